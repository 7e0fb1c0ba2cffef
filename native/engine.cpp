// Small tensors are measured and applied by one thread while they are in its cache, several in one turn. Of a large
// tensor the chunks are measured by whoever is free; who finishes the last one adds up the sums, finishes the columns,
// and makes the chunks available to apply, which are taken in reverse: what was read last may still be in cache.
// Nobody waits at a barrier: while one tensor is being finished, the others measure the next.

#include "engine.h"

#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "plan.h"
#include "pool.h"

namespace adafactor {
namespace {

// Memory that grows as needed and is not initialised.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  char* reserve(size_t size) {
    if (size <= size_) return data_;
    std::free(data_);
    data_ = static_cast<char*>(std::malloc(size));
    size_ = data_ ? size : 0;
    return data_;
  }
  Buffer* next = nullptr;

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

struct Work {
  adafactor_tensor& t;
  Plan plan;
  Workspace space = {};
  Buffer* buffer = nullptr;
  int64_t measured = 0, applied = 0, next_apply = 0;
  explicit Work(adafactor_tensor& tensor) : t(tensor), plan(tensor) {}
};

size_t bytes_of(int64_t dtype) { return dtype == ADAFACTOR_FLOAT64 ? 8 : dtype == ADAFACTOR_FLOAT32 ? 4 : 2; }

size_t padded(int64_t bytes) { return (size_t(bytes) + 63) / 64 * 64; }

// Lays out the workspace; false where memory ran out.
bool prepare(Work& work, Buffer& buffer, Verb verb) {
  const adafactor_tensor& t = work.t;
  const Plan& plan = work.plan;
  Workspace& space = work.space;
  const bool factored = t.flags & ADAFACTOR_FACTORED;
  const int64_t element = t.param_dtype == ADAFACTOR_FLOAT64 ? 8 : 4;
  int64_t rows = t.outer * t.rows * t.inner, columns = t.outer * t.inner * t.columns;
  if (t.flags & ADAFACTOR_COLUMNS_FIRST) std::swap(rows, columns);
  const int64_t sums = factored ? columns : t.slices;
  const size_t finished = factored && !t.finished ? padded(rows * element) : 0;
  const bool own_S = !t.S || (verb == kMeasure && (t.flags & ADAFACTOR_ROWS_SUMMED));  // complete: not added to again
  const size_t S = own_S ? padded(sums * element) : 0, W = t.W ? 0 : padded(sums * element);
  const size_t partial = factored && plan.sum_parts > 1 ? padded(columns * plan.sum_parts * element) : 0;
  const size_t units = padded(plan.units * 8), step_size = t.step_size ? 0 : padded(t.slices * 16);
  char* at = buffer.reserve(finished + S + W + 2 * partial + 4 * units + step_size);
  if (!at) return false;
  const auto take = [&at](size_t size) {
    char* here = at;
    at += size;
    return here;
  };
  space.finished = finished ? take(finished) : t.finished;
  space.S = S ? take(S) : t.S;
  space.W = W ? take(W) : t.W;
  space.partial_S = take(partial);
  space.partial_W = take(partial);
  space.Q = reinterpret_cast<double*>(take(units));
  space.Q_found = reinterpret_cast<double*>(take(units));
  space.g2 = reinterpret_cast<double*>(take(units));
  space.u2 = reinterpret_cast<double*>(take(units));
  space.step_size = step_size ? reinterpret_cast<double*>(take(step_size)) : t.step_size;
  space.parts = plan.sum_parts;
  space.units_per_slice = plan.units_per_slice;
  return true;
}

struct Task {
  enum Kind { kNone, kSmall, kMeasureChunk, kApplyChunk } kind = kNone;
  Work* work = nullptr;
  int64_t chunk = 0;   // or one past the last of the small tensors from `work` on
};

class Schedule {
 public:
  Schedule(const Kernels* kernels, Verb verb) : kernels_(kernels), verb_(verb) {}
  ~Schedule() {
    for (int64_t k = 0; k < large_ + small_; ++k) works_[k].~Work();
    std::free(works_);
    std::free(ready_);
    while (buffers_) delete pop();
  }

  // Large tensors first: the many small ones then fill the gaps at the end.
  bool add(adafactor_tensor* tensors, int64_t count) {
    works_ = static_cast<Work*>(std::malloc(sizeof(Work) * size_t(count)));
    ready_ = static_cast<Work**>(std::malloc(sizeof(Work*) * size_t(count)));
    if (!works_ || !ready_) {
      std::free(works_);
      works_ = nullptr;
      return false;
    }
    int64_t last = count;
    for (int64_t k = count; k-- > 0;) {
      Work work(tensors[k]);
      elements_ += work.plan.units ? tensors[k].outer * tensors[k].rows * tensors[k].inner * tensors[k].columns : 0;
      if (work.plan.chunks <= 1) new (works_ + --last) Work(work);
    }
    small_ = count - last;
    for (int64_t k = 0; k < count; ++k) {
      Work work(tensors[k]);
      if (work.plan.chunks > 1) new (works_ + large_++) Work(work);
    }
    return true;
  }

