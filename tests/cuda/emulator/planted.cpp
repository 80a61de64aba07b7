// Small kernels for the tests of the emulated device itself: a right one, and ones with a planted fault.
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/cuda/warpgroup.h"

extern "C" void fastgen_emulated_device(int multiprocessors, int64_t shared_limit, int capability);

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
  GridBarrier grid(arrived, int(gridDim.x));
  for (int round = 0; round < count; ++round) {
    if (threadIdx.x == 0) {
      float sum = 1;
      for (unsigned b = 0; b < gridDim.x; ++b) sum += round > 0 ? sums[(round - 1) * gridDim.x + b] : 0.0f;
      sums[round * gridDim.x + blockIdx.x] = sum;
    }
    if (barrier) grid.wait();
  }
}

// Each block of a cluster writes to the next one.
__global__ void neighbours(float* out, int cluster, bool begin, bool end, bool barrier) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int rank = int(blockIdx.x) % cluster;
  if (end && rank == 1) return;
  if (begin) cluster_barrier();
  in_block_of_cluster(shared, (rank + 1) % cluster)[threadIdx.x] = float(blockIdx.x * kThreads + threadIdx.x);
  const float early = shared[threadIdx.x];
  cluster_barrier();
  out[blockIdx.x * kThreads + threadIdx.x] = barrier ? shared[threadIdx.x] : early;
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

// What can be wrong with the two kernels below, a warpgroup's product and a ring of copies.
struct Faults {
  bool no_wait = false, wait_for_other = false, touches = false, rewrites = false, no_fence = false;
  bool no_shared_fence = false, overwrites = false, askew = false, wrong_stride = false, wrong_leading = false;
  bool other_side = false, a_warp_alone = false, a_warp_waits_alone = false;
  bool left_unfenced = false, left_behind_fence = false, sums_unfenced = false, sums_behind_fence = false;
  bool no_full = false, no_empty = false, wrong_parity = false, few_arrive = false, not_initialised = false;
  bool no_turn = false, many_registers = false;
};

// out (64, 128) = 2 left (64, 16) right (16, 128), halves row after row in memory; a second product with the same
// operands adds the other half. right is copied to shared memory in two parts of 64 columns, in swizzled rows.
__global__ void warpgroup_product(const Float16* left, const Float16* right, float* out, Faults f) {
  const int thread = int(threadIdx.x), lane = thread % 32, g = thread / 32 * 16 + lane / 4, c = lane % 4 * 2;
  auto* shared = reinterpret_cast<Float16*>(dynamic_shared()) + (f.askew ? 64 : 0);
  for (int i = thread; i < 16 * 16; i += kThreads) {
    const int row = i / 16, piece = i % 16;
    copy_async16(shared + piece / 8 * 1024 + row * 64 + (piece % 8 ^ row % 8) * 8, right + row * 128 + piece * 8);
  }
  copy_async_commit();
  copy_async_wait<0>();
  if (!f.no_shared_fence) fence_shared();
  block_barrier();
  if (f.a_warp_alone && thread >= 32) return;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) memcpy(&a[i], left + (g + i % 2 * 8) * 16 + c + i / 2 * 8, 4);
  float d[16][4], other[8][4] = {};
  const uint64_t b = matrix_descriptor(shared, f.wrong_stride ? 2048 : 1024, f.wrong_leading ? 1024 : 2048);
  if (f.left_unfenced) {
    warpgroup_fence(d, other);
  } else if (f.sums_unfenced) {
    warpgroup_fence(d, a);
  } else if (!f.no_fence) {
    warpgroup_fence(d, other, a);
  }
  if (f.left_behind_fence) a[1] ^= 1;
  if (f.sums_behind_fence) other[2][1] = 1;
  warpgroup_multiply_add<Float16, true>(d, a, b, false);
  warpgroup_multiply_add<Float16, true>(d, a, b, true);
  warpgroup_commit();
  warpgroup_multiply_add<Float16, true>(other, a, b, true);
  warpgroup_commit();
  if (f.touches) d[3][1] = 0.0f;
  if (f.rewrites) a[2] = 0;
  if (f.overwrites) copy_async16(shared + thread * 8, right);
  if (f.wait_for_other) warpgroup_wait<1>(other);
  if (f.no_wait) {
    out[g * 128 + c] = d[0][0];
  } else {
    warpgroup_wait<1>(d);
  }
  if (f.a_warp_waits_alone ? thread < 32 : !f.a_warp_alone && named_barrier_any(1, kThreads, thread == 77)) {
    warpgroup_wait<0>(other);
    out[g * 128 + c] = 0;
  } else {
    warpgroup_wait<0>(other);
  }
  if (f.overwrites) {
    copy_async_commit();
    copy_async_wait<0>();
  }
  for (int n = 0; n < 16 && !f.no_wait; ++n) {
    for (int e = 0; e < 4; ++e) out[(g + e / 2 * 8) * 128 + n * 8 + c + e % 2] = d[n][e];
  }
}

