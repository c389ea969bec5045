// Products of small matrices in fp32, a cell of the result at a time, for each instruction set.
//
// A cell is summed in registers, so its operands are read where they lie: nothing is packed, which
// with few rows would take as long as the sums. The right one may be stored in 16 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_isa.h"
#include "formats.h"
#include "small_matrices.h"

namespace lora_fast {

template <class F, int kLanes>
LORA_FAST_INLINE void load(const typename F::Bits* from, Floats<kLanes>& to) {
  if constexpr (std::is_same_v<F, Fp32>) {
    memcpy(&to, from, sizeof(to));
  } else if constexpr (kLanes == 1) {
    to = F::widen(*from);
  } else {
    using Words = typename VectorOf<uint32_t, kLanes>::Type;
    typename VectorOf<uint16_t, kLanes>::Type bits;
    memcpy(&bits, from, sizeof(bits));
    Words words = __builtin_convertvector(bits, Words);
    if constexpr (std::is_same_v<F, Bf16>) {
      words <<= 16;
    } else {
      // The product moves the exponent's bias from 15 to 127 and makes subnormal numbers normal.
      const Words sign = (words & 0x8000) << 16, magnitude = (words & 0x7fff) << 13;
      Floats<kLanes> value;
      memcpy(&value, &magnitude, sizeof(value));
      value *= 0x1p112f;
      memcpy(&words, &value, sizeof(words));
      const Words is_special = (Words)(magnitude >= uint32_t{Fp16::kExponent} << 13);
      words |= sign | (is_special & Fp32::kExponent);
    }
    memcpy(&to, &words, sizeof(to));
  }
}

template <int kLanes>
LORA_FAST_INLINE float total(const Floats<kLanes>& sums) {
  if constexpr (kLanes == 1) {
    return sums;
  } else {
    Floats<kLanes / 2> lower, upper;
    memcpy(&lower, &sums, sizeof(lower));
    memcpy(&upper, reinterpret_cast<const char*>(&sums) + sizeof(lower), sizeof(upper));
    lower += upper;
    return total<kLanes / 2>(lower);
  }
}

// out[i, c] (+)= sum over t of left[i, t] * right[t, c], c < kVectors * kLanes.
template <class R, int kRows, int kVectors, int kLanes>
LORA_FAST_INLINE void multiply_steps(
    const Strided& left, const Stored<R>& right, int64_t begin, int64_t end, float* out,
    int64_t out_row) {
  Floats<kLanes> sum[kRows][kVectors] = {};
  for (int64_t t = begin; t < end; ++t) {
    Floats<kLanes> value[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      load<R, kLanes>(right.data + t * right.row + v * kLanes, value[v]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float factor = left.data[i * left.row + t * left.step];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * value[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + i * out_row + v * kLanes;
      if (begin > 0) {
        Floats<kLanes> before;
        memcpy(&before, to, sizeof(before));
        sum[i][v] += before;
      }
      memcpy(to, &sum[i][v], sizeof(sum[i][v]));
    }
  }
}

// The same without the (+), in parts: one sum of very many loses digits.
template <class R, int kRows, int kVectors, int kLanes>
LORA_FAST_INLINE void multiply_block(
    const Strided& left, const Stored<R>& right, int64_t steps, float* out, int64_t out_row) {
  constexpr int64_t kPart = 512;
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + kPart, steps);
    multiply_steps<R, kRows, kVectors, kLanes>(left, right, begin, end, out, out_row);
    begin = end;
  } while (begin < steps);
}

template <class R, int kVectors, int kLanes>
LORA_FAST_INLINE void multiply_columns(
    const Strided& left, int64_t rows, const Stored<R>& right, int64_t steps, float* out,
    int64_t out_row) {
  const auto at = [&](int64_t i) { return Strided{left.data + i * left.row, left.row, left.step}; };
  constexpr int kMost = kVectors * kLanes > 8 && kLanes == 8 ? 4 : 8;  // AVX2 has 16 registers
  int64_t i = 0;
  for (; i + kMost <= rows; i += kMost) {
    multiply_block<R, kMost, kVectors, kLanes>(at(i), right, steps, out + i * out_row, out_row);
  }
  if (kMost > 4 && i + 4 <= rows) {
    multiply_block<R, 4, kVectors, kLanes>(at(i), right, steps, out + i * out_row, out_row);
    i += 4;
  }
  if (i + 2 <= rows) {
    multiply_block<R, 2, kVectors, kLanes>(at(i), right, steps, out + i * out_row, out_row);
    i += 2;
  }
  if (i < rows)
    multiply_block<R, 1, kVectors, kLanes>(at(i), right, steps, out + i * out_row, out_row);
}

// out[i, c] = sum over t of left[i, t] * right[t, c], of at most kCellRows and kCellCols.
template <class R, int kLanes>
LORA_FAST_INLINE void multiply_cell(
    const Strided& left, int64_t rows, const Stored<R>& right, int64_t cols, int64_t steps,
    float* out, int64_t out_row) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
    multiply_columns<R, 2, kLanes>(left, rows, right.at(0, c), steps, out + c, out_row);
  }
  if (c + kLanes <= cols) {
    multiply_columns<R, 1, kLanes>(left, rows, right.at(0, c), steps, out + c, out_row);
    c += kLanes;
  }
  if (kLanes > 8 && c + 8 <= cols) {
    multiply_columns<R, 1, 8>(left, rows, right.at(0, c), steps, out + c, out_row);
    c += 8;
  }
  if (kLanes > 4 && c + 4 <= cols) {
    multiply_columns<R, 1, 4>(left, rows, right.at(0, c), steps, out + c, out_row);
    c += 4;
  }
  for (; c < cols; ++c)
    multiply_columns<R, 1, 1>(left, rows, right.at(0, c), steps, out + c, out_row);
}

