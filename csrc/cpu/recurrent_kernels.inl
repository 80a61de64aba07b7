// The entries of the kernel table for recurrent layers (see recurrent.inl and recurrent_backward.inl).
#include "recurrent_backward.inl"

namespace fastgen {
namespace {

template <class Params, class Body>
FASTGEN_FN void with_dtype(const Params& p, const Body& body) {
  switch (p.dtype) {
    case DType::kFloat64: return with_mode<double, Multiply<double>>(p, body);
    case DType::kBFloat16: return with_mode<BFloat16, Multiply<float>>(p, body);
    case DType::kFloat16: return with_mode<Float16, Multiply<float>>(p, body);
    default: return with_mode<float, Multiply<float>>(p, body);
  }
}

RecurrentSizes recurrent_sizes(const RecurrentParams& p, int64_t rows) {
  RecurrentSizes sizes{};
  with_dtype(p, [&](const auto& kernel) { sizes = kernel.sizes(rows); });
  return sizes;
}
void recurrent(const RecurrentParams& p, const RecurrentWork& work) {
  with_dtype(p, [&](const auto& kernel) { kernel.run(work); });
}
RecurrentBackwardSizes recurrent_backward_sizes(const RecurrentBackwardParams& p, int64_t rows) {
  RecurrentBackwardSizes sizes{};
  with_dtype(p, [&](const auto& kernel) { sizes = kernel.sizes(rows); });
  return sizes;
}
void recurrent_backward(const RecurrentBackwardParams& p, const RecurrentBackwardWork& work) {
  with_dtype(p, [&](const auto& kernel) { kernel.run(work); });
}

}  // namespace
}  // namespace fastgen
