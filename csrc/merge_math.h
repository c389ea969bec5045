// The arithmetic of one merged weight, shared by the CPU and the CUDA kernels.
//
//   merge     W' = round(W + s * acc)      acc = sum_j B[n, j] * A[j, k], j ascending, one fma each
//             code = ordered(W) - ordered(round(W' - s * acc))
//   unmerge   W  = unordered(ordered(round(W' - s * acc)) + code)
//
// The sums are fma only, which IEEE 754 defines to the last bit, and no product stands beside an
// addition, so a compiler has nothing to contract or reorder: a weight that was merged on one
// device can be unmerged on another.
#pragma once

#include <cmath>

#include "formats.h"

namespace lora_fast {

LORA_FAST_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

LORA_FAST_INLINE double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

template <class F>
LORA_FAST_INLINE bool is_finite(typename F::Bits bits) {
  return (bits & F::kExponent) != F::kExponent;
}

// Stored bits to integers in the order of the numbers, one apart for neighbours: -0 is -1, +0 is 0.
template <class F>
LORA_FAST_INLINE typename F::Word ordered(typename F::Bits bits) {
  using Word = typename F::Word;
  constexpr int kWord = 8 * sizeof(Word), kBits = 8 * sizeof(typename F::Bits);
  // All ones below the sign of a negative number, sign-extended to the word.
  const Word high = static_cast<Word>(bits) << (kWord - kBits);
  const Word sign = Word{0} - (high >> (kWord - 1));
  constexpr Word kMagnitude = (Word{1} << (kBits - 1)) - 1;
  constexpr Word kExtension = kBits == kWord ? Word{0} : ~Word{0} << (kBits % kWord);
  return static_cast<Word>(bits) ^ (sign & (kMagnitude | kExtension));
}

template <class F>
LORA_FAST_INLINE typename F::Bits unordered(typename F::Word word) {
  using Word = typename F::Word;
  constexpr int kWord = 8 * sizeof(Word), kBits = 8 * sizeof(typename F::Bits);
  constexpr Word kMagnitude = (Word{1} << (kBits - 1)) - 1;
  const Word sign = Word{0} - (word >> (kWord - 1));
  return static_cast<typename F::Bits>(word ^ (sign & kMagnitude));
}

// The one code that is no distance: the weight itself is in the overflow list.
constexpr int8_t kOverflow = -128;

template <class F>
struct Merged {
  typename F::Bits bits;
  int8_t code;
  typename F::Word infinite;  // 1: a finite weight would become inf or NaN
  typename F::Word overflow;  // 1: code is kOverflow
};

// Of a finite weight whose merged one is finite too, and what subtracting the delta gives.
template <class F>
LORA_FAST_INLINE Merged<F> encode(
    typename F::Bits weight, typename F::Bits merged, typename F::Bits back) {
  using Word = typename F::Word;
  const Word distance = ordered<F>(weight) - ordered<F>(back);
  const bool fits = static_cast<Word>(distance + 127) <= 254;
  const Word code = select<Word>(fits, distance, static_cast<Word>(kOverflow));
  return {merged, static_cast<int8_t>(static_cast<uint8_t>(code)), 0, static_cast<Word>(!fits)};
}

template <class F>
LORA_FAST_INLINE Merged<F> merge_weight(
    typename F::Bits weight, typename F::Compute acc, typename F::Compute scaling) {
  using Bits = typename F::Bits;
  using Word = typename F::Word;
  const Bits sum = F::round(fused(scaling, acc, F::widen(weight)));
  const bool finite = is_finite<F>(weight);  // inf and NaN are kept as they are
  const Bits merged = static_cast<Bits>(select<Word>(finite, sum, weight));
  const Bits back = F::round(fused(-scaling, acc, F::widen(merged)));
  Merged<F> result = encode<F>(weight, merged, back);
  const Word code = static_cast<Word>(static_cast<uint8_t>(result.code));
  result.code = static_cast<int8_t>(static_cast<uint8_t>(select<Word>(finite, code, 0)));
  result.infinite = static_cast<Word>(finite) & static_cast<Word>(!is_finite<F>(merged));
  result.overflow &= static_cast<Word>(finite);
  return result;
}

template <class F>
struct PlainMerged {
  typename F::Bits bits;
  int8_t code;
  typename F::Word not_plain;  // 1: the other two are wrong, merge_weight must decide
};

// merge_weight for the weights that nearly all are: finite before and after, with a code that fits.
template <class F>
LORA_FAST_INLINE PlainMerged<F> merge_plain_weight(
    typename F::Bits weight, typename F::Compute acc, typename F::Compute scaling) {
  using Bits = typename F::Bits;
  using Word = typename F::Word;
  const Bits merged = F::round(fused(scaling, acc, F::widen(weight)));
  const Bits back = F::round(fused(-scaling, acc, F::widen(merged)));
  const Word distance = ordered<F>(weight) - ordered<F>(back);
  const Word not_plain = static_cast<Word>(static_cast<Word>(distance + 127) > 254) |
      static_cast<Word>(!is_finite<F>(weight)) | static_cast<Word>(!is_finite<F>(merged));
  return {merged, static_cast<int8_t>(static_cast<uint8_t>(distance)), not_plain};
}

template <class F>
LORA_FAST_INLINE typename F::Bits unmerge_weight(
    typename F::Bits merged, typename F::Compute acc, typename F::Compute scaling, int8_t code) {
  using Word = typename F::Word;
  const typename F::Bits back = F::round(fused(-scaling, acc, F::widen(merged)));
  const typename F::Bits weight = unordered<F>(ordered<F>(back) + static_cast<Word>(code));
  return static_cast<typename F::Bits>(select<Word>(is_finite<F>(merged), weight, merged));
}

}  // namespace lora_fast
