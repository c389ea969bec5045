// The arithmetic of merge_math.h for four neighbouring weights at once: what the CUDA kernels do
// with the weights that nearly all are. Weights of 16 bits stay two to a word, which saves a GPU
// half of the instructions; the bits are those of merge_weight and unmerge_weight.
#pragma once

#include <type_traits>

#include "merge_math.h"

namespace lora_fast {

constexpr int kGroup = 4;

// The lowest byte of each word.
LORA_FAST_INLINE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
#else
  return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | d << 24;
#endif
}

// The lower byte of each half word.
LORA_FAST_INLINE uint32_t even_bytes(uint32_t first, uint32_t second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(first, second, 0x6420);
#else
  return low_bytes(first, first >> 16, second, second >> 16);
#endif
}

// Undoes even_bytes: a half word for each of bytes 0 and 1 or, of the second, 2 and 3.
LORA_FAST_INLINE uint32_t spread_bytes(uint32_t bytes, int second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(bytes, 0, second ? 0x4342 : 0x4140);
#else
  const uint32_t two = bytes >> 16 * second;
  return (two & 0xff) | (two & 0xff00) << 8;
#endif
}

// Half words of all ones where a half word has its highest bit set, else of zeros.
LORA_FAST_INLINE uint32_t sign_halves(uint32_t word) {
#if defined(__CUDA_ARCH__)
  uint32_t signs;  // __byte_perm knows no signs
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(signs) : "r"(word));
  return signs;
#else
  return (word >> 15 & 0x00010001) * 0xffff;
#endif
}

// Half words as in `ordered`, plus 2^15: nothing is borrowed from one for the difference of others.
LORA_FAST_INLINE uint32_t order_halves(uint32_t word) {
  constexpr uint32_t kMagnitude = 0x7fff7fff;
  return (kMagnitude & (word ^ sign_halves(word))) | (~kMagnitude & ~word);
}

LORA_FAST_INLINE uint32_t unorder_halves(uint32_t word) {
  constexpr uint32_t kMagnitude = 0x7fff7fff;
  return (kMagnitude & ~(word ^ sign_halves(word))) | (~kMagnitude & ~word);
}

// Four weights next to one another, in words of one or two.
template <class F>
struct alignas(sizeof(typename F::Bits) == 2 ? 8 : 16) Group {
  using Bits = typename F::Bits;
  static constexpr bool kPaired = sizeof(Bits) == 2;
  using Word = std::conditional_t<kPaired, uint32_t, Bits>;
  static constexpr int kWords = kPaired ? kGroup / 2 : kGroup;
  Word word[kWords];

  LORA_FAST_INLINE Bits lane(int i) const {
    if constexpr (kPaired) {
      return static_cast<Bits>(word[i / 2] >> (i % 2 * 16));
    } else {
      return word[i];
    }
  }

  // Drops lane 0 and appends lane 3: a loop that a compiler leaves one has no other lanes.
  LORA_FAST_INLINE void shift(Bits last) {
    if constexpr (kPaired) {
      word[0] = word[0] >> 16 | word[1] << 16;
      word[1] = word[1] >> 16 | static_cast<Word>(last) << 16;
    } else {
      for (int i = 0; i + 1 < kGroup; ++i) word[i] = word[i + 1];
      word[kGroup - 1] = last;
    }
  }
};

// round(weight + factor * acc) for four, each with one rounding of the sum and one to the format.
template <class F>
LORA_FAST_INLINE Group<F> add_to_group(
    const Group<F>& weight, const typename F::Compute (&acc)[kGroup], typename F::Compute factor) {
  using Compute = typename F::Compute;
  Group<F> result;
  if constexpr (Group<F>::kPaired) {
    for (int k = 0; k < Group<F>::kWords; ++k) {
      const Compute low = fused(factor, acc[2 * k], F::widen(weight.lane(2 * k)));
      const Compute high = fused(factor, acc[2 * k + 1], F::widen(weight.lane(2 * k + 1)));
      result.word[k] = F::round_pair(low, high);
    }
  } else {
    for (int i = 0; i < kGroup; ++i) {
      result.word[i] = F::round(fused(factor, acc[i], F::widen(weight.word[i])));
    }
  }
  return result;
}

