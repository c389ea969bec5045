// Vectors for merge_cpu_cells.h by the names of what they do, in AVX-512 and in AVX2.
//
// A format's Words hold a weight in the upper bits of 32, where it is an fp32 number; its Packs
// hold the weights as they are stored, in one vector for bf16, in two for fp32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "merge_math.h"

namespace lora_fast {

constexpr int kTileRows = 8;
constexpr int kTileCols = 256;

// Where the rows of a tile begin; weights and codes lie side by side along a row.
template <class Bits>
struct TileRows {
  Bits* weight[kTileRows];
  int8_t* code[kTileRows];
};

// Where a pass over the cells of a tile stopped: before row `row` of the cell at col; at kTileRows
// if only columns from col on are left, too few for a cell.
struct Stop {
  int64_t row, col;
};

// Passes over the cells of a tile, and how many columns a cell has; none where a format has none.
template <class F>
struct Cells {
  using Compute = typename F::Compute;
  using Pass = Stop (*)(
      const Compute* left, const Compute* right, int64_t rank, Compute scaling,
      const TileRows<typename F::Bits>& rows, int64_t begin, int64_t end);
  Pass merge = nullptr, unmerge = nullptr;
  int64_t cols = 0;
};

}  // namespace lora_fast

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false, of GCC 12's own header
#include <immintrin.h>
#pragma GCC diagnostic pop

#define LORA_FAST_VECTOR LORA_FAST_TARGET inline __attribute__((always_inline))

namespace lora_fast::avx512 {

#define LORA_FAST_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))

using Floats = __m512;
using Words = __m512i;
constexpr int kLanes = 16;
constexpr int kCellRows = 8;  // with two vectors each, half of the 32 registers

LORA_FAST_VECTOR Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
LORA_FAST_VECTOR Words load_words(const void* from) { return _mm512_loadu_si512(from); }
LORA_FAST_VECTOR void store_words(void* to, Words a) { _mm512_storeu_si512(to, a); }
LORA_FAST_VECTOR Floats as_floats(Words a) { return _mm512_castsi512_ps(a); }
LORA_FAST_VECTOR Words as_words(Floats a) { return _mm512_castps_si512(a); }
LORA_FAST_VECTOR Floats repeat(float a) { return _mm512_set1_ps(a); }
LORA_FAST_VECTOR Words repeat(int a) { return _mm512_set1_epi32(a); }
LORA_FAST_VECTOR Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
LORA_FAST_VECTOR Floats fma_negated(Floats a, Floats b, Floats c) {
  return _mm512_fnmadd_ps(a, b, c);
}
LORA_FAST_VECTOR Words bits_and(Words a, Words b) { return _mm512_and_si512(a, b); }
LORA_FAST_VECTOR Words xor_and(Words a, Words b, Words c) {  // a ^ (b & c)
  return _mm512_ternarylogic_epi32(a, b, c, 0x78);
}
LORA_FAST_VECTOR bool any_above(Words a, Words b, Words limit) {
  return _mm512_cmpgt_epu32_mask(_mm512_max_epu32(a, b), limit) != 0;
}
// Keeps a value in a register, where GCC would load or make it anew each time.
LORA_FAST_VECTOR Words keep(Words a) {
  asm("" : "+v"(a));
  return a;
}

// What differs between the sets; merge_cpu_cells.h has the rest of Fp32Vectors.
struct Fp32Lanes {
  static LORA_FAST_VECTOR Words repeat_bits(int a) { return repeat(a); }
  static LORA_FAST_VECTOR Words signs(Words a) { return _mm512_srai_epi32(a, 31); }
  static LORA_FAST_VECTOR Words plus(Words a, Words b) { return _mm512_add_epi32(a, b); }
  static LORA_FAST_VECTOR Words minus(Words a, Words b) { return _mm512_sub_epi32(a, b); }
  static LORA_FAST_VECTOR void store_codes(int8_t* code, const Words (&a)[2]) {
    const Words lower = _mm512_set_epi32(
        0x3e003c, 0x3a0038, 0x360034, 0x320030, 0x2e002c, 0x2a0028, 0x260024, 0x220020, 0x1e001c,
        0x1a0018, 0x160014, 0x120010, 0x0e000c, 0x0a0008, 0x060004, 0x020000);
    const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_permutex2var_epi16(a[0], lower, a[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(code), bytes);
  }
  static LORA_FAST_VECTOR Words load_codes(const int8_t* code, int p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code) + p));
  }
};

