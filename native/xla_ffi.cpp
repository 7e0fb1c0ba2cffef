// The kernels as XLA custom calls on the CPU. Whoever registers them, in JAX or in TensorFlow, is elsewhere:
// src/adafactor/engine/xla/custom_call.py is JAX's side of this file.
//
// A call takes a few numbers, then the buffers of one tensor after another. Under vmap the numbers have one row per
// model, and a tensor stacks the models in its leading axis: it becomes that many records.

#include <atomic>
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "adafactor.h"
#include "engine.h"
#include "xla_abi.h"

namespace {

namespace xla = adafactor::xla;

enum { kEmaWeight, kRho, kEps1, kEps2, kClip, kBeta1, kNumbers };
enum { kFactored, kOuter, kRows, kInner, kColumns, kSlices, kIndex, kWords };  // of each tensor in the attribute `tensors`

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

  const xla::Frame& frame() const { return frame_; }

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

// The threads of XLA's own pool, beside which ours would be too many. XLA runs a task some time or other: who comes
// when the work is done goes again, and only those who have begun are waited for.
class Pool {
 public:
  explicit Pool(const xla::Frame& frame) : frame_(frame) {
    if (frame.api->size < offsetof(xla::Api, count_threads) + sizeof frame.api->count_threads) return;
    xla::CountThreads count{sizeof count, nullptr, frame.context, &threads_};
    if (xla::Error* error = frame.api->count_threads(&count)) drop(error), threads_ = 0;
  }

  int64_t threads() const { return threads_; }  // 0 where there is no pool

  static void run(void* pool, int helpers, void (*work)(void*), void* context) {
    static_cast<Pool*>(pool)->share(helpers, work, context);
  }

 private:
  struct Shift {
    void (*work)(void*);
    void* context;
    std::mutex mutex;
    std::condition_variable left;
    bool over = false;
    int active = 0;
  };

  void share(int helpers, void (*work)(void*), void* context) {
    const auto shift = std::make_shared<Shift>();
    shift->work = work, shift->context = context;
    for (int k = 0; k < helpers; ++k) {
      auto* ticket = new (std::nothrow) std::shared_ptr<Shift>(shift);
      if (!ticket) break;
      xla::Schedule task{sizeof task, nullptr, frame_.context, help, ticket};
      if (xla::Error* error = frame_.api->schedule(&task)) drop(error), delete ticket;
    }
    work(context);
    std::unique_lock<std::mutex> lock(shift->mutex);
    shift->over = true;
    while (shift->active > 0) shift->left.wait(lock);
  }

  static void help(void* ticket) {
    const std::unique_ptr<std::shared_ptr<Shift>> mine(static_cast<std::shared_ptr<Shift>*>(ticket));
    Shift& shift = **mine;
    std::unique_lock<std::mutex> lock(shift.mutex);
    if (shift.over) return;
    ++shift.active;
    lock.unlock();
    shift.work(shift.context);
    lock.lock();
    if (--shift.active == 0) shift.left.notify_one();
  }

  void drop(xla::Error* error) const {
    xla::ErrorDestroy destroy{sizeof destroy, nullptr, error};
    frame_.api->error_destroy(&destroy);
  }

