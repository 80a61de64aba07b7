// From the scores of a row to its next token: fastgen/reference/generate.py, pick_tokens, step by step. Plain loops
// for the compiler to vectorise: single IEEE operations in double precision, then integers, so every instruction set
// has the same token. No sorting: a cut in the order of the weights is found by halving the range of their values.
#include "../common/params.h"
#include "../common/philox.h"

namespace fastgen {
namespace {

constexpr int kUnitBits = 40;           // weights are in units of 2^-40 of the largest
constexpr double kSmallestScore = -28;  // exp of less is under one unit

// exp(x) 2^40 for x <= 0, rounded down: x = k ln 2 + r, and exp(r) by its Taylor series.
FASTGEN_FN int64_t probability_units(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to an integer
  constexpr double kInverseFactorial[] = {1.0,
                                          1.0 / 1.0,
                                          1.0 / 2.0,
                                          1.0 / 6.0,
                                          1.0 / 24.0,
                                          1.0 / 120.0,
                                          1.0 / 720.0,
                                          1.0 / 5040.0,
                                          1.0 / 40320.0,
                                          1.0 / 362880.0,
                                          1.0 / 3628800.0,
                                          1.0 / 39916800.0,
                                          1.0 / 479001600.0,
                                          1.0 / 6227020800.0};
  const bool large = x >= kSmallestScore;
  x = large ? x : 0.0;
  const double k = (x * 1.4426950408889634 + kRound) - kRound;
  const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  double value = kInverseFactorial[13];
  FASTGEN_UNROLL
  for (int n = 12; n >= 0; --n) value = value * r + kInverseFactorial[n];
  const uint64_t exponent = uint64_t(int64_t(k) + 1023 + kUnitBits) << 52;
  double power;
  memcpy(&power, &exponent, sizeof power);
  return large ? int64_t(value * power) : 0;
}

// The largest v in [0, 2^40] for which holds(v), which is true of 0 and, once false, stays so.
template <class Predicate>
FASTGEN_FN int64_t largest(const Predicate& holds) {
  int64_t low = 0, high = (int64_t(1) << kUnitBits) + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The float64 uniform number of an element of a stream.
FASTGEN_FN double uniform_at(uint64_t seed, uint64_t element) {
  const uint64_t block = element >> 1;
  uint64_t c0[] = {uint32_t(block)}, c1[] = {block >> 32}, c2[] = {0}, c3[] = {kWidth64};
  philox4x32_10(c0, c1, c2, c3, PhiloxKey(seed));
  const uint64_t low = element & 1 ? c2[0] : c0[0], high = element & 1 ? c3[0] : c1[0];
  return double((uint64_t(uint32_t(low)) | high << 32) >> 11) * 0x1p-53;
}

// Over score(i), i < count: a token, or -1.
template <class Score>
FASTGEN_FN int64_t pick(const Score& score, const DrawParams& p, int64_t row) {
  const int64_t count = p.vocabulary;
  double most = -__builtin_inf();
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    const double x = score(i);
    nan |= x != x;
    most = x > most ? x : most;
  }
  if (nan || !(most - most == 0)) return -1;
  if (p.temperature == 0) {
    int64_t i = 0;
    while (score(i) != most) ++i;
    return i;
  }

  int64_t* weight = p.weights + row * count;
  for (int64_t i = 0; i < count; ++i) weight[i] = probability_units(score(i) - most);
  if (p.top_k > 0 && p.top_k < count) {
    const int64_t least = largest([&](int64_t v) {
      int64_t at_least = 0;
      for (int64_t i = 0; i < count; ++i) at_least += weight[i] >= v;
      return at_least >= p.top_k;
    });
    for (int64_t i = 0; i < count; ++i) weight[i] = weight[i] < least ? 0 : weight[i];
  }
  if (p.top_p < 1) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += weight[i];
    const double limit = p.top_p * double(total);
    const auto sum_from = [&](int64_t v) {
      int64_t sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += weight[i] >= v ? weight[i] : 0;
      return sum;
    };
    // Above the cut, everything is within the limit; of what stands at it, the first tokens are.
    const int64_t cut = largest([&](int64_t v) { return v == 0 || double(sum_from(v)) >= limit; });
    int64_t before = sum_from(cut + 1);
    for (int64_t i = 0; i < count; ++i) {
      if (weight[i] > cut) continue;
      const bool keep = weight[i] == cut && double(before) < limit;
      before += keep ? cut : 0;
      weight[i] = keep ? cut : 0;
    }
  }
  if (p.min_p > 0) {
    const double least = p.min_p * double(int64_t(1) << kUnitBits);
    for (int64_t i = 0; i < count; ++i) weight[i] = double(weight[i]) < least ? 0 : weight[i];
  }

  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += weight[i];
  const int64_t scaled = int64_t(uniform_at(p.seeds[row], p.elements[row]) * double(total));
  int64_t left = scaled < total - 1 ? scaled : total - 1, token = 0;
  while (left >= weight[token]) left -= weight[token++];
  return token;
}

template <class Storage>
void draw_tokens_as(const DrawParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Storage* logits = static_cast<const Storage*>(p.logits) + row * p.vocabulary;
    const bool* seen = p.seen == nullptr ? nullptr : p.seen + p.seen_rows[row] * p.vocabulary;
    const double temperature = p.temperature == 0 ? 1 : p.temperature, penalty = p.repetition_penalty;
    if (seen == nullptr) {
      p.tokens[row] = pick([=](int64_t i) { return double(widen(logits[i])) / temperature; }, p, row);
    } else {
      p.tokens[row] = pick(
          [=](int64_t i) {
            const double x = double(widen(logits[i]));
            return (seen[i] ? (x < 0 ? x * penalty : x / penalty) : x) / temperature;
          },
          p, row);
    }
  }
}

void draw_tokens(const DrawParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat64: return draw_tokens_as<double>(p, begin, end);
    case DType::kBFloat16: return draw_tokens_as<BFloat16>(p, begin, end);
    case DType::kFloat16: return draw_tokens_as<Float16>(p, begin, end);
    default: return draw_tokens_as<float>(p, begin, end);
  }
}

}  // namespace
}  // namespace fastgen