struct Bf16Vectors {
  using Bits = uint16_t;
  static constexpr int kPacks = 1;

  // To nearest, ties to even; only the upper half of what round() returns counts.
  struct Rounding {
    Words last = keep(repeat(0x10000)), half = keep(repeat(0x7fff)), one = keep(repeat(1));
    Words upper = keep(repeat(-0x10000));

    LORA_FAST_VECTOR Words round(Words exact) const {
      const Words up = _mm512_add_epi32(exact, half);
      return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(exact, last), up, one);
    }
    LORA_FAST_VECTOR Words clear(Words rounded) const { return bits_and(rounded, upper); }
  };

  static LORA_FAST_VECTOR Words wide(const Bits* from, int v) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + v);
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
  static LORA_FAST_VECTOR void pack(const Words (&word)[2], Words (&packed)[1]) {
    const Words upper = _mm512_set_epi32(
        0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d,
        0x1b0019, 0x170015, 0x130011, 0x0f000d, 0x0b0009, 0x070005, 0x030001);
    packed[0] = _mm512_permutex2var_epi16(word[0], upper, word[1]);
  }
  static LORA_FAST_VECTOR Words repeat_bits(int a) {
    return _mm512_set1_epi16(static_cast<int16_t>(a));
  }
  static LORA_FAST_VECTOR Words signs(Words a) { return _mm512_srai_epi16(a, 15); }
  static LORA_FAST_VECTOR Words plus(Words a, Words b) { return _mm512_add_epi16(a, b); }
  static LORA_FAST_VECTOR Words minus(Words a, Words b) { return _mm512_sub_epi16(a, b); }
  static LORA_FAST_VECTOR bool any_bits_above(const Words (&a)[1], Words limit) {
    return _mm512_cmpgt_epu16_mask(a[0], limit) != 0;
  }
  static LORA_FAST_VECTOR void store_codes(int8_t* code, const Words (&a)[1]) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(code), _mm512_cvtepi16_epi8(a[0]));
  }
  static LORA_FAST_VECTOR Words load_codes(const int8_t* code, int) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
  }
};

#include "merge_cpu_cells.h"
#undef LORA_FAST_TARGET

}  // namespace lora_fast::avx512

namespace lora_fast::avx2 {

#define LORA_FAST_TARGET __attribute__((target("avx2,fma")))

using Floats = __m256;
using Words = __m256i;
constexpr int kLanes = 8;
constexpr int kCellRows = 4;  // with two vectors each, half of the 16 registers

LORA_FAST_VECTOR Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
LORA_FAST_VECTOR Words load_words(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
LORA_FAST_VECTOR void store_words(void* to, Words a) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), a);
}
LORA_FAST_VECTOR Floats as_floats(Words a) { return _mm256_castsi256_ps(a); }
LORA_FAST_VECTOR Words as_words(Floats a) { return _mm256_castps_si256(a); }
LORA_FAST_VECTOR Floats repeat(float a) { return _mm256_set1_ps(a); }
LORA_FAST_VECTOR Words repeat(int a) { return _mm256_set1_epi32(a); }
LORA_FAST_VECTOR Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
LORA_FAST_VECTOR Floats fma_negated(Floats a, Floats b, Floats c) {
  return _mm256_fnmadd_ps(a, b, c);
}
LORA_FAST_VECTOR Words bits_and(Words a, Words b) { return _mm256_and_si256(a, b); }
LORA_FAST_VECTOR Words xor_and(Words a, Words b, Words c) {
  return _mm256_xor_si256(a, _mm256_and_si256(b, c));
}
LORA_FAST_VECTOR bool any_above(Words a, Words b, Words limit) {
  const Words largest = _mm256_max_epu32(_mm256_max_epu32(a, b), limit);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(largest, limit)) != -1;
}
LORA_FAST_VECTOR Words keep(Words a) { return a; }  // there are too few registers
// 64-bit quarters 0, 2, 1, 3: in order, after a pack that worked on each half for itself.
LORA_FAST_VECTOR Words in_order(Words a) { return _mm256_permute4x64_epi64(a, 0xd8); }
LORA_FAST_VECTOR void store_bytes(int8_t* to, Words halves) {
  const Words bytes = in_order(_mm256_packs_epi16(halves, halves));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
}

