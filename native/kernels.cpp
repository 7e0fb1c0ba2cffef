// Measure and apply: plain loops over tiles of float (double for float64 parameters), compiled once per instruction
// set as ADAFACTOR_NS. No function here or in what it includes has external linkage but `kernels`, and no sum
// depends on the width of a register: hence the same bits everywhere.

#include "apply.h"
#include "finish.h"
#include "measure.h"

namespace ADAFACTOR_NS {

extern const adafactor::Kernels kernels[2];
const adafactor::Kernels kernels[2] = {  // of float and of double
    {measure<float>, combine<float>, finish<float>, commit<float>, apply<float>, parameter_scale},
    {measure<double>, combine<double>, finish<double>, commit<double>, apply<double>, parameter_scale},
};

}  // namespace ADAFACTOR_NS