// out (64, 64) = left (64, 64) right (64, 64)^T, right in 8 rows of 128 bytes one below the other.
__global__ void warpgroup_product_of_rows(const Float16* left, const Float16* right, float* out, Faults f) {
  const int thread = int(threadIdx.x), lane = thread % 32, g = thread / 32 * 16 + lane / 4, c = lane % 4 * 2;
  auto* shared = reinterpret_cast<Float16*>(dynamic_shared());
  for (int i = thread; i < 64 * 8; i += kThreads) {
    const int row = i / 8, piece = i % 8;
    copy_async16(shared + row * 64 + (piece ^ row % 8) * 8, right + row * 64 + piece * 8);
  }
  copy_async_commit();
  copy_async_wait<0>();
  block_barrier();
  fence_shared();  // by who reads, which will do too
  uint32_t a[4][4];
  float d[8][4];
  const uint64_t b = matrix_descriptor(shared, f.wrong_stride ? 512 : 1024, 16);
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) memcpy(&a[k][i], left + (g + i % 2 * 8) * 64 + k * 16 + c + i / 2 * 8, 4);
  }
  warpgroup_fence(d, a);
  for (int k = 0; k < 4; ++k) {
    if (f.other_side) {
      warpgroup_multiply_add<Float16, true>(d, a[k], moved(b, 32 * k), k > 0);
    } else {
      warpgroup_multiply_add<Float16, false>(d, a[k], moved(b, 32 * k), k > 0);
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>(d);
  for (int n = 0; n < 8; ++n) {
    for (int e = 0; e < 4; ++e) out[(g + e / 2 * 8) * 64 + n * 8 + c + e % 2] = d[n][e];
  }
}

// One warp brings numbers, 32 at a time, through two slots; the others add them up.
__global__ void ring(const float* in, float* out, int rounds, Faults f) {
  auto* slots = reinterpret_cast<float*>(dynamic_shared());
  auto* full = reinterpret_cast<uint64_t*>(slots + 64);
  uint64_t* const empty = full + 2;
  if (threadIdx.x == 0 && !f.not_initialised) {
    for (int i = 0; i < 2; ++i) {
      init_arrivals(full + i, 32);
      init_arrivals(empty + i, f.few_arrive ? kThreads : kThreads - 32);
    }
  }
  block_barrier();
  const int lane = int(threadIdx.x) % 32;
  float sum = 0;
  for (int n = 0; n < rounds; ++n) {
    const uint32_t parity = uint32_t(n / 2 % 2);
    if (threadIdx.x < 32) {
      if (!f.no_empty || n + 10 < rounds) wait_arrivals(empty + n % 2, f.wrong_parity ? parity : parity ^ 1);
      slots[n % 2 * 32 + lane] = in[n * 32 + lane];
      warp_barrier();  // where another thread may go on
      arrive(full + n % 2);
    } else {
      if (!f.no_full || n + 10 < rounds) wait_arrivals(full + n % 2, parity);
      sum += slots[n % 2 * 32 + lane];
      warp_barrier();
      arrive(empty + n % 2);
    }
  }
  out[threadIdx.x] = sum;
}

// Two warps write in turns.
__global__ void turns(float* out, int rounds, Faults f) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int warp = int(threadIdx.x) / 32;
  if (warp > 1) return;
  if (threadIdx.x < 32) shared[threadIdx.x] = 1;
  if (warp == 0) named_barrier_arrive(2, 64);
  for (int n = 0; n < rounds; ++n) {
    if (!f.no_turn) named_barrier_wait(warp == 0 ? 1 : 2, 64);
    float& number = shared[threadIdx.x % 32];
    number = warp == 0 ? number * 3 : number + 1;
    warp_barrier();
    if (!f.no_turn) named_barrier_arrive(warp == 0 ? 2 : 1, 64);
  }
  if (warp == 1) {
    named_barrier_wait(2, 64);
    out[threadIdx.x % 32] = shared[threadIdx.x % 32];
  }
}

__global__ void registers(Faults f) {
  if (threadIdx.x < 128) {
    lower_registers<40>();
  } else if (f.many_registers) {
    raise_registers<240>();
  } else {
    raise_registers<232>();
  }
}

// What stands behind the prefix, or the name where it has another.
std::string after(const std::string& prefix, const std::string& name) {
  if (name == prefix) return "";
  return name.starts_with(prefix + ", ") ? name.substr(prefix.size() + 2) : name;
}

