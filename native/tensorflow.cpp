// The step as a TensorFlow op, a library of its own. src/adafactor/engine/tensorflow/op.py is the other side of this file.
//
// The op is stateless, values in and values out: TensorFlow lets the variables go on without a copy where the caller
// reads them, and adopts the results where it assigns them. A new parameter is written over its gradient where
// TensorFlow gives the gradient's buffer away, which it does if nobody else holds it.
//
// No header of TensorFlow is needed: its C API (tensorflow/c/kernels.h, ops.h, tf_tensor.h, tf_status.h) is declared
// here, and looked up in the TensorFlow that this process has loaded. Where anything is missing nothing is registered
// and adafactor_tensorflow_missing() says what.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "adafactor.h"
#include "xla_abi.h"

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

// ---- TensorFlow's C API ----------------------------------------------------------------------------------------

struct TF_Status;
struct TF_Tensor;
struct TF_OpDefinitionBuilder;
struct TF_ShapeHandle;
struct TF_ShapeInferenceContext;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;

enum TF_DataType : int { TF_FLOAT = 1, TF_DOUBLE = 2, TF_BFLOAT16 = 14, TF_HALF = 19 };
enum TF_Code : int { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8, TF_INTERNAL = 13 };

#define ADAFACTOR_TF_FUNCTIONS(F)                                                                                      \
  F(TF_Status*, TF_NewStatus, ())                                                                                      \
  F(void, TF_DeleteStatus, (TF_Status*))                                                                               \
  F(void, TF_SetStatus, (TF_Status*, TF_Code, const char*))                                                            \
  F(TF_Code, TF_GetCode, (const TF_Status*))                                                                           \
  F(const char*, TF_Message, (const TF_Status*))                                                                       \
  F(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char*))                                                 \
  F(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char*))                                       \
  F(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char*))                                      \
  F(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char*))                                     \
  F(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                                                             \
    (TF_OpDefinitionBuilder*, void (*)(TF_ShapeInferenceContext*, TF_Status*)))                                        \
  F(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                                              \
  F(TF_ShapeHandle*, TF_NewShapeHandle, ())                                                                            \
  F(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                                                     \
  F(void, TF_ShapeInferenceContextGetInput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))             \
  F(void, TF_ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))            \
  F(TF_KernelBuilder*, TF_NewKernelBuilder,                                                                            \
    (const char*, const char*, void* (*)(TF_OpKernelConstruction*), void (*)(void*, TF_OpKernelContext*),              \
     void (*)(void*)))                                                                                                 \
  F(void, TF_RegisterKernelBuilder, (const char*, TF_KernelBuilder*, TF_Status*))                                      \
  F(void, TF_OpKernelConstruction_GetAttrSize, (TF_OpKernelConstruction*, const char*, int32_t*, int32_t*, TF_Status*)) \
  F(void, TF_OpKernelConstruction_GetAttrInt64List,                                                                    \
    (TF_OpKernelConstruction*, const char*, int64_t*, int, TF_Status*))                                                \
  F(void, TF_OpKernelConstruction_GetAttrInt64, (TF_OpKernelConstruction*, const char*, int64_t*, TF_Status*))         \
  F(void, TF_OpKernelConstruction_GetAttrBool, (TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*))    \
  F(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                                     \
  F(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                                               \
  F(void, TF_GetInput, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                                            \
  F(TF_Tensor*, TF_AllocateOutput,                                                                                     \
    (TF_OpKernelContext*, int, TF_DataType, const int64_t*, int, size_t, TF_Status*))                                  \
  F(TF_Tensor*, TF_ForwardInputOrAllocateOutput,                                                                       \
    (TF_OpKernelContext*, const int*, int, int, const int64_t*, int, int*, TF_Status*))                                \
  F(void, TF_DeleteTensor, (TF_Tensor*))                                                                               \
  F(TF_DataType, TF_TensorType, (const TF_Tensor*))                                                                    \
  F(int, TF_NumDims, (const TF_Tensor*))                                                                               \
  F(int64_t, TF_Dim, (const TF_Tensor*, int))                                                                          \
  F(int64_t, TF_TensorElementCount, (const TF_Tensor*))                                                                \
  F(size_t, TF_TensorByteSize, (const TF_Tensor*))                                                                     \
  F(void*, TF_TensorData, (const TF_Tensor*))

#define ADAFACTOR_TF_DECLARE(result, name, arguments) result(*name) arguments = nullptr;
ADAFACTOR_TF_FUNCTIONS(ADAFACTOR_TF_DECLARE)

// The TensorFlow of this process; it must not be a second one that comes in with this question.
void* loaded(const char* name) {
#if defined(_WIN32)
  (void)name;
  return reinterpret_cast<void*>(GetModuleHandleA("_pywrap_tensorflow_common.dll"));
#elif defined(__APPLE__)
  return dlopen((std::string(name) + ".2.dylib").c_str(), RTLD_LAZY | RTLD_NOLOAD);
#else
  return dlopen((std::string(name) + ".so.2").c_str(), RTLD_LAZY | RTLD_NOLOAD);
#endif
}

void* symbol(void* library, const char* name) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

// The name of a function that TensorFlow does not have; null: it has all.
const char* look_up(void* library) {
#define ADAFACTOR_TF_LOOK_UP(result, name, arguments)                    \
  name = reinterpret_cast<result(*) arguments>(symbol(library, #name)); \
  if (!name) return #name;
  ADAFACTOR_TF_FUNCTIONS(ADAFACTOR_TF_LOOK_UP)
  return nullptr;
}

class Status {
 public:
  Status() : status_(TF_NewStatus()) {}
  ~Status() { TF_DeleteStatus(status_); }
  Status(const Status&) = delete;
  operator TF_Status*() const { return status_; }
  bool ok() const { return TF_GetCode(status_) == TF_OK; }
  void fail(TF_Code code, const std::string& what) { TF_SetStatus(status_, code, ("adafactor: " + what).c_str()); }

 private:
  TF_Status* const status_;
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(Tensor&& other) : tensor_(other.tensor_) { other.tensor_ = nullptr; }
  explicit Tensor(TF_Tensor* tensor) : tensor_(tensor) {}
  ~Tensor() { release(); }
  Tensor& operator=(Tensor&& other) {
    std::swap(tensor_, other.tensor_);
    return *this;
  }
  void release() {
    if (tensor_) TF_DeleteTensor(tensor_);
    tensor_ = nullptr;
  }
  void* data() const { return TF_TensorData(tensor_); }
  int64_t count() const { return TF_TensorElementCount(tensor_); }
  size_t bytes() const { return TF_TensorByteSize(tensor_); }
  TF_DataType type() const { return TF_TensorType(tensor_); }
  std::vector<int64_t> dims() const {
    std::vector<int64_t> dims(static_cast<size_t>(TF_NumDims(tensor_)));
    for (size_t k = 0; k < dims.size(); ++k) dims[k] = TF_Dim(tensor_, int(k));
    return dims;
  }

 private:
  TF_Tensor* tensor_ = nullptr;
};

// ---- the op ----------------------------------------------------------------------------------------------------

using Step = int (*)(adafactor_tensor*, int64_t, int64_t, int64_t);

struct Connection {
  Step step = nullptr;
  int64_t threads = 1, isa = 0;
} connection;

std::atomic<int64_t> gradients_seen{0}, gradients_taken{0};  // taken: with their memory

enum { kFactored, kOuter, kRows, kInner, kColumns, kSlices, kWords };  // of each tensor in the attribute `tensors`
enum { kLearningRate, kRho, kEmaWeight, kEps1, kEps2, kClip, kBeta1, kNumbers };

int64_t dtype_of(TF_DataType type) {
  switch (type) {
    case TF_FLOAT: return ADAFACTOR_FLOAT32;
    case TF_DOUBLE: return ADAFACTOR_FLOAT64;
    case TF_BFLOAT16: return ADAFACTOR_BFLOAT16;
    case TF_HALF: return ADAFACTOR_FLOAT16;
  }
  return -1;
}

// The sums of x^2 of the parameters that steps have left, by where they are, so that the next step need not read x for
// them. The memory is held: TensorFlow then writes to it no more and gives the address to nothing else, so what is found
// there is that parameter. The step that finds it lets it go; so do the next step of the node that left it, and its end.
class Left {
 public:
  // Of one parameter of one node.
  struct Place {
    const void* address = nullptr;  // of what is held
    int missed = 0;                 // how often somebody else had replaced the parameter before the next step
  };

  // Whether the sums of t.param, which `place` steps now, are known; then they are in t.Q.
  bool find(Place& place, const adafactor_tensor& t) {
    Entry mine, gone;  // let go after the lock
    std::lock_guard<std::mutex> lock(mutex_);
    const bool found = take(t.param, mine) && alike(mine.form, t);  // not if it is seen in another shape
    if (found) std::copy(mine.Q.begin(), mine.Q.end(), t.Q);
    if (place.address && place.address != t.param && take(place.address, gone)) ++place.missed;
    place.address = nullptr;
    return found;
  }
  void keep(Place& place, Tensor param, const adafactor_tensor& t) {
    Entry entry, gone;
    const void* address = param.data();
    std::lock_guard<std::mutex> lock(mutex_);
    if (place.address) take(place.address, gone);  // another thread's, in the same node
    place.address = nullptr;
    if (place.missed > 1 || param.count() == 0) return;  // to hold what others replace would be a second copy of it
    entry = {std::move(param), t, std::vector<double>(t.Q, t.Q + t.slices)};
    std::swap(entries_[address], entry);
    place.address = address;
  }
  void forget(const Place& place) {
    Entry gone;
    std::lock_guard<std::mutex> lock(mutex_);
    if (place.address) take(place.address, gone);
  }
  int64_t count() {
    std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(entries_.size());
  }

 private:
  struct Entry {
    Tensor param;
    adafactor_tensor form;
    std::vector<double> Q;
  };
  static bool alike(const adafactor_tensor& a, const adafactor_tensor& b) {
    return a.param_dtype == b.param_dtype && (a.flags & ADAFACTOR_FACTORED) == (b.flags & ADAFACTOR_FACTORED) &&
           a.outer == b.outer && a.rows == b.rows && a.inner == b.inner && a.columns == b.columns && a.slices == b.slices;
  }
  bool take(const void* address, Entry& entry) {
    const auto found = entries_.find(address);
    if (found == entries_.end()) return false;
    std::swap(entry, found->second);
    entries_.erase(found);
    return true;
  }
  std::mutex mutex_;  // of the places too
  std::unordered_map<const void*, Entry> entries_;
};

Left& left = *new Left;  // never destroyed: at exit TensorFlow may have gone before

// Inputs: parameters, statistics (row and column, or the second moment), momenta, diagnostics, which all have an output
// of their dtype and shape in the same order; then gradients, numbers, and the weight decay of each parameter.
class StepKernel {
 public:
  StepKernel(TF_OpKernelConstruction* construction, Status& status) {
    int32_t length = 0, total = 0;
    TF_OpKernelConstruction_GetAttrSize(construction, "tensors", &length, &total, status);
    if (!status.ok()) return;
    words_.resize(size_t(length));
    TF_OpKernelConstruction_GetAttrInt64List(construction, "tensors", words_.data(), length, status);
    if (status.ok()) TF_OpKernelConstruction_GetAttrInt64(construction, "N", &count_, status);
    if (status.ok()) TF_OpKernelConstruction_GetAttrInt64(construction, "K", &statistics_, status);
    if (status.ok()) TF_OpKernelConstruction_GetAttrInt64(construction, "M", &momenta_, status);
    if (status.ok()) TF_OpKernelConstruction_GetAttrInt64(construction, "R", &diagnostics_, status);
    unsigned char scale = 0, keep = 0;
    if (status.ok()) TF_OpKernelConstruction_GetAttrBool(construction, "scale", &scale, status);
    if (status.ok()) TF_OpKernelConstruction_GetAttrBool(construction, "keep", &keep, status);
    if (!status.ok()) return;
    scale_ = scale;
    if (scale && keep) places_.resize(size_t(count_));
    int64_t statistics = 0;
    for (size_t k = 0; k + kWords <= words_.size(); k += kWords) statistics += words_[k + kFactored] ? 2 : 1;
    if (words_.size() != size_t(count_) * kWords || statistics != statistics_ || (momenta_ && momenta_ != count_) ||
        (diagnostics_ && diagnostics_ != count_))
      status.fail(TF_INVALID_ARGUMENT, "the attribute `tensors` does not describe the inputs");
  }

  ~StepKernel() {
    for (const Left::Place& place : places_) left.forget(place);
  }

  void compute(TF_OpKernelContext* context, Status& status) const {
    if (!connection.step) return status.fail(TF_INTERNAL, "no native kernels: import adafactor.keras first");
    const int gradients = int(count_ + statistics_ + momenta_ + diagnostics_);
    const Tensor numbers = input(context, gradients + int(count_), status);
    const Tensor decays = input(context, gradients + int(count_) + 1, status);
    if (!status.ok()) return;
    if (numbers.count() != kNumbers || decays.count() != count_)
      return status.fail(TF_INVALID_ARGUMENT, "too few numbers");

    std::vector<Tensor> held;  // for as long as their memory is at work
    std::vector<adafactor_tensor> records;
    std::vector<Tensor> reports, targets;
    int64_t slices = 0;
    for (int64_t k = 0; k < count_; ++k) slices += words_[size_t(k) * kWords + kSlices];
    std::vector<double> Q(static_cast<size_t>(slices)), diagnostics(static_cast<size_t>(diagnostics_ ? 4 * slices : 0));
    int next_statistic = int(count_);
    int64_t slice = 0;
    for (int64_t k = 0; k < count_; ++k) {
      adafactor_tensor t = record(k, static_cast<const double*>(numbers.data()), static_cast<const double*>(decays.data())[k]);
      const auto take = [&](int index) {
        held.push_back(input(context, index, status));
        return held.back().data();
      };
      const auto give = [&](int index) {
        held.push_back(output(context, index, held.back(), status));
        return held.back().data();
      };
      const auto in_place = [&](int index, int64_t size) -> void* {  // a copy of an input, to be worked on
        const void* from = take(index);
        if (!status.ok() || !expect(held.back(), size, status)) return nullptr;
        const size_t bytes = held.back().bytes();
        void* to = give(index);
        if (status.ok() && bytes) std::memcpy(to, from, bytes);
        return to;
      };
      const int64_t size = t.outer * t.rows * t.inner * t.columns;
      const int64_t rows = t.flags & ADAFACTOR_FACTORED ? t.outer * t.rows * t.inner : size;

      Tensor param = input(context, int(k), status);
      if (!status.ok() || !expect(param, size, status)) return;
      const std::vector<int64_t> dims = param.dims();
      {  // only looked at: held, it could not be given away
        const Tensor gradient = input(context, gradients + int(k), status);
        if (!status.ok()) return;
        if (gradient.dims() != dims) return status.fail(TF_INVALID_ARGUMENT, "a gradient is not of its variable's shape");
        t.grad_dtype = dtype_of(gradient.type());
      }
      t.param_dtype = dtype_of(param.type());
      t.param = param.data();
      const int candidate = gradients + int(k);
      int forwarded = -1;
      targets.emplace_back(TF_ForwardInputOrAllocateOutput(context, &candidate, 1, int(k), dims.data(), int(dims.size()),
                                                           &forwarded, status));
      if (!status.ok()) return;
      t.target = targets.back().data();
      t.grad = forwarded == candidate ? t.target : take(candidate);
      ++gradients_seen, gradients_taken += forwarded == candidate;
      held.push_back(std::move(param));
      if (!status.ok()) return;

      t.row = in_place(next_statistic++, rows);
      if (status.ok() && (t.flags & ADAFACTOR_FACTORED))
        t.column = in_place(next_statistic++, t.outer * t.inner * t.columns);
      if (!status.ok()) return;
      if (momenta_) {
        const int index = int(count_ + statistics_ + k);
        t.momentum = take(index);
        if (!status.ok() || !expect(held.back(), size, status)) return;
        t.momentum_dtype = dtype_of(held.back().type());
        t.momentum_target = give(index);
      }
      if (diagnostics_) {
        const int index = int(count_ + statistics_ + momenta_ + k);
        const Tensor before = input(context, index, status);
        if (!status.ok() || !expect(before, 3 * t.slices, status)) return;
        reports.push_back(output(context, index, before, status));
        t.diagnostics = diagnostics.data() + 4 * slice;
      }
      if (!status.ok()) return;
      t.Q = Q.data() + slice;
      if (!places_.empty() && left.find(places_[size_t(k)], t)) t.flags |= ADAFACTOR_Q_KNOWN;
      slice += t.slices;
      records.push_back(t);
    }
    if (const int error = connection.step(records.data(), count_, connection.threads, connection.isa))
      return status.fail(error == 1 ? TF_RESOURCE_EXHAUSTED : TF_INTERNAL, "the native step failed, error " + std::to_string(error));
    for (size_t k = 0; k < places_.size(); ++k)
      left.keep(places_[k], std::move(targets[k]), records[k]);
    for (int64_t k = 0; k < diagnostics_; ++k) {
      const adafactor_tensor& t = records[size_t(k)];
      Tensor& report = reports[size_t(k)];
      for (int64_t s = 0; s < t.slices; ++s)
        for (int64_t j = 0; j < 3; ++j) {
          const double value = t.diagnostics[4 * s + j];
          if (report.type() == TF_DOUBLE) static_cast<double*>(report.data())[3 * s + j] = value;
          else static_cast<float*>(report.data())[3 * s + j] = float(value);
        }
    }
  }

 private:
  static Tensor input(TF_OpKernelContext* context, int index, Status& status) {
    TF_Tensor* tensor = nullptr;
    if (status.ok()) TF_GetInput(context, index, &tensor, status);
    return Tensor(tensor);
  }

  static Tensor output(TF_OpKernelContext* context, int index, const Tensor& like, Status& status) {
    const std::vector<int64_t> dims = like.dims();
    return Tensor(TF_AllocateOutput(context, index, like.type(), dims.data(), int(dims.size()), like.bytes(), status));
  }

  static bool expect(const Tensor& tensor, int64_t size, Status& status) {
    if (tensor.count() != size)
      status.fail(TF_INVALID_ARGUMENT, "an input has " + std::to_string(tensor.count()) + " numbers in place of " + std::to_string(size));
    return status.ok();
  }

  adafactor_tensor record(int64_t k, const double* numbers, double weight_decay) const {
    const int64_t* words = words_.data() + k * kWords;
    adafactor_tensor t;
    std::memset(&t, 0, sizeof t);
    t.outer = words[kOuter], t.rows = words[kRows], t.inner = words[kInner], t.columns = words[kColumns];
    t.slices = words[kSlices];
    t.global_rows = t.rows, t.global_columns = t.columns;
    t.global_size = t.slices ? t.outer * t.rows * t.inner * t.columns / t.slices : 0;
    t.flags = (words[kFactored] ? ADAFACTOR_FACTORED : 0u) | ADAFACTOR_SCALE_AFTER_DECAY;
    if (scale_) t.flags |= ADAFACTOR_SCALE_PARAMETER;
    t.rho = numbers[kRho], t.ema_weight = numbers[kEmaWeight], t.eps1 = numbers[kEps1], t.eps2 = numbers[kEps2];
    t.clip = numbers[kClip], t.beta1 = numbers[kBeta1];
    t.decay_factor = 1 - numbers[kLearningRate] * weight_decay;
    t.rng_stream = uint64_t(k);
    return t;
  }

  std::vector<int64_t> words_;
  int64_t count_ = 0, statistics_ = 0, momenta_ = 0, diagnostics_ = 0;
  bool scale_ = false;
  mutable std::vector<Left::Place> places_;  // none: nothing is kept
};

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  StepKernel* kernel = nullptr;
  try {
    kernel = new StepKernel(construction, status);
  } catch (const std::bad_alloc&) {
    status.fail(TF_RESOURCE_EXHAUSTED, "no memory");
  }
  if (!status.ok()) TF_OpKernelConstruction_Failure(construction, status);
  return kernel;
}

void compute(void* kernel, TF_OpKernelContext* context) {
  Status status;
  try {
    static_cast<const StepKernel*>(kernel)->compute(context, status);
  } catch (const std::bad_alloc&) {
    status.fail(TF_RESOURCE_EXHAUSTED, "no memory");
  }
  if (!status.ok()) TF_OpKernelContext_Failure(context, status);
}

void destroy(void* kernel) { delete static_cast<StepKernel*>(kernel); }

// Output k is of the shape of input k, for as many as there are.
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeHandle* shape = TF_NewShapeHandle();
  for (int k = 0; TF_GetCode(status) == TF_OK; ++k) {
    TF_ShapeInferenceContextGetInput(context, k, shape, status);
    if (TF_GetCode(status) == TF_OK) TF_ShapeInferenceContextSetOutput(context, k, shape, status);
  }
  TF_SetStatus(status, TF_OK, "");
  TF_DeleteShapeHandle(shape);
}

// What stands in the way of the op, or an empty string where it is registered.
std::string register_op() {
  void* library = loaded("libtensorflow_framework");
  if (!library) return "no TensorFlow is loaded";
  if (const char* name = look_up(library)) return std::string("this TensorFlow has no ") + name;
  Status status;
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder("Adafactor>Step");
  for (const char* attribute :
       {"N: int >= 1", "K: int >= 1", "M: int >= 0", "R: int >= 0", "T: {float, double, bfloat16, half}", "S: {float, double}",
        "G: {float, double, bfloat16, half}", "tensors: list(int)", "scale: bool", "keep: bool = false"})
    TF_OpDefinitionBuilderAddAttr(op, attribute);
  for (const char* value : {"params: N * T", "statistics: K * S", "momenta: M * S", "diagnostics: R * S", "grads: N * G",
                            "numbers: double", "weight_decays: double"})
    TF_OpDefinitionBuilderAddInput(op, value);
  for (const char* value : {"new_params: N * T", "new_statistics: K * S", "new_momenta: M * S", "new_diagnostics: R * S"})
    TF_OpDefinitionBuilderAddOutput(op, value);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes);
  TF_RegisterOpDefinition(op, status);
  if (!status.ok()) return TF_Message(status);
  TF_RegisterKernelBuilder("AdafactorStep", TF_NewKernelBuilder("Adafactor>Step", "CPU", create, compute, destroy), status);
  return status.ok() ? "" : TF_Message(status);
}

const std::string missing = register_op();  // when TensorFlow loads this library, and looks for what is registered

}  // namespace

// One sentence without its full stop, or null where the op is registered.
extern "C" ADAFACTOR_API const char* adafactor_tensorflow_missing() { return missing.empty() ? nullptr : missing.c_str(); }

// Says where the native step is, how many threads a call may use, and their instruction set. False: another version.
extern "C" ADAFACTOR_API int adafactor_tensorflow_connect(Step step, int64_t abi, int64_t threads, int64_t isa) {
  if (abi != ADAFACTOR_ABI * 65536 + int64_t(sizeof(adafactor_tensor))) return 0;
  connection = {step, threads, isa};
  return 1;
}

// Gradients so far, and those of them whose memory became the parameter's.
extern "C" ADAFACTOR_API void adafactor_tensorflow_gradients(int64_t* seen, int64_t* taken) {
  *seen = gradients_seen, *taken = gradients_taken;
}

// Parameters whose sums of x^2 are known.
extern "C" ADAFACTOR_API int64_t adafactor_tensorflow_left() { return left.count(); }

// Makes a handler known to TensorFlow's XLA on CPUs. What stands in the way, or null; valid until the next call.
extern "C" ADAFACTOR_API const char* adafactor_tensorflow_register_xla(const char* name, adafactor::xla::Handler* handler) {
  namespace xla = adafactor::xla;
  static std::string refusal;
  const char* symbol_of_api = "_ZN3xla3ffi12GetXlaFfiApiEv";
  void* library = loaded("libtensorflow_cc");
  const auto get = library ? reinterpret_cast<const xla::Api* (*)()>(symbol(library, symbol_of_api)) : nullptr;
  if (!get) return "it has no xla::ffi::GetXlaFfiApi";
  const xla::Api& api = *get();
  if (api.size < offsetof(xla::Api, stream_get)) return "its XLA has an interface of another form";
  xla::Register call = {sizeof call, nullptr, {name, std::strlen(name)}, {"Host", 4}, {nullptr, nullptr, nullptr, handler}, 0};
  xla::Error* error = api.handler_register(&call);
  if (!error) return nullptr;
  struct { size_t size; xla::Extension* extensions; xla::Error* error; const char* message; } text = {sizeof text, nullptr, error, ""};
  reinterpret_cast<void (*)(void*)>(api.error_get_message)(&text);
  refusal = text.message;
  xla::ErrorDestroy destroyed = {sizeof destroyed, nullptr, error};
  api.error_destroy(&destroyed);
  return refusal.c_str();
}