  const xla::Frame& frame_;
  int64_t threads_ = 0;
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

// Where `measure` leaves what the kernels have found: [slices] but for rows, columns and diagnostics, [slices][3] or null.
template <class T>
struct Results {
  T *row, *column, *row_factor, *inverse_clip, *alpha, *diagnostics;
};

// The update is g times row_factor, which holds the finished rows, times column_factor, which finish has left in S.
template <class T>
void give(const adafactor_tensor& t, const Results<T>& to) {
  const int64_t rows = rows_of(t) / std::max<int64_t>(t.slices, 1);
  const bool factored = t.flags & ADAFACTOR_FACTORED;
  if (factored) std::memcpy(to.column, t.W, size_t(columns_of(t)) * sizeof(T));
  for (int64_t s = 0; s < t.slices; ++s) {
    const T inverse_clip = T(t.step_size[2 * s + 1]);
    to.alpha[s] = T(t.step_size[2 * s]);
    if (!factored) to.inverse_clip[s] = inverse_clip;
    for (int64_t k = 0; to.diagnostics && k < 3; ++k) to.diagnostics[3 * s + k] = T(t.diagnostics[4 * s + k]);
    for (int64_t i = s * rows; factored && i < (s + 1) * rows; ++i) {
      to.row[i] = to.row_factor[i];
      to.row_factor[i] = inverse_clip * inverse_root(to.row[i]);
    }
  }
}

// What both handlers know of a call before its tensors.
struct Head {
  std::vector<double> numbers, decay_factors;  // [models][kNumbers], [models][tensors of the whole update]
  const int64_t* words;                        // [count][kWords]
  int64_t models, count, threads, isa;
  int32_t statistics;  // the dtype of the statistics and of the arithmetic
  bool clip, scale, after_decay, diagnostics;

  explicit Head(Call& call) {
    const xla::Buffer& first = call.argument();
    statistics = first.dtype;
    numbers = doubles(first);
    decay_factors = doubles(call.argument());
    const xla::Array& tensors = call.integers("tensors");
    words = static_cast<const int64_t*>(tensors.data);
    models = int64_t(numbers.size()) / kNumbers, count = int64_t(tensors.count) / kWords;
    clip = call.flag("clip"), scale = call.flag("scale"), after_decay = call.flag("scale_after_decay");
    diagnostics = call.flag("diagnostics");
    threads = threads_to_use, isa = isa_to_use;
    for (int64_t k = ADAFACTOR_ISAS; isa < 0 && k-- > 0;)
      if (adafactor_supported(k)) isa = k;
    for (int64_t k = 0; k < count; ++k)
      if (words[k * kWords + kIndex] >= int64_t(decay_factors.size()) / models)
        throw Refused{"adafactor: a tensor has no decay factor"};
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
    t.flags = (its[kFactored] ? ADAFACTOR_FACTORED : 0) | (scale ? ADAFACTOR_SCALE_PARAMETER : 0) |
              (after_decay ? ADAFACTOR_SCALE_AFTER_DECAY : 0);
    t.ema_weight = of[kEmaWeight], t.rho = of[kRho], t.eps1 = of[kEps1], t.eps2 = of[kEps2], t.beta1 = of[kBeta1];
    t.clip = clip ? of[kClip] : std::numeric_limits<double>::infinity();
    t.decay_factor = decay_factors[size_t(model * int64_t(decay_factors.size()) / models + its[kIndex])];
    return t;
  }

  void perform(const Call& call, std::vector<adafactor_tensor>& tensors, adafactor::Verb verb) const {
    Pool pool(call.frame());
    const adafactor::Crew crew{Pool::run, &pool};
    const bool theirs = pool.threads() > 0;
    const int64_t most = theirs && pool.threads() < threads ? pool.threads() : threads;
    const int error = adafactor::perform(tensors.data(), int64_t(tensors.size()), most, isa, verb, theirs ? &crew : nullptr);
    if (error == 1) throw Refused{"adafactor: no memory for row and column sums", xla::kResourceExhausted};
    if (error) throw Refused{"adafactor: the native kernels refused a tensor"};
  }

