// From the scores of a row to its next token: fastgen/reference/generate.py, pick_tokens, step by step. Plain loops
// for the compiler to vectorise: single IEEE operations in double precision, then integers, so every instruction set
// has the same token. No sorting: a cut in the order of the weights is found by halving the range of their values.
#include "../common/draw.h"

namespace fastgen {
namespace {

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
      p.tokens[row] =
          pick([=](int64_t i) { return score_of(double(widen(logits[i])), false, temperature, 1.0); }, p, row);
    } else {
      p.tokens[row] =
          pick([=](int64_t i) { return score_of(double(widen(logits[i])), seen[i], temperature, penalty); }, p, row);
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
