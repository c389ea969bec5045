// The kernels of merge_ and unmerge_ on CUDA, without anything of torch's tensors.
//
// A block covers a tile of one weight. It writes the tile only when all of it is known to be good
// and notes that it did, so when one weight can't be merged, exactly what was written is taken
// back.
#pragma once

#include "merge.h"

namespace lora_fast {
constexpr int kThreads = 256;
constexpr int kVector = 4;  // neighbouring columns of one thread
constexpr int kRows = 4;    // rows of one thread
constexpr int kTileCols = 128;
constexpr int kTileRows = kThreads * kVector / kTileCols * kRows;
constexpr int kChunk = 16;  // ranks of the factors in shared memory at a time
constexpr int kBatch = 48;  // weights in one launch: a kernel's arguments have 32,764 bytes

// Blocks that share a multiprocessor: enough loads must be on their way to keep the memory busy.
template <class F, bool kAligned>
constexpr int kBlocks = sizeof(typename F::Compute) == 4 && kAligned ? 3 : 1;

enum class Mode { kMerge, kUndo, kUnmerge };

// Where the element in row and column of an item lies.
struct Layout {
  int64_t row_stride = 0, col_stride = 0;
  bool is_matrix = false;   // else only View::offset tells
  bool is_aligned = false;  // kVector columns can be moved at once
};

struct Job {
  Item item;
  Layout weight, code;
  int64_t first_tile = 0, col_tiles = 0;
  int index = 0;  // of the item in the call
};

struct Batch {
  Job jobs[kBatch];
  int count = 0;
};
static_assert(sizeof(Batch) < 32000, "a kernel's arguments have 32,764 bytes");

// What the blocks find out about one item.
struct Outcome {
  unsigned long long overflow, not_finite, list_full;
};

template <class E>
struct alignas(sizeof(E) * kVector) Packed {
  E lane[kVector];
};

template <class E>
__device__ __forceinline__ E& at(
    E* base, const Item& item, const View& view, const Layout& layout, int64_t row, int64_t col) {
  if (layout.is_matrix) return base[row * layout.row_stride + col * layout.col_stride];
  return base[view.offset(row * item.cols + col)];
}

template <bool kAligned, class E>
__device__ __forceinline__ Packed<E> load(
    E* base, const Item& item, const View& view, const Layout& layout, int64_t row, int64_t col) {
  Packed<E> result{};
  if (row >= item.rows || col >= item.cols) return result;
  if constexpr (kAligned) {
    result = *reinterpret_cast<const Packed<E>*>(base + row * layout.row_stride + col);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (col + i < item.cols) result.lane[i] = at(base, item, view, layout, row, col + i);
    }
  }
  return result;
}

template <bool kAligned, class E>
__device__ __forceinline__ void store(
    E* base, const Item& item, const View& view, const Layout& layout, int64_t row, int64_t col,
    const Packed<E>& values) {
  if (row >= item.rows || col >= item.cols) return;
  if constexpr (kAligned) {
    *reinterpret_cast<Packed<E>*>(base + row * layout.row_stride + col) = values;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (col + i < item.cols) at(base, item, view, layout, row, col + i) = values.lane[i];
    }
  }
}

// Reads kCount elements of a factor, kStep apart in its first or second dimension, of which those
// below `valid` are there; rounded to what F computes in. All are on their way before any is used.
template <class Compute, int kCount, class Stored, class Widen>
__device__ __forceinline__ void read(
    const void* data, int64_t at, int64_t step, int valid, Compute (&found)[kCount], Widen widen) {
  const Stored* from = static_cast<const Stored*>(data) + at;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    found[n] = n < valid ? static_cast<Compute>(widen(*from)) : Compute{0};
    from += step;
  }
}

template <class F, int kCount>
__device__ __forceinline__ void read_factor(
    const Factor& factor, int64_t at, int64_t step, int valid,
    typename F::Compute (&found)[kCount]) {
  using Compute = typename F::Compute;
  const void* data = factor.data;
  switch (factor.dtype) {
    case Dtype::kFp64:
      return read<Compute, kCount, double>(
          data, at, step, valid, found, [](double value) { return value; });
    case Dtype::kFp32:
      return read<Compute, kCount, float>(
          data, at, step, valid, found, [](float value) { return value; });
    case Dtype::kFp16:
      return read<Compute, kCount, uint16_t>(data, at, step, valid, found, Fp16::widen);
    default: return read<Compute, kCount, uint16_t>(data, at, step, valid, found, Bf16::widen);
  }
}

