// Who works on what, when. See engine.cpp.
#ifndef ADAFACTOR_ENGINE_H
#define ADAFACTOR_ENGINE_H

#include "kernels.h"

namespace adafactor {

enum Verb { kMeasure = 1, kApply = 2, kStep = 3 };

// Returns false where memory ran out. `kernels`: of float and of double.
bool run(adafactor_tensor* tensors, int64_t count, int64_t threads, const Kernels* kernels, Verb verb);

}  // namespace adafactor
#endif
