// fastgen::attention and its backward on the CPU: checks, memory, and how the work is split.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "memory.h"
#include "tensor.h"
#include "units.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

// Shape (batch, heads, rows, width), in memory (batch, rows, heads, width) where that is the order of `like`.
Tensor empty_in_order(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  const bool heads_inside = like.stride(2) > like.stride(1);
  const auto least = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t sizes[4] = {batch, heads, rows, width};
  const int64_t strides[4] = {least(heads) * least(rows) * width, heads_inside ? width : least(rows) * width,
                              heads_inside ? least(heads) * width : width, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, int32_t(like.scalar_type()),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor out(handle);
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}

Tensor4 operand(const Tensor& tensor) {
  Tensor4 out{tensor.const_data_ptr(), {}};
  for (int64_t d = 0; d < 4; ++d) out.stride[d] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  // The last dimension of one element is dense whatever its stride says.
  if (tensor.size(3) == 1) out.stride[3] = 1;
  return out;
}

// The arguments of both directions as AttentionParams.
class Arguments {
 public:
  AttentionParams p{};

  Arguments(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, const Optional& slopes,
            const Optional& cu_q, const Optional& cu_k, const Optional& seed_offset, double dropout_p, double scale,
            double softcap, int64_t left, int64_t right, bool lower_right)
      : dtype_(query.scalar_type()) {
    check_floating(dtype_);
    check_operand("query", query);
    check_operand("key", key);
    check_operand("value", value);
    p.dtype = p.mask_dtype = dtype_of(dtype_);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.queries = query.size(2);
    p.width = query.size(3);
    p.kv_heads = key.size(1);
    p.keys = key.size(2);
    p.value_width = value.size(3);
    STD_TORCH_CHECK(p.width > 0 && p.value_width > 0, "query, value: expected a last dimension of at least 1");
    STD_TORCH_CHECK(key.size(0) == p.batch && key.size(3) == p.width, "key: expected the batch and width of query");
    STD_TORCH_CHECK(value.size(0) == p.batch && value.size(1) == p.kv_heads && value.size(2) == p.keys,
                    "value: expected the batch, heads and length of key");
    STD_TORCH_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0,
                    "key: expected a number of heads that divides query's, ", p.heads, ", got ", p.kv_heads);
    p.query = operand(query);
    p.key = operand(key);
    p.value = operand(value);
    p.scale = scale;
    p.softcap = softcap;
    p.left = left < 0 ? kUnlimited : std::min(left, kUnlimited);
    p.right = right < 0 ? kUnlimited : std::min(right, kUnlimited);
    p.lower_right = lower_right;

    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected at least 0 and less than 1, got ", dropout_p);
    STD_TORCH_CHECK((dropout_p > 0) == seed_offset.has_value(), "seed_offset: expected with dropout, and only then");
    if (seed_offset) check_seed_offset(*seed_offset, 1);
    read_seed_offset(seed_offset, p.seed, p.offset);
    p.keep = uint64_t(std::nearbyint((1 - dropout_p) * 0x1p32));
    p.kept_weight = 1 / (1 - dropout_p);

    STD_TORCH_CHECK(cu_q.has_value() == cu_k.has_value(), "cu_q, cu_k: expected both or neither");
    if (cu_q) {
      STD_TORCH_CHECK(p.batch == 1 && !mask, "cu_q: expected a batch of 1 and no mask");
      query_starts_ = starts("cu_q", *cu_q, p.queries);
      key_starts_ = starts("cu_k", *cu_k, p.keys);
      STD_TORCH_CHECK(query_starts_.size() == key_starts_.size(), "cu_k: expected as many elements as cu_q");
      p.batch = int64_t(query_starts_.size()) - 1;
      p.query_starts = query_starts_.data();
      p.key_starts = key_starts_.data();
    }
    if (mask) {
      const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
      bool fits = mask->dim() == 4 && mask->is_cpu();
      for (int64_t d = 0; fits && d < 4; ++d) fits = mask->size(d) == full[d] || mask->size(d) == 1;
      STD_TORCH_CHECK(fits, "mask: expected 4 dimensions, each 1 or that of (batch, heads, queries, keys)");
      const ScalarType type = mask->scalar_type();
      STD_TORCH_CHECK(type == ScalarType::Bool || type == dtype_ || type == work_dtype(),
                      "mask: expected bool, the dtype of query or, for half types, float32");
      p.mask_dtype = dtype_of(type);
      p.mask = operand(*mask);
      if (mask->size(3) == 1) p.mask.stride[3] = p.keys == 1 ? 1 : 0;
    }
    if (slopes) {
      const int64_t dims = slopes->dim();
      STD_TORCH_CHECK((dims == 1 || (dims == 2 && !cu_q && slopes->size(0) == p.batch)) &&
                          slopes->size(dims - 1) == p.heads && slopes->scalar_type() == work_dtype() &&
                          slopes->is_cpu(),
                      "slopes: expected (heads) or (batch, heads) in float32, for float64 in float64");
      p.slopes = slopes->const_data_ptr();
      p.slope_batch = dims == 2 ? slopes->stride(0) : 0;
      p.slope_head = slopes->stride(dims - 1);
    }
  }

  ScalarType work_dtype() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  // Plans the units of ragged sequences, `heads` for each `length` of rows that begin at `starts`; returns how many.
  int64_t plan_units(AttentionParams& params, int64_t heads, const int64_t* starts, int64_t length) {
    first_units_.assign(1, 0);
    for (int64_t n = 0; n < params.batch; ++n) {
      first_units_.push_back(first_units_.back() + heads * ((starts[n + 1] - starts[n] + length - 1) / length));
    }
    params.first_units = first_units_.data();
    return first_units_.back();
  }

  // Multiply-adds of the two products, as if everything were seen.
  double products() const {
    double scores = double(p.batch) * double(p.queries) * double(p.keys);
    if (p.query_starts != nullptr) {
      scores = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        scores += double(p.query_starts[n + 1] - p.query_starts[n]) * double(p.key_starts[n + 1] - p.key_starts[n]);
      }
    }
    return scores * double(p.heads) * double(p.width + p.value_width);
  }

 private:
  void check_operand(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == dtype_ && tensor.is_cpu(), name,
                    ": expected 4 dimensions (batch, heads, length, width) and the dtype and device of query");
  }

  static std::vector<int64_t> starts(const char* name, const Tensor& tensor, int64_t total) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) > 0 && tensor.is_cpu() &&
                        (type == ScalarType::Int || type == ScalarType::Long),
                    name, ": expected int32 or int64 numbers (sequences + 1) on the CPU");
    std::vector<int64_t> out;
    for (int64_t n = 0; n < tensor.size(0); ++n) {
      const int64_t i = n * tensor.stride(0);
      out.push_back(type == ScalarType::Int ? static_cast<const int32_t*>(tensor.const_data_ptr())[i]
                                            : static_cast<const int64_t*>(tensor.const_data_ptr())[i]);
      STD_TORCH_CHECK(n == 0 ? out[0] == 0 : out[n] >= out[n - 1], name, ": expected ascending numbers from 0 on");
    }
    STD_TORCH_CHECK(out.back() == total, name, ": expected the last one to be the number of rows, ", total, ", got ",
                    out.back());
    return out;
  }

  ScalarType dtype_;
  std::vector<int64_t> query_starts_, key_starts_, first_units_;
};

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask,
                                     const Optional& slopes, const Optional& cu_q, const Optional& cu_k,
                                     const Optional& seed_offset, double dropout_p, double scale, double softcap,
                                     int64_t left, int64_t right, bool lower_right) {
  Arguments arguments(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, dropout_p, scale, softcap, left, right,
                      lower_right);
  AttentionParams& p = arguments.p;
  const Tensor out = empty_in_order(query, query.size(0), p.heads, p.queries, p.value_width);
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

constexpr int64_t kUnitsWanted = 16;   // of a backward pass: where there are fewer heads, their keys are cut
constexpr int64_t kKeysOfChunk = 256;  // at least

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Optional& grad_out, const Optional& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Optional& mask, const Optional& slopes, const Optional& cu_q, const Optional& cu_k,
    const Optional& seed_offset, const Tensor& out, const Tensor& lse, double dropout_p, double scale, double softcap,
    int64_t left, int64_t right, bool lower_right, int64_t needs) {
  Arguments arguments(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, dropout_p, scale, softcap, left, right,
                      lower_right);
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) = arguments.p;
  const ScalarType dtype = query.scalar_type(), work = arguments.work_dtype();
  const auto needed = [&](int i) { return (needs >> i & 1) != 0; };
  STD_TORCH_CHECK(!(mask && needed(3)) || mask->scalar_type() != ScalarType::Bool, "mask: a bool has no gradient");

  const auto check = [&](const char* name, const Optional& tensor, int64_t dims, ScalarType type) {
    if (!tensor) return;
    bool fits = tensor->dim() == dims && tensor->scalar_type() == type && tensor->is_cpu();
    for (int64_t d = 0; fits && d < 3; ++d) fits = tensor->size(d) == query.size(d);
    if (fits && dims == 4) fits = tensor->size(3) == p.value_width;
    STD_TORCH_CHECK(fits, name, ": expected the shape and dtype of a result of the forward pass");
  };
  check("grad_out", grad_out, 4, dtype);
  check("grad_lse", grad_lse, 3, work);
  check("out", out, 4, dtype);
  check("lse", lse, 3, work);
  const auto contiguous = [](const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); };
  const Tensor dense_lse = contiguous(lse);
  Optional dense_grad_lse;
  if (grad_lse) dense_grad_lse = contiguous(*grad_lse);
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
    Tensor grad = empty_in_order(like, like.size(0), like.size(1), like.size(2), like.size(3));
    to = operand(grad);
    return grad;
  };
  const Tensor grad_query = result(0, query, p.grad_query), grad_key = result(1, key, p.grad_key),
               grad_value = result(2, value, p.grad_value);
  Tensor grad_mask = none(mask ? mask->scalar_type() : dtype), grad_slopes = none(slopes ? work : dtype);
  if (mask && needed(3)) {
    for (int64_t d = 0; d < 4; ++d) p.mask_size[d] = mask->size(d);
    grad_mask = empty_cpu(p.mask_size, 4, mask->scalar_type());
    p.grad_mask = grad_mask.mutable_data_ptr();
  }

  p.rows = query.size(0) * p.heads * p.queries;
  p.most_queries = p.queries;
  p.most_keys = p.keys;
  if (p.query_starts != nullptr) {
    p.most_queries = p.most_keys = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      p.most_queries = std::max(p.most_queries, p.query_starts[n + 1] - p.query_starts[n]);
      p.most_keys = std::max(p.most_keys, p.key_starts[n + 1] - p.key_starts[n]);
    }
  }
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
