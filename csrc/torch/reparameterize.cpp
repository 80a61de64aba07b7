// fastgen::reparameterize, reparameterize_kl and their backwards on the CPU.
#include "reparameterize_ops.h"

#include <algorithm>

#include "../cpu/isa.h"
#include "memory.h"

namespace fastgen {
namespace {

template <class Body>
void for_pieces(const Shape& shape, const Body& body) {
  const int64_t pieces = shape.rows * pieces_per_row(shape);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(shape.inner, kPiece));
  if (pieces <= grain) return body(0, pieces);
  torch::stable::parallel_for(0, pieces, grain, body);
}

struct CpuReparameterize {
  static Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dims) {
    Tensor out = empty_cpu(sizes, dims, like.scalar_type());
    prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
    return out;
  }

  static void run(ReparameterizeParams& p, const std::optional<Tensor>& seed_offset, const Tensor&) {
    read_seed_offset(seed_offset, p.seed, p.offset);
    std::optional<Tensor> pieces;
    if (p.kl != nullptr && pieces_per_row(p.shape) > 1) {
      const int64_t sizes[] = {p.shape.rows, pieces_per_row(p.shape)};
      pieces = empty_cpu(sizes, 2, ScalarType::Double);
      p.kl_pieces = static_cast<double*>(pieces->mutable_data_ptr());
    }
    const KernelTable& table = kernels();
    for_pieces(p.shape, [&](int64_t begin, int64_t end) { table.reparameterize(p, begin, end); });
    if (pieces) table.reparameterize_add_pieces(p, 0, p.shape.rows);
  }

  static void run(ReparameterizeBackwardParams& p, const std::optional<Tensor>& seed_offset, const Tensor&) {
    read_seed_offset(seed_offset, p.seed, p.offset);
    const KernelTable& table = kernels();
    for_pieces(p.shape, [&](int64_t begin, int64_t end) { table.reparameterize_backward(p, begin, end); });
  }
};

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  using Ops = fastgen::ReparameterizeOps<fastgen::CpuReparameterize>;
  m.impl("reparameterize", TORCH_BOX(&Ops::reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&Ops::reparameterize_backward));
  m.impl("reparameterize_kl", TORCH_BOX(&Ops::reparameterize_kl));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&Ops::reparameterize_kl_backward));
}
