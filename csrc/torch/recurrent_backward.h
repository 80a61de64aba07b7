// fastgen::recurrent_backward on the CPU, for those that take a step as a sequence of one.
#pragma once

#include <tuple>

#include "tensor.h"

namespace fastgen {

using RecurrentGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RecurrentGradients recurrent_backward(
    int64_t mode, const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
    const std::optional<Tensor>& grad_c_n, const Tensor& input, const std::optional<Tensor>& batch_sizes,
    const Tensor& w_ih, const Tensor& w_hh, const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
    const std::optional<Tensor>& w_hr, const Tensor& h_0, const std::optional<Tensor>& c_0,
    const std::optional<Tensor>& h_mask, const Tensor& output, const Tensor& gates, const Tensor& cells,
    bool batch_first, bool reverse, int64_t needs, const std::optional<Tensor>& norm_ih,
    const std::optional<Tensor>& norm_hh, const std::optional<Tensor>& norm_c, const std::optional<Tensor>& norm_c_bias,
    const std::optional<Tensor>& seed_offset, double norm_eps, double zoneout_c, double zoneout_h);

}  // namespace fastgen
