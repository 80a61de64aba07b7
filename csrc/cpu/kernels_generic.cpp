// The kernels for any CPU; compiled with the baseline flags.
#include "kernel_table.h"
#include "vec_generic.h"
// After vec_generic.h, which defines Isa:
#include "probe.inl"
#include "random.inl"
#include "reparameterize.inl"
#include "recurrent_kernels.inl"
#include "cell.inl"
#include "generate.inl"

namespace fastgen {

const KernelTable kGenericKernels = {"generic",
                                     kProbes,
                                     random,
                                     reparameterize,
                                     reparameterize_add_pieces,
                                     reparameterize_backward,
                                     recurrent_sizes,
                                     recurrent,
                                     recurrent_backward_sizes,
                                     recurrent_backward,
                                     recurrent_cell,
                                     recurrent_cell_backward,
                                     linear_rows,
                                     draw_tokens};

}  // namespace fastgen
