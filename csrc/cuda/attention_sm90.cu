// Built for sm_90a alone where 9.0 is among the architectures (setup.py), and then FASTGEN_SM90A is defined; a build
// without it has no such kernel.
#include "attention_sm90.h"

#include <algorithm>

#include "attention_sm90.inl"

namespace fastgen {

#if defined(FASTGEN_SM90A) || defined(FASTGEN_EMULATED)
namespace {

constexpr int64_t kCached = 16 << 20;  // bytes of keys and values that are read together, a third of the cache

// Whether every row starts a whole number of aligned pieces of 16 bytes from the first one.
bool has_vectors(const Tensor4& x, int64_t width) {
  const bool whole = x.stride[0] % 8 == 0 && x.stride[1] % 8 == 0 && x.stride[2] % 8 == 0 && width % 8 == 0;
  return whole && x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Whether the kernel takes a call with so many units.
bool takes(const AttentionParams& p, int64_t most_queries, int64_t units) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const bool plain = p.softcap == 0 && p.mask.data == nullptr && p.slopes == nullptr && p.keep == uint64_t(1) << 32;
  return compute_capability() == 90 && half && plain && p.scale > 0 && has_vectors(p.query, p.width) &&
         has_vectors(p.key, p.width) && has_vectors(p.value, p.value_width) && most_queries > kSm90Rows / 2 &&
         2 * units >= multiprocessors() && units < int64_t(1) << 31;
}

}  // namespace

bool attention_sm90(Arguments& arguments, const Tensor& query, const Tensor& out, const Tensor& lse) {
  AttentionParams& p = arguments.p;
  const auto [most_queries, most_keys] = arguments.longest();
  int64_t units = p.batch * p.heads * ceil_div(p.queries, kSm90Rows);
  if (p.query_starts != nullptr) units = arguments.plan_units(p, p.heads, p.query_starts, kSm90Rows);
  if (!takes(p, most_queries, units)) return false;
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
  c.together = unsigned(std::clamp<int64_t>(kCached / bytes, 1, p.batch * p.kv_heads) * c.group);
  const auto go = [&](auto* kernel, size_t shared) {
    const int64_t blocks = std::min<int64_t>(units, multiprocessors());
    launch(kernel, dim3(unsigned(blocks)), dim3(kSm90Threads), shared, current_stream(query), c);
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