template <class F>
struct Accumulator {
  using Compute = typename F::Compute;
  Compute value[kRows][kVector];

  // value = sum_j left[row, j] * right[j, col], j ascending, one fused multiply-add each.
  __device__ __forceinline__ void compute(const Item& item, int64_t tile_row, int64_t tile_col) {
    __shared__ Compute left[kChunk][kTileRows];
    __shared__ Compute right[kChunk][kTileCols];
    const int row = threadIdx.x / (kTileCols / kVector) * kRows;
    const int col = threadIdx.x % (kTileCols / kVector) * kVector;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) value[r][c] = 0;
    }
    for (int64_t start = 0; start < item.rank; start += kChunk) {
      const int ranks = static_cast<int>(min(static_cast<int64_t>(kChunk), item.rank - start));
      __syncthreads();
      stage_left(item, tile_row, start, ranks, left);
      stage_right(item, tile_col, start, ranks, right);
      __syncthreads();
      // Not beyond ranks: adding 0 * 0 would turn a sum of -0 into +0.
      for (int j = 0; j < ranks; ++j) {
        Compute a[kRows], b[kVector];
#pragma unroll
        for (int r = 0; r < kRows; ++r) a[r] = left[j][row + r];
#pragma unroll
        for (int c = 0; c < kVector; ++c) b[c] = right[j][col + c];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kVector; ++c) value[r][c] = fused(a[r], b[c], value[r][c]);
        }
      }
    }
  }

 private:
  // Ranks start to start + ranks of the tile's rows of the left factor; a thread has one rank.
  static __device__ __forceinline__ void stage_left(
      const Item& item, int64_t tile_row, int64_t start, int ranks,
      Compute (&left)[kChunk][kTileRows]) {
    constexpr int kStep = kThreads / kChunk, kCount = kTileRows / kStep;
    const int j = threadIdx.x % kChunk, first = threadIdx.x / kChunk;
    const Factor& factor = item.left;
    const int64_t at = (tile_row + first) * factor.stride0 + (start + j) * factor.stride1;
    const int valid = j < ranks ? count_below(tile_row + first, item.rows, kStep, kCount) : 0;
    Compute found[kCount];
    read_factor<F>(factor, at, kStep * factor.stride0, valid, found);
#pragma unroll
    for (int n = 0; n < kCount; ++n) left[j][first + n * kStep] = found[n];
  }

  // The same of the tile's columns of the right factor; a thread has one column.
  static __device__ __forceinline__ void stage_right(
      const Item& item, int64_t tile_col, int64_t start, int ranks,
      Compute (&right)[kChunk][kTileCols]) {
    constexpr int kStep = kThreads / kTileCols, kCount = kChunk / kStep;
    const int col = threadIdx.x % kTileCols, first = threadIdx.x / kTileCols;
    const Factor& factor = item.right;
    const int64_t at = (start + first) * factor.stride0 + (tile_col + col) * factor.stride1;
    const int valid = tile_col + col < item.cols ? count_below(first, ranks, kStep, kCount) : 0;
    Compute found[kCount];
    read_factor<F>(factor, at, kStep * factor.stride0, valid, found);
#pragma unroll
    for (int n = 0; n < kCount; ++n) right[first + n * kStep][col] = found[n];
  }

  // How many of first, first + step, ... are below end, at most `most`.
  static __device__ __forceinline__ int count_below(
      int64_t first, int64_t end, int step, int most) {
    return static_cast<int>(
        max(int64_t{0}, min(static_cast<int64_t>(most), (end - first + step - 1) / step)));
  }
};

