// fastgen::claim, random_bits, uniform, normal, exponential, bernoulli on the CPU.
#include "../cpu/isa.h"
#include "memory.h"
#include "random_ops.h"

namespace fastgen {
namespace {

Tensor draw(const Tensor& seed_offset, const std::vector<int64_t>& size, ScalarType dtype, RandomParams p) {
  const int64_t streams = stream_count(seed_offset);
  Tensor out = torch::stable::empty(stacked_size(seed_offset, size), dtype);
  p.dtype = dtype_of(dtype);
  p.count = product(size);
  const int64_t* words = static_cast<const int64_t*>(seed_offset.const_data_ptr());
  const int64_t next_word = seed_offset.stride(seed_offset.dim() - 1);
  const int64_t next_stream = seed_offset.dim() == 2 ? seed_offset.stride(0) : 0;
  char* data = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(data, size_t(out.numel()) * out.element_size());
  const auto fill = kernels().random;
  for (int64_t s = 0; s < streams; ++s) {
    p.seed = uint64_t(words[s * next_stream]);
    p.offset = uint64_t(words[s * next_stream + next_word]);
    p.out = data + s * p.count * int64_t(out.element_size());
    torch::stable::parallel_for(0, p.count, kGrain, [&](int64_t begin, int64_t end) { fill(p, begin, end); });
  }
  return out;
}

// The present (seed, offset) of a generator, which moves `count` elements on.
Tensor claim(Tensor state, int64_t count) {
  check_seed_offset(state, 1);
  Tensor taken = torch::stable::clone(state);
  int64_t* offset = static_cast<int64_t*>(state.mutable_data_ptr()) + state.stride(0);
  *offset = int64_t(uint64_t(*offset) + uint64_t(count));
  return taken;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("claim", TORCH_BOX(&fastgen::claim));
  using Ops = fastgen::RandomOps<&fastgen::draw>;
  m.impl("random_bits", TORCH_BOX(&Ops::random_bits));
  m.impl("uniform", TORCH_BOX(&Ops::uniform));
  m.impl("normal", TORCH_BOX(&Ops::normal));
  m.impl("exponential", TORCH_BOX(&Ops::exponential));
  m.impl("bernoulli", TORCH_BOX(&Ops::bernoulli));
}
