// fastgen::mm on the CPU.
#include "../cpu/isa.h"
#include "memory.h"
#include "tensor.h"
#include "units.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

// The tensor itself where one of its strides is 1, else a copy with rows.
Tensor dense_one_way(const Tensor& x) {
  return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}
bool has_rows(const Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1; }

Tensor mm(const Tensor& left, const Tensor& right, const Optional& bias) {
  const ScalarType dtype = left.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "left: expected float32 or float64, got dtype number ", int(dtype));
  STD_TORCH_CHECK(left.dim() == 2 && left.is_cpu(), "left: expected a matrix on the CPU");
  STD_TORCH_CHECK(right.dim() == 2 && right.is_cpu() && right.scalar_type() == dtype && right.size(0) == left.size(1),
                  "right: expected a matrix with a row for each column of left, ", left.size(1), ", and its dtype");
  MatrixParams p{};
  p.dtype = dtype_of(dtype);
  p.rows = left.size(0);
  p.depth = left.size(1);
  p.columns = right.size(1);
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == p.columns && bias->scalar_type() == dtype && bias->is_cpu()),
      "bias: expected a vector of ", p.columns, " in the dtype of left");
  const int64_t sizes[2] = {p.rows, p.columns};
  const Tensor out = empty_cpu(sizes, 2, dtype);
  if (out.numel() == 0) return out;
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());

  Tensor a = dense_one_way(left), b = dense_one_way(right);
  // Columns on the left go with rows on the right, and without a bias.
  if (!has_rows(a) && (!has_rows(b) || bias)) a = torch::stable::contiguous(a);
  p.left_step = has_rows(a) ? 1 : a.stride(1);
  p.left_row = has_rows(a) ? a.stride(0) : 1;
  p.left = a.const_data_ptr();
  p.right_column = has_rows(b) ? 1 : b.stride(1);
  p.right_row = has_rows(b) ? b.stride(0) : 1;
  p.right = b.const_data_ptr();
  Optional dense_bias;
  if (bias) {
    dense_bias = as_contiguous(*bias);
    p.bias = dense_bias->const_data_ptr();
  }
  p.out = out.mutable_data_ptr();

  const KernelTable& table = kernels();
  const double products = double(p.rows) * double(p.columns) * double(p.depth);
  const MatrixSizes plan = table.matrix_sizes(p, useful_threads(products));
  run_units(plan.units, plan.scratch, products,
            [&](int64_t unit, void* scratch) { table.matrix_product(p, plan, unit, scratch); });
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("mm", TORCH_BOX(&fastgen::mm)); }