// Notes a weight whose code is kOverflow; false if the list is full.
template <class Bits>
__device__ bool list_overflow(
    const Item& item, Outcome& outcome, int64_t row, int64_t col, Bits weight) {
  const unsigned long long at = atomicAdd(&outcome.overflow, 1ull);
  if (at >= static_cast<unsigned long long>(item.overflow_size)) return false;
  item.overflow_index[at] = static_cast<int32_t>(item.passed_index(row, col));
  static_cast<Bits*>(item.overflow_value)[at] = weight;
  return true;
}

// Merges the thread's part of a tile in registers: after and code take the results.
template <class F>
__device__ __forceinline__ bool merge_part(
    const Item& item, Outcome& outcome, const Accumulator<F>& acc, int64_t row, int64_t col,
    Packed<typename F::Bits> (&weight)[kRows], Packed<int8_t> (&code)[kRows]) {
  using Compute = typename F::Compute;
  bool good = true;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      const auto before = weight[r].lane[c];
      const Merged<F> merged =
          merge_weight<F>(before, acc.value[r][c], static_cast<Compute>(item.scaling));
      weight[r].lane[c] = merged.bits;
      code[r].lane[c] = merged.code;
      if (row + r >= item.rows || col + c >= item.cols) continue;
      if (merged.infinite != 0) {
        outcome.not_finite = 1;
        good = false;
      } else if (merged.overflow != 0 && item.code != nullptr) {
        if (!list_overflow(item, outcome, row + r, col + c, before)) {
          outcome.list_full = 1;
          good = false;
        }
      }
    }
  }
  return good;
}

// Grid: a block for each tile of kTileRows x kTileCols of each job. Any strides, unless kAligned.
template <class F, Mode kMode, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<F, kAligned>)
    merge_kernel(const __grid_constant__ Batch batch, Outcome* outcomes, uint8_t* written) {
  using Bits = typename F::Bits;
  int j = 0;
  while (j + 1 < batch.count && blockIdx.x >= batch.jobs[j + 1].first_tile) ++j;
  const Job& job = batch.jobs[j];
  const Item& item = job.item;
  if (kMode == Mode::kUndo && (item.code == nullptr || !written[blockIdx.x])) return;

  const int64_t tile = blockIdx.x - job.first_tile;
  const int64_t tile_row = tile / job.col_tiles * kTileRows;
  const int64_t tile_col = tile % job.col_tiles * kTileCols;
  const int64_t row = tile_row + threadIdx.x / (kTileCols / kVector) * kRows;
  const int64_t col = tile_col + threadIdx.x % (kTileCols / kVector) * kVector;

  Bits* weights = static_cast<Bits*>(item.weight);
  Packed<Bits> weight[kRows];
  Packed<int8_t> code[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // before the sums, which hide the wait for it
    weight[r] = load<kAligned>(weights, item, item.weight_view, job.weight, row + r, col);
  }
  Accumulator<F> acc;
  acc.compute(item, tile_row, tile_col);

  if (kMode == Mode::kMerge) {
    Outcome& outcome = outcomes[job.index];
    const bool good = merge_part<F>(item, outcome, acc, row, col, weight, code);
    const bool all_good = __syncthreads_and(good);
    if (threadIdx.x == 0) written[blockIdx.x] = all_good;
    if (!all_good) return;
  } else {
    const auto scaling = static_cast<typename F::Compute>(item.scaling);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      code[r] = load<kAligned>(item.code, item, item.code_view, job.code, row + r, col);
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        weight[r].lane[c] =
            unmerge_weight<F>(weight[r].lane[c], acc.value[r][c], scaling, code[r].lane[c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    store<kAligned>(weights, item, item.weight_view, job.weight, row + r, col, weight[r]);
    if (kMode == Mode::kMerge && item.code != nullptr) {
      store<kAligned>(item.code, item, item.code_view, job.code, row + r, col, code[r]);
    }
  }
}

// Grid: a thread for each entry of the overflow list of one item.
template <class Bits>
__global__ void restore_kernel(const __grid_constant__ Item item, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t passed = item.overflow_index[i];
  if (passed < 0 || passed >= item.numel()) return;
  static_cast<Bits*>(item.weight)[item.weight_view.offset(item.own_index(passed))] =
      static_cast<const Bits*>(item.overflow_value)[i];
}

}  // namespace lora_fast