  int64_t most_threads() const { return 1 + elements_ / (kGrain / 2); }
  bool failed() const { return failed_; }

  void work() {
    // Rounding and subnormals as IEEE has them, whatever the calling thread or a worker had been set to.
    std::fenv_t environment;
    std::fegetenv(&environment);
    std::fesetenv(FE_DFL_ENV);
    {
      Buffer buffer;
      for (Task task = take(); task.kind != Task::kNone; task = take()) perform(task, buffer);
    }
    std::fesetenv(&environment);
  }

 private:
  const Kernels& kernels(const Work& work) const { return kernels_[work.t.param_dtype == ADAFACTOR_FLOAT64]; }

  Task take() {
    Task task;
    std::unique_lock<std::mutex> lock(mutex_);
    for (; !failed_;) {
      if (ready_first_ < ready_last_) {
        Work& work = *ready_[ready_first_];
        task.kind = Task::kApplyChunk;
        task.work = &work;
        task.chunk = work.plan.chunks - ++work.next_apply;
        if (task.chunk == 0) ++ready_first_;
        return task;
      }
      if (next_large_ < large_) {
        Work& work = works_[next_large_];
        if (next_chunk_ == 0) {
          ++in_flight_;
          work.buffer = buffers_ ? pop() : new (std::nothrow) Buffer;
          if (!work.buffer || !prepare(work, *work.buffer, verb_)) {
            failed_ = true;
            changed_.notify_all();
            break;
          }
        }
        task.kind = Task::kMeasureChunk;
        task.work = &work;
        task.chunk = next_chunk_++;
        if (next_chunk_ == turns(work)) ++next_large_, next_chunk_ = 0;
        return task;
      }
      if (next_small_ < small_) {
        task.kind = Task::kSmall;
        task.work = works_ + large_ + next_small_;
        for (int64_t elements = 0; next_small_ < small_ && elements < kGrain / 2; ++next_small_) {
          const adafactor_tensor& t = works_[large_ + next_small_].t;
          elements += t.outer * t.rows * t.inner * t.columns + 256;  // and something for the call itself
        }
        task.chunk = large_ + next_small_;
        return task;
      }
      if (in_flight_ == 0) break;
      changed_.wait(lock);
    }
    return task;
  }

  // Chunks to measure; before a mere apply there is one turn, to finish the columns.
  int64_t turns(const Work& work) const { return (verb_ & kMeasure) ? work.plan.chunks : 1; }

  void perform(const Task& task, Buffer& buffer) {
    Work& work = *task.work;
    if (task.kind == Task::kSmall) {
      for (Work* small = task.work; small != works_ + task.chunk; ++small) perform_small(*small, buffer);
    } else if (task.kind == Task::kMeasureChunk) {
      if (verb_ & kMeasure) chunk(work, task.chunk, kernels(work).measure);
      std::unique_lock<std::mutex> lock(mutex_);
      if (++work.measured < turns(work)) return;
      lock.unlock();
      const bool applies = between(work);
      lock.lock();
      --in_flight_;
      if (applies) ready_[ready_last_++] = &work;
      else release(work);
      changed_.notify_all();
    } else {
      chunk(work, task.chunk, kernels(work).apply);
      std::unique_lock<std::mutex> lock(mutex_);
      if (++work.applied < work.plan.chunks) return;
      lock.unlock();
      conclude(work);
      lock.lock();
      release(work);
    }
  }

  void perform_small(Work& work, Buffer& buffer) {
    if (verb_ & kMeasure) work.t.skipped = 0;
    if (work.plan.units == 0) {
      if (work.t.flags & ADAFACTOR_SCALE_PARAMETER)
        for (int64_t s = 0; s < work.t.slices; ++s) work.t.Q[s] = 0;
      return;
    }
    if (!prepare(work, buffer, verb_)) {
      std::lock_guard<std::mutex> lock(mutex_);
      failed_ = true;
      changed_.notify_all();
      return;
    }
    if (verb_ & kMeasure) chunk(work, 0, kernels(work).measure);
    if (!between(work)) return;
    chunk(work, 0, kernels(work).apply);
    conclude(work);
  }

  void chunk(const Work& work, int64_t index, void (*kernel)(const adafactor_tensor&, const Workspace&, const Unit&)) {
    const int64_t first = index * work.plan.units_per_chunk;
    const int64_t last = std::min(first + work.plan.units_per_chunk, work.plan.units);
    for (int64_t k = first; k < last; ++k) kernel(work.t, work.space, work.plan.unit(k, work.t));
  }

