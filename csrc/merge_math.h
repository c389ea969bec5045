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
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LORA_FAST_INLINE __host__ __device__ __forceinline__
#else
#define LORA_FAST_INLINE inline __attribute__((always_inline))
#endif

namespace lora_fast {

template <class To, class From>
LORA_FAST_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

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

// condition ? a : b without a branch, so that loops over it become vectors.
template <class Word>
LORA_FAST_INLINE Word select(bool condition, Word a, Word b) {
  return b ^ ((a ^ b) & (Word{0} - static_cast<Word>(condition)));
}

// A format names how a weight is stored (Bits), what it is computed in (Compute), and the unsigned
// integer as wide as that (Word). kExponent selects the bits that are all ones in inf and NaN.

struct Fp64 {
  using Bits = uint64_t;
  using Word = uint64_t;
  using Compute = double;
  static constexpr Bits kExponent = 0x7ff0000000000000;
  static LORA_FAST_INLINE Compute widen(Bits bits) { return bit_cast<double>(bits); }
  static LORA_FAST_INLINE Bits round(Compute value) { return bit_cast<Bits>(value); }
};

struct Fp32 {
  using Bits = uint32_t;
  using Word = uint32_t;
  using Compute = float;
  static constexpr Bits kExponent = 0x7f800000;
  static LORA_FAST_INLINE Compute widen(Bits bits) { return bit_cast<float>(bits); }
  static LORA_FAST_INLINE Bits round(Compute value) { return bit_cast<Bits>(value); }
};

struct Bf16 {
  using Bits = uint16_t;
  using Word = uint32_t;
  using Compute = float;
  static constexpr Bits kExponent = 0x7f80;
  static LORA_FAST_INLINE Compute widen(Bits bits) {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  // To nearest, ties to even. NaN stays non-finite, which is all that its one reader asks.
  static LORA_FAST_INLINE Bits round(Compute value) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t word = bit_cast<uint32_t>(value);
    const bool is_nan = (word & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return static_cast<Bits>(select<uint32_t>(is_nan, 0x7fc0, rounded));
#endif
  }
  // Two at once, the first in the lower half of the word.
  static LORA_FAST_INLINE uint32_t round_pair(Compute low, Compute high) {
#if defined(__CUDA_ARCH__)
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
#else
    return round(low) | static_cast<uint32_t>(round(high)) << 16;
#endif
  }
};

struct Fp16 {
  using Bits = uint16_t;
  using Word = uint32_t;
  using Compute = float;
  static constexpr Bits kExponent = 0x7c00;

  static LORA_FAST_INLINE Compute widen(Bits bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));  // exact, as is the code below
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t magnitude = bits & 0x7fff;
    const uint32_t normal = (magnitude << 13) + 0x38000000;  // exponent bias 15 to 127
    // A subnormal m * 2^-24 is the exact difference (0.5 + m * 2^-24) - 0.5.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(0x3f000000 + magnitude) - 0.5f);
    const uint32_t infinite = normal + 0x38000000;
    const uint32_t large = select(magnitude < kExponent, normal, infinite);
    return bit_cast<float>(select(magnitude < 0x0400, subnormal, large) | sign);
#endif
  }

  // To nearest, ties to even, subnormals kept.
  static LORA_FAST_INLINE Bits round(Compute value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t magnitude = word & 0x7fffffff;
    const uint32_t sign = (word >> 16) & 0x8000;
    const uint32_t normal = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 the spacing is 2^-24, which is that of float at 0.5: the addition rounds.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t infinite = select<uint32_t>(magnitude > 0x7f800000, 0x7e00, 0x7c00);
    const uint32_t large = select(magnitude < 0x477ff000, normal, infinite);
    return static_cast<Bits>(select(magnitude < 0x38800000, subnormal, large) | sign);
#endif
  }
  static LORA_FAST_INLINE uint32_t round_pair(Compute low, Compute high) {
#if defined(__CUDA_ARCH__)
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
#else
    return round(low) | static_cast<uint32_t>(round(high)) << 16;
#endif
  }
};

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
