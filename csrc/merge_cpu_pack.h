// A and B as the sums of a tile read them, also as pairs of bf16 numbers.
//
// VDPBF16PS multiplies two pairs and adds to a sum what two fma in a row would, the upper numbers
// first, but takes subnormal numbers and sums for zero. The product of two bf16 numbers is exact in
// fp32. So where A and B hold bf16 numbers neither too small nor too large, the sums have the bits
// that merge_math.h demands. Source: Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2, VDPBF16PS.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "merge.h"

namespace lora_fast {

// The biased exponents of the numbers in a factor, but of its zeros.
struct Exponents {
  int least = 255, most = 0;

  // Whether no sum of up to 2^20 products is subnormal or infinite on the way. Products, and so
  // also their rounded sums, are multiples of the product of the last bits of two numbers.
  bool can_multiply(const Exponents& other) const {
    if (least == 0 || other.least == 0) return false;
    const int last_bit = (least - 134) + (other.least - 134);
    const int product = (most - 126) + (other.most - 126);
    return last_bit >= -126 && product + 20 < 127;
  }
};

// pairs[j, c] = rows[2 j, c] in the upper half, rows[2 j + 1, c] in the lower, and the exponents of
// both in exponents: of an fp32 number that is no bf16 number as if it were subnormal.
inline void pack_pairs(
    const float* rows, int64_t rank, int64_t cols, float* pairs, Exponents& exponents) {
  uint32_t least = ~uint32_t{0}, most = 0, rest = 0;
  for (int64_t j = 0; j < rank; j += 2) {
    const float* next = j + 1 < rank ? rows + (j + 1) * cols : nullptr;
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t upper = bit_cast<uint32_t>(rows[j * cols + c]);
      const uint32_t lower = next == nullptr ? 0 : bit_cast<uint32_t>(next[c]);
      const uint32_t first = upper & 0x7fffffff, second = lower & 0x7fffffff;
      least = std::min(least, std::min(first - 1, second - 1));  // zero becomes the largest
      most = std::max(most, std::max(first, second));
      rest |= (upper | lower) & 0xffff;
      pairs[j / 2 * cols + c] = bit_cast<float>(upper | (lower >> 16));
    }
  }
  if (most == 0) return;
  exponents.least = std::min(exponents.least, rest == 0 ? static_cast<int>((least + 1) >> 23) : 0);
  exponents.most = std::max(exponents.most, static_cast<int>(most >> 23));
}

// Some columns of a factor, rounded to what F computes in: [part][rank][width], zeros beyond the
// last column.
template <class F>
class Panel {
  using Compute = typename F::Compute;

 public:
  Panel(int64_t width, bool with_pairs) : width_(width), with_pairs_(with_pairs) {}

  // Room for so many columns of a factor, so that pack() takes no more memory.
  void reserve(int64_t rank, int64_t columns) {
    const int64_t parts = (columns + width_ - 1) / width_;
    values_.reserve(parts * rank * width_);
    if (with_pairs_) pairs_.reserve(parts * ((rank + 1) / 2) * width_);
  }

  void pack(const Factor& factor, int64_t rank, int64_t begin, int64_t end) {
    const int64_t parts = (end - begin + width_ - 1) / width_;
    rank_ = rank;
    values_.resize(parts * rank * width_);
    const int64_t missing = parts * width_ - (end - begin);
    for (int64_t j = 0; missing > 0 && j < rank; ++j) {
      std::fill_n(values_.data() + ((parts - 1) * rank + j + 1) * width_ - missing, missing, 0);
    }
    dispatch_format(factor.dtype, [&](auto stored) {
      using Stored = decltype(stored);
      const auto* from = static_cast<const typename Stored::Bits*>(factor.data);
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t first = begin + p * width_, count = std::min(width_, end - first);
        const auto* part = from + first * factor.stride1;
        Compute* to = values_.data() + p * rank * width_;
        if (factor.stride0 == 1) {
          // Along the rank, as the factor lies in memory.
          for (int64_t c = 0; c < count; ++c) {
            widen<Stored>(part + c * factor.stride1, 1, rank, to + c, width_);
          }
          continue;
        }
        for (int64_t j = 0; j < rank; ++j) {
          widen<Stored>(part + j * factor.stride0, factor.stride1, count, to + j * width_, 1);
        }
      }
    });
    if constexpr (std::is_same_v<F, Bf16>) {
      if (with_pairs_) pack_pairs(parts);
    }
  }

  const Compute* values(int64_t part) const { return values_.data() + part * rank_ * width_; }
  const Compute* pairs(int64_t part) const { return pairs_.data() + part * steps() * width_; }
  int64_t steps() const { return (rank_ + 1) / 2; }

  // Whether the sums over pairs have the right bits.
  bool pairs_with(const Panel& other) const {
    return with_pairs_ && exponents_.can_multiply(other.exponents_);
  }

 private:
  template <class Stored>
  static void widen(
      const typename Stored::Bits* from, int64_t stride, int64_t count, Compute* to,
      int64_t to_stride) {
    if (stride == 1 && to_stride == 1) {  // apart, so that it becomes vectors
      for (int64_t c = 0; c < count; ++c) to[c] = Compute(Stored::widen(from[c]));
      return;
    }
    for (int64_t c = 0; c < count; ++c) {
      to[c * to_stride] = Compute(Stored::widen(from[c * stride]));
    }
  }

  void pack_pairs(int64_t parts) {
    pairs_.resize(parts * steps() * width_);
    exponents_ = {};
    for (int64_t p = 0; p < parts; ++p) {
      lora_fast::pack_pairs(
          values(p), rank_, width_, pairs_.data() + p * steps() * width_, exponents_);
    }
  }

  int64_t width_, rank_ = 0;
  bool with_pairs_;
  std::vector<Compute> values_, pairs_;
  Exponents exponents_;
};

}  // namespace lora_fast
