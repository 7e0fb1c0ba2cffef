// The C interface: checks what a caller could get wrong, and picks the instruction set.

#include "adafactor.h"

#include "engine.h"
#include "pool.h"

#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#include <immintrin.h>
#include <intrin.h>
#endif

namespace adafactor_baseline {
extern const adafactor::Kernels kernels[2];
}
#ifdef ADAFACTOR_X86
namespace adafactor_avx2 {
extern const adafactor::Kernels kernels[2];
}
namespace adafactor_avx512 {
extern const adafactor::Kernels kernels[2];
}
#endif

namespace {

const adafactor::Kernels* const kernels[ADAFACTOR_ISAS] = {
    adafactor_baseline::kernels,
#ifdef ADAFACTOR_X86
    adafactor_avx2::kernels,
    adafactor_avx512::kernels,
#endif
};

// All of x86-64-v3 and v4, which the compiler was told it may use, and a system that saves the registers.
bool runs(int64_t isa) {
  if (isa == ADAFACTOR_BASELINE) return true;
#if !defined(ADAFACTOR_X86)
  return false;
#elif defined(_MSC_VER) && !defined(__clang__)
  int a[4], b[4], c[4];
  __cpuid(a, 0);
  if (a[0] < 7) return false;
  __cpuidex(a, 1, 0);
  __cpuidex(b, 7, 0);
  __cpuid(c, int(0x80000001));
  const int need1 = (1 << 12) | (1 << 22) | (1 << 27) | (1 << 28) | (1 << 29);  // FMA MOVBE OSXSAVE AVX F16C
  if ((a[2] & need1) != need1 || !(c[2] & (1 << 5))) return false;              // LZCNT
  const unsigned long long saved = _xgetbv(0);
  const int need2 = (1 << 3) | (1 << 5) | (1 << 8);  // BMI1 AVX2 BMI2
  if ((b[1] & need2) != need2 || (saved & 6) != 6) return false;
  if (isa == ADAFACTOR_AVX2) return true;
  const int need3 = (1 << 16) | (1 << 17) | (1 << 28) | (1 << 30) | int(1u << 31);  // AVX512 F DQ CD BW VL
  return (b[1] & need3) == need3 && (saved & 0xe6) == 0xe6;
#else
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  if (isa == ADAFACTOR_AVX2) return v3;
  return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
}

bool known(int64_t dtype) { return dtype >= ADAFACTOR_FLOAT32 && dtype <= ADAFACTOR_FLOAT64; }

bool half(int64_t dtype) { return dtype == ADAFACTOR_BFLOAT16 || dtype == ADAFACTOR_FLOAT16; }

int check(const adafactor_tensor& t, adafactor::Verb verb) {
  if (!known(t.param_dtype) || !known(t.grad_dtype) || (t.momentum && !known(t.momentum_dtype))) return 2;
  if (t.residual && (!half(t.param_dtype) || (t.flags & ADAFACTOR_STOCHASTIC_ROUNDING))) return 6;
  if (t.target && t.target == t.grad && t.param_dtype != t.grad_dtype) return 7;
  const bool factored = t.flags & ADAFACTOR_FACTORED;
  if ((t.flags & ADAFACTOR_SCALE_PARAMETER) && !t.Q) return 3;
  if (t.outer * t.rows * t.inner * t.columns == 0) return 0;
  if (!t.param || !t.grad || !t.row || (factored && !t.column)) return 3;
  if ((t.flags & ADAFACTOR_COLUMNS_FIRST) && (!factored || t.inner != 1)) return 5;
  if (verb != adafactor::kStep && (!t.S || !t.W || (factored && !t.finished))) return 3;
  if (verb != adafactor::kStep && verb != adafactor::kMeasure && !t.step_size) return 3;
  const bool totals = t.flags & ADAFACTOR_TOTALS;
  if (verb == adafactor::kFinish && factored && (t.flags & ADAFACTOR_MATRIX_SUMS) && !t.matrix_sums) return 3;
  if (verb == adafactor::kFinish && totals && (!t.u2 || (factored && !t.mu))) return 3;
  if ((t.flags & (ADAFACTOR_ROW_SUMS | ADAFACTOR_ROWS_SUMMED)) &&
      (!factored || (t.flags & ADAFACTOR_COLUMNS_FIRST) || verb == adafactor::kStep))
    return 5;
  return t.slices > 0 && t.outer % t.slices == 0 ? 0 : 3;
}

}  // namespace

int adafactor::perform(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa, Verb verb,
                       const Crew* crew) {
  if (isa < 0 || isa >= ADAFACTOR_ISAS || !kernels[isa] || !runs(isa)) return 4;
  for (int64_t k = 0; k < count; ++k)
    if (const int error = check(tensors[k], verb)) return error;
  return run(tensors, count, threads, kernels[isa], verb, crew) ? 0 : 1;
}

extern "C" {

int adafactor_measure(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa) {
  return adafactor::perform(tensors, count, threads, isa, adafactor::kMeasure);
}

int adafactor_finish(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa) {
  return perform(tensors, count, threads, isa, adafactor::kFinish);
}

int adafactor_apply(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa) {
  return adafactor::perform(tensors, count, threads, isa, adafactor::kApply);
}

int adafactor_step(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa) {
  return adafactor::perform(tensors, count, threads, isa, adafactor::kStep);
}

void adafactor_number(adafactor_tensor* tensors, int64_t count) {
  for (int64_t k = 0; k < count; ++k) tensors[k].step = uint64_t(*tensors[k].count + 1);
}

void adafactor_use_openmp(void* parallel, void* most_threads) {
  adafactor::use_openmp({reinterpret_cast<decltype(adafactor::OpenMP::parallel)>(parallel),
                         reinterpret_cast<decltype(adafactor::OpenMP::most_threads)>(most_threads)});
}

int adafactor_ask(int (*const* functions)(void*, int64_t*), int64_t function_count, char* const* objects, int64_t count,
                  int64_t offset, const void* none, int64_t* answers) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t f = 0; f < function_count; ++f) {
      int64_t& answer = answers[f * count + k] = 0;
      if (objects[k] == none) continue;
      if (const int error = functions[f](objects[k] + offset, &answer)) return error;
    }
  }
  return 0;
}

int64_t adafactor_abi(void) { return ADAFACTOR_ABI * 65536 + int64_t(sizeof(adafactor_tensor)); }
int adafactor_built(int64_t isa) { return isa >= 0 && isa < ADAFACTOR_ISAS && kernels[isa]; }
int adafactor_supported(int64_t isa) { return adafactor_built(isa) && runs(isa); }

}  // extern "C"
