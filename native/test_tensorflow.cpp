// The op of TensorFlow in many threads, for the sanitizers (scripts/sanitize.sh): TensorFlow is not built with them, so
// what the op calls of it stands here, over buffers with counted references. TensorFlow runs one kernel from several
// threads at once, and lets them read the same input.

#include <cstdio>
#include <map>
#include <memory>
#include <thread>

#include "tensorflow.cpp"

namespace {

struct TF_Status {
  TF_Code code = TF_OK;
  std::string message;
};

struct TF_Tensor {
  TF_DataType type = TF_FLOAT;
  std::vector<int64_t> dims;
  std::shared_ptr<char> memory;

  static TF_Tensor make(TF_DataType type, const std::vector<int64_t>& dims) {
    TF_Tensor made{type, dims, nullptr};
    made.memory.reset(new char[made.bytes()](), std::default_delete<char[]>());
    return made;
  }
  size_t count() const {
    size_t count = 1;
    for (const int64_t n : dims) count *= size_t(n);
    return count;
  }
  size_t bytes() const { return count() * (type == TF_DOUBLE ? 8 : 4); }
};

struct TF_OpKernelContext {
  std::vector<TF_Tensor> inputs, outputs;
  std::string failure;
};

struct TF_OpKernelConstruction {
  std::map<std::string, int64_t> numbers;
  std::vector<int64_t> words;
};

void stand_in() {
  TF_NewStatus = [] { return new TF_Status; };
  TF_DeleteStatus = [](TF_Status* status) { delete status; };
  TF_SetStatus = [](TF_Status* status, TF_Code code, const char* message) { *status = {code, message}; };
  TF_GetCode = [](const TF_Status* status) { return status->code; };
  TF_Message = [](const TF_Status* status) { return status->message.c_str(); };
  TF_OpKernelConstruction_GetAttrSize = [](TF_OpKernelConstruction* c, const char*, int32_t* length, int32_t*, TF_Status*) {
    *length = int32_t(c->words.size());
  };
  TF_OpKernelConstruction_GetAttrInt64List = [](TF_OpKernelConstruction* c, const char*, int64_t* to, int, TF_Status*) {
    std::memcpy(to, c->words.data(), c->words.size() * sizeof *to);
  };
  TF_OpKernelConstruction_GetAttrInt64 = [](TF_OpKernelConstruction* c, const char* name, int64_t* to, TF_Status*) {
    *to = c->numbers.at(name);
  };
  TF_OpKernelConstruction_GetAttrBool = [](TF_OpKernelConstruction*, const char*, unsigned char* to, TF_Status*) { *to = 1; };
  TF_OpKernelContext_Failure = [](TF_OpKernelContext* context, TF_Status* status) { context->failure = status->message; };
  TF_GetInput = [](TF_OpKernelContext* context, int k, TF_Tensor** to, TF_Status*) {
    *to = new TF_Tensor(context->inputs[size_t(k)]);
  };
  TF_AllocateOutput = [](TF_OpKernelContext* context, int k, TF_DataType type, const int64_t* dims, int rank, size_t, TF_Status*) {
    return new TF_Tensor(context->outputs[size_t(k)] = TF_Tensor::make(type, {dims, dims + rank}));
  };
  TF_ForwardInputOrAllocateOutput = [](TF_OpKernelContext* context, const int* candidates, int, int k, const int64_t* dims,
                                       int rank, int* forwarded, TF_Status* status) {
    TF_Tensor& input = context->inputs[size_t(*candidates)];
    if (input.memory.use_count() != 1) return TF_AllocateOutput(context, k, input.type, dims, rank, 0, status);
    *forwarded = *candidates;
    return new TF_Tensor(context->outputs[size_t(k)] = input);
  };
  TF_DeleteTensor = [](TF_Tensor* tensor) { delete tensor; };
  TF_TensorType = [](const TF_Tensor* tensor) { return tensor->type; };
  TF_NumDims = [](const TF_Tensor* tensor) { return int(tensor->dims.size()); };
  TF_Dim = [](const TF_Tensor* tensor, int axis) { return tensor->dims[size_t(axis)]; };
  TF_TensorElementCount = [](const TF_Tensor* tensor) { return int64_t(tensor->count()); };
  TF_TensorByteSize = [](const TF_Tensor* tensor) { return tensor->bytes(); };
  TF_TensorData = [](const TF_Tensor* tensor) -> void* { return tensor->memory.get(); };
}

TF_Tensor random(const std::vector<int64_t>& dims, uint32_t seed) {
  TF_Tensor made = TF_Tensor::make(TF_FLOAT, dims);
  for (size_t k = 0; k < made.count(); ++k) {
    seed = seed * 1664525u + 1013904223u;
    reinterpret_cast<float*>(made.memory.get())[k] = float(int32_t(seed)) * 0x1p-31f;
  }
  return made;
}

TF_Tensor doubles(std::initializer_list<double> values) {
  TF_Tensor made = TF_Tensor::make(TF_DOUBLE, {int64_t(values.size())});
  std::memcpy(made.memory.get(), values.begin(), made.bytes());
  return made;
}

const std::vector<std::vector<int64_t>> kShapes = {{300, 500}, {70'001}, {7}};
constexpr int kState = 3 + 4 + 3 + 3;  // parameters, statistics, momenta, diagnostics

std::vector<TF_Tensor> gradients(uint32_t step) {
  std::vector<TF_Tensor> made;
  for (size_t k = 0; k < kShapes.size(); ++k) made.push_back(random(kShapes[k], 100 * step + uint32_t(k)));
  return made;
}

// The state after three steps. Gradients that others hold are read and left alone.
std::string train(void* kernel, const std::vector<std::vector<TF_Tensor>>* held) {
  std::vector<TF_Tensor> state;
  for (size_t k = 0; k < kShapes.size(); ++k) state.push_back(random(kShapes[k], uint32_t(k) + 7));
  for (const std::vector<int64_t>& dims : {std::vector<int64_t>{300}, {500}, kShapes[1], kShapes[2]})
    state.push_back(TF_Tensor::make(TF_FLOAT, dims));
  for (const auto& dims : kShapes) state.push_back(TF_Tensor::make(TF_FLOAT, dims));
  for (int k = 0; k < 3; ++k) state.push_back(TF_Tensor::make(TF_FLOAT, {1, 3}));
  for (uint32_t step = 0; step < 3; ++step) {
    TF_OpKernelContext context;
    context.inputs = std::move(state);
    context.outputs.resize(kState);
    for (TF_Tensor& g : held ? std::vector<TF_Tensor>((*held)[step]) : gradients(step)) context.inputs.push_back(std::move(g));
    context.inputs.push_back(doubles({0.25, 0.01, step ? 0.5 : 1.0, 1e-30, 1e-3, 1.0, 0.9}));
    context.inputs.push_back(doubles({0.01, 0.0, 0.01}));
    compute(kernel, &context);
    if (!context.failure.empty()) return context.failure;
    state = std::move(context.outputs);
  }
  std::string contents;
  for (const TF_Tensor& each : state) contents.append(each.memory.get(), each.bytes());
  return contents;
}

}  // namespace

int main() {
  stand_in();
  if (!adafactor_tensorflow_connect(adafactor_step, adafactor_abi(), 3, ADAFACTOR_BASELINE)) return std::puts("another ABI"), 1;
  TF_OpKernelConstruction construction;
  construction.numbers = {{"N", 3}, {"K", 4}, {"M", 3}, {"R", 3}};
  construction.words = {1, 1, 300, 1, 500, 1, 0, 1, 1, 1, 70'001, 1, 0, 1, 1, 1, 7, 1};
  void* kernel = create(&construction);
  const std::vector<std::vector<TF_Tensor>> held = {gradients(0), gradients(1), gradients(2)};
  const std::string expected = train(kernel, &held);
  int64_t seen = 0, taken = 0;
  adafactor_tensorflow_gradients(&seen, &taken);
  if (seen != 9 || taken != 0) return std::fprintf(stderr, "%s: %d gradients, %d taken\n", expected.c_str(), int(seen), int(taken)), 1;
  std::vector<std::string> results(6);
  std::vector<std::thread> threads;
  for (size_t k = 0; k < results.size(); ++k)
    threads.emplace_back([&, k] { results[k] = train(kernel, k % 2 ? &held : nullptr); });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& result : results)
    if (result != expected) return std::fprintf(stderr, "other bits from concurrent callers\n"), 1;
  adafactor_tensorflow_gradients(&seen, &taken);
  if (seen != 9 * 7 || taken != 9 * 3) return std::fprintf(stderr, "%d gradients, %d taken\n", int(seen), int(taken)), 1;
  for (size_t step = 0; step < held.size(); ++step)
    for (size_t k = 0; k < kShapes.size(); ++k)
      if (std::memcmp(held[step][k].memory.get(), gradients(uint32_t(step))[k].memory.get(), held[step][k].bytes()))
        return std::fprintf(stderr, "a gradient that others hold was written to\n"), 1;
  destroy(kernel);
  if (adafactor_tensorflow_left()) return std::fprintf(stderr, "parameters are still held\n"), 1;
  std::puts("ok");
  return 0;
}
