// Runs the kernels over many shapes, dtypes and threads, for the sanitizers (scripts/sanitize.sh) and for whoever has
// no Python at hand. Numbers are checked in tests/test_native.py; here: every thread count and instruction set gives
// the same bytes, several callers at once get them too, and nothing outside the buffers is touched (each has its own
// heap block of exactly its size).

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "adafactor.h"

namespace {

size_t bytes_of(int64_t dtype) { return dtype == ADAFACTOR_FLOAT64 ? 8 : dtype == ADAFACTOR_FLOAT32 ? 4 : 2; }

using Buffer = std::unique_ptr<char[]>;

struct Model {
  std::vector<adafactor_tensor> tensors;
  std::vector<Buffer> buffers;
  std::vector<size_t> sizes;
  uint32_t random = 1;

  void* zeros(size_t size) {
    buffers.emplace_back(new char[size]());
    sizes.push_back(size);
    return buffers.back().get();
  }

  void* numbers(size_t count, int64_t dtype) {
    char* data = static_cast<char*>(zeros(count * bytes_of(dtype)));
    for (size_t k = 0; k < count; ++k) {
      random = random * 1664525u + 1013904223u;
      const float x = float(int32_t(random)) * 0x1p-31f;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint16_t high = uint16_t(bits >> 16), half = uint16_t(0x3c00 | (bits & 0x83ff));
      const double wide = x;
      switch (dtype) {
        case ADAFACTOR_FLOAT64: std::memcpy(data + 8 * k, &wide, 8); break;
        case ADAFACTOR_FLOAT32: std::memcpy(data + 4 * k, &x, 4); break;
        case ADAFACTOR_BFLOAT16: std::memcpy(data + 2 * k, &high, 2); break;
        default: std::memcpy(data + 2 * k, &half, 2); break;
      }
    }
    return data;
  }

  void add(bool factored, bool columns_first, int64_t outer, int64_t n, int64_t inner, int64_t m, int64_t slices,
           int64_t dtype, int64_t grad, int64_t momentum, bool separate) {
    adafactor_tensor t = {};
    const size_t N = size_t(outer * n * inner * m), element = dtype == ADAFACTOR_FLOAT64 ? 8 : 4;
    const size_t rows = factored ? size_t(outer * n * inner) : N, columns = factored ? size_t(outer * inner * m) : 0;
    const size_t whole = columns_first ? columns : rows;
    const size_t sums = !factored ? size_t(slices) : columns_first ? rows : columns;
    t.outer = outer, t.rows = t.global_rows = n, t.inner = inner, t.columns = t.global_columns = m, t.slices = slices;
    t.global_size = slices ? int64_t(N) / slices : 0;
    t.param_dtype = dtype, t.grad_dtype = grad, t.momentum_dtype = momentum < 0 ? 0 : momentum;
    t.param = numbers(N, dtype);
    t.grad = numbers(N, grad);
    t.row = zeros(rows * element);
    if (factored) t.column = zeros(columns * element);
    if (momentum >= 0) t.momentum = zeros(N * bytes_of(momentum));
    t.Q = static_cast<double*>(zeros(size_t(slices) * 8));
    if (separate) {
      if (factored) t.finished = zeros(whole * element);
      t.S = zeros(sums * element);
      t.W = zeros(sums * element);
      t.step_size = static_cast<double*>(zeros(size_t(slices) * 16));
    }
    t.rho = 0.01, t.ema_weight = 0.5, t.eps1 = 1e-30, t.eps2 = 1e-3, t.clip = 1, t.decay_factor = 0.99, t.beta1 = 0.9;
    t.seed = 7, t.rng_stream = tensors.size();
    t.flags = ADAFACTOR_SCALE_PARAMETER | ADAFACTOR_SKIP_NONFINITE | (factored ? ADAFACTOR_FACTORED : 0u);
    if (columns_first) t.flags |= ADAFACTOR_COLUMNS_FIRST;
    const bool half = dtype == ADAFACTOR_BFLOAT16 || dtype == ADAFACTOR_FLOAT16;
    if ((tensors.size() + tensors.size() / 4) % 2) t.flags |= ADAFACTOR_STOCHASTIC_ROUNDING;
    else if (half) t.residual = zeros(N * 2);
    tensors.push_back(t);
  }

  explicit Model(bool separate) {
    const int64_t shapes[][6] = {
        // 0: not factored, 1: factored, 2: columns first; outer, n, inner, m, slices
        {0, 1, 1, 1, 1, 1},      {0, 1, 1, 1, 70001, 1}, {0, 5, 1, 1, 33, 5},    {0, 1, 1, 1, 530000, 1},
        {0, 0, 1, 1, 5, 0},      {0, 1, 1, 1, 0, 1},     {1, 1, 1, 1, 1, 1},     {1, 1, 7, 1, 5, 1},
        {1, 1, 1300, 1, 410, 1}, {1, 1, 40, 1, 2051, 1}, {1, 3, 17, 4, 19, 1},   {1, 6, 30, 1, 31, 3},
        {1, 2, 700, 1, 900, 2},  {1, 50, 3, 1, 3, 1},    {1, 1, 300, 9, 200, 1},  {2, 1, 1, 1, 1, 1},
        {2, 1, 7, 1, 5, 1},      {2, 50, 3, 1, 3, 1},    {2, 6, 30, 1, 31, 3},    {2, 1, 40, 1, 1051, 1},
        {2, 1, 1300, 1, 410, 1}, {2, 1, 260, 1, 2100, 1},
    };
    int64_t k = 0;
    for (const auto& s : shapes)
      for (int64_t dtype = 0; dtype < 4; ++dtype, ++k)
        add(s[0] > 0, s[0] == 2, s[1], s[2], s[3], s[4], s[5], dtype, (dtype + k / 4) % 4, k % 5 - 1, separate);
  }

