// What both directions of attention take and give, for any device.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace fastgen {

using Optional = std::optional<Tensor>;

// Shape (batch, heads, rows, width), in memory (batch, rows, heads, width) where that is the order of `like`; of its
// dtype, on its device.
inline Tensor empty_in_order(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  const bool heads_inside = like.stride(2) > like.stride(1);
  const auto least = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t sizes[4] = {batch, heads, rows, width};
  const int64_t strides[4] = {least(heads) * least(rows) * width, heads_inside ? width : least(rows) * width,
                              heads_inside ? least(heads) * width : width, 1};
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, int32_t(like.scalar_type()), device,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor4 operand(const Tensor& tensor) {
  Tensor4 out{tensor.const_data_ptr(), {}};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  // The last dimension of one element is dense whatever its stride says.
  for (size_t d = 0; d < 4; ++d) out.stride[d] = sizes[d] == 1 ? (d == 3 ? 1 : 0) : strides[d];
  return out;
}

// The arguments of both directions, checked, as AttentionParams; on any device. What stands in memory that only the
// caller can read or make is the caller's: the seed and offset, and where the starts of ragged sequences lie, which are
// those of the host here.
class Arguments {
 public:
  AttentionParams p{};

  Arguments(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, const Optional& slopes,
            const Optional& cu_q, const Optional& cu_k, const Optional& seed_offset, double dropout_p, double scale,
            double softcap, int64_t left, int64_t right, bool lower_right)
      : dtype_(query.scalar_type()) {
    check_floating(dtype_);
    check_operand("query", query, query);
    check_operand("key", key, query);
    check_operand("value", value, query);
    p.dtype = p.mask_dtype = dtype_of(dtype_);
    const auto q = query.sizes(), k = key.sizes(), v = value.sizes();  // a call each, where size(d) is one a number
    p.batch = q[0];
    p.heads = q[1];
    p.queries = q[2];
    p.width = q[3];
    p.kv_heads = k[1];
    p.keys = k[2];
    p.value_width = v[3];
    STD_TORCH_CHECK(p.width > 0 && p.value_width > 0, "query, value: expected a last dimension of at least 1");
    STD_TORCH_CHECK(k[0] == p.batch && k[3] == p.width, "key: expected the batch and width of query");
    STD_TORCH_CHECK(v[0] == p.batch && v[1] == p.kv_heads && v[2] == p.keys,
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
    if (seed_offset) {
      check_seed_offset(*seed_offset, 1);
      STD_TORCH_CHECK(same_device(*seed_offset, query), "seed_offset: expected the device of query");
    }
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
      bool fits = mask->dim() == 4 && same_device(*mask, query);
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
                          same_device(*slopes, query),
                      "slopes: expected (heads) or (batch, heads) in float32, for float64 in float64");
      p.slopes = slopes->const_data_ptr();
      p.slope_batch = dims == 2 ? slopes->stride(0) : 0;
      p.slope_head = slopes->stride(dims - 1);
    }
  }

  // Checks what the backward pass is given besides.
  void check_backward(const Optional& grad_out, const Optional& grad_lse, const Tensor& query, const Optional& mask,
                      const Tensor& out, const Tensor& lse, int64_t needs) const {
    STD_TORCH_CHECK(!(mask && (needs >> 3 & 1) != 0) || mask->scalar_type() != ScalarType::Bool,
                    "mask: a bool has no gradient");
    const auto check = [&](const char* name, const Optional& tensor, int64_t dims, ScalarType type) {
      if (!tensor) return;
      bool fits = tensor->dim() == dims && tensor->scalar_type() == type && same_device(*tensor, query);
      for (int64_t d = 0; fits && d < 3; ++d) fits = tensor->size(d) == query.size(d);
      if (fits && dims == 4) fits = tensor->size(3) == p.value_width;
      STD_TORCH_CHECK(fits, name, ": expected the shape, dtype and device of a result of the forward pass");
    };
    check("grad_out", grad_out, 4, dtype_);
    check("grad_lse", grad_lse, 3, work_dtype());
    check("out", out, 4, dtype_);
    check("lse", lse, 3, work_dtype());
  }

  ScalarType work_dtype() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  // Plans the units of ragged sequences, `heads` for each `length` of rows, of which a place from `starts` on counts as
  // `rows`; returns how many.
  int64_t plan_units(AttentionParams& params, int64_t heads, const int64_t* starts, int64_t length, int64_t rows = 1) {
    first_units_.assign(1, 0);
    for (int64_t n = 0; n < params.batch; ++n) {
      first_units_.push_back(first_units_.back() +
                             heads * ((rows * (starts[n + 1] - starts[n]) + length - 1) / length));
    }
    params.first_units = first_units_.data();
    return first_units_.back();
  }

  // The most queries and the most keys of a sequence.
  std::tuple<int64_t, int64_t> longest() const {
    if (p.query_starts == nullptr) return {p.queries, p.keys};
    int64_t queries = 0, keys = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      queries = std::max(queries, p.query_starts[n + 1] - p.query_starts[n]);
      keys = std::max(keys, p.key_starts[n + 1] - p.key_starts[n]);
    }
    return {queries, keys};
  }

  // Multiply-adds of the two products, as if everything were seen, or what takes as long. To read a key and its value
  // counts as two more queries that look at them, which is most of it where a single query does; and what comes before
  // the first key of a head as 16 more keys, which is most of it where there are few.
  double products() const {
    const auto of = [&](int64_t queries, int64_t keys) {
      return (double(p.heads) * double(queries) + 2 * double(p.kv_heads)) * (double(keys) + 16);
    };
    double pairs = 0;
    if (p.query_starts == nullptr) {
      pairs = double(p.batch) * of(p.queries, p.keys);
    } else {
      for (int64_t n = 0; n < p.batch; ++n) {
        pairs += of(p.query_starts[n + 1] - p.query_starts[n], p.key_starts[n + 1] - p.key_starts[n]);
      }
    }
    return pairs * double(p.width + p.value_width);
  }

 private:
  void check_operand(const char* name, const Tensor& tensor, const Tensor& query) const {
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == dtype_ && same_device(tensor, query), name,
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

}  // namespace fastgen
