// Who works on what, when. See engine.cpp.
#ifndef ADAFACTOR_ENGINE_H
#define ADAFACTOR_ENGINE_H

#include "kernels.h"

namespace adafactor {

enum Verb { kMeasure = 1, kFinish = 2, kApply = 4, kStep = 7 };

// Somebody else's threads in place of pool.h's: `run` does what run_parallel does, which is told `threads` besides.
struct Crew {
  void (*run)(void* threads, int helpers, void (*work)(void*), void* context);
  void* threads;
};

// Returns false where memory ran out. `kernels`: of float and of double. `crew`: null for the threads of pool.h.
bool run(adafactor_tensor* tensors, int64_t count, int64_t threads, const Kernels* kernels, Verb verb,
         const Crew* crew = nullptr);

// The verbs of adafactor.h, and what they return.
int perform(adafactor_tensor* tensors, int64_t count, int64_t threads, int64_t isa, Verb verb,
            const Crew* crew = nullptr);

}  // namespace adafactor
#endif