template <class F>
LORA_FAST_INLINE bool all_finite(const Group<F>& group) {
  using Word = typename Group<F>::Word;
  constexpr Word kEach = Group<F>::kPaired ? 0x00010001 : 1;
  constexpr Word kExponent = F::kExponent * kEach;
  constexpr Word kSign = (Word{1} << (8 * sizeof(typename F::Bits) - 1)) * kEach;
  // The lowest bit of an exponent of all ones, added to it, carries into the sign.
  constexpr Word kLowest = (Word{F::kExponent} & (Word{0} - F::kExponent)) * kEach;
  Word any = 0;
  for (auto word : group.word) any |= (word & kExponent) + kLowest;
  return (any & kSign) == 0;
}

template <class F>
struct MergedGroup {
  Group<F> bits, back;
  uint32_t code;  // a byte for each
  bool finite;    // all merged weights are
  bool fits;      // all distances do; else code is wrong, for the neighbours of such a weight too
};

// merge_weight for four; `finite` and `fits` tell whether all of it holds. A weight that is not
// finite makes a merged one that is not.
template <class F>
LORA_FAST_INLINE MergedGroup<F> merge_group(
    const Group<F>& weight, const typename F::Compute (&acc)[kGroup], typename F::Compute scaling) {
  using Word = typename Group<F>::Word;
  MergedGroup<F> merged;
  merged.bits = add_to_group<F>(weight, acc, scaling);
  merged.back = add_to_group<F>(merged.bits, acc, -scaling);
  merged.finite = all_finite(merged.bits);
  uint32_t distance[Group<F>::kWords];  // plus 128
  Word far = 0;
  for (int k = 0; k < Group<F>::kWords; ++k) {
    // A distance fits from -127 to 127: plus 128 and plus 127 both lie in a byte.
    if constexpr (Group<F>::kPaired) {
      const uint32_t apart = order_halves(weight.word[k]) - order_halves(merged.back.word[k]);
      distance[k] = apart + 0x00800080;
      far |= (distance[k] | (apart + 0x007f007f)) & 0xff00ff00;
    } else {
      const Word apart = ordered<F>(weight.word[k]) - ordered<F>(merged.back.word[k]);
      distance[k] = static_cast<uint32_t>(apart + 128);
      far |= ((apart + 128) | (apart + 127)) & ~Word{0xff};
    }
  }
  merged.fits = far == 0;
  if constexpr (Group<F>::kPaired) {
    merged.code = even_bytes(distance[0], distance[1]);
  } else {
    merged.code = low_bytes(distance[0], distance[1], distance[2], distance[3]);
  }
  merged.code ^= 0x80808080;
  return merged;
}

// unmerge_weight for four merged weights, all finite. Where the code is kOverflow the result is no
// weight: the overflow list has that.
template <class F>
LORA_FAST_INLINE Group<F> unmerge_group(
    const Group<F>& merged, const typename F::Compute (&acc)[kGroup], typename F::Compute scaling,
    uint32_t code) {
  using Word = typename Group<F>::Word;
  Group<F> weight = add_to_group<F>(merged, acc, -scaling);
  if constexpr (Group<F>::kPaired) {
    // Plus 128, from 1 to 255; kOverflow, which would borrow from a neighbour, as a distance of 0.
    uint32_t distance = code ^ 0x80808080;
    distance |= ~((distance & 0x7f7f7f7f) + 0x7f7f7f7f) & 0x80808080;
    for (int k = 0; k < Group<F>::kWords; ++k) {
      const uint32_t back = order_halves(weight.word[k]);
      weight.word[k] = unorder_halves(back + spread_bytes(distance, k) - 0x00800080);
    }
  } else {
    for (int i = 0; i < kGroup; ++i) {
      const auto one = static_cast<int8_t>(code >> 8 * i);
      weight.word[i] = unordered<F>(ordered<F>(weight.word[i]) + static_cast<Word>(one));
    }
  }
  return weight;
}

}  // namespace lora_fast
