// The kernels as XLA custom calls on the CPU. Whoever registers them, in JAX or in TensorFlow, is elsewhere:
// src/adafactor/engine/xla/custom_call.py is JAX's side of this file.
//
// A call takes a few numbers, then the buffers of one tensor after another. Under vmap the numbers have one row per
// model, and a tensor stacks the models in its leading axis: it becomes that many records.

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "adafactor.h"
#include "xla_abi.h"

namespace {

namespace xla = adafactor::xla;

enum { kEmaWeight, kRho, kEps1, kEps2, kClip, kBeta1, kNumbers };
enum { kFactored, kOuter, kRows, kInner, kColumns, kSlices, kWords };  // of each tensor in the attribute `tensors`

std::atomic<int64_t> threads_to_use{1}, isa_to_use{-1};  // -1: the best there is

int64_t dtype_of(int32_t dtype) {
  switch (dtype) {
    case xla::kF32: return ADAFACTOR_FLOAT32;
    case xla::kBF16: return ADAFACTOR_BFLOAT16;
    case xla::kF16: return ADAFACTOR_FLOAT16;
    case xla::kF64: return ADAFACTOR_FLOAT64;
    default: return -1;
  }
}

int64_t width_of(int32_t dtype) { return dtype == xla::kF64 ? 8 : dtype == xla::kF32 ? 4 : 2; }

int64_t count_of(const xla::Buffer& buffer) {
  int64_t count = 1;
  for (int64_t k = 0; k < buffer.rank; ++k) count *= buffer.dims[k];
  return count;
}

// What goes wrong with a call, as one sentence.
struct Refused {
  const char* message;
  int32_t code = xla::kInvalidArgument;
};

void check(int error) {
  if (error == 1) throw Refused{"adafactor: no memory for row and column sums", xla::kResourceExhausted};
  if (error) throw Refused{"adafactor: the native kernels refused a tensor"};
}

// One execution of a handler: its operands in order, and its attributes by name.
class Call {
 public:
  explicit Call(xla::Frame& frame) : frame_(frame) {
    if (!xla::whole(frame) || frame.arguments.size != sizeof frame.arguments ||
        frame.results.size != sizeof frame.results || frame.attributes.size != sizeof frame.attributes)
      throw Refused{"adafactor: this XLA lays out its calls in another way than version 0.1 of its interface does",
                    xla::kUnimplemented};
  }

  const xla::Buffer& argument() { return next(frame_.arguments, arguments_); }
  const xla::Buffer& result() { return next(frame_.results, results_); }
  const xla::Buffer& peek() { return next(frame_.arguments, arguments_, 0); }

  bool flag(const char* name) const { return *static_cast<const bool*>(scalar(name, xla::kPred)); }

  const xla::Array& integers(const char* name) const {
    const int64_t k = find(name);
    const auto* array = static_cast<const xla::Array*>(frame_.attributes.values[k]);
    if (frame_.attributes.kinds[k] != xla::kArray || array->dtype != xla::kS64) refuse_attribute();
    return *array;
  }

 private:
  static const xla::Buffer& next(const xla::Operands& operands, int64_t& at, int64_t step = 1) {
    if (at >= operands.count || operands.kinds[at] != xla::kBuffer)
      throw Refused{"adafactor: a call has fewer buffers than its attribute `tensors` asks for"};
    const auto& buffer = *static_cast<const xla::Buffer*>(operands.values[at]);
    if (!xla::whole(buffer)) throw Refused{"adafactor: this XLA lays out its buffers in another way", xla::kUnimplemented};
    at += step;
    return buffer;
  }

  const void* scalar(const char* name, int32_t dtype) const {
    const int64_t k = find(name);
    const auto* value = static_cast<const xla::Scalar*>(frame_.attributes.values[k]);
    if (frame_.attributes.kinds[k] != xla::kScalar || value->dtype != dtype) refuse_attribute();
    return value->value;
  }

  int64_t find(const char* name) const {
    const xla::Attributes& attributes = frame_.attributes;
    for (int64_t k = 0; k < attributes.count; ++k) {
      const xla::Text& text = *attributes.names[k];
      if (text.length == std::strlen(name) && !std::memcmp(text.data, name, text.length)) return k;
    }
    refuse_attribute();
  }

  [[noreturn]] static void refuse_attribute() { throw Refused{"adafactor: an attribute is missing or of another type"}; }

