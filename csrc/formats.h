// How numbers are stored: their bits, and the exact way to what is computed with and back.
#pragma once

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

// condition ? a : b without a branch, so that loops over it become vectors.
template <class Word>
LORA_FAST_INLINE Word select(bool condition, Word a, Word b) {
  return b ^ ((a ^ b) & (Word{0} - static_cast<Word>(condition)));
}

enum class Dtype : int8_t { kFp64, kFp32, kFp16, kBf16 };

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

}  // namespace lora_fast