  int64_t slices() const {
    int64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += words[k * kWords + kSlices];
    return sum;
  }
};

template <class T>
void measure_as(Call& call, const Head& head) {
  std::vector<adafactor_tensor> records;
  std::vector<Results<T>> results;
  int64_t columns = 0;
  for (int64_t k = 0; k < head.count; ++k) {
    const int64_t* its = head.words + k * kWords;
    columns += its[kFactored] ? its[kOuter] * its[kInner] * its[kColumns] : 2 * its[kSlices];
  }
  std::vector<T> sums(static_cast<size_t>(columns));
  std::vector<double> per_slice(static_cast<size_t>(7 * head.slices()));  // Q, the step size and the diagnostics
  T* next_sum = sums.data();
  double* next = per_slice.data();
  const auto take = [&next_sum](int64_t count) {
    T* here = next_sum;
    next_sum += count;
    return here;
  };
  for (int64_t k = 0; k < head.count; ++k) {
    const bool factored = head.words[k * kWords + kFactored];
    const auto give = [&] { return static_cast<T*>(call.result().data); };
    const xla::Buffer &g = call.argument(), &x = call.argument();
    T* row = static_cast<T*>(call.argument().data);
    T* column = factored ? static_cast<T*>(call.argument().data) : nullptr;
    T *new_row = factored ? give() : nullptr, *new_column = factored ? give() : nullptr;
    T *row_factor = factored ? give() : nullptr, *column_factor = factored ? give() : nullptr;
    T *weight = factored ? nullptr : give(), *inverse_clip = factored ? nullptr : give();
    T *alpha = give(), *diagnostics = head.diagnostics ? give() : nullptr;
    for (int64_t model = 0; model < head.models; ++model) {
      adafactor_tensor t = head.record(k, model);
      t.param_dtype = dtype_of(x.dtype), t.grad_dtype = dtype_of(g.dtype);
      const int64_t rows = factored ? rows_of(t) : size_of(t), column_numbers = columns_of(t);
      t.param = advance(x.data, model * size_of(t) * width_of(x.dtype));
      t.grad = advance(g.data, model * size_of(t) * width_of(g.dtype));
      t.row = row + model * rows;
      t.Q = next, t.step_size = t.Q + t.slices, t.diagnostics = t.step_size + 2 * t.slices;
      next += 7 * t.slices;
      Results<T> its{};
      its.alpha = alpha + model * t.slices;
      if (diagnostics) its.diagnostics = diagnostics + 3 * model * t.slices;
      if (factored) {
        t.column = column + model * column_numbers;
        its.row = new_row + model * rows, its.column = new_column + model * column_numbers;
        t.finished = its.row_factor = row_factor + model * rows;
        t.S = column_factor + model * column_numbers;
        t.W = take(column_numbers);
      } else {
        its.inverse_clip = inverse_clip + model * t.slices;
        for (int64_t s = 0; s < t.slices; ++s) weight[model * t.slices + s] = T(t.ema_weight);
        t.S = take(t.slices), t.W = take(t.slices);
      }
      records.push_back(t);
      results.push_back(its);
    }
  }
  head.perform(call, records, adafactor::Verb(adafactor::kMeasure | adafactor::kFinish));
  for (size_t k = 0; k < records.size(); ++k) give(records[k], results[k]);
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
  const size_t slices = static_cast<size_t>(head.slices());
  std::vector<adafactor_tensor> records;
  std::vector<double> Q(slices), diagnostics(head.diagnostics ? 4 * slices : 0);
  std::vector<const xla::Buffer*> reported;
  double *next_Q = Q.data(), *next_diagnostics = diagnostics.data();
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
    if (head.diagnostics) reported.push_back(&call.result());
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
      if (head.diagnostics) t.diagnostics = next_diagnostics, next_diagnostics += 4 * t.slices;
      records.push_back(t);
    }
  }
  head.perform(call, records, adafactor::kStep);
  const double* of = diagnostics.data();
  for (const xla::Buffer* to : reported) {
    const int64_t count = count_of(*to);
    for (int64_t k = 0; k < count; ++k) {
      const double value = of[k / 3 * 4 + k % 3];
      if (head.statistics == xla::kF64) static_cast<double*>(to->data)[k] = value;
      else static_cast<float*>(to->data)[k] = float(value);
    }
    of += count / 3 * 4;
  }
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