  xla::Frame& frame_;
  int64_t arguments_ = 0, results_ = 0;
};

char* advance(void* buffer, int64_t bytes) { return static_cast<char*>(buffer) + bytes; }

std::vector<double> doubles(const xla::Buffer& buffer) {
  std::vector<double> values(static_cast<size_t>(count_of(buffer)));
  for (size_t k = 0; k < values.size(); ++k)
    values[k] = buffer.dtype == xla::kF64 ? static_cast<const double*>(buffer.data)[k]
                                          : static_cast<const float*>(buffer.data)[k];
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

// What both handlers know of a call before its tensors.
struct Head {
  std::vector<double> numbers, decay_factors;  // [models][kNumbers], [models][count]
  const int64_t* words;                        // [count][kWords]
  int64_t models, count, threads, isa;
  int32_t statistics;  // the dtype of the statistics and of the arithmetic
  bool clip, scale;

  explicit Head(Call& call) {
    const xla::Buffer& first = call.argument();
    statistics = first.dtype;
    numbers = doubles(first);
    decay_factors = doubles(call.argument());
    const xla::Array& tensors = call.integers("tensors");
    words = static_cast<const int64_t*>(tensors.data);
    models = int64_t(numbers.size()) / kNumbers, count = int64_t(tensors.count) / kWords;
    clip = call.flag("clip"), scale = call.flag("scale");
    threads = threads_to_use, isa = isa_to_use;
    for (int64_t k = ADAFACTOR_ISAS; isa < 0 && k-- > 0;)
      if (adafactor_supported(k)) isa = k;
    if (int64_t(decay_factors.size()) != models * count) throw Refused{"adafactor: one decay factor per tensor, please"};
  }

  // The part of tensor `k` that belongs to one model, without its buffers.
  adafactor_tensor record(int64_t k, int64_t model) const {
    const int64_t* its = words + k * kWords;
    const double* of = numbers.data() + model * kNumbers;
    adafactor_tensor t;
    std::memset(&t, 0, sizeof t);
    t.outer = its[kOuter] / models, t.rows = its[kRows], t.inner = its[kInner], t.columns = its[kColumns];
    t.slices = its[kSlices] / models;
    t.global_rows = t.rows, t.global_columns = t.columns;
    t.global_size = t.slices ? t.outer * t.rows * t.inner * t.columns / t.slices : 0;
    t.flags = (its[kFactored] ? ADAFACTOR_FACTORED : 0) | (scale ? ADAFACTOR_SCALE_PARAMETER : 0);
    t.ema_weight = of[kEmaWeight], t.rho = of[kRho], t.eps1 = of[kEps1], t.eps2 = of[kEps2], t.beta1 = of[kBeta1];
    t.clip = clip ? of[kClip] : std::numeric_limits<double>::infinity();
    t.decay_factor = decay_factors[size_t(model * count + k)];
    return t;
  }

  int64_t slices() const {
    int64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += words[k * kWords + kSlices];
    return sum;
  }
};

template <class T>
void measure_as(Call& call, const Head& head) {
  const bool after = call.flag("scale_after_decay"), report = call.flag("report");
  std::vector<adafactor_tensor> records;
  std::vector<Finish<T>> finishes;
  int64_t columns = 0;
  for (int64_t k = 0; k < head.count; ++k) {
    const int64_t* its = head.words + k * kWords;
    columns += its[kFactored] ? its[kOuter] * its[kInner] * its[kColumns] : 2 * its[kSlices];
  }
  std::vector<T> sums(static_cast<size_t>(columns));
  std::vector<double> Q(static_cast<size_t>(head.slices()));
  T* next_sum = sums.data();
  double* next_Q = Q.data();
  for (int64_t k = 0; k < head.count; ++k) {
    const bool factored = head.words[k * kWords + kFactored];
    const auto give = [&] { return static_cast<T*>(call.result().data); };
    const xla::Buffer &g = call.argument(), &x = head.scale ? call.argument() : g;
    T* row = static_cast<T*>(call.argument().data);
    T* column = factored ? static_cast<T*>(call.argument().data) : nullptr;
    T *new_row = factored ? give() : nullptr, *new_column = factored ? give() : nullptr;
    T *row_factor = factored ? give() : nullptr, *column_factor = give();  // the latter is [slices] if not factored
    T* reports = report ? give() : nullptr;
    for (int64_t model = 0; model < head.models; ++model) {
      adafactor_tensor t = head.record(k, model);
      if (after) t.flags |= ADAFACTOR_SCALE_AFTER_DECAY;
      t.param_dtype = dtype_of(x.dtype), t.grad_dtype = dtype_of(g.dtype);
      const int64_t rows = factored ? rows_of(t) : size_of(t), sums_size = factored ? columns_of(t) : t.slices;
      t.param = advance(x.data, model * size_of(t) * width_of(x.dtype));
      t.grad = advance(g.data, model * size_of(t) * width_of(g.dtype));
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
  check(adafactor_measure(records.data(), int64_t(records.size()), head.threads, head.isa));
  for (size_t k = 0; k < records.size(); ++k) {
    const adafactor_tensor& t = records[k];
    const Finish<T>& its = finishes[k];
    if (t.flags & ADAFACTOR_FACTORED) {
      finish(t, its);
    } else {
      for (int64_t s = 0; s < t.slices; ++s) its.column_factor[s] = T(factor(t, t.Q[s], its.W[s], its.report_of(s)));
    }
  }
}

void measure(Call& call) {
  const Head head(call);
  (head.statistics == xla::kF64 ? measure_as<double> : measure_as<float>)(call, head);
}

// The results are the arguments' own buffers: XLA was told so. A copy is the way out where it did not listen.
char* in_place(const xla::Buffer& from, const xla::Buffer& to) {
  if (to.data != from.data) std::memcpy(to.data, from.data, static_cast<size_t>(count_of(from) * width_of(from.dtype)));
  return static_cast<char*>(to.data);
}

void step(Call& call) {
  const Head head(call);
  const bool momentum = call.flag("momentum");
  std::vector<adafactor_tensor> records;
  std::vector<double> Q(static_cast<size_t>(head.slices()));
  double* next_Q = Q.data();
  const int64_t width = width_of(head.statistics);
  for (int64_t k = 0; k < head.count; ++k) {
    const xla::Buffer &g = call.argument(), &x = call.peek();
    const auto next = [&] {
      const xla::Buffer& from = call.argument();
      return in_place(from, call.result());
    };
    char *param = next(), *row = next(), *column = head.words[k * kWords + kFactored] ? next() : nullptr;
    const int32_t average_type = momentum ? call.peek().dtype : head.statistics;
    char* average = momentum ? next() : nullptr;
    for (int64_t model = 0; model < head.models; ++model) {
      adafactor_tensor t = head.record(k, model);
      t.param_dtype = dtype_of(x.dtype), t.grad_dtype = dtype_of(g.dtype), t.momentum_dtype = dtype_of(average_type);
      const int64_t size = size_of(t), rows = column ? rows_of(t) : size;
      t.param = param + model * size * width_of(x.dtype);
      t.grad = advance(g.data, model * size * width_of(g.dtype));
      t.row = row + model * rows * width;
      t.column = column ? column + model * columns_of(t) * width : nullptr;
      t.momentum = average ? average + model * size * width_of(average_type) : nullptr;
      t.Q = next_Q, next_Q += t.slices;
      records.push_back(t);
    }
  }
  check(adafactor_step(records.data(), int64_t(records.size()), head.threads, head.isa));
}

xla::Error* failure(const xla::Frame& frame, const Refused& refused) {
  xla::ErrorCreate error{sizeof error, nullptr, refused.message, refused.code};
  return frame.api->error_create(&error);
}

// What every handler does around its work: it names its version when it is asked, and lets no exception out.
xla::Error* handle(xla::Frame* frame, void (*work)(Call&)) {
  if (frame->extensions && frame->extensions->kind == xla::kMetadata) {
    xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(frame->extensions)->metadata;
    if (metadata.size < offsetof(xla::Metadata, traits) + sizeof metadata.traits)
      return failure(*frame, {"adafactor: this XLA asks for its handlers' version in another way", xla::kUnimplemented});
    metadata.version = {sizeof metadata.version, nullptr, xla::kMajor, xla::kMinor};
    metadata.traits = 0;
    return nullptr;
  }
  if (frame->stage != xla::kExecute) return nullptr;
  try {
    Call call(*frame);
    work(call);
    return nullptr;
  } catch (const Refused& refused) {
    return failure(*frame, refused);
  } catch (const std::bad_alloc&) {
    return failure(*frame, {"adafactor: no memory for the descriptors of a call", xla::kResourceExhausted});
  }
}

}  // namespace

extern "C" {

ADAFACTOR_API xla::Error* adafactor_xla_measure(xla::Frame* frame) { return handle(frame, measure); }
ADAFACTOR_API xla::Error* adafactor_xla_step(xla::Frame* frame) { return handle(frame, step); }

// For every later call: a compiled program may run where another number of threads or instruction set is right.
ADAFACTOR_API void adafactor_xla_configure(int64_t threads, int64_t isa) { threads_to_use = threads, isa_to_use = isa; }

}  // extern "C"
