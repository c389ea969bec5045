// Small matrices in memory: how they lie, and what is written to and read from a cell of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats.h"

namespace lora_fast {

constexpr int64_t kCellRows = 8, kCellCols = 32;

// A matrix [i, t] at data[i * row + t * step].
struct Strided {
  const float* data;
  int64_t row, step = 1;
};

// A matrix in format F, whose columns lie side by side.
template <class F>
struct Stored {
  const typename F::Bits* data;
  int64_t row;

  Stored at(int64_t i, int64_t c) const { return {data + i * row + c, row}; }
};

// GCC's vectors, by their length; a single number is none.
template <class T, int kLanes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <class T>
struct VectorOf<T, 1> {
  using Type = T;
};
template <int kLanes>
using Floats = typename VectorOf<float, kLanes>::Type;

// What a result is written to: to[i, c] = scale * cell[i, c] (* keep[i, c]), or that is added.
template <class F>
struct Result {
  typename F::Bits* to;
  int64_t row;
  float scale;
  const uint8_t* keep = nullptr;  // as to lies
  int64_t keep_row = 0;

  Result at(int64_t i, int64_t c) const {
    return {
        to + i * row + c, row, scale, keep == nullptr ? keep : keep + i * keep_row + c, keep_row};
  }
};

template <class F, bool kAdd>
LORA_FAST_INLINE void write_some(
    const float* __restrict from, const uint8_t* __restrict keep, float scale, int64_t cols,
    typename F::Bits* __restrict to) {
  if (keep == nullptr) {
    for (int64_t c = 0; c < cols; ++c) {
      to[c] = F::round(kAdd ? F::widen(to[c]) + scale * from[c] : scale * from[c]);
    }
    return;
  }
  for (int64_t c = 0; c < cols; ++c) {
    const float value = scale * from[c] * static_cast<float>(keep[c]);
    to[c] = F::round(kAdd ? F::widen(to[c]) + value : value);
  }
}

template <class F, bool kAdd>
LORA_FAST_INLINE void write_cell(
    const float* cell, int64_t rows, int64_t cols, const Result<F>& result) {
  constexpr int64_t kSome = 16;  // a number that the compiler knows, so that there is no loop
  for (int64_t i = 0; i < rows; ++i) {
    const Result<F> to = result.at(i, 0);
    const float* from = cell + i * kCellCols;
    int64_t c = 0;
    for (; c + kSome <= cols; c += kSome) {
      const uint8_t* keep = to.keep == nullptr ? nullptr : to.keep + c;
      write_some<F, kAdd>(from + c, keep, to.scale, kSome, to.to + c);
    }
    const uint8_t* keep = to.keep == nullptr ? nullptr : to.keep + c;
    if (c < cols) write_some<F, kAdd>(from + c, keep, to.scale, cols - c, to.to + c);
  }
}

// to[c] = from[c] (* keep[c])
template <class F>
LORA_FAST_INLINE void widen_row(
    const typename F::Bits* __restrict from, const uint8_t* __restrict keep, int64_t cols,
    float* __restrict to) {
  if (keep == nullptr) {
    for (int64_t c = 0; c < cols; ++c) to[c] = F::widen(from[c]);
    return;
  }
  for (int64_t c = 0; c < cols; ++c) to[c] = F::widen(from[c]) * static_cast<float>(keep[c]);
}

// to[t, c] = from[c, t] of four columns and four steps.
template <class F>
LORA_FAST_INLINE void transpose_four(
    const typename F::Bits* from, int64_t from_row, float* to, int64_t to_row) {
  using Four = Floats<4>;
  Four a[4], b[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) a[c][t] = F::widen(from[c * from_row + t]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {  // columns half and half + 2, interleaved
    b[half] = Four{a[half][0], a[half + 2][0], a[half][1], a[half + 2][1]};
    b[half + 2] = Four{a[half][2], a[half + 2][2], a[half][3], a[half + 2][3]};
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Four& even = b[2 * half];
    const Four& odd = b[2 * half + 1];
    const Four first = {even[0], odd[0], even[1], odd[1]};
    const Four second = {even[2], odd[2], even[3], odd[3]};
    memcpy(to + 2 * half * to_row, &first, sizeof(first));
    memcpy(to + (2 * half + 1) * to_row, &second, sizeof(second));
  }
}

// to[t, c] = from[c, t], steps kCellCols apart.
template <class F>
LORA_FAST_INLINE void transpose(
    const typename F::Bits* __restrict from, int64_t from_row, int64_t steps, int64_t cols,
    float* __restrict to) {
  const int64_t whole_steps = steps / 4 * 4, whole_cols = cols / 4 * 4;
  for (int64_t c = 0; c < whole_cols; c += 4) {
    for (int64_t t = 0; t < whole_steps; t += 4) {
      transpose_four<F>(from + c * from_row + t, from_row, to + t * kCellCols + c, kCellCols);
    }
  }
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t t = c < whole_cols ? whole_steps : 0; t < steps; ++t) {
      to[t * kCellCols + c] = F::widen(from[c * from_row + t]);
    }
  }
}

}  // namespace lora_fast
