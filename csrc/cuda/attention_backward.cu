// fastgen::attention_backward on CUDA: what the kernels take, memory, launches.
#include "attention_backward.inl"
#include "attention_sm90.h"

#include <tuple>
#include <type_traits>

namespace fastgen {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T, int kWidth, bool kOwnsKeys>
using Arithmetic =
    std::conditional_t<std::is_same_v<T, float>, Scalars<kWidth, kOwnsKeys>, TensorCores<T, kWidth, kOwnsKeys>>;

template <class A>
void launch_gradients(const AttentionGradients& g, int64_t units, cudaStream_t stream) {
  if (units == 0) return;
  STD_TORCH_CHECK(units < (int64_t(1) << 31), "query: expected fewer than 2^31 tiles of rows on CUDA, got ", units);
  const size_t shared = GradientMemory<A>(nullptr, drops(g.c)).bytes;
  const auto start = [&](void (*kernel)(AttentionGradients)) {
    launch(kernel, dim3(unsigned(units)), dim3(A::kThreads), shared, stream, g);
  };
  if constexpr (!std::is_same_v<typename A::T, float>) {
    const bool extras = g.c.cap > 0 || g.c.mask.data != nullptr || g.c.slopes != nullptr || drops(g.c);
    if (!extras) return start(gradients_kernel<A, false>);
  }
  start(gradients_kernel<A, true>);
}

// Units of A, blocks: tiles of the rows that they own, for each head of each sequence. `starts` has what ragged ones
// need on the device.
template <class A>
int64_t plan(Arguments& arguments, AttentionCall& c, const Tensor& like, Optional& starts) {
  AttentionParams& p = arguments.p;
  const int64_t heads = A::kOwnsKeys ? p.kv_heads : p.heads;
  if (p.query_starts == nullptr) {
    return p.batch * heads * ceil_div(A::kOwnsKeys ? p.keys : p.queries, A::kRows);
  }
  const int64_t units = arguments.plan_units(p, heads, A::kOwnsKeys ? p.key_starts : p.query_starts, A::kRows);
  starts = upload_starts(c, p, like);
  return units;
}

template <class T, int kWidth>
void run(Arguments& arguments, AttentionGradients g, const Tensor& query, const Optional& grad_slopes) {
  using OfKeys = Arithmetic<T, kWidth, true>;
  using OfQueries = Arithmetic<T, kWidth, false>;
  const cudaStream_t stream = current_stream(query);
  const Tensor terms = make_terms<T>(g, int(query.size(2)), query);
  Optional starts;
  if (g.grad_key.data != nullptr || g.grad_value.data != nullptr) {
    const int64_t units = plan<OfKeys>(arguments, g.c, query, starts);
    launch_gradients<OfKeys>(g, units, stream);
  }
  if (g.grad_query.data == nullptr && !grad_slopes) return;
  const int64_t units = plan<OfQueries>(arguments, g.c, query, starts);
  Optional slope_sums;
  if (grad_slopes) {
    slope_sums = torch::stable::new_empty(query, {units}, ScalarType::Double);
    g.slope_sums = static_cast<double*>(slope_sums->mutable_data_ptr());
  }
  launch_gradients<OfQueries>(g, units, stream);
  if (grad_slopes && grad_slopes->numel() > 0) {
    launch(slopes_kernel, dim3(unsigned(grad_slopes->numel())), dim3(32), 0, stream, g, OfQueries::kRows,
           grad_slopes->dim() == 2, static_cast<float*>(grad_slopes->mutable_data_ptr()));
  }
}

// Calls body<T, kWidth>() for a call that the kernels take.
template <class Body>
auto with_kernels(const AttentionParams& p, const Body& body) {
  const bool narrow = p.width <= 64 && p.value_width <= 64;
  switch (p.dtype) {
    case DType::kBFloat16:
      return narrow ? body.template operator()<BFloat16, 64>() : body.template operator()<BFloat16, 128>();
    case DType::kFloat16:
      return narrow ? body.template operator()<Float16, 64>() : body.template operator()<Float16, 128>();
    default: return narrow ? body.template operator()<float, 64>() : body.template operator()<float, 128>();
  }
}

// What takes_attention takes, but for the gradient of a mask and for more shared memory than a block can have: float32
// of width 128 needs 150 KB, all else less than the 99 KB that every device from 8.0 on has.
bool takes(const AttentionParams& p, bool wants_mask) {
  return takes_attention(p) && !wants_mask && with_kernels(p, [&]<class T, int kWidth>() {
           const bool drops = p.keep < (uint64_t(1) << 32);
           return std::max(GradientMemory<Arithmetic<T, kWidth, true>>(nullptr, drops).bytes,
                           GradientMemory<Arithmetic<T, kWidth, false>>(nullptr, drops).bytes) <= shared_limit();
         });
}

Gradients attention_backward(const Optional& grad_out, const Optional& grad_lse, const Tensor& query, const Tensor& key,
                             const Tensor& value, const Optional& mask, const Optional& slopes, const Optional& cu_q,
                             const Optional& cu_k, const Optional& seed_offset, const Tensor& out, const Tensor& lse,
                             double dropout_p, double scale, double softcap, int64_t left, int64_t right,
                             bool lower_right, int64_t needs) {
  Arguments arguments(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, dropout_p, scale, softcap, left, right,
                      lower_right);
  arguments.check_backward(grad_out, grad_lse, query, mask, out, lse, needs);
  const OnDevice device(query);
  if (!takes(arguments.p, mask && (needs >> 3 & 1) != 0)) {
    return plain<Gradients>("fastgen::attention_backward", grad_out, grad_lse, query, key, value, mask, slopes, cu_q,
                            cu_k, seed_offset, out, lse, dropout_p, scale, softcap, left, right, lower_right, needs);
  }
  Tensor seed;
  AttentionGradients g{};
  g.c = attention_call(arguments.p, seed_offset_pointer(seed_offset, seed));
  const Tensor dense_lse = as_contiguous(lse);
  Optional dense_grad_lse;
  if (grad_lse) dense_grad_lse = as_contiguous(*grad_lse);
  g.out = operand(out);
  g.lse = static_cast<const float*>(dense_lse.const_data_ptr());
  if (grad_out) g.grad_out = operand(*grad_out);
  if (dense_grad_lse) g.grad_lse = static_cast<const float*>(dense_grad_lse->const_data_ptr());

  const auto needed = [&](int i) { return (needs >> i & 1) != 0; };
  const auto none = [&](const Tensor& like) { return torch::stable::new_empty(query, {0}, like.scalar_type()); };
  const auto result = [&](int i, const Tensor& like, Tensor4& to) {
    if (!needed(i)) return none(like);
    Tensor grad = empty_in_order(like, like.size(0), like.size(1), like.size(2), like.size(3));
    to = operand(grad);
    return grad;
  };
  const Tensor grad_query = result(0, query, g.grad_query), grad_key = result(1, key, g.grad_key),
               grad_value = result(2, value, g.grad_value);
  Optional grad_slopes;
  if (slopes && needed(4)) {
    grad_slopes = torch::stable::new_empty(query, slopes->sizes(), slopes->scalar_type());
  }
  const bool done = !grad_slopes && attention_backward_sm90(arguments, g, query);
  if (!done)
    with_kernels(arguments.p, [&]<class T, int kWidth>() { run<T, kWidth>(arguments, g, query, grad_slopes); });
  return {grad_query, grad_key, grad_value, none(mask ? *mask : query),
          grad_slopes ? *grad_slopes : none(slopes ? *slopes : query)};
}

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) { m.impl("attention_backward", TORCH_BOX(&fastgen::attention_backward)); }
