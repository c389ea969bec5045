// The inner loops of merge_ and unmerge_ on the CPU, compiled once for each instruction set.
//
// The loops are plain C++ over merge_math.h; the compiler turns them into vectors. They serve every
// weight; merge_cpu_cells.h does what nearly all are faster. The bits are the same in all.
#pragma once

#include <unistd.h>

#include <algorithm>

#include "cpu_isa.h"
#include "float_environment.h"
#include "merge.h"
#include "merge_cpu_vectors.h"

namespace lora_fast {

constexpr int64_t kTaskRows = 256;

// Of the packed right factor: half of what the L2 cache holds.
inline int64_t right_bytes() {
  constexpr int64_t kLeast = 256 * 1024;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or less where it is not known
  return std::max(kLeast, found / 2);
#else
  return kLeast;
#endif
}

struct TileFlags {
  bool finite = true;
  bool overflow = false;
};

// acc[r, c] = fma over kRank of the j of left[j, r] * right[j, c], four rows at a time: one load
// for each four operations.
template <int kRank, class Compute>
LORA_FAST_INLINE void accumulate_some(
    const Compute* __restrict left, const Compute* __restrict right, Compute* __restrict acc) {
  constexpr int kRows = 4;
  for (int first = 0; first < kTileRows; first += kRows, acc += kRows * kTileCols) {
    Compute factor[kRows][kRank];
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kRank; ++j) factor[r][j] = left[j * kTileRows + first + r];
    }
    for (int c = 0; c < kPanelCols; ++c) {
      Compute sum[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r] = acc[r * kTileCols + c];
#pragma GCC unroll 8
      for (int j = 0; j < kRank; ++j) {
        const Compute value = right[j * kPanelCols + c];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r] = fused(factor[r][j], value, sum[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r * kTileCols + c] = sum[r];
    }
  }
}

// acc[r, c] for the columns c from begin to end, and for those beside them in their panels.
template <class Compute>
LORA_FAST_INLINE void accumulate_tile(
    const Compute* __restrict left, const Compute* __restrict panels, int64_t rank, int64_t begin,
    int64_t end, Compute* __restrict acc) {
  for (int64_t c = begin / kPanelCols * kPanelCols; c < end; c += kPanelCols) {
    const Compute* right = panel_at(panels, rank, c);
    for (int64_t r = 0; r < kTileRows; ++r) {
      std::fill_n(acc + r * kTileCols + c, kPanelCols, Compute{0});
    }
    int64_t j = 0;
    for (; j + 8 <= rank; j += 8) {
      accumulate_some<8>(left + j * kTileRows, right + j * kPanelCols, acc + c);
    }
    for (; j + 4 <= rank; j += 4) {
      accumulate_some<4>(left + j * kTileRows, right + j * kPanelCols, acc + c);
    }
    for (; j < rank; ++j) {
      accumulate_some<1>(left + j * kTileRows, right + j * kPanelCols, acc + c);
    }
  }
}

template <class F>
LORA_FAST_INLINE void merge_row(
    const typename F::Bits* __restrict before, const typename F::Compute* __restrict acc,
    typename F::Compute scaling, int64_t cols, typename F::Bits* __restrict after,
    int8_t* __restrict code, TileFlags& flags) {
  using Word = typename F::Word;
  Word not_plain = 0;
  for (int64_t c = 0; c < cols; ++c) {
    const PlainMerged<F> merged = merge_plain_weight<F>(before[c], acc[c], scaling);
    after[c] = merged.bits;
    code[c] = merged.code;
    not_plain |= merged.not_plain;
  }
  if (not_plain == 0) return;
  Word infinite = 0, overflow = 0;
  for (int64_t c = 0; c < cols; ++c) {
    const Merged<F> merged = merge_weight<F>(before[c], acc[c], scaling);
    after[c] = merged.bits;
    code[c] = merged.code;
    infinite |= merged.infinite;
    overflow |= merged.overflow;
  }
  flags.finite = flags.finite && infinite == 0;
  flags.overflow = flags.overflow || overflow != 0;
}

template <class F>
LORA_FAST_INLINE void unmerge_row(
    const typename F::Bits* __restrict before, const typename F::Compute* __restrict acc,
    typename F::Compute scaling, const int8_t* __restrict code, int64_t cols,
    typename F::Bits* __restrict after) {
  for (int64_t c = 0; c < cols; ++c) {
    after[c] = unmerge_weight<F>(before[c], acc[c], scaling, code[c]);
  }
}

template <class F>
struct Kernels {
  using Bits = typename F::Bits;
  using Compute = typename F::Compute;
  void (*accumulate)(const Compute*, const Compute*, int64_t, int64_t, int64_t, Compute*);
  void (*merge)(const Bits*, const Compute*, Compute, int64_t, Bits*, int8_t*, TileFlags&);
  void (*unmerge)(const Bits*, const Compute*, Compute, const int8_t*, int64_t, Bits*);
  Cells<F> cells;
  Cells<F> pair_cells;  // for factors that pack_pairs packed
};

#define LORA_FAST_KERNELS(NAME, TARGET, ...)                                                       \
  template <class F>                                                                               \
  struct NAME {                                                                                    \
    using Bits = typename F::Bits;                                                                 \
    using Compute = typename F::Compute;                                                           \
    TARGET static void accumulate(                                                                 \
        const Compute* left, const Compute* panels, int64_t rank, int64_t begin, int64_t end,      \
        Compute* acc) {                                                                            \
      accumulate_tile(left, panels, rank, begin, end, acc);                                        \
    }                                                                                              \
    TARGET static void merge(                                                                      \
        const Bits* before, const Compute* acc, Compute scaling, int64_t cols, Bits* after,        \
        int8_t* code, TileFlags& flags) {                                                          \
      merge_row<F>(before, acc, scaling, cols, after, code, flags);                                \
    }                                                                                              \
    TARGET static void unmerge(                                                                    \
        const Bits* before, const Compute* acc, Compute scaling, const int8_t* code, int64_t cols, \
        Bits* after) {                                                                             \
      unmerge_row<F>(before, acc, scaling, code, cols, after);                                     \
    }                                                                                              \
    static Kernels<F> all() { return {accumulate, merge, unmerge, __VA_ARGS__}; }                  \
  };

LORA_FAST_KERNELS(Portable, , {}, {})
#if defined(__x86_64__)
LORA_FAST_KERNELS(Avx2, __attribute__((target(LORA_FAST_AVX2))), avx2::cells<F>(), {})
LORA_FAST_KERNELS(Avx512, __attribute__((target(LORA_FAST_AVX512))), avx512::cells<F>(), {})
LORA_FAST_KERNELS(
    Avx512Bf16, __attribute__((target(LORA_FAST_AVX512))), avx512::cells<F>(),
    avx512_bf16::cells<F>())
#endif
#undef LORA_FAST_KERNELS

template <class F>
Kernels<F> choose_kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16: {
      static const bool adds_pairs_like_fma = avx512_bf16::adds_pairs_like_fma();
      if (adds_pairs_like_fma) return Avx512Bf16<F>::all();
      [[fallthrough]];
    }
    case Isa::kAvx512: return Avx512<F>::all();
    case Isa::kAvx2: return Avx2<F>::all();
#endif
    default: return Portable<F>::all();
  }
}

}  // namespace lora_fast
