// What the engine asks of each instruction set. Plain data only: this header is compiled for several processors, and
// an inline function from the standard library would be merged by the linker and might run on the wrong one.
#ifndef ADAFACTOR_KERNELS_H
#define ADAFACTOR_KERNELS_H

#include "adafactor.h"

namespace adafactor {

// Scratch of one tensor between measure and apply: buffers of T, doubles where said. A unit is a piece that one
// thread works on at a time; the cut depends on the shape alone, so that sums do not depend on the threads.
struct Workspace {
  void* finished;   // these three as in adafactor_tensor
  void* S;
  void* W;
  void* partial_S;  // [outer][parts] times S of a block, where a matrix is measured in several parts
  void* partial_W;
  double* Q;        // [units] sums of x^2, before or after the step
  double* Q_found;  // [units] where Q was known: what apply finds it to have been
  double* g2;       // [units] if not factored: sums of g^2 and of u^2
  double* u2;
  double* step_size;  // as in adafactor_tensor
  int64_t parts;
  int64_t units_per_slice;
};

// Blocks [b, b_end) and of these the rows (elements, if not factored) [begin, end). Only a whole block has company.
struct Unit {
  int64_t index, slice, part;
  int64_t b, b_end, begin, end;
  int64_t column, column_end;  // what it measures where columns come first, perhaps nothing; apply goes by rows
};

struct Kernels {
  void (*measure)(const adafactor_tensor&, const Workspace&, const Unit&);
  void (*combine)(const adafactor_tensor&, const Workspace&);  // adds what the units measured
  bool (*finish)(const adafactor_tensor&, const Workspace&);   // false: skip this tensor
  void (*commit)(const adafactor_tensor&, const Workspace&);   // what apply does not commit row by row
  void (*apply)(const adafactor_tensor&, const Workspace&, const Unit&);
  double (*scale)(const adafactor_tensor&, double Q);          // eq. 9
};

}  // namespace adafactor
#endif
