// The kernels for AVX-512; compiled with its own -m flags, and only called where isa.cpp finds the CPU able.
#include "kernel_table.h"
#include "vec_avx512.h"
// After vec_avx512.h, which defines Isa:
#include "probe.inl"
#include "random.inl"
#include "reparameterize.inl"
#include "recurrent_kernels.inl"
#include "cell.inl"
#include "generate.inl"

namespace fastgen {

const KernelTable kAvx512Kernels = {"avx512",
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