  // What lies between the passes; true where the second one follows.
  bool between(Work& work) {
    if (verb_ & kMeasure) work.t.skipped = 0, kernels(work).combine(work.t, work.space);
    if (verb_ & kFinish) work.t.skipped = !kernels(work).finish(work.t, work.space);
    if (!(verb_ & kApply)) return false;
    if (work.t.skipped) leave_alone(work.t);
    else kernels(work).commit(work.t, work.space);
    return !work.t.skipped;
  }

  // What apply would have left elsewhere is what it was.
  static void leave_alone(const adafactor_tensor& t) {
    const size_t size = size_t(t.outer * t.rows * t.inner * t.columns);
    if (t.target && t.target != t.param) std::memcpy(t.target, t.param, size * bytes_of(t.param_dtype));
    if (t.momentum && t.momentum_target && t.momentum_target != t.momentum)
      std::memcpy(t.momentum_target, t.momentum, size * bytes_of(t.momentum_dtype));
  }

  // What apply leaves behind besides the tensors: that it was made, and the sums of the new x^2.
  void conclude(Work& work) {
    if (work.t.count) ++*work.t.count;
    if (!(work.t.flags & ADAFACTOR_SCALE_PARAMETER)) return;
    if (work.t.flags & ADAFACTOR_Q_KNOWN) rescale(work);
    for (int64_t s = 0; s < work.t.slices; ++s) work.t.Q[s] = of_slice(work, work.space.Q, s);
  }

  static double of_slice(const Work& work, const double* of_units, int64_t slice) {
    const int64_t n = work.plan.units_per_slice;
    double sum = 0;
    for (int64_t k = slice * n; k < (slice + 1) * n; ++k) sum += of_units[k];
    return sum;
  }

  // Q was known and yet not true: somebody wrote to x since. What lacks to the step of the right size is made up for,
  // as a step along the same direction without decay, momentum or statistics of its own.
  void rescale(Work& work) {
    const adafactor_tensor& t = work.t;
    bool wrong = false;
    for (int64_t s = 0; s < t.slices; ++s) {
      const double Q = of_slice(work, work.space.Q_found, s);
      double& step = work.space.step_size[2 * s];
      const bool same = Q == t.Q[s] || (Q != Q && t.Q[s] != t.Q[s]);
      const double scale = same ? 0 : kernels(work).scale(t, Q);
      step = same ? 0 : t.rho * scale - step;
      wrong = wrong || step != 0;
      if (!same && t.diagnostics) t.diagnostics[4 * s + 2] = scale;
    }
    if (!wrong || t.target == t.grad) return;
    adafactor_tensor rest = t;
    if (t.target) rest.param = t.target;
    if (t.momentum_target) rest.momentum = t.momentum_target;
    rest.flags &= ~uint64_t(ADAFACTOR_Q_KNOWN);
    rest.decay_factor = 1, rest.ema_weight = 0, rest.beta1 = 1, rest.seed = ~t.seed;
    for (int64_t k = 0; k < work.plan.units; ++k) kernels(work).apply(rest, work.space, work.plan.unit(k, t));
  }

  Buffer* pop() {
    Buffer* first = buffers_;
    buffers_ = first->next;
    return first;
  }

  void release(Work& work) {
    work.buffer->next = buffers_;
    buffers_ = work.buffer;
    work.buffer = nullptr;
  }

  const Kernels* const kernels_;
  const Verb verb_;
  Work* works_ = nullptr;   // the large ones, then the small ones
  int64_t large_ = 0, small_ = 0, elements_ = 0;

  std::mutex mutex_;        // guards what follows and the counters in Work
  std::condition_variable changed_;
  int64_t next_large_ = 0, next_chunk_ = 0, next_small_ = 0, in_flight_ = 0;
  Work** ready_ = nullptr;  // measured and finished, in order
  int64_t ready_first_ = 0, ready_last_ = 0;
  Buffer* buffers_ = nullptr;
  bool failed_ = false;
};

}  // namespace

bool run(adafactor_tensor* tensors, int64_t count, int64_t threads, const Kernels* kernels, Verb verb,
         const Crew* crew) {
  if (count == 0) return true;
  Schedule schedule(kernels, verb);
  if (!schedule.add(tensors, count)) return false;
  const int64_t helpers = std::min(threads, schedule.most_threads()) - 1;
  const int wanted = int(std::min<int64_t>(helpers, 1023));
  const auto work = [](void* s) { static_cast<Schedule*>(s)->work(); };
  if (crew && wanted > 0) crew->run(crew->threads, wanted, work, &schedule);
  else run_parallel(wanted, work, &schedule);
  return !schedule.failed();
}

}  // namespace adafactor
