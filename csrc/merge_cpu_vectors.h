// Vectors for merge_cpu_cells.h by the names of what they do, in AVX-512 and in AVX2.
//
// A format's Words hold a weight in the upper bits of 32, where it is an fp32 number; its Packs
// hold the weights as they are stored, in one vector for bf16, in two for fp32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu_isa.h"
#include "merge_math.h"

namespace lora_fast {

constexpr int kTileRows = 8;
constexpr int kTileCols = 256;
constexpr int kPanelCols = 32;  // of the right factor that lie together: what a cell reads is dense

// Where column col begins in panels of [steps][kPanelCols].
template <class Compute>
const Compute* panel_at(const Compute* panels, int64_t steps, int64_t col) {
  return panels + col / kPanelCols * kPanelCols * steps + col % kPanelCols;
}

// Where the rows of a tile begin; weights and codes lie side by side along a row.
template <class Bits>
struct TileRows {
  Bits* weight[kTileRows];
  int8_t* code[kTileRows];
};

// Where a pass over the cells of a tile stopped: at a row of the cell at col that slow refused; at
// kTileRows if only columns from col on are left, too few for a cell.
struct Stop {
  int64_t row, col;
};

// What a pass over the cells of a tile reads and writes, and whom it asks.
template <class F>
struct CellPass {
  using Compute = typename F::Compute;
  const Compute* left;   // [steps][kTileRows]
  const Compute* right;  // panels of [steps][kPanelCols]
  int64_t steps;
  Compute scaling;
  const TileRows<typename F::Bits>& rows;
  int64_t cols;
  // Does a row of a cell that needs more than the cells do, from its sums; false if it can't be.
  bool (*slow)(const void* context, int64_t row, int64_t col, const Compute* sums);
  const void* context;
};

// Passes over the cells of a tile, and how many columns a cell has; none where a format has none.
template <class F>
struct Cells {
  using Pass = Stop (*)(const CellPass<F>&);
  Pass merge = nullptr, unmerge = nullptr;
  int64_t cols = 0;
};

}  // namespace lora_fast

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false, of GCC 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define LORA_FAST_VECTOR LORA_FAST_TARGET inline __attribute__((always_inline))

namespace lora_fast::avx512 {

#define LORA_FAST_TARGET __attribute__((target(LORA_FAST_AVX512)))

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
LORA_FAST_VECTOR Floats add_step(Floats a, Floats b, Floats sum) { return fma(a, b, sum); }
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

// What merge_cpu_cells.h needs of bf16 but the rounding.
struct Bf16Lanes {
  using Bits = uint16_t;
  static constexpr int kPacks = 1;
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

struct Bf16Vectors : Bf16Lanes {
  static constexpr bool kFlushes = false;

  struct Rounded {
    Words up[2], wide[2];
    LORA_FAST_VECTOR Words pack(int) const {
      const Words upper = _mm512_set_epi32(
          0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d,
          0x1b0019, 0x170015, 0x130011, 0x0f000d, 0x0b0009, 0x070005, 0x030001);
      return _mm512_permutex2var_epi16(up[0], upper, up[1]);
    }
  };

  // To nearest, ties to even.
  struct Convert {
    Words last = keep(repeat(0x10000)), half = keep(repeat(0x7fff)), one = keep(repeat(1));
    Words upper = keep(repeat(-0x10000));

    LORA_FAST_VECTOR Words wide(const Bits* from, int v) const {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + v);
      return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    }
    LORA_FAST_VECTOR Words round(Words exact) const {
      const Words up = _mm512_add_epi32(exact, half);
      return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(exact, last), up, one);
    }
    LORA_FAST_VECTOR Rounded round(const Words (&exact)[2]) const {
      const Words up[2] = {round(exact[0]), round(exact[1])};
      return {{up[0], up[1]}, {bits_and(up[0], upper), bits_and(up[1], upper)}};
    }
  };
};

#include "merge_cpu_cells.h"
#undef LORA_FAST_TARGET

}  // namespace lora_fast::avx512