Faults planted(const std::map<std::string, bool Faults::*>& faults, const std::string& fault) {
  Faults out;
  if (!fault.empty()) out.*faults.at(fault) = true;
  return out;
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
  } else if (const std::string wrong = after("cluster", name); wrong != name) {
    fastgen_emulated_device(4, 227 * 1024, wrong == "of an older device" ? 80 : 90);
    out.resize(8 * kThreads);
    launch_clusters(neighbours, wrong == "cut" ? 6 : 8, 4, kThreads, kThreads * 4, nullptr, out.data(), 4,
                    wrong != "not begun", wrong == "ended", wrong != "not waited for");
    for (int i = 0; i < 8 * kThreads; ++i) {
      right &= out[i] == float((i / kThreads / 4 * 4 + (i / kThreads + 3) % 4) * kThreads + i % kThreads);
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
  } else if (const std::string wrong = after("warpgroup product", name); wrong != name) {
    const std::map<std::string, bool Faults::*> faults = {{"not waited for", &Faults::no_wait},
                                                          {"another waited for", &Faults::wait_for_other},
                                                          {"touched", &Faults::touches},
                                                          {"left side rewritten", &Faults::rewrites},
                                                          {"without a fence", &Faults::no_fence},
                                                          {"of unfenced copies", &Faults::no_shared_fence},
                                                          {"overwritten", &Faults::overwrites},
                                                          {"askew", &Faults::askew},
                                                          {"of a wrong stride", &Faults::wrong_stride},
                                                          {"of a wrong leading stride", &Faults::wrong_leading},
                                                          {"by a warp alone", &Faults::a_warp_alone},
                                                          {"waited for by a warp alone", &Faults::a_warp_waits_alone},
                                                          {"left side not fenced", &Faults::left_unfenced},
                                                          {"left side behind the fence", &Faults::left_behind_fence},
                                                          {"sums not fenced", &Faults::sums_unfenced},
                                                          {"sums behind the fence", &Faults::sums_behind_fence}};
    std::vector<Float16> left(64 * 16), right_side(16 * 128);
    out.assign(64 * 128, 0);
    for (size_t i = 0; i < left.size(); ++i) narrow(float(int(i * 7 % 11) - 5), &left[i]);
    for (size_t i = 0; i < right_side.size(); ++i) narrow(float(int(i * 5 % 13) - 6), &right_side[i]);
    alone(warpgroup_product, 8192, left.data(), right_side.data(), out.data(), planted(faults, wrong));
    for (size_t i = 0; i < out.size(); ++i) {
      float want = 0;
      for (size_t k = 0; k < 16; ++k) want += 2 * widen(left[i / 128 * 16 + k]) * widen(right_side[k * 128 + i % 128]);
      right &= out[i] == want;
    }
  } else if (const std::string wrong = after("product of rows", name); wrong != name) {
    const std::map<std::string, bool Faults::*> faults = {{"of a wrong stride", &Faults::wrong_stride},
                                                          {"taken for columns", &Faults::other_side}};
    std::vector<Float16> left(64 * 64), right_side(64 * 64);
    out.assign(64 * 64, 0);
    for (size_t i = 0; i < left.size(); ++i) narrow(float(int(i * 7 % 11) - 5), &left[i]);
    for (size_t i = 0; i < right_side.size(); ++i) narrow(float(int(i * 5 % 13) - 6), &right_side[i]);
    alone(warpgroup_product_of_rows, 8192, left.data(), right_side.data(), out.data(), planted(faults, wrong));
    for (size_t i = 0; i < out.size(); ++i) {
      float want = 0;
      for (size_t k = 0; k < 64; ++k) want += widen(left[i / 64 * 64 + k]) * widen(right_side[i % 64 * 64 + k]);
      right &= out[i] == want;
    }
  } else if (const std::string wrong = after("ring", name); wrong != name) {
    const std::map<std::string, bool Faults::*> faults = {{"read too early", &Faults::no_full},
                                                          {"written too early", &Faults::no_empty},
                                                          {"of a wrong parity", &Faults::wrong_parity},
                                                          {"too few arrive at", &Faults::few_arrive},
                                                          {"not initialised", &Faults::not_initialised}};
    in.resize(32 * 50);
    for (size_t i = 0; i < in.size(); ++i) in[i] = float(i % 97);
    alone(ring, 288, in.data(), out.data(), 50, planted(faults, wrong));
    for (size_t t = 32; t < kThreads; ++t) {
      float want = 0;
      for (size_t n = 0; n < 50; ++n) want += in[32 * n + t % 32];
      right &= out[t] == want;
    }
  } else if (name == "turns" || name == "no turns") {
    Faults faults;
    faults.no_turn = name == "no turns";
    alone(turns, 128, out.data(), 8, faults);
    float want = 1;  // the second warp begins
    for (int n = 0; n < 8; ++n) want = (want + 1) * 3;
    right &= out[0] == want;
  } else if (name == "registers" || name == "too many registers") {
    Faults faults;
    faults.many_registers = name == "too many registers";
    launch(registers, 1, 3 * kThreads, 0, nullptr, faults);
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
