// A few threads that sleep until there is work. The caller always works too, so every call makes progress whatever
// the workers do, and several threads may call at once.
//
// Where a framework in this process computes with OpenMP, its threads spin for some milliseconds after each of its
// operations, in the way of any others: `use_openmp` has them do our work.
#ifndef ADAFACTOR_POOL_H
#define ADAFACTOR_POOL_H

namespace adafactor {

// Runs work(context) on the calling thread and on up to `helpers` others at the same time; returns when all are done.
// `work` may run on fewer threads: it must take its share from a common list until that is empty.
void run_parallel(int helpers, void (*work)(void*), void* context);

// GOMP_parallel and omp_get_max_threads.
struct OpenMP {
  void (*parallel)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
  int (*most_threads)(void);
};

// For calls that want no more threads than OpenMP has; not in a child of fork(), where OpenMP has lost them.
void use_openmp(const OpenMP& openmp);

}  // namespace adafactor
#endif
