// The kernels as XLA custom calls, for JAX on CPU. src/adafactor/engine/xla/custom_call.py is the other side of this file.
//
// A call takes a few numbers, then the buffers of one tensor after another. Under vmap the numbers have one row per
// model, and a tensor stacks the models in its leading axis: it becomes that many records.

#include <cmath>
#include <cstring>
#include <vector>

#include "adafactor.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Tensors = ffi::Span<const int64_t>;

enum { kDecay, kRho, kEps1, kEps2, kClip, kBeta1, kNumbers };
enum { kFactored, kB0, kN, kB1, kM, kSlices, kWords };  // of each tensor in the attribute `tensors`

int64_t dtype_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32: return ADAFACTOR_FLOAT32;
    case ffi::DataType::BF16: return ADAFACTOR_BFLOAT16;
    case ffi::DataType::F16: return ADAFACTOR_FLOAT16;
    case ffi::DataType::F64: return ADAFACTOR_FLOAT64;
    default: return -1;
  }
}

ffi::Error failure(int error) {
  if (error == 1) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "adafactor: no memory for row and column sums");
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "adafactor: the native kernels refused a tensor");
}

char* advance(void* buffer, int64_t bytes) { return static_cast<char*>(buffer) + bytes; }

// The part of one tensor that belongs to model `k` of `models`, without its buffers.
adafactor_tensor record(const int64_t* words, int64_t models, const double* numbers) {
  adafactor_tensor t;
  std::memset(&t, 0, sizeof t);
  t.outer = words[kB0] / models, t.rows = words[kN], t.inner = words[kB1], t.columns = words[kM];
  t.slices = words[kSlices] / models;
  t.global_rows = t.rows, t.global_columns = t.columns;
  t.global_size = t.slices ? t.outer * t.rows * t.inner * t.columns / t.slices : 0;
  t.flags = words[kFactored] ? ADAFACTOR_FACTORED : 0;
  t.ema_weight = numbers[kDecay], t.rho = numbers[kRho], t.eps1 = numbers[kEps1], t.eps2 = numbers[kEps2];
  t.clip = numbers[kClip], t.beta1 = numbers[kBeta1], t.decay_factor = 1;
  return t;
}

std::vector<double> doubles(const ffi::AnyBuffer& buffer) {
  std::vector<double> values(buffer.element_count());
  for (size_t k = 0; k < values.size(); ++k)
    values[k] = buffer.element_type() == ffi::DataType::F64 ? static_cast<const double*>(buffer.untyped_data())[k]
                                                            : static_cast<const float*>(buffer.untyped_data())[k];
  return values;
}

int64_t size_of(const adafactor_tensor& t) { return t.outer * t.rows * t.inner * t.columns; }
int64_t rows_of(const adafactor_tensor& t) { return t.outer * t.rows * t.inner; }
int64_t columns_of(const adafactor_tensor& t) { return t.outer * t.inner * t.columns; }

template <class T>
T inverse_root(T v) {
  return v == 0 ? T(0) : T(1) / std::sqrt(v);
}

// rho max(eps2, RMS(x)) / max(1, RMS(u)/d) of one slice (eqs. 9 and 10). NaN stays NaN. Where it is asked for, the
// report is of RMS(u), the divisor and the scale.
template <class T>
double factor(const adafactor_tensor& t, double Q, double u2, T* report) {
  const double N = double(t.global_size), rms_u = std::sqrt(u2 / N), excess = rms_u / t.clip;
  const double divisor = std::isinf(t.clip) || excess <= 1 ? 1 : excess;
  double scale = 1;
  if (t.flags & ADAFACTOR_SCALE_PARAMETER) {
    scale = std::sqrt(Q / N) * ((t.flags & ADAFACTOR_SCALE_AFTER_DECAY) ? std::fabs(t.decay_factor) : 1);
    if (scale <= t.eps2) scale = t.eps2;
  }
  if (report) report[0] = T(rms_u), report[1] = T(divisor), report[2] = T(scale);
  return t.rho * scale / divisor;
}

// Where the second half of `measure` finds the statistics and leaves its results.
template <class T>
struct Finish {
  const T *S, *W, *old_column;
  T *row, *column, *row_factor, *column_factor;
  T* report;  // [slices][3], or null
  T* report_of(int64_t slice) const { return report ? report + 3 * slice : nullptr; }
};

