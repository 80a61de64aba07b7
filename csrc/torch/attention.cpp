// fastgen::attention and its backward on the CPU: checks, memory, and how the work is split.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "attention_arguments.h"
#include "memory.h"
#include "units.h"

namespace fastgen {
namespace {

Tensor result_in_order(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  Tensor out = empty_in_order(like, batch, heads, rows, width);
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
                                     const Optional& slopes, const Optional& cu_q, const Optional& cu_k,
                                     const Optional& seed_offset, double dropout_p, double scale, double softcap,
                                     int64_t left, int64_t right, bool lower_right) {
  Arguments arguments(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, dropout_p, scale, softcap, left, right,
                      lower_right);
  AttentionParams& p = arguments.p;
  read_seed_offset(seed_offset, p.seed, p.offset);
  const Tensor out = result_in_order(query, query.size(0), p.heads, p.queries, p.value_width);
  const int64_t rows[3] = {query.size(0), p.heads, p.queries};
  const Tensor lse = empty_cpu(rows, 3, arguments.work_dtype());
  p.out = operand(out);
  p.lse = lse.mutable_data_ptr();
  const KernelTable& table = kernels();
  AttentionSizes sizes = table.attention_sizes(p);
  if (cu_q) sizes.units = arguments.plan_units(p, p.heads, p.query_starts, sizes.unit_queries);
  Optional sums;
  if (sizes.sums > 0) {
    sums = bytes(sizes.sums);
    p.sums = sums->mutable_data_ptr();
  }
  const auto run = [&](AttentionPhase phase, int64_t units, int64_t scratch, double products) {
    run_units(units, scratch, products, [&](int64_t unit, void* own) { table.attention(p, phase, unit, own); });
  };
  run(AttentionPhase::kKeys, sizes.units, sizes.scratch, arguments.products());
  run(AttentionPhase::kJoin, sizes.join_units, 0, double(sizes.sums) / 4);
  return {out, lse};
}

// Of a backward pass: where there are fewer heads, their keys are cut. Each chunk packs the queries and their gradients
// anew and has sums for theirs, about a tenth of its time at 512 keys.
constexpr int64_t kUnitsWanted = 8;
constexpr int64_t kKeysOfChunk = 256;  // at least

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Optional& grad_out, const Optional& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Optional& mask, const Optional& slopes, const Optional& cu_q, const Optional& cu_k,
    const Optional& seed_offset, const Tensor& out, const Tensor& lse, double dropout_p, double scale, double softcap,
    int64_t left, int64_t right, bool lower_right, int64_t needs) {
  Arguments arguments(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, dropout_p, scale, softcap, left, right,
                      lower_right);
  read_seed_offset(seed_offset, arguments.p.seed, arguments.p.offset);
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) = arguments.p;
  const ScalarType dtype = query.scalar_type(), work = arguments.work_dtype();
  const auto needed = [&](int i) { return (needs >> i & 1) != 0; };
  arguments.check_backward(grad_out, grad_lse, query, mask, out, lse, needs);
  const Tensor dense_lse = as_contiguous(lse);
  Optional dense_grad_lse;
  if (grad_lse) dense_grad_lse = as_contiguous(*grad_lse);
  p.out = operand(out);
  p.lse = const_cast<void*>(dense_lse.const_data_ptr());  // read only
  if (grad_out) p.grad_out = operand(*grad_out);
  p.grad_lse = dense_grad_lse ? dense_grad_lse->const_data_ptr() : nullptr;

  const auto none = [](ScalarType type) {
    const int64_t zero = 0;
    return empty_cpu(&zero, 1, type);
  };
  const auto result = [&](int i, const Tensor& like, Tensor4& to) {
    if (!needed(i)) return none(dtype);
    Tensor grad = result_in_order(like, like.size(0), like.size(1), like.size(2), like.size(3));
    to = operand(grad);
    return grad;
  };
  const Tensor grad_query = result(0, query, p.grad_query), grad_key = result(1, key, p.grad_key),
               grad_value = result(2, value, p.grad_value);
  Tensor grad_mask = none(mask ? mask->scalar_type() : dtype), grad_slopes = none(slopes ? work : dtype);
  if (mask && needed(3)) {
    for (int64_t d = 0; d < 4; ++d) p.mask_size[d] = mask->size(d);
    grad_mask = empty_cpu(p.mask_size, 4, mask->scalar_type());
    prefer_huge_pages(grad_mask.mutable_data_ptr(), size_t(grad_mask.numel()) * grad_mask.element_size());
    p.grad_mask = grad_mask.mutable_data_ptr();
  }

