// Built for sm_90a alone where 9.0 is among the architectures (setup.py), and then FASTGEN_SM90A is defined; a build
// without it has no such kernel.
#include "attention_sm90.h"

#include <algorithm>

#include "attention_sm90.inl"

namespace fastgen {

#if defined(FASTGEN_SM90A) || defined(FASTGEN_EMULATED)
bool attention_sm90(Arguments& arguments, const Tensor& query, const Tensor& out, const Tensor& lse) {
  AttentionParams& p = arguments.p;
  const auto [most_queries, most_keys] = arguments.longest();
  int64_t units = p.batch * p.heads * ceil_div(p.queries, kSm90Rows);
  if (p.query_starts != nullptr) units = arguments.plan_units(p, p.heads, p.query_starts, kSm90Rows);
  if (!takes_sm90(p) || most_queries <= kSm90Rows / 2) return false;
  if (2 * units < multiprocessors() || units >= int64_t(1) << 31) return false;
  PersistentCall c{};
  static_cast<AttentionCall&>(c) = attention_call(p, nullptr);
  const Optional starts = upload_starts(c, p, query);
  c.out = operand(out);
  c.lse = static_cast<float*>(lse.mutable_data_ptr());
  c.rows = lse.numel();
  c.group = int(p.heads / p.kv_heads);
  c.packed = c.splits = 1;
  c.tile_rows = kSm90Rows;
  c.tiles = int(ceil_div(p.queries, kSm90Rows));
  c.units = unsigned(units);
  const int64_t bytes = std::max<int64_t>(p.keys * (p.width + p.value_width) * 2, 1);
  c.together = unsigned(std::clamp<int64_t>(kCachedSm90 / bytes, 1, p.batch * p.kv_heads) * c.group);
  const auto go = [&](auto* kernel, size_t shared) {
    const int64_t blocks = std::min<int64_t>(units, multiprocessors());
    launch(kernel, dim3(unsigned(blocks)), dim3(kRingThreads), shared, current_stream(query), c);
  };
  const bool wide = std::max(p.width, p.value_width) > 64;
  if (p.dtype == DType::kBFloat16) {
    wide ? go(&attention_sm90_kernel<BFloat16, 128>, kSm90Shared<128>)
         : go(&attention_sm90_kernel<BFloat16, 64>, kSm90Shared<64>);
  } else {
    wide ? go(&attention_sm90_kernel<Float16, 128>, kSm90Shared<128>)
         : go(&attention_sm90_kernel<Float16, 64>, kSm90Shared<64>);
  }
  return true;
}

#else

bool attention_sm90(Arguments&, const Tensor&, const Tensor&, const Tensor&) { return false; }

#endif

}  // namespace fastgen