// Eqs. 3, 7, 9, 10 after adafactor_measure: the update is g times row_factor (which holds the finished rows) times
// column_factor (which holds S). The step size is in row_factor.
template <class T>
void finish(const adafactor_tensor& t, const Finish<T>& f) {
  const int64_t m = t.columns, matrices = t.outer / t.slices * t.inner;
  std::vector<double> root_mu(static_cast<size_t>(matrices));
  const T ema_weight = T(t.ema_weight), past = T(1 - t.ema_weight), eps1 = T(t.eps1);
  for (int64_t s = 0; s < t.slices; ++s) {
    double u2 = 0;
    for (int64_t k = 0; k < matrices; ++k) {
      const int64_t at = (s * matrices + k) * m;
      double total = 0, weighted = 0;
      for (int64_t j = at; j < at + m; ++j) {
        const T c = past * f.old_column[j] + ema_weight * (f.S[j] / T(t.rows) + eps1);
        f.column[j] = c;
        total += c;
        weighted += c == 0 ? 0 : f.W[j] / c;
      }
      const double mu = total / double(m);
      root_mu[size_t(k)] = std::sqrt(mu);
      u2 += mu * weighted;
    }
    const double scale = factor(t, t.Q[s], u2, f.report_of(s));
    for (int64_t k = 0; k < matrices; ++k) {
      const int64_t at = (s * matrices + k) * m;
      const T common = T(root_mu[size_t(k)]);
      for (int64_t j = at; j < at + m; ++j) f.column_factor[j] = common * inverse_root(f.column[j]);
    }
    // With the columns, whose factor may be huge where there was no gradient, the scale could overflow.
    const int64_t rows = rows_of(t) / t.slices;
    for (int64_t i = s * rows; i < (s + 1) * rows; ++i) {
      f.row[i] = f.row_factor[i];
      f.row_factor[i] = T(scale) * inverse_root(f.row[i]);
    }
  }
}

template <class T>
ffi::Error measure_as(const std::vector<double>& numbers, const std::vector<double>& keep, ffi::RemainingArgs args,
                      ffi::RemainingRets rets, Tensors tensors, bool scale, bool scale_after_decay, bool report,
                      int64_t threads, int64_t isa) {
  const int64_t models = int64_t(numbers.size()) / kNumbers, count = int64_t(tensors.size()) / kWords;
  std::vector<adafactor_tensor> records;
  std::vector<Finish<T>> finishes;
  int64_t columns = 0, slices = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* words = tensors.begin() + k * kWords;
    columns += words[kFactored] ? words[kB0] * words[kB1] * words[kM] : 2 * words[kSlices];
    slices += words[kSlices];
  }
  std::vector<T> sums(static_cast<size_t>(columns));
  std::vector<double> Q(static_cast<size_t>(slices));
  T* next_sum = sums.data();
  double* next_Q = Q.data();
  size_t in = 0, out = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* words = tensors.begin() + k * kWords;
    const bool factored = words[kFactored];
    const auto take = [&] { return *args.get<ffi::AnyBuffer>(in++); };
    const auto give = [&] { return static_cast<T*>((*rets.get<ffi::AnyBuffer>(out++))->untyped_data()); };
    const ffi::AnyBuffer g = take(), x = scale ? take() : g;
    T* row = static_cast<T*>(take().untyped_data());
    T* column = factored ? static_cast<T*>(take().untyped_data()) : nullptr;
    T *new_row = factored ? give() : nullptr, *new_column = factored ? give() : nullptr;
    T *row_factor = factored ? give() : nullptr, *column_factor = give();  // the latter is [slices] if not factored
    T* reports = report ? give() : nullptr;
    for (int64_t model = 0; model < models; ++model) {
      adafactor_tensor t = record(words, models, numbers.data() + model * kNumbers);
      if (scale) t.flags |= ADAFACTOR_SCALE_PARAMETER;
      if (scale_after_decay) t.flags |= ADAFACTOR_SCALE_AFTER_DECAY;
      t.decay_factor = keep[size_t(model * count + k)];
      t.param_dtype = dtype_of(x.element_type()), t.grad_dtype = dtype_of(g.element_type());
      const int64_t rows = factored ? rows_of(t) : size_of(t), sums_size = factored ? columns_of(t) : t.slices;
      t.param = advance(x.untyped_data(), model * size_of(t) * int64_t(ffi::ByteWidth(x.element_type())));
      t.grad = advance(g.untyped_data(), model * size_of(t) * int64_t(ffi::ByteWidth(g.element_type())));
      t.row = row + model * rows;
      t.Q = next_Q, next_Q += t.slices;
      T* its_report = reports ? reports + 3 * model * t.slices : nullptr;
      T *S = column_factor + model * sums_size, *W = next_sum;
      next_sum += sums_size;
      if (factored) {
        t.column = column + model * sums_size, t.finished = row_factor + model * rows;
        finishes.push_back({S, W, static_cast<T*>(t.column), new_row + model * rows, new_column + model * sums_size,
                            row_factor + model * rows, S, its_report});
      } else {
        S = next_sum, next_sum += sums_size;
        finishes.push_back({S, W, nullptr, nullptr, nullptr, nullptr, column_factor + model * sums_size, its_report});
      }
      t.S = S, t.W = W;
      records.push_back(t);
    }
  }
  if (const int error = adafactor_measure(records.data(), int64_t(records.size()), threads, isa)) return failure(error);
  for (size_t k = 0; k < records.size(); ++k) {
    const adafactor_tensor& t = records[k];
    if (t.flags & ADAFACTOR_FACTORED) {
      finish(t, finishes[k]);
    } else {
      for (int64_t s = 0; s < t.slices; ++s) finishes[k].column_factor[s] = T(factor(t, t.Q[s], finishes[k].W[s], finishes[k].report_of(s)));
    }
  }
  return ffi::Error::Success();
}

