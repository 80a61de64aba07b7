// From the scores of a row to its next token, by a block: fastgen/reference/generate.py, pick_tokens.
//
// Weights are whole numbers below 2^41, so their sums have no order, and bins of a histogram may be added to by any
// thread. A cut in the order of the weights is found by their bits from the top down: as a floating-point number a
// weight has 46 of them, the first 10 are its exponent and four bits more, so that already the first histogram parts
// the weights of a language model well. What a bin holds is copied into shared memory as soon as it has room there.
#pragma once

#include "../common/draw.h"
#include "device.h"

namespace fastgen {
namespace {

constexpr int kSlice = 4096;  // tokens: rows that are longer are shared out, their weights stand in global memory
constexpr int kSliceThreads = 256, kMostThreads = 1024;
constexpr int kKeyBits = 46, kFirstBits = 10, kMoreBits = 9, kBins = 1 << kFirstBits;
static_assert((kKeyBits - kFirstBits) % kMoreBits == 0);
constexpr int64_t kAllOfThem = int64_t(1) << 62;

// The largest score, and the first token that has it; infinity for a NaN, which is no maximum to draw by either.
struct Best {
  double score = -__builtin_inf();
  int64_t token = kAllOfThem;
};

FASTGEN_FN Best better(const Best& a, const Best& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token) ? a : b;
}

// Some of the weights of a row: how many, and their sum.
struct Tally {
  int64_t count = 0, sum = 0;
};

FASTGEN_FN Tally operator+(const Tally& a, const Tally& b) { return {a.count + b.count, a.sum + b.sum}; }

// What is left by the filters: the weights above one, and the first `equal` of those equal to it.
struct Kept {
  int64_t weight = 0, equal = kAllOfThem;
};

struct Draw : DrawOptions {
  const void* logits;          // (rows, V)
  const bool* seen;            // (rows, V) or null
  const int64_t* seed_offset;  // (rows, 2)
  int slices;
  Best* best;        // (rows, slices) and
  int64_t* weights;  // (rows, V) where there are several
};

struct Cut {
  int64_t weight;
  Tally above, at, all;  // of the weights above it, of those equal to it, and of all
};

// In shared memory.
struct DrawShared {
  uint32_t count[kBins], low[kBins], high[kBins];  // of each bin the weights and their sum
  Best best[32];                                   // of each warp
  Tally tally[32];
  Tally above, at;
  int bin;
  uint32_t listed;
  int64_t weights[kSlice];  // of the row, or of a bin
};
static_assert(sizeof(DrawShared) <= 48 * 1024);

__device__ inline DrawShared& draw_shared() { return *reinterpret_cast<DrawShared*>(dynamic_shared()); }
__device__ inline int lane_of_thread() { return int(threadIdx.x) % 32; }
__device__ inline int warp_of_thread() { return int(threadIdx.x) / 32; }

__device__ inline double score_at(const Draw& p, int64_t row, int64_t token) {
  const int64_t at = row * p.vocabulary + token;
  double logit;
  switch (p.dtype) {
    case DType::kFloat64: logit = static_cast<const double*>(p.logits)[at]; break;
    case DType::kBFloat16: logit = widen(static_cast<const BFloat16*>(p.logits)[at]); break;
    case DType::kFloat16: logit = widen(static_cast<const Float16*>(p.logits)[at]); break;
    default: logit = static_cast<const float*>(p.logits)[at];
  }
  const bool seen = p.seen != nullptr && p.seen[at];
  return score_of(logit, seen, p.temperature == 0 ? 1.0 : p.temperature, p.repetition_penalty);
}

// The best of what each thread of the block has; all of them receive it.
__device__ inline Best best_of_block(Best best) {
  Best* of_warps = draw_shared().best;
  for (int step = 16; step > 0; step /= 2) {
    best = better(best, {shuffle_xor(best.score, step), shuffle_xor(best.token, step)});
  }
  if (lane_of_thread() == 0) of_warps[warp_of_thread()] = best;
  block_barrier();
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) best = better(best, of_warps[warp]);
  block_barrier();
  return best;
}

__device__ inline Best best_of_scores(const Draw& p, int64_t row, int64_t begin, int64_t end) {
  Best best;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const double x = score_at(p, row, i);
    best = better(best, {x != x ? __builtin_inf() : x, i});
  }
  return best_of_block(best);
}

__device__ inline Best best_of_slices(const Draw& p, int64_t row) {
  Best best;
  for (int i = int(threadIdx.x); i < p.slices; i += int(blockDim.x)) best = better(best, p.best[row * p.slices + i]);
  return best_of_block(best);
}

FASTGEN_FN bool is_finite(double x) { return x - x == 0; }

__device__ inline void store_weights(const Draw& p, int64_t row, int64_t begin, int64_t end, double most, int64_t* to) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) to[i] = probability_units(score_at(p, row, i) - most);
}