  p.rows = query.size(0) * p.heads * p.queries;
  std::tie(p.most_queries, p.most_keys) = arguments.longest();
  // By shape alone: the order of sums must not depend on the threads.
  const int64_t heads = std::max<int64_t>(p.batch * p.kv_heads, 1);
  const int64_t wanted = (kUnitsWanted + heads - 1) / heads;
  p.chunk = std::max<int64_t>({(p.most_keys + wanted - 1) / wanted, kKeysOfChunk, 1});
  p.chunk = (p.chunk + kKeysOfChunk - 1) / kKeysOfChunk * kKeysOfChunk;
  p.most_chunks = std::max<int64_t>((p.most_keys + p.chunk - 1) / p.chunk, 1);
  Optional query_sums;
  if (needed(0) && p.most_chunks > 1) {
    const int64_t size[3] = {p.most_chunks, p.rows, p.width};
    query_sums = empty_cpu(size, 3, work);
    p.query_sums = query_sums->mutable_data_ptr();
  }
  std::vector<double> slope_sums;
  if (slopes && needed(4)) {
    slope_sums.resize(size_t(p.batch * p.heads * p.most_chunks));
    p.slope_sums = slope_sums.data();
  }
  // Queries of a sequence without keys belong to no unit.
  if (needed(0) && (p.keys == 0 || p.query_starts != nullptr) && grad_query.numel() > 0) {
    std::memset(grad_query.mutable_data_ptr(), 0, size_t(grad_query.numel()) * grad_query.element_size());
  }

  const KernelTable& table = kernels();
  AttentionBackwardSizes sizes = table.attention_backward_sizes(p);
  if (cu_q) sizes.units = arguments.plan_units(p, p.kv_heads, p.key_starts, p.chunk);
  const auto run = [&](AttentionBackwardPhase phase, int64_t units, int64_t scratch) {
    run_units(units, scratch, 2.5 * arguments.products(),
              [&](int64_t unit, void* own) { table.attention_backward(p, phase, unit, own); });
  };
  run(AttentionBackwardPhase::kMask, sizes.mask_units, sizes.mask_scratch);
  if (needed(0) || needed(1) || needed(2) || p.slope_sums != nullptr) {
    run(AttentionBackwardPhase::kKeys, sizes.units, sizes.scratch);
  }
  if (p.query_sums != nullptr) run(AttentionBackwardPhase::kQueries, p.batch * p.heads, 0);

  if (slopes && needed(4)) {
    const bool per_batch = slopes->dim() == 2;
    const int64_t size[2] = {per_batch ? p.batch : p.heads, p.heads};
    grad_slopes = empty_cpu(size, per_batch ? 2 : 1, work);
    std::vector<double> sums(size_t((per_batch ? p.batch : 1) * p.heads));
    for (int64_t i = 0; i < p.batch * p.heads; ++i) {
      for (int64_t c = 0; c < p.most_chunks; ++c) {
        sums[size_t(per_batch ? i : i % p.heads)] += slope_sums[size_t(i * p.most_chunks + c)];
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      if (work == ScalarType::Double) {
        static_cast<double*>(grad_slopes.mutable_data_ptr())[i] = sums[i];
      } else {
        static_cast<float*>(grad_slopes.mutable_data_ptr())[i] = float(sums[i]);
      }
    }
  }
  return {grad_query, grad_key, grad_value, grad_mask, grad_slopes};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastgen::attention));
  m.impl("attention_backward", TORCH_BOX(&fastgen::attention_backward));
}