ffi::Error measure(ffi::AnyBuffer numbers, ffi::AnyBuffer keep, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   Tensors tensors, bool scale, bool scale_after_decay, bool report, int64_t threads, int64_t isa) {
  const bool wide = numbers.element_type() == ffi::DataType::F64;
  return (wide ? measure_as<double> : measure_as<float>)(doubles(numbers), doubles(keep), args, rets, tensors, scale,
                                                         scale_after_decay, report, threads, isa);
}

// The results are the arguments' own buffers: XLA was told so. A copy is the way out where it did not listen.
void* in_place(const ffi::AnyBuffer& from, ffi::Result<ffi::AnyBuffer> to) {
  if (to->untyped_data() != from.untyped_data()) std::memcpy(to->untyped_data(), from.untyped_data(), from.size_bytes());
  return to->untyped_data();
}

ffi::Error step(ffi::AnyBuffer numbers_buffer, ffi::AnyBuffer keep_buffer, ffi::RemainingArgs args,
                ffi::RemainingRets rets, Tensors tensors, bool scale, bool momentum, int64_t threads, int64_t isa) {
  const std::vector<double> numbers = doubles(numbers_buffer), keep = doubles(keep_buffer);
  const int64_t models = int64_t(numbers.size()) / kNumbers, count = int64_t(tensors.size()) / kWords;
  std::vector<adafactor_tensor> records;
  int64_t slices = 0;
  for (int64_t k = 0; k < count; ++k) slices += tensors.begin()[k * kWords + kSlices];
  std::vector<double> Q(static_cast<size_t>(slices));
  double* next_Q = Q.data();
  size_t in = 0, out = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* words = tensors.begin() + k * kWords;
    const ffi::AnyBuffer g = *args.get<ffi::AnyBuffer>(in++), x = *args.get<ffi::AnyBuffer>(in);
    const auto next = [&] { return static_cast<char*>(in_place(*args.get<ffi::AnyBuffer>(in++), *rets.get<ffi::AnyBuffer>(out++))); };
    const ffi::DataType statistics = numbers_buffer.element_type();
    ffi::DataType average_type = statistics;
    char *param = next(), *row = next(), *column = words[kFactored] ? next() : nullptr, *average = nullptr;
    if (momentum) {
      average_type = args.get<ffi::AnyBuffer>(in)->element_type();
      average = next();
    }
    const int64_t width = int64_t(ffi::ByteWidth(statistics));
    for (int64_t model = 0; model < models; ++model) {
      adafactor_tensor t = record(words, models, numbers.data() + model * kNumbers);
      if (scale) t.flags |= ADAFACTOR_SCALE_PARAMETER;
      t.decay_factor = keep[size_t(model * count + k)];
      t.param_dtype = dtype_of(x.element_type()), t.grad_dtype = dtype_of(g.element_type());
      t.momentum_dtype = dtype_of(average_type);
      const int64_t size = size_of(t), rows = column ? rows_of(t) : size;
      t.param = param + model * size * int64_t(ffi::ByteWidth(x.element_type()));
      t.grad = advance(g.untyped_data(), model * size * int64_t(ffi::ByteWidth(g.element_type())));
      t.row = row + model * rows * width;
      t.column = column ? column + model * columns_of(t) * width : nullptr;
      t.momentum = average ? average + model * size * int64_t(ffi::ByteWidth(average_type)) : nullptr;
      t.Q = next_Q, next_Q += t.slices;
      records.push_back(t);
    }
  }
  const int error = adafactor_step(records.data(), int64_t(records.size()), threads, isa);
  return error ? failure(error) : ffi::Error::Success();
}

}  // namespace

// Of the headers this was built with: another jaxlib refuses to start a CPU client beside a handler of another version.
extern "C" ADAFACTOR_API int64_t adafactor_xla_version() { return XLA_FFI_API_MAJOR * 65536 + XLA_FFI_API_MINOR; }

extern "C" ADAFACTOR_API XLA_FFI_Error* adafactor_xla_measure(XLA_FFI_CallFrame* frame);
extern "C" ADAFACTOR_API XLA_FFI_Error* adafactor_xla_step(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(adafactor_xla_measure, measure,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<Tensors>("tensors")
                                  .Attr<bool>("scale")
                                  .Attr<bool>("scale_after_decay")
                                  .Attr<bool>("report")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(adafactor_xla_step, step,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<Tensors>("tensors")
                                  .Attr<bool>("scale")
                                  .Attr<bool>("momentum")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("isa"));
