// Small kernels for the tests of the emulated device itself: a right one, and ones with a planted fault.
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/cuda/device.h"

namespace fastgen {
namespace {

constexpr int kThreads = 128;

__global__ void reverse(const float* in, float* out, bool barrier) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) block_barrier();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void copy_by_parts(const float* in, float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  copy_async16(shared + 4 * threadIdx.x, in + 4 * (threadIdx.x % (kThreads / 4)), threadIdx.x < kThreads / 4);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  block_barrier();
  out[threadIdx.x] = shared[threadIdx.x];
  out[kThreads + threadIdx.x] = shared[kThreads + threadIdx.x];  // zeros, as they were not there
}

// Copies over what others still read, or after a barrier.
__global__ void refill(const float* in, float* out, bool barrier) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = in[threadIdx.x];
  block_barrier();
  const float kept = barrier ? shared[kThreads - 1 - threadIdx.x] : 0.0f;
  if (barrier) block_barrier();
  if (threadIdx.x < kThreads / 4) copy_async16(shared + 4 * threadIdx.x, in + kThreads);
  copy_async_commit();
  out[threadIdx.x] = barrier ? kept : shared[kThreads - 1 - threadIdx.x];
  copy_async_wait<0>();
}

__global__ void a_lane_alone() {
  if (threadIdx.x == 0) warp_barrier();
}

__global__ void two_shuffles(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? shuffle_xor(1.0f, 1) : shuffle_down(1.0f, 1);
}

__global__ void behind_shared(float* out) {
  copy_async16(dynamic_shared() + 16 * threadIdx.x, out);
  copy_async_commit();
}

__global__ void write_behind_shared() { dynamic_shared()[threadIdx.x] = 0; }

// Each block adds what all blocks wrote in the round before.
__global__ void rounds(uint32_t* arrived, float* sums, int count, bool barrier) {
  GridBarrier grid(arrived);
  for (int round = 0; round < count; ++round) {
    if (threadIdx.x == 0) {
      float sum = 1;
      for (unsigned b = 0; b < gridDim.x; ++b) sum += round > 0 ? sums[(round - 1) * gridDim.x + b] : 0.0f;
      sums[round * gridDim.x + blockIdx.x] = sum;
    }
    if (barrier) grid.wait();
  }
}

__global__ void wait_for(const uint32_t* flag) {
  while (load_acquire(flag) == 0) {
  }
}

// out (16, 8) = left (16, 16) right (16, 8), both row after row in shared memory.
__global__ void product(const Float16* left, const Float16* right, float* out) {
  auto* shared = reinterpret_cast<Float16*>(dynamic_shared());
  for (int i = int(threadIdx.x); i < 256; i += 32) shared[i] = left[i];
  for (int i = int(threadIdx.x); i < 256; i += 32) shared[256 + i] = i < 128 ? right[i] : Float16{0};
  warp_barrier();
  const int lane = int(threadIdx.x), g = lane / 4, c = 2 * (lane % 4);
  uint32_t a[4], b[4];
  load_matrices(a, shared + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(b, shared + 256 + lane % 16 * 8);  // the other half of the lanes repeat these rows
  float d[4] = {};
  multiply_add<Float16>(d, a, {b[0], b[1]});
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + c + i % 2] = d[i];
}

std::string outcome(const std::string& name) {
  std::vector<float> in(4 * kThreads), out(4 * kThreads, -1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i);
  uint32_t flag = 0;
  const auto alone = [&](auto kernel, size_t shared, auto... args) {
    launch(kernel, 1, kThreads, shared, nullptr, args...);
  };
  bool right = true;
  if (name == "reverse" || name == "no barrier") {
    alone(reverse, kThreads * 4, in.data(), out.data(), name == "reverse");
    for (int i = 0; i < kThreads; ++i) right &= out[i] == in[kThreads - 1 - i];
  } else if (name == "copy" || name == "no wait") {
    alone(copy_by_parts, 16 * kThreads, in.data(), out.data(), name == "copy");
    for (int i = 0; i < 2 * kThreads; ++i) right &= out[i] == (i < kThreads ? in[i] : 0.0f);
  } else if (name == "refill" || name == "refill too early") {
    alone(refill, kThreads * 4, in.data(), out.data(), name == "refill");
    for (int i = 0; i < kThreads; ++i) right &= out[i] == in[kThreads - 1 - i];
  } else if (name == "a lane alone") {
    alone(a_lane_alone, 0);
  } else if (name == "two shuffles") {
    alone(two_shuffles, 0, out.data());
  } else if (name == "behind shared") {
    alone(behind_shared, 16 * kThreads - 16, out.data());
  } else if (name == "write behind shared") {
    alone(write_behind_shared, kThreads - 1);
  } else if (name == "rounds" || name == "no grid barrier") {
    launch_cooperative(rounds, 4, kThreads, 0, nullptr, &flag, out.data(), 5, name == "rounds");
    float want = 0;  // of a round: what each block has
    for (int round = 0; round < 5; ++round) {
      want = 1 + 4 * want;
      for (int block = 0; block < 4; ++block) right &= out[4 * round + block] == want;
    }
  } else if (name == "too many blocks") {
    launch_cooperative(rounds, 1000, kThreads, 0, nullptr, &flag, out.data(), 0, true);
  } else if (name == "nobody sets the flag") {
    alone(wait_for, 0, &flag);
  } else if (name == "too much shared memory") {
    alone(a_lane_alone, size_t(1) << 20);
  } else if (name == "product") {
    std::vector<Float16> left(256), right_side(128);
    std::vector<float> want(128);
    for (int i = 0; i < 256; ++i) narrow(float((i * 7) % 11 - 5), &left[i]);
    for (int i = 0; i < 128; ++i) narrow(float((i * 5) % 13 - 6), &right_side[i]);
    launch(product, 1, 32, 1024, nullptr, left.data(), right_side.data(), out.data());
    for (int i = 0; i < 128; ++i) {
      for (int k = 0; k < 16; ++k) want[i] += widen(left[i / 8 * 16 + k]) * widen(right_side[k * 8 + i % 8]);
      right &= out[i] == want[i];
    }
  } else {
    return "no such kernel";
  }
  return right ? "right" : "wrong result";
}

}  // namespace
}  // namespace fastgen

int main(int, char** arguments) {
  try {
    std::puts(fastgen::outcome(arguments[1]).c_str());
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
  return 0;
}