// Of weights above 0, in their order; the exponent is 0 to 40.
FASTGEN_FN uint64_t key_of(int64_t weight) {
  const double x = double(weight);
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits >> 12) - (uint64_t(1023) << 40);
}
FASTGEN_FN int64_t weight_of(uint64_t key) {
  const uint64_t bits = (key + (uint64_t(1023) << 40)) << 12;
  double x;
  memcpy(&x, &bits, sizeof x);
  return int64_t(x);
}

__device__ inline Tally warp_total(Tally of) {
  for (int step = 16; step > 0; step /= 2) of = of + Tally{shuffle_xor(of.count, step), shuffle_xor(of.sum, step)};
  return of;
}

__device__ inline void add_to_bin(DrawShared& shared, int bin, const Tally& of) {
  add_shared(&shared.count[bin], uint32_t(of.count));
  const uint32_t low = uint32_t(of.sum), before = add_shared(&shared.low[bin], low);
  const uint32_t high = uint32_t(of.sum >> 32) + (before + low < before ? 1 : 0);
  if (high != 0) add_shared(&shared.high[bin], high);
}

// The weights of a warp, each to its bin, or to none: -1. Where all have the same one, they are added up beforehand.
__device__ inline void add_to_bins(DrawShared& shared, int bin, int64_t weight) {
  if (!warp_any(bin != shuffle(bin, 0))) {
    if (bin < 0) return;
    const Tally of = warp_total({1, weight});
    if (lane_of_thread() == 0) add_to_bin(shared, bin, of);
  } else if (bin >= 0) {
    add_to_bin(shared, bin, {1, weight});
  }
}

__device__ inline Tally tally_of_bin(const DrawShared& shared, int bin) {
  return {int64_t(shared.count[bin]), int64_t(uint64_t(shared.high[bin]) << 32 | shared.low[bin])};
}

// The largest of the weights, of those that are at least `least` and not 0, for which holds(t, all) is true of the
// tally t of the weights that are no smaller; 0 where that is not even true of all. Of a tally and larger ones it holds
// or it does not.
template <class Holds>
__device__ Cut cut_of(const int64_t* weights, int64_t count, int64_t least, const Holds& holds) {
  DrawShared& shared = draw_shared();
  const int threads = int(blockDim.x), lane = lane_of_thread();
  Cut cut{};
  uint64_t prefix = 0;  // of the key of the cut
  for (int shift = kKeyBits; shift > 0;) {
    const bool first = shift == kKeyBits;
    const int bits = first ? kFirstBits : kMoreBits, bins = 1 << bits;
    shift -= bits;
    const bool lists = !first && weights != shared.weights && cut.at.count <= kSlice;
    for (int i = int(threadIdx.x); i < bins; i += threads) shared.count[i] = shared.low[i] = shared.high[i] = 0;
    if (threadIdx.x == 0) shared.listed = 0;
    block_barrier();
    for (int64_t begin = int64_t(threadIdx.x) - lane; begin < count; begin += threads) {
      const int64_t weight = begin + lane < count ? weights[begin + lane] : 0;
      const uint64_t key = key_of(weight);
      const bool belongs = weight > 0 && weight >= least && key >> (shift + bits) == prefix;
      add_to_bins(shared, belongs ? int(key >> shift & uint64_t(bins - 1)) : -1, weight);
      if (lists && belongs) shared.weights[add_shared(&shared.listed, 1)] = weight;
    }
    block_barrier();
    if (lists) {
      weights = shared.weights;
      count = cut.at.count;
    }

    // Each thread has some neighbouring bins: those above are the ones of the lanes and warps behind it.
    const int own_bins = bins > threads ? bins / threads : 1, first_bin = int(threadIdx.x) * own_bins;
    Tally own;
    for (int i = 0; i < own_bins && first_bin < bins; ++i) own = own + tally_of_bin(shared, first_bin + i);
    Tally from = own;  // this lane on
    for (int step = 1; step < 32; step *= 2) {
      const Tally behind = {shuffle_down(from.count, step), shuffle_down(from.sum, step)};
      if (lane + step < 32) from = from + behind;
    }
    if (lane == 0) shared.tally[warp_of_thread()] = from;
    block_barrier();
    Tally above = cut.above + Tally{from.count - own.count, from.sum - own.sum}, all;
    for (int warp = 0; warp < threads / 32; ++warp) {
      const Tally of = shared.tally[warp];
      if (warp > warp_of_thread()) above = above + of;
      all = all + of;
    }
    if (first) cut.all = all;
    for (int bin = first_bin + own_bins - 1; bin >= first_bin && first_bin < bins; --bin) {
      const Tally at = tally_of_bin(shared, bin), upto = above + at;
      if (at.count > 0 && holds(upto, cut.all) && (above.count == 0 || !holds(above, cut.all))) {
        shared.bin = bin;
        shared.above = above;
        shared.at = at;
      }
      above = upto;
    }
    block_barrier();
    if (!holds(cut.all, cut.all)) return cut;
    prefix = prefix << bits | uint64_t(shared.bin);
    cut.above = shared.above;
    cut.at = shared.at;
  }
  cut.weight = weight_of(prefix);
  return cut;
}

