#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace adafactor {
namespace {

struct Job {
  void (*work)(void*);
  void* context;
  int vacant;       // helpers still wanted
  int active = 0;   // helpers at work
  Job* next = nullptr;
  std::condition_variable left;
};

struct Pool {
  std::mutex mutex;
  std::condition_variable wanted;
  Job* jobs = nullptr;
  int threads = 0;
  int idle = 0;

  Job* vacancy() {
    for (Job* job = jobs; job; job = job->next)
      if (job->vacant > 0) return job;
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      Job* job = vacancy();
      if (!job) {
        ++idle;
        wanted.wait(lock);
        --idle;
        continue;
      }
      --job->vacant;
      ++job->active;
      lock.unlock();
      job->work(job->context);
      lock.lock();
      if (--job->active == 0) job->left.notify_one();
    }
  }

  // Workers are detached and the pool is never destroyed: at exit they are asleep and simply end with the process.
  void grow(int count) {
    for (; threads < count; ++threads) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the caller does the work
      }
    }
  }

  void run(int helpers, void (*work)(void*), void* context) {
    Job job;
    job.work = work;
    job.context = context;
    job.vacant = helpers;
    {
      std::lock_guard<std::mutex> lock(mutex);
      grow(helpers);
      job.next = jobs;
      jobs = &job;
    }
    for (int k = 0; k < helpers; ++k) wanted.notify_one();
    work(context);
    std::unique_lock<std::mutex> lock(mutex);
    for (Job** link = &jobs; *link; link = &(*link)->next) {
      if (*link == &job) {
        *link = job.next;
        break;
      }
    }
    while (job.active > 0) job.left.wait(lock);
  }
};

// A child of fork() has the parent's pool in memory but none of its threads, and locks in an unknown state: it starts
// a new pool and leaves the old one alone. The storage is static so that the handler need not allocate.
alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* pool = nullptr;

OpenMP openmp = {nullptr, nullptr};

void renew() {
  pool = new (storage) Pool;
  openmp = {nullptr, nullptr};
}

struct Start {
  Start() {
    renew();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, renew);
#endif
  }
} start;

}  // namespace

void use_openmp(const OpenMP& functions) { openmp = functions; }

// A team has the size that OpenMP's other users gave it, because another size ends threads and starts them: those of
// it that are not wanted have no share.
void run_parallel(int helpers, void (*work)(void*), void* context) {
  if (helpers <= 0) return work(context);
  if (!openmp.parallel || helpers >= openmp.most_threads()) return pool->run(helpers, work, context);
  struct Shares {
    void (*work)(void*);
    void* context;
    std::atomic<int> left;
  } shares = {work, context, {helpers + 1}};
  const auto take = [](void* data) {
    Shares& shares = *static_cast<Shares*>(data);
    if (shares.left.fetch_sub(1) > 0) shares.work(shares.context);
  };
  openmp.parallel(take, &shares, 0, 0);
}

}  // namespace adafactor