// AVX-512 with its instructions for bf16, which take subnormal numbers for zero.
namespace lora_fast::avx512_bf16 {

#define LORA_FAST_TARGET __attribute__((target("avx512bf16," LORA_FAST_AVX512)))

using namespace avx512;

// Both hold pairs of bf16 numbers: it adds the product of the upper two, then that of the lower.
LORA_FAST_VECTOR Floats add_step(Floats a, Floats b, Floats sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

struct Bf16Vectors : Bf16Lanes {
  static constexpr bool kFlushes = true;
  using Exact = avx512::Bf16Vectors;  // serves the rows that this one can't

  struct Rounded {
    Words packed, wide[2];
    LORA_FAST_VECTOR Words pack(int) const { return packed; }
  };

  struct Convert {
    // From where in a pack the upper halves of each vector come.
    Words places[2] = {keep(places_from(0)), keep(places_from(kLanes))};

    static LORA_FAST_VECTOR Words places_from(int first) {
      const Words lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      return _mm512_slli_epi32(_mm512_add_epi32(lane, repeat(first)), 16);
    }
    LORA_FAST_VECTOR Words widen(Words packed, int v) const {
      return _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places[v], packed);
    }
    LORA_FAST_VECTOR Words wide(const Bits* from, int v) const {
      return widen(load_words(from), v);
    }
    LORA_FAST_VECTOR Rounded round(const Words (&exact)[2]) const {
      const Words packed = (Words)_mm512_cvtne2ps_pbh(as_floats(exact[1]), as_floats(exact[0]));
      return {packed, {widen(packed, 0), widen(packed, 1)}};
    }
  };

  static LORA_FAST_VECTOR bool any_below(Words a, Words b, Words limit) {
    return _mm512_cmplt_epu16_mask(_mm512_min_epu16(a, b), limit) != 0;
  }
  static LORA_FAST_VECTOR bool any_zero(Words a) { return _mm512_testn_epi16_mask(a, a) != 0; }
};

#include "merge_cpu_cells.h"

// Whether add_step is what it is by the manual, which codes that another machine wrote depend on:
// other orders and roundings give other sums for one in ten of these numbers.
LORA_FAST_TARGET inline bool adds_pairs_like_fma() {
  uint32_t state = 1;
  const auto draw = [&state](uint32_t bits) {  // between 2^-8 and 2^8, of either sign
    state = state * 1664525 + 1013904223;
    return (state & 0x87ffffff & bits) + 0x3b800000;
  };
  for (int i = 0; i < 64; ++i) {
    uint32_t a[2][kLanes], b[2][kLanes], pair_a[kLanes], pair_b[kLanes];
    float start[kLanes], sum[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int half = 0; half < 2; ++half) {
        a[half][lane] = draw(0xffff0000);
        b[half][lane] = draw(0xffff0000);
      }
      start[lane] = bit_cast<float>(draw(0xffffffff));
      pair_a[lane] = a[0][lane] | a[1][lane] >> 16;
      pair_b[lane] = b[0][lane] | b[1][lane] >> 16;
    }
    const Floats pairs_a = as_floats(load_words(pair_a)), pairs_b = as_floats(load_words(pair_b));
    store_words(sum, as_words(add_step(pairs_a, pairs_b, load_floats(start))));
    for (int lane = 0; lane < kLanes; ++lane) {
      float expected = start[lane];
      for (int half = 0; half < 2; ++half) {
        expected = fused(bit_cast<float>(a[half][lane]), bit_cast<float>(b[half][lane]), expected);
      }
      if (bit_cast<uint32_t>(expected) != bit_cast<uint32_t>(sum[lane])) return false;
    }
  }
  return true;
}
#undef LORA_FAST_TARGET

}  // namespace lora_fast::avx512_bf16

namespace lora_fast::avx2 {

#define LORA_FAST_TARGET __attribute__((target(LORA_FAST_AVX2)))

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
LORA_FAST_VECTOR Floats add_step(Floats a, Floats b, Floats sum) { return fma(a, b, sum); }
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
  static constexpr bool kFlushes = false;

  struct Rounded {
    Words up[2], wide[2];
    LORA_FAST_VECTOR Words pack(int) const {
      return in_order(
          _mm256_packus_epi32(_mm256_srli_epi32(up[0], 16), _mm256_srli_epi32(up[1], 16)));
    }
  };

  struct Convert {
    LORA_FAST_VECTOR Words wide(const Bits* from, int v) const {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + v);
      return _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    }
    LORA_FAST_VECTOR Words round(Words exact) const {
      const Words is_odd = bits_and(_mm256_srli_epi32(exact, 16), repeat(1));
      return _mm256_add_epi32(_mm256_add_epi32(exact, repeat(0x7fff)), is_odd);
    }
    LORA_FAST_VECTOR Rounded round(const Words (&exact)[2]) const {
      const Words up[2] = {round(exact[0]), round(exact[1])}, upper = repeat(-0x10000);
      return {{up[0], up[1]}, {bits_and(up[0], upper), bits_and(up[1], upper)}};
    }
  };

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
