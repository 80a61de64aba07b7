// fastgen::attention on CUDA: which kernel, how rows and keys are dealt out to blocks, and memory.
#include "attention.h"

#include <algorithm>

#include "attention_forward.inl"
#include "attention_sm90.h"

namespace fastgen {
namespace {

using Kernel = void (*)(ForwardCall);

// A kernel for tiles of `rows` rows.
struct Choice {
  Kernel kernel;
  int rows, threads, tile_keys;
  size_t shared;
};

template <class T, int kWidth>
Choice choose_half(int64_t rows, bool extras) {
  const int warps = int(std::clamp<int64_t>(ceil_div(rows, 16), 1, extras ? 8 : 4));
  const auto choice = [&](Kernel kernel, int fragments, size_t shared) {
    return Choice{kernel, 16 * fragments * warps, 32 * warps, kTileKeys, shared};
  };
  if (extras) return choice(&attention_kernel<T, kWidth, 1, true>, 1, kForwardShared<kWidth, 1>);
  if (rows > 64) return choice(&attention_kernel<T, kWidth, 2, false>, 2, kForwardShared<kWidth, 2>);
  return choice(&attention_kernel<T, kWidth, 1, false>, 1, kForwardShared<kWidth, 1>);
}

template <int kWidth>
Choice choose(const ForwardCall& c, int64_t rows) {
  if (c.dtype == DType::kFloat32) {
    if (rows > 16) return {&attention_float_kernel<kWidth, 4>, 64, 256, kFloatKeys<kWidth>, kFloatShared<kWidth, 4>};
    return {&attention_float_kernel<kWidth, 1>, 16, 256, kFloatKeys<kWidth>, kFloatShared<kWidth, 1>};
  }
  const bool extras = c.cap > 0 || c.mask.data != nullptr || c.slopes != nullptr || drops(c) || !(c.product_scale > 0);
  return c.dtype == DType::kBFloat16 ? choose_half<BFloat16, kWidth>(rows, extras)
                                     : choose_half<Float16, kWidth>(rows, extras);
}

constexpr int64_t kPackedRows = 64;   // heads of one key head are packed together up to here
constexpr int64_t kTilesOfSplit = 2;  // at least, where keys are split

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
                                     const Optional& slopes, const Optional& cu_q, const Optional& cu_k,
                                     const Optional& seed_offset, double dropout_p, double scale, double softcap,
                                     int64_t left, int64_t right, bool lower_right) {
  Arguments arguments(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, dropout_p, scale, softcap, left, right,
                      lower_right);
  AttentionParams& p = arguments.p;
  if (!takes_attention(p)) {
    return plain<std::tuple<Tensor, Tensor>>("fastgen::attention", query, key, value, mask, slopes, cu_q, cu_k,
                                             seed_offset, dropout_p, scale, softcap, left, right, lower_right);
  }
  const OnDevice device(query);
  const Tensor out = empty_in_order(query, query.size(0), p.heads, p.queries, p.value_width);
  const Tensor lse = torch::stable::new_empty(query, {query.size(0), p.heads, p.queries}, ScalarType::Float);
  if (lse.numel() == 0 || attention_sm90(arguments, query, out, lse)) return {out, lse};
  Tensor keep_seed;
  ForwardCall c{};
  static_cast<AttentionCall&>(c) = attention_call(p, seed_offset_pointer(seed_offset, keep_seed));
  c.out = operand(out);
  c.lse = static_cast<float*>(lse.mutable_data_ptr());
  c.rows = lse.numel();

  const auto [most_queries, most_keys] = arguments.longest();
  c.group = int(p.heads / p.kv_heads);
  c.packed = c.group * most_queries <= kPackedRows ? c.group : 1;
  // Tiles of 128 rows read keys half as often as those of 64; those fill a device sooner.
  const int64_t rows = c.packed * most_queries, heads = p.heads / c.packed;
  const bool many = p.batch * heads * ceil_div(rows, 128) >= 2 * multiprocessors();
  const int64_t tile_rows = many ? rows : std::min<int64_t>(rows, 64);
  const Choice choice = std::max(c.width, c.value_width) > 64 ? choose<128>(c, tile_rows) : choose<64>(c, tile_rows);
  c.tile_rows = choice.rows;
  c.tiles = int(ceil_div(rows, c.tile_rows));
  int64_t units = p.batch * heads * c.tiles;
  Optional starts;
  if (cu_q) {
    units = arguments.plan_units(p, heads, p.query_starts, c.tile_rows, c.packed);
    starts = upload_starts(c, p, query);
  }
  STD_TORCH_CHECK(units < int64_t(1) << 31, "query: expected fewer than 2^31 tiles of rows on CUDA, got ", units);

  // Splits as many as run at once, by the shape and the device alone.
  const int64_t span =
      std::min(p.left, most_keys) + std::min(p.right, most_keys) + std::min<int64_t>(most_queries, c.tile_rows);
  const int64_t tiles = ceil_div(std::min(most_keys, span), choice.tile_keys), most_splits = tiles / kTilesOfSplit;
  c.splits = 1;
  if (most_splits > 1) {
    const int64_t at_once =
        int64_t(multiprocessors()) * blocks_per_multiprocessor(choice.kernel, choice.threads, choice.shared);
    const int64_t splits = std::clamp<int64_t>(at_once / units, 1, most_splits);
    c.splits = int(ceil_div(tiles, ceil_div(tiles, splits)));  // none that would be empty
  }
  Optional parts;
  if (c.splits > 1) {
    const int64_t tops = c.splits * c.rows * 2;
    parts = torch::stable::new_empty(query, {tops + c.splits * c.rows * p.value_width}, ScalarType::Float);
    c.tops = static_cast<float2*>(parts->mutable_data_ptr());
    c.parts = static_cast<float*>(parts->mutable_data_ptr()) + tops;
  }

  const cudaStream_t stream = current_stream(query);
  launch(choice.kernel, dim3(unsigned(units), unsigned(c.splits)), dim3(unsigned(choice.threads)), choice.shared,
         stream, c);
  if (c.splits > 1) {
    launch(join_kernel, dim3(unsigned(c.rows)), dim3(unsigned(ceil_div(p.value_width, 32) * 32)), 0, stream, c);
  }
  return {out, lse};
}

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) { m.impl("attention", TORCH_BOX(&fastgen::attention)); }
