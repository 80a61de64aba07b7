// The kernels for any CPU; compiled with the baseline flags.
#include "vec_generic.h"
// After vec_generic.h, which defines Isa:
#include "kernels.inl"

namespace fastgen {

constinit const KernelTable kGenericKernels = kernel_table("generic");

}  // namespace fastgen
