// fastgen::reparameterize, reparameterize_kl and their backwards on the CPU.
#include <algorithm>
#include <tuple>

#include "../cpu/isa.h"
#include "memory.h"
#include "tensor.h"

namespace fastgen {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

void check_noise(const std::optional<Tensor>& seed_offset, const std::optional<Tensor>& eps, const Tensor& mu) {
  STD_TORCH_CHECK(seed_offset.has_value() != eps.has_value(), "seed_offset, eps: expected exactly one of them");
  if (eps) check_like("eps", *eps, mu);
}

// A contiguous tensor of the shape and dtype of `like`, about to be written.
Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  Tensor out = empty_cpu(sizes.data(), int64_t(sizes.size()), like.scalar_type());
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}

template <class Body>
void for_pieces(const Shape& shape, const Body& body) {
  const int64_t pieces = shape.rows * pieces_per_row(shape);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(shape.inner, kPiece));
  if (pieces <= grain) return body(0, pieces);
  torch::stable::parallel_for(0, pieces, grain, body);
}

std::tuple<Tensor, std::optional<Tensor>> forward(const Tensor& mu, const Tensor& logvar,
                                                  const std::optional<Tensor>& seed_offset,
                                                  const std::optional<Tensor>& eps, bool with_kl) {
  check_like("logvar", logvar, mu);
  check_noise(seed_offset, eps, mu);
  const auto sizes = mu.sizes();
  Tensor z = new_like(mu);
  std::optional<Tensor> kl;
  if (with_kl) {
    STD_TORCH_CHECK(mu.dim() > 0, "mu: expected at least one dimension");
    kl = empty_cpu(sizes.data(), int64_t(sizes.size()) - 1, mu.scalar_type());
  }
  if (mu.numel() == 0) {
    if (kl) torch::stable::zero_(*kl);
    return {z, kl};
  }

  ReparameterizeParams p{};
  p.dtype = dtype_of(mu.scalar_type());
  read_seed_offset(seed_offset, p.seed, p.offset);
  ElementwiseLayout layout(mu, with_kl);
  layout.add(mu, p.mu);
  layout.add(logvar, p.logvar);
  layout.add(eps, p.eps);
  layout.finish(p.shape);
  p.z = z.mutable_data_ptr();
  p.kl = kl ? kl->mutable_data_ptr() : nullptr;

  std::optional<Tensor> pieces;
  if (with_kl && pieces_per_row(p.shape) > 1) {
    pieces = torch::stable::empty({p.shape.rows, pieces_per_row(p.shape)}, ScalarType::Double);
    p.kl_pieces = static_cast<double*>(pieces->mutable_data_ptr());
  }
  const KernelTable& table = kernels();
  for_pieces(p.shape, [&](int64_t begin, int64_t end) { table.reparameterize(p, begin, end); });
  if (pieces) table.reparameterize_add_pieces(p, 0, p.shape.rows);
  return {z, kl};
}

Tensor reparameterize(const Tensor& mu, const Tensor& logvar, std::optional<Tensor> seed_offset,
                      std::optional<Tensor> eps) {
  return std::get<0>(forward(mu, logvar, seed_offset, eps, false));
}

std::tuple<Tensor, Tensor> reparameterize_kl(const Tensor& mu, const Tensor& logvar, std::optional<Tensor> seed_offset,
                                             std::optional<Tensor> eps) {
  auto [z, kl] = forward(mu, logvar, seed_offset, eps, true);
  return {z, *kl};
}

// mu is absent where grad_kl is.
std::tuple<std::optional<Tensor>, Tensor> backward(const std::optional<Tensor>& grad_z,
                                                   const std::optional<Tensor>& grad_kl,
                                                   const std::optional<Tensor>& mu, const Tensor& logvar,
                                                   const std::optional<Tensor>& seed_offset,
                                                   const std::optional<Tensor>& eps, bool want_grad_mu) {
  STD_TORCH_CHECK(grad_z || grad_kl, "grad_z, grad_kl: expected at least one of them");
  check_noise(seed_offset, eps, logvar);
  if (grad_z) check_like("grad_z", *grad_z, logvar);
  if (mu) check_like("mu", *mu, logvar);
  if (grad_kl) {
    STD_TORCH_CHECK(grad_kl->dim() == logvar.dim() - 1 && grad_kl->scalar_type() == logvar.scalar_type(),
                    "grad_kl: expected the dtype of logvar and its shape without the last dimension");
    for (int64_t d = 0; d < grad_kl->dim(); ++d) {
      STD_TORCH_CHECK(grad_kl->size(d) == logvar.size(d), "grad_kl: expected the shape of logvar without the last "
                                                          "dimension");
    }
  }
  Tensor grad_logvar = new_like(logvar);
  std::optional<Tensor> grad_mu;
  if (want_grad_mu) grad_mu = new_like(logvar);
  if (logvar.numel() == 0) return {grad_mu, grad_logvar};

  ReparameterizeBackwardParams p{};
  p.dtype = dtype_of(logvar.scalar_type());
  read_seed_offset(seed_offset, p.seed, p.offset);
  ElementwiseLayout layout(logvar, grad_kl.has_value());
  layout.add(grad_z, p.grad_z);
  layout.add(grad_kl, p.grad_kl, /*per_row=*/true);
  layout.add(mu, p.mu);
  layout.add(logvar, p.logvar);
  layout.add(eps, p.eps);
  layout.finish(p.shape);
  p.grad_mu = grad_mu ? grad_mu->mutable_data_ptr() : nullptr;
  p.grad_logvar = grad_logvar.mutable_data_ptr();
  const KernelTable& table = kernels();
  for_pieces(p.shape, [&](int64_t begin, int64_t end) { table.reparameterize_backward(p, begin, end); });
  return {grad_mu, grad_logvar};
}

Tensor reparameterize_backward(const Tensor& grad_z, const Tensor& logvar, std::optional<Tensor> seed_offset,
                               std::optional<Tensor> eps) {
  return std::get<1>(backward(grad_z, std::nullopt, std::nullopt, logvar, seed_offset, eps, false));
}

std::tuple<Tensor, Tensor> reparameterize_kl_backward(std::optional<Tensor> grad_z, std::optional<Tensor> grad_kl,
                                                      const Tensor& mu, const Tensor& logvar,
                                                      std::optional<Tensor> seed_offset, std::optional<Tensor> eps) {
  auto [grad_mu, grad_logvar] = backward(grad_z, grad_kl, mu, logvar, seed_offset, eps, true);
  return {*grad_mu, grad_logvar};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("reparameterize", TORCH_BOX(&fastgen::reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&fastgen::reparameterize_backward));
  m.impl("reparameterize_kl", TORCH_BOX(&fastgen::reparameterize_kl));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&fastgen::reparameterize_kl_backward));
}