  static size_t bytes(const adafactor_tensor& t, int64_t dtype) {
    return size_t(t.outer * t.rows * t.inner * t.columns) * bytes_of(dtype);
  }

  // A step that leaves the new values in other buffers, the gradients' where `over_gradients`, as a framework does
  // whose arrays do not change. The old ones must be as they were; then they become the new ones.
  int elsewhere(bool over_gradients, int (*step)(adafactor_tensor*, int64_t, int64_t, int64_t), int64_t threads, int64_t isa) {
    std::string before = contents();
    std::vector<adafactor_tensor> there = tensors;
    std::vector<Buffer> spent;
    for (adafactor_tensor& t : there) {
      const size_t size = bytes(t, t.param_dtype), grad = bytes(t, t.grad_dtype);
      spent.emplace_back(new char[grad]);
      if (grad) std::memcpy(spent.back().get(), t.grad, grad);
      t.grad = spent.back().get();
      t.target = over_gradients && t.param_dtype == t.grad_dtype ? spent.back().get() : zeros(size);
      if (t.momentum) t.momentum_target = zeros(bytes(t, t.momentum_dtype));
    }
    const int error = step(there.data(), int64_t(there.size()), threads, isa);
    for (size_t k = 0; k < tensors.size(); ++k) {
      adafactor_tensor& t = tensors[k];
      const std::string param(static_cast<const char*>(t.param), bytes(t, t.param_dtype));
      if (before.compare(0, param.size(), param) != 0) std::fprintf(stderr, "a parameter was written\n"), std::exit(1);
      before.erase(0, param.size() + size_t(t.slices) * 8);
      if (t.residual) before.erase(0, bytes(t, ADAFACTOR_BFLOAT16));
      if (t.momentum) before.erase(0, bytes(t, t.momentum_dtype));
      if (param.size()) std::memcpy(t.param, there[k].target, param.size());
      if (t.momentum && param.size()) std::memcpy(t.momentum, there[k].momentum_target, bytes(t, t.momentum_dtype));
    }
    return error;
  }

  std::string contents() const {
    std::string all;
    for (const adafactor_tensor& t : tensors) {  // what a step leaves behind, not its scratch
      const size_t N = size_t(t.outer * t.rows * t.inner * t.columns);
      all.append(static_cast<const char*>(t.param), N * bytes_of(t.param_dtype));
      all.append(reinterpret_cast<const char*>(t.Q), size_t(t.slices) * 8);
      if (t.residual) all.append(static_cast<const char*>(t.residual), N * 2);
      if (t.momentum) all.append(static_cast<const char*>(t.momentum), N * bytes_of(t.momentum_dtype));
    }
    return all;
  }
};

enum Where { kInPlace, kElsewhere, kOverGradients };

void train(bool separate, int64_t threads, int64_t isa, std::string& contents, Where where = kInPlace) {
  Model model(separate);
  for (uint64_t step = 1; step <= 2; ++step) {
    for (adafactor_tensor& t : model.tensors) t.step = step;
    adafactor_tensor* first = model.tensors.data();
    const int64_t count = int64_t(model.tensors.size());
    const int error = where       ? model.elsewhere(where == kOverGradients, adafactor_step, threads, isa)
                      : !separate ? adafactor_step(first, count, threads, isa)
                                  : adafactor_measure(first, count, threads, isa) |
                                        adafactor_finish(first, count, threads, isa) |
                                        adafactor_apply(first, count, threads, isa);
    if (error) std::fprintf(stderr, "error %d\n", error), std::exit(1);
  }
  contents = model.contents();
}

}  // namespace

int main() {
  std::string expected;
  train(false, 1, ADAFACTOR_BASELINE, expected);
  for (int64_t isa = 0; isa < ADAFACTOR_ISAS; ++isa) {
    if (!adafactor_supported(isa)) continue;
    for (const bool separate : {false, true}) {
      std::string contents;
      train(separate, separate ? 2 : 7, isa, contents);
      if (contents != expected) return std::fprintf(stderr, "other bits: isa %d\n", int(isa)), 1;
    }
  }
  for (const Where where : {kElsewhere, kOverGradients}) {
    std::string contents;
    train(false, 7, ADAFACTOR_BASELINE, contents, where);
    if (contents != expected) return std::fprintf(stderr, "other bits: where %d\n", int(where)), 1;
  }
  std::vector<std::string> results(3);
  std::vector<std::thread> callers;
  for (std::string& result : results) callers.emplace_back([&result] { train(false, 3, ADAFACTOR_BASELINE, result); });
  for (std::thread& caller : callers) caller.join();
  for (const std::string& result : results)
    if (result != expected) return std::fprintf(stderr, "other bits from concurrent callers\n"), 1;
#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork of a process with threads
  const pid_t child = fork();
  train(false, 3, ADAFACTOR_BASELINE, results[0]);
  if (child == 0) _exit(results[0] == expected ? 0 : 1);
  int status = 1;
  if (waitpid(child, &status, 0) != child || status != 0) return std::fprintf(stderr, "other bits after fork\n"), 1;
#endif
  std::puts("ok");
  return 0;
}