// top_k, top_p and min_p.
__device__ inline Kept filter(const Draw& p, const int64_t* weights) {
  Kept kept;
  if (p.top_k > 0 && p.top_k < p.vocabulary) {
    const auto enough = [&](const Tally& upto, const Tally&) { return upto.count >= p.top_k; };
    kept.weight = cut_of(weights, p.vocabulary, 0, enough).weight;
  }
  if (p.top_p < 1) {
    const auto enough = [&](const Tally& upto, const Tally& all) {
      return double(upto.sum) >= p.top_p * double(all.sum);
    };
    const Cut cut = cut_of(weights, p.vocabulary, kept.weight, enough);
    // Of what stands at the cut, those that have less than the limit in front of them.
    const double limit = p.top_p * double(cut.all.sum);
    int64_t few = 0, many = cut.at.count;
    while (few < many) {
      const int64_t middle = (few + many) / 2;
      if (double(cut.above.sum + middle * cut.weight) < limit) {
        few = middle + 1;
      } else {
        many = middle;
      }
    }
    kept = {cut.weight, few};
  }
  if (p.min_p > 0) {
    const double share = p.min_p < 1.5 ? p.min_p : 1.5, least = share * double(int64_t(1) << kUnitBits);
    int64_t whole = int64_t(least);
    whole += double(whole) < least ? 1 : 0;
    if (whole > kept.weight) kept = {whole - 1, 0};
  }
  return kept;
}

// The first token with which the weights that are left add up to more than the share u of their sum.
__device__ inline int64_t token_at(const int64_t* weights, int64_t count, const Kept& kept, double u) {
  Tally* of_warps = draw_shared().tally;
  const int warp = warp_of_thread(), warps = int(blockDim.x) / 32, lane = lane_of_thread();
  // count: of the weights equal to kept.weight; sum: of those above.
  const auto tally = [&](int64_t i, int64_t end) {
    const int64_t weight = i < end ? weights[i] : -1;
    return Tally{weight == kept.weight ? 1 : 0, weight > kept.weight ? weight : 0};
  };
  const auto sum_of = [&](const Tally& of) {
    return of.sum + kept.weight * (of.count < kept.equal ? of.count : kept.equal);
  };
  int64_t begin = 0, end = count, left = 0;
  Tally before;
  // Each warp has a part, and the one in which the sum is reached is the next whole.
  for (bool first = true;; first = false) {
    const int64_t size = end - begin, part = ((size + warps - 1) / warps + 31) / 32 * 32;
    const int64_t own = begin + warp * part, own_end = own + part < end ? own + part : end;
    Tally of;
    for (int64_t i = own + lane; i < own_end; i += 32) of = of + tally(i, own_end);
    of = warp_total(of);
    if (lane == 0) of_warps[warp] = of;
    block_barrier();
    if (first) {
      Tally all;
      for (int i = 0; i < warps; ++i) all = all + of_warps[i];
      const int64_t total = sum_of(all), scaled = int64_t(u * double(total));
      left = scaled < total - 1 ? scaled : total - 1;
    }
    for (int i = 0; i < warps; ++i, begin += part) {
      const Tally upto = before + of_warps[i];
      if (sum_of(upto) > left) break;
      before = upto;
    }
    end = begin + part < end ? begin + part : end;
    block_barrier();
    if (part == 32) break;
  }
  Tally upto = tally(begin + lane, end);
  for (int step = 1; step < 32; step *= 2) {
    const Tally of = {shuffle(upto.count, (lane - step) & 31), shuffle(upto.sum, (lane - step) & 31)};
    if (lane >= step) upto = upto + of;
  }
  const Tally short_of = warp_total({sum_of(before + upto) > left ? 0 : 1, 0});
  return begin + short_of.count;
}

// The token of a row, or -1, by its block, whose threads are a power of two, 64 at least; all of them receive it.
__device__ inline int64_t pick(const Draw& p, int64_t row, uint64_t element) {
  const Best best = p.slices == 1 ? best_of_scores(p, row, 0, p.vocabulary) : best_of_slices(p, row);
  if (!is_finite(best.score)) return -1;
  if (p.temperature == 0) return best.token;
  const int64_t* weights = p.weights + row * p.vocabulary;
  if (p.slices == 1) {
    int64_t* own = draw_shared().weights;
    store_weights(p, row, 0, p.vocabulary, best.score, own);
    block_barrier();
    weights = own;
  }
  const Kept kept = filter(p, weights);
  return token_at(weights, p.vocabulary, kept, uniform_at(uint64_t(p.seed_offset[2 * row]), element));
}

}  // namespace
}  // namespace fastgen
