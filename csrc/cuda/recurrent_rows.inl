// What a recurrent sequence needs of all rows of all steps at once, before or after the kernel of its steps.
#pragma once

#include <utility>

#include "recurrent_backward.inl"
#include "recurrent_forward.inl"

namespace fastgen {
namespace {

constexpr int kRowThreads = 256;

// body(i) for the warps of a grid.
template <class Body>
__device__ void for_rows(int64_t count, const Body& body) {
  const int64_t warps = int64_t(gridDim.x) * (kRowThreads / 32);
  for (int64_t i = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32; i < count; i += warps) body(i);
}

template <class T>
struct MeanAndScale {
  T mean, scale;
};

// The mean of a row that `value(j)` gives, and 1 / sqrt(variance + eps).
template <class Value, class T = decltype(std::declval<Value>()(0))>
__device__ MeanAndScale<T> mean_and_scale(int64_t width, double eps, const Value& value) {
  T sum = 0, squares = 0;
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) sum = sum + value(j);
  const T mean = warp_sum(sum) / T(width);
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
    const T away = value(j) - mean;
    squares = squares + away * away;
  }
  return {mean, T(1) / square_root(warp_sum(squares) / T(width) + T(eps))};
}

// Layer norm of W_ih x: standardises its rows, and saves them.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) standardise_kernel(RecurrentParams p, Element* x) {
  using T = typename WorkType<Element>::T;
  const int64_t units = p.hidden_size, width = 4 * units;
  for_rows(p.rows, [&](int64_t i) {
    Element* row = x + i * width;
    const auto moments = mean_and_scale(width, p.norm_eps, [&](int64_t j) { return widen(row[j]); });
    auto* hat = p.gates == nullptr ? nullptr : static_cast<Element*>(p.gates) + i * 12 * units + 4 * units;
    for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
      narrow((widen(row[j]) - moments.mean) * moments.scale, row + j);
      if (hat != nullptr) hat[j] = row[j];
    }
    if (threadIdx.x % 32 == 0 && p.cells != nullptr) static_cast<T*>(p.cells)[i * (units + 2) + units] = moments.scale;
  });
}

// The standardised c' of all rows, and what they were multiplied with.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) cells_kernel(BackwardParams p, float* c_hat, float* c_scale) {
  const int64_t units = p.hidden_size, width = units + 2;
  const auto* cells = static_cast<const float*>(p.cells);
  for_rows(p.steps * p.batch, [&](int64_t i) {
    const int64_t s = i / p.batch, b = i % p.batch;
    const Step now = step_of(p, s), before = s > 0 ? step_of(p, s - 1) : Step{};
    if (b >= now.rows) return;
    const int64_t row = row_of(p, now, b);
    const auto* gates = static_cast<const Element*>(p.gates) + row * 12 * units;
    const auto value = [&](int64_t u) {
      if (!p.zone_c.used) return cells[row * width + u];
      const float c =
          b < before.rows ? cells[row_of(p, before, b) * width + u] : value_of<Element>(p.c_0, b * units + u);
      return widen(gates[units + u]) * c + widen(gates[u]) * widen(gates[2 * units + u]);
    };
    const auto moments = mean_and_scale(units, p.norm_eps, value);
    for (int64_t u = threadIdx.x % 32; u < units; u += 32) {
      c_hat[row * units + u] = (value(u) - moments.mean) * moments.scale;
    }
    if (threadIdx.x % 32 == 0) c_scale[row] = moments.scale;
  });
}

// Back through the norm of W_ih x.
template <class Element, class Params>
__global__ void __launch_bounds__(kRowThreads) input_norm_kernel(Params p) {
  using T = typename WorkType<Element>::T;
  const int64_t units = p.hidden_size, width = 4 * units;
  for_rows(p.rows, [&](int64_t i) {
    const T* to_gates = p.to_gates + i * width;
    const auto* hat = static_cast<const Element*>(p.gates) + i * 12 * units + 4 * units;
    T sum = 0, across = 0;
    for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
      const T grad = to_gates[j] * value_of<Element>(p.norm_ih, j);
      sum = sum + grad;
      across = across + grad * widen(hat[j]);
    }
    const T mean = warp_sum(sum) / T(width), slope = warp_sum(across) / T(width);
    const T scale = static_cast<const T*>(p.cells)[i * (units + 2) + units];
    for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
      const T grad = to_gates[j] * value_of<Element>(p.norm_ih, j);
      narrow(scale * (grad - mean - widen(hat[j]) * slope), static_cast<Element*>(p.grad_gates_ih) + i * width + j);
    }
  });
}

// The h that each row's step was fed, [rows][P]: what the gradient of W_hh is a product with.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) fed_kernel(RecurrentParams p, Element* fed) {
  const int64_t width = p.output_size, count = p.steps * p.batch * width;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kRowThreads) {
    const int64_t s = i / (p.batch * width), b = i / width % p.batch, u = i % width;
    const Step now = step_of(p, s), before = s > 0 ? step_of(p, s - 1) : Step{};
    if (b >= now.rows) continue;
    const auto h = b < before.rows ? value_of<Element>(p.output, row_of(p, before, b) * width + u)
                                   : value_of<Element>(p.h_0, b * width + u);
    narrow(h * value_of<Element>(p.h_mask, b * width + u, 1), fed + row_of(p, now, b) * width + u);
  }
}

}  // namespace
}  // namespace fastgen
