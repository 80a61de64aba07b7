// All kernels of an instruction set and their table (after a vec_*.h, which defines Isa).
#pragma once

#include "activation_kernels.inl"
#include "attention_kernels.inl"
#include "cell.inl"
#include "generate.inl"
#include "kernel_table.h"
#include "linear_rows.inl"
#include "matrix.inl"
#include "probe.inl"
#include "random.inl"
#include "recurrent_kernels.inl"
#include "reparameterize.inl"

namespace fastgen {
namespace {

constexpr KernelTable kernel_table(const char* isa) {
  return {isa,
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
          recurrent_cell_rows,
          recurrent_cell_backward,
          linear_rows,
          linear_rows_backward,
          attention_sizes,
          attention,
          attention_backward_sizes,
          attention_backward,
          matrix_sizes,
          matrix_product,
          activation,
          activation_backward,
          activation_add_blocks,
          draw_tokens};
}

}  // namespace
}  // namespace fastgen
