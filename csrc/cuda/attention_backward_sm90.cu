// Built as attention_sm90.cu is.
#include <algorithm>

#include "attention_backward_sm90.inl"
#include "attention_sm90.h"

namespace fastgen {

#if defined(FASTGEN_SM90A) || defined(FASTGEN_EMULATED)
namespace {

template <class T, bool kOwnsKeys>
void launch_sm90(PersistentGradients g, const AttentionParams& p, int64_t units, const Tensor& query) {
  g.units = unsigned(units);
  g.tiles = unsigned(ceil_div(kOwnsKeys ? p.keys : p.queries, kOwnedRows));
  // What a head reads; heads of queries that read one head of keys share it.
  const int64_t bytes = (p.width + p.value_width) * 2 * (kOwnsKeys ? p.queries * (p.heads / p.kv_heads) : p.keys);
  const int64_t most = p.batch * p.kv_heads, together = std::clamp<int64_t>(kCachedSm90 / bytes, 1, most);
  g.together = unsigned(together * (kOwnsKeys ? 1 : p.heads / p.kv_heads));
  const int64_t blocks = std::min<int64_t>(units, multiprocessors());
  launch(gradients_sm90_kernel<T, kOwnsKeys>, dim3(unsigned(blocks)), dim3(kRingThreads),
         kGradientsShared<T, kOwnsKeys>, current_stream(query), g);
}

}  // namespace

bool attention_backward_sm90(Arguments& arguments, const GradientOperands& operands, const Tensor& query) {
  const AttentionParams& p = arguments.p;
  if (!takes_sm90(p) || p.query_starts != nullptr || std::max(p.width, p.value_width) > 64) return false;
  if (operands.grad_out.data == nullptr || !has_vectors(operands.grad_out, p.value_width)) return false;
  if (p.queries <= kOwnedRows / 2 || p.keys <= kOwnedRows / 2) return false;
  const int64_t of_queries = p.batch * p.heads * ceil_div(p.queries, kOwnedRows);
  const int64_t of_keys = p.batch * p.kv_heads * ceil_div(p.keys, kOwnedRows);
  if (2 * std::min(of_queries, of_keys) < multiprocessors()) return false;
  if (std::max(of_queries, of_keys) >= int64_t(1) << 31) return false;
  PersistentGradients g{};
  static_cast<GradientOperands&>(g) = operands;
  g.c = attention_call(p, nullptr);
  const auto run = [&]<class T>() {
    const Tensor terms = make_terms<T>(g, int(ceil_div(p.queries, kPairRows) * kPairRows), query);
    if (g.grad_key.data != nullptr || g.grad_value.data != nullptr) launch_sm90<T, true>(g, p, of_keys, query);
    if (g.grad_query.data != nullptr) launch_sm90<T, false>(g, p, of_queries, query);
  };
  p.dtype == DType::kBFloat16 ? run.template operator()<BFloat16>() : run.template operator()<Float16>();
  return true;
}

#else

bool attention_backward_sm90(Arguments&, const GradientOperands&, const Tensor&) { return false; }

#endif

}  // namespace fastgen