// out[i, j] = sum over t of left[i, t] * right[j, t]; both have a step of 1.
template <class R, int kRows, int kCols, int kLanes>
LORA_FAST_INLINE void dot_block(
    const Strided& left, const Stored<R>& right, int64_t steps, float* out, int64_t out_row) {
  Floats<kLanes> sum[kRows][kCols] = {};
  int64_t t = 0;
  for (; t + kLanes <= steps; t += kLanes) {
    Floats<kLanes> value[kCols];
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) load<R, kLanes>(right.data + j * right.row + t, value[j]);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      Floats<kLanes> factor;
      memcpy(&factor, left.data + i * left.row + t, sizeof(factor));
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) sum[i][j] += factor * value[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      float sums = total<kLanes>(sum[i][j]);
      for (int64_t rest = t; rest < steps; ++rest) {
        sums += left.data[i * left.row + rest] * R::widen(right.data[j * right.row + rest]);
      }
      out[i * out_row + j] = sums;
    }
  }
}

template <class R, int kRows, int kLanes>
LORA_FAST_INLINE void dot_rows(
    const Strided& left, const Stored<R>& right, int64_t cols, int64_t steps, float* out,
    int64_t out_row) {
  constexpr int kMost = kLanes < 16 && kRows > 2 ? 2 : 4;  // AVX2 has 16 registers
  int64_t j = 0;
  for (; j + kMost <= cols; j += kMost) {
    dot_block<R, kRows, kMost, kLanes>(left, right.at(j, 0), steps, out + j, out_row);
  }
  for (; j < cols; ++j)
    dot_block<R, kRows, 1, kLanes>(left, right.at(j, 0), steps, out + j, out_row);
}

// out[i, j] = sum over t of left[i, t] * right[j, t]; both have a step of 1.
template <class R, int kLanes>
LORA_FAST_INLINE void dot_cell(
    const Strided& left, int64_t rows, const Stored<R>& right, int64_t cols, int64_t steps,
    float* out, int64_t out_row) {
  const auto at = [&](int64_t i) { return Strided{left.data + i * left.row, left.row}; };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    dot_rows<R, 4, kLanes>(at(i), right, cols, steps, out + i * out_row, out_row);
  }
  for (; i < rows; ++i) {
    dot_rows<R, 1, kLanes>(at(i), right, cols, steps, out + i * out_row, out_row);
  }
}

template <class F>
struct Products {
  using Bits = typename F::Bits;
  // The cell left right, or left right^T, of so many rows, columns and steps. Of wide numbers or of
  // those that are stored.
  template <class R>
  using Multiply = void(
      const Strided& left, int64_t rows, const Stored<R>& right, int64_t cols, int64_t steps,
      float* out, int64_t out_row);
  Multiply<Fp32>* multiply_wide;
  Multiply<F>* multiply;
  Multiply<F>* dot;
  void (*add)(const float*, int64_t, int64_t, const Result<F>&);
  void (*set)(const float*, int64_t, int64_t, const Result<F>&);
  void (*widen)(const Bits*, const uint8_t*, int64_t, float*);
  void (*transpose)(const Bits*, int64_t, int64_t, int64_t, float*);
};

#define LORA_FAST_PRODUCTS(NAME, LANES, TARGET)                                                  \
  template <class F>                                                                             \
  struct NAME {                                                                                  \
    using Bits = typename F::Bits;                                                               \
    template <class R>                                                                           \
    TARGET static void multiply(                                                                 \
        const Strided& left, int64_t rows, const Stored<R>& right, int64_t cols, int64_t steps,  \
        float* out, int64_t out_row) {                                                           \
      multiply_cell<R, LANES>(left, rows, right, cols, steps, out, out_row);                     \
    }                                                                                            \
    TARGET static void dot(                                                                      \
        const Strided& left, int64_t rows, const Stored<F>& right, int64_t cols, int64_t steps,  \
        float* out, int64_t out_row) {                                                           \
      dot_cell<F, LANES>(left, rows, right, cols, steps, out, out_row);                          \
    }                                                                                            \
    TARGET static void add(const float* cell, int64_t rows, int64_t cols, const Result<F>& to) { \
      write_cell<F, true>(cell, rows, cols, to);                                                 \
    }                                                                                            \
    TARGET static void set(const float* cell, int64_t rows, int64_t cols, const Result<F>& to) { \
      write_cell<F, false>(cell, rows, cols, to);                                                \
    }                                                                                            \
    TARGET static void widen(const Bits* from, const uint8_t* keep, int64_t cols, float* to) {   \
      widen_row<F>(from, keep, cols, to);                                                        \
    }                                                                                            \
    TARGET static void transpose(                                                                \
        const Bits* from, int64_t from_row, int64_t steps, int64_t cols, float* to) {            \
      lora_fast::transpose<F>(from, from_row, steps, cols, to);                                  \
    }                                                                                            \
    static Products<F> all() {                                                                   \
      return {multiply<Fp32>, multiply<F>, dot, add, set, widen, transpose};                     \
    }                                                                                            \
  };

LORA_FAST_PRODUCTS(PortableProducts, 4, )
#if defined(__x86_64__)
LORA_FAST_PRODUCTS(Avx2Products, 8, __attribute__((target(LORA_FAST_AVX2))))
LORA_FAST_PRODUCTS(Avx512Products, 16, __attribute__((target(LORA_FAST_AVX512))))
#endif
#undef LORA_FAST_PRODUCTS

template <class F>
Products<F> choose_products() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return Avx512Products<F>::all();
    case Isa::kAvx2: return Avx2Products<F>::all();
#endif
    default: return PortableProducts<F>::all();
  }
}

}  // namespace lora_fast