// What differs between the sets; merge_cpu_cells.h has the rest of Fp32Vectors.
struct Fp32Lanes {
  static LORA_FAST_VECTOR Words repeat_bits(int a) { return repeat(a); }
  static LORA_FAST_VECTOR Words signs(Words a) { return _mm256_srai_epi32(a, 31); }
  static LORA_FAST_VECTOR Words plus(Words a, Words b) { return _mm256_add_epi32(a, b); }
  static LORA_FAST_VECTOR Words minus(Words a, Words b) { return _mm256_sub_epi32(a, b); }
  static LORA_FAST_VECTOR void store_codes(int8_t* code, const Words (&a)[2]) {
    store_bytes(code, in_order(_mm256_packs_epi32(a[0], a[1])));
  }
  static LORA_FAST_VECTOR Words load_codes(const int8_t* code, int p) {
    return _mm256_cvtepi8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + p * kLanes)));
  }
};

struct Bf16Vectors {
  using Bits = uint16_t;
  static constexpr int kPacks = 1;

  struct Rounding {
    LORA_FAST_VECTOR Words round(Words exact) const {
      const Words is_odd = bits_and(_mm256_srli_epi32(exact, 16), repeat(1));
      return _mm256_add_epi32(_mm256_add_epi32(exact, repeat(0x7fff)), is_odd);
    }
    LORA_FAST_VECTOR Words clear(Words rounded) const {
      return bits_and(rounded, repeat(-0x10000));
    }
  };

  static LORA_FAST_VECTOR Words wide(const Bits* from, int v) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + v);
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  }
  static LORA_FAST_VECTOR void pack(const Words (&word)[2], Words (&packed)[1]) {
    packed[0] = in_order(
        _mm256_packus_epi32(_mm256_srli_epi32(word[0], 16), _mm256_srli_epi32(word[1], 16)));
  }
  static LORA_FAST_VECTOR Words repeat_bits(int a) {
    return _mm256_set1_epi16(static_cast<int16_t>(a));
  }
  static LORA_FAST_VECTOR Words signs(Words a) { return _mm256_srai_epi16(a, 15); }
  static LORA_FAST_VECTOR Words plus(Words a, Words b) { return _mm256_add_epi16(a, b); }
  static LORA_FAST_VECTOR Words minus(Words a, Words b) { return _mm256_sub_epi16(a, b); }
  static LORA_FAST_VECTOR bool any_bits_above(const Words (&a)[1], Words limit) {
    const Words within = _mm256_cmpeq_epi16(_mm256_max_epu16(a[0], limit), limit);
    return _mm256_movemask_epi8(within) != -1;
  }
  static LORA_FAST_VECTOR void store_codes(int8_t* code, const Words (&a)[1]) {
    store_bytes(code, a[0]);
  }
  static LORA_FAST_VECTOR Words load_codes(const int8_t* code, int) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code)));
  }
};

#include "merge_cpu_cells.h"
#undef LORA_FAST_TARGET

}  // namespace lora_fast::avx2

#undef LORA_FAST_VECTOR
#endif
