// The reparameterisation ops of any device: checks, allocation, parameters.
#pragma once

#include <tuple>

#include "tensor.h"

namespace fastgen {

// Device: static Tensor empty(like, sizes, dims), an uninitialised contiguous tensor of like's dtype, and
// static void run(params, seed_offset, like) for both parameter structs.
template <class Device>
struct ReparameterizeOps {
  using Optional = std::optional<Tensor>;

  static Tensor reparameterize(const Tensor& mu, const Tensor& logvar, Optional seed_offset, Optional eps) {
    return std::get<0>(forward(mu, logvar, seed_offset, eps, false));
  }

  static std::tuple<Tensor, Tensor> reparameterize_kl(const Tensor& mu, const Tensor& logvar, Optional seed_offset,
                                                      Optional eps) {
    auto [z, kl] = forward(mu, logvar, seed_offset, eps, true);
    return {z, *kl};
  }

  static Tensor reparameterize_backward(const Tensor& grad_z, const Tensor& logvar, Optional seed_offset,
                                        Optional eps) {
    return std::get<1>(backward(grad_z, std::nullopt, std::nullopt, logvar, seed_offset, eps));
  }

  static std::tuple<Tensor, Tensor> reparameterize_kl_backward(Optional grad_z, Optional grad_kl, const Tensor& mu,
                                                               const Tensor& logvar, Optional seed_offset,
                                                               Optional eps) {
    auto [grad_mu, grad_logvar] = backward(grad_z, grad_kl, mu, logvar, seed_offset, eps);
    return {*grad_mu, grad_logvar};
  }

 private:
  static Tensor empty_like(const Tensor& like) {
    const auto sizes = like.sizes();
    return Device::empty(like, sizes.data(), int64_t(sizes.size()));
  }

  static void check_noise(const Optional& seed_offset, const Optional& eps, const Tensor& mu) {
    STD_TORCH_CHECK(seed_offset.has_value() != eps.has_value(), "seed_offset, eps: expected exactly one of them");
    if (seed_offset) {
      check_seed_offset(*seed_offset, 1);
      STD_TORCH_CHECK(same_device(*seed_offset, mu), "seed_offset: expected a tensor on the device of the operands");
    }
    if (eps) check_like("eps", *eps, mu);
  }

  static std::tuple<Tensor, Optional> forward(const Tensor& mu, const Tensor& logvar, const Optional& seed_offset,
                                              const Optional& eps, bool with_kl) {
    check_floating(mu.scalar_type());
    check_like("logvar", logvar, mu);
    check_noise(seed_offset, eps, mu);
    Tensor z = empty_like(mu);
    Optional kl;
    if (with_kl) {
      STD_TORCH_CHECK(mu.dim() > 0, "mu: expected at least one dimension");
      kl = Device::empty(mu, mu.sizes().data(), mu.dim() - 1);
    }
    if (mu.numel() == 0) {
      if (kl) torch::stable::zero_(*kl);
      return {z, kl};
    }
    ReparameterizeParams p{};
    p.dtype = dtype_of(mu.scalar_type());
    ElementwiseLayout layout(mu, with_kl);
    layout.add(mu, p.mu);
    layout.add(logvar, p.logvar);
    layout.add(eps, p.eps);
    layout.finish(p.shape);
    p.z = z.mutable_data_ptr();
    p.kl = kl ? kl->mutable_data_ptr() : nullptr;
    Device::run(p, seed_offset, mu);
    return {z, kl};
  }

  // Without mu, which only grad_kl needs, there is no grad_mu: it would be grad_z.
  static std::tuple<Optional, Tensor> backward(const Optional& grad_z, const Optional& grad_kl, const Optional& mu,
                                               const Tensor& logvar, const Optional& seed_offset, const Optional& eps) {
    STD_TORCH_CHECK(grad_z || grad_kl, "grad_z, grad_kl: expected at least one of them");
    check_floating(logvar.scalar_type());
    check_noise(seed_offset, eps, logvar);
    if (grad_z) check_like("grad_z", *grad_z, logvar);
    if (mu) check_like("mu", *mu, logvar);
    if (grad_kl) check_rows(*grad_kl, logvar);
    Tensor grad_logvar = empty_like(logvar);
    Optional grad_mu;
    if (mu) grad_mu = empty_like(logvar);
    if (logvar.numel() == 0) return {grad_mu, grad_logvar};

    ReparameterizeBackwardParams p{};
    p.dtype = dtype_of(logvar.scalar_type());
    ElementwiseLayout layout(logvar, grad_kl.has_value());
    layout.add(grad_z, p.grad_z);
    layout.add(grad_kl, p.grad_kl, /*per_row=*/true);
    layout.add(mu, p.mu);
    layout.add(logvar, p.logvar);
    layout.add(eps, p.eps);
    layout.finish(p.shape);
    p.grad_mu = grad_mu ? grad_mu->mutable_data_ptr() : nullptr;
    p.grad_logvar = grad_logvar.mutable_data_ptr();
    Device::run(p, seed_offset, logvar);
    return {grad_mu, grad_logvar};
  }

  static void check_rows(const Tensor& grad_kl, const Tensor& logvar) {
    bool fits = same_device(grad_kl, logvar) && grad_kl.dim() == logvar.dim() - 1 &&
                grad_kl.scalar_type() == logvar.scalar_type();
    for (int64_t d = 0; fits && d < grad_kl.dim(); ++d) fits = grad_kl.size(d) == logvar.size(d);
    STD_TORCH_CHECK(fits, "grad_kl: expected the dtype of logvar and its shape without the last dimension");
  }
};

}  // namespace fastgen
