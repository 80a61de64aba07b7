// What the kernels of the backward pass of attention share: their operands, and what they need of each row.
#pragma once

#include "attention.h"

namespace fastgen {

// Beside the arguments of the forward pass.
struct GradientOperands {
  Tensor4 out, grad_out;  // data null: zero
  const float *lse, *grad_lse;
  Tensor4 grad_query, grad_key, grad_value;  // last stride 1; data null: not wanted
};

namespace {

// All that a kernel knows.
struct AttentionGradients : GradientOperands {
  AttentionCall c;
  float2* terms;       // of each row of lse: see terms_kernel
  int terms_rows;      // of each head, at least as many as queries
  double* slope_sums;  // of each unit that owns queries, or null
};

// Of each row what its weights and their gradients lack: its log-sum-exp in units of log 2, and delta. A row that sees
// no key has (inf, 0): weights of 2^-inf, and no gradient even where that of its lse is not finite. So have rows behind
// the queries of a head. A warp has a row.
constexpr int kTermsThreads = 256;

template <class T>
__global__ void __launch_bounds__(kTermsThreads) terms_kernel(const AttentionGradients g, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * (kTermsThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = int(threadIdx.x) % 32, i = int(row % g.terms_rows);
  const int64_t head = row / g.terms_rows, h = head % g.c.heads, b = head / g.c.heads;
  const int64_t of_lse = head * g.c.queries + i;
  if (i >= g.c.queries) {
    if (lane == 0) g.terms[row] = {INFINITY, 0.0f};
    return;
  }
  float delta = 0.0f;
  if (g.grad_out.data != nullptr) {
    const Rows<T> grad = rows_of<T>(g.grad_out, int(b), int(h), i, g.c.value_width);
    const Rows<T> out = rows_of<T>(g.out, int(b), int(h), i, g.c.value_width);
    for (int k = lane; k < g.c.value_width; k += 32) {
      delta += widen(grad.data[k * grad.step]) * widen(out.data[k * out.step]);
    }
    for (int mask = 16; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  }
  if (lane != 0) return;
  if (g.grad_lse != nullptr) delta -= g.grad_lse[of_lse];
  const bool sees_any = g.lse[of_lse] != -INFINITY;
  g.terms[row] = {sees_any ? g.lse[of_lse] * kLog2E : INFINITY, sees_any ? delta : 0.0f};
}

// Of `rows` rows, those of all heads.
template <class T>
Tensor make_terms(AttentionGradients& g, int terms_rows, const Tensor& query) {
  const int64_t rows = query.size(0) * query.size(1) * terms_rows;
  const Tensor terms = torch::stable::new_empty(query, {rows, 2}, ScalarType::Float);
  g.terms = static_cast<float2*>(terms.mutable_data_ptr());
  g.terms_rows = terms_rows;
  if (rows > 0) {
    const auto blocks = unsigned(ceil_div(rows, kTermsThreads / 32));
    launch(terms_kernel<T>, dim3(blocks), dim3(kTermsThreads), 0, current_stream(query), g, rows);
  }
  return terms;
}

}  // namespace
}  // namespace fastgen
