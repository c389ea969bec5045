// The kernels of merge_ and unmerge_ on CUDA, without anything of torch's tensors.
//
// A block covers a tile of one weight. It writes the tile only when all of it is known to be good
// and notes that it did, so when one weight can't be merged, exactly what was written is taken
// back.
#pragma once

#include "merge_cuda_jobs.h"
#include "merge_cuda_memory.cuh"
#include "merge_groups.h"

namespace lora_fast {
constexpr int kChunk = 16;    // ranks of the factors in shared memory at a time
constexpr int kListed = 512;  // entries of the overflow list that a block gathers

// Blocks that share a multiprocessor: as many as have registers for what each thread holds.
template <class F, bool kAligned>
constexpr int kBlocks = kAligned && sizeof(typename F::Compute) == 4 ? 2 : 1;

enum class Mode { kMerge, kUndo, kUnmerge };

// Which rows and columns of its tile a thread has. A warp has 4 threads down and 8 across, so that
// its reads of shared memory are broadcasts of 64 and 128 bytes; 4 warps stand side by side.
template <int kRows>
struct Place {
  int row, col;
  __device__ __forceinline__ Place()
      : row(threadIdx.x / 128 * (4 * kRows) + threadIdx.x % 32 / 8 * kRows),
        col(threadIdx.x / 32 % 4 * 32 + threadIdx.x % 8 * kGroup) {}
};

// Reads kCount elements of a factor, `step` apart, of which those below `valid` are there; rounded
// to what F computes in. All are on their way before any is used.
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
      return read<Compute, kCount, uint16_t>(
          data, at, step, valid, found, [](uint16_t bits) { return Fp16::widen(bits); });
    default:
      return read<Compute, kCount, uint16_t>(
          data, at, step, valid, found, [](uint16_t bits) { return Bf16::widen(bits); });
  }
}

// The sums of a thread's part of a tile.
template <class F, int kRows>
struct Sums {
  using Compute = typename F::Compute;
  static constexpr int kTileRows = tile_rows(kRows);
  Compute value[kRows][kGroup];

  // value = sum_j left[row, j] * right[j, col], j ascending, one fused multiply-add each.
  __device__ __forceinline__ void compute(
      const Item& item, int64_t tile_row, int64_t tile_col, const Place<kRows>& mine) {
    // Four more, so that the ranks of a row, which neighbouring threads bring, lie in other banks.
    alignas(16) __shared__ Compute left[kChunk][kTileRows + 4];
    alignas(16) __shared__ Compute right[kChunk][kTileCols];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kGroup; ++c) value[r][c] = 0;
    }
    for (int64_t start = 0; start < item.rank; start += kChunk) {
      const int64_t rest = item.rank - start;
      const int ranks = rest < kChunk ? static_cast<int>(rest) : kChunk;
      __syncthreads();
      stage_left(item, tile_row, start, ranks, left);
      stage_right(item, tile_col, start, ranks, right);
      __syncthreads();
      // Not beyond ranks: adding 0 * 0 would turn a sum of -0 into +0.
#pragma unroll 4
      for (int j = 0; j < ranks; ++j) {
        Compute a[kRows], b[kGroup];
#pragma unroll
        for (int r = 0; r < kRows; ++r) a[r] = left[j][mine.row + r];
#pragma unroll
        for (int c = 0; c < kGroup; ++c) b[c] = right[j][mine.col + c];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kGroup; ++c) value[r][c] = fused(a[r], b[c], value[r][c]);
        }
      }
    }
  }

 private:
  // Ranks start to start + ranks of the tile's rows of the left factor; a thread has one rank.
  static __device__ __forceinline__ void stage_left(
      const Item& item, int64_t tile_row, int64_t start, int ranks,
      Compute (&left)[kChunk][kTileRows + 4]) {
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
    if (first >= end) return 0;
    const int64_t count = (end - first + step - 1) / step;
    return count < most ? static_cast<int>(count) : most;
  }
};

// The weights of a tile whose code is kOverflow, gathered so that the block asks for room in the
// overflow list of its item once. What does not fit here goes there by itself.
template <class Bits>
struct Gathered {
  int count;
  unsigned long long first;  // place in the item's list
  uint16_t place[kListed];   // row and column in the tile
  Bits value[kListed];
};

// Puts a weight into the list of an item; false if that is full.
template <class Bits>
__device__ __forceinline__ bool put(
    const Item& item, unsigned long long at, int64_t row, int64_t col, Bits weight) {
  if (at >= static_cast<unsigned long long>(item.overflow_size)) return false;
  item.overflow_index[at] = static_cast<int32_t>(item.passed_index(row, col));
  static_cast<Bits*>(item.overflow_value)[at] = weight;
  return true;
}

// One tile of a job, as a thread of its block sees it.
template <class F, int kRows>
struct Tile {
  using Bits = typename F::Bits;
  using Compute = typename F::Compute;
  const Job& job;
  int64_t row, col;  // of the tile
  Place<kRows> mine;

  // Merges a row of the thread's weights in registers; false where one can't be merged.
  __device__ __forceinline__ bool merge_row(
      int r, const Compute (&acc)[kGroup], Group<F>& weight, uint32_t& code, Outcome& outcome,
      Gathered<Bits>& gathered) const {
    const Item& item = job.item;
    const auto scaling = static_cast<Compute>(item.scaling);
    const MergedGroup<F> merged = merge_group<F>(weight, acc, scaling);
    Group<F> before = weight, back = merged.back;
    weight = merged.bits;
    code = merged.code;
    if (merged.finite && (merged.fits || item.code == nullptr)) return true;
    // One after another: these are few, and the code for them stays short.
    bool good = true;
    Compute sums[kGroup] = {acc[0], acc[1], acc[2], acc[3]};
#pragma unroll 1
    for (int i = 0; i < kGroup; ++i) {
      Merged<F> one = encode<F>(before.lane(0), weight.lane(0), back.lane(0));
      if (!merged.finite) one = merge_weight<F>(before.lane(0), sums[0], scaling);
      if (is_there(r, i)) {
        if (one.infinite != 0) {
          outcome.not_finite = 1;
          good = false;
        } else if (one.overflow != 0 && item.code != nullptr) {
          good = gather(r, i, before.lane(0), outcome, gathered) && good;
        }
      }
      weight.shift(one.bits);
      code = code >> 8 | static_cast<uint32_t>(static_cast<uint8_t>(one.code)) << 24;
      before.shift(0);
      back.shift(0);
      for (int k = 0; k + 1 < kGroup; ++k) sums[k] = sums[k + 1];
    }
    return good;
  }

  // Puts what was gathered into the item's list; false if that is full. The whole block calls it.
  __device__ __forceinline__ bool hand_over(Outcome& outcome, Gathered<Bits>& gathered) const {
    const int count = gathered.count < kListed ? gathered.count : kListed;
    if (count == 0) return true;
    if (threadIdx.x == 0) {
      gathered.first = atomicAdd(&outcome.overflow, static_cast<unsigned long long>(count));
    }
    __syncthreads();
    bool fits = true;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int place = gathered.place[i];
      fits = put(job.item, gathered.first + i, row + place / kTileCols, col + place % kTileCols,
                 gathered.value[i]) &&
          fits;
    }
    if (!fits) outcome.list_full = 1;
    return __syncthreads_and(fits);
  }

 private:
  __device__ __forceinline__ bool is_there(int r, int i) const {
    return row + mine.row + r < job.item.rows && col + mine.col + i < job.item.cols;
  }

  __device__ __forceinline__ bool gather(
      int r, int i, Bits weight, Outcome& outcome, Gathered<Bits>& gathered) const {
    const int at = atomicAdd(&gathered.count, 1);
    if (at < kListed) {
      gathered.place[at] = static_cast<uint16_t>((mine.row + r) * kTileCols + mine.col + i);
      gathered.value[at] = weight;
      return true;
    }
    const unsigned long long listed = atomicAdd(&outcome.overflow, 1ull);
    if (put(job.item, listed, row + mine.row + r, col + mine.col + i, weight)) return true;
    outcome.list_full = 1;
    return false;
  }
};

// Undoes the merge of a row of weights.
template <class F>
__device__ __forceinline__ Group<F> unmerge_row(
    const Group<F>& merged, const typename F::Compute (&acc)[kGroup], typename F::Compute scaling,
    uint32_t code) {
  if (all_finite(merged)) return unmerge_group<F>(merged, acc, scaling, code);
  Group<F> weight = merged;
  typename F::Compute sums[kGroup] = {acc[0], acc[1], acc[2], acc[3]};
#pragma unroll 1
  for (int i = 0; i < kGroup; ++i) {
    const auto one = static_cast<int8_t>(static_cast<uint8_t>(code));
    weight.shift(unmerge_weight<F>(weight.lane(0), sums[0], scaling, one));
    code >>= 8;
    for (int k = 0; k + 1 < kGroup; ++k) sums[k] = sums[k + 1];
  }
  return weight;
}

// Grid: a block for each tile of each job. Any strides, unless kAligned.
template <class F, Mode kMode, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<F, kAligned>)
    merge_kernel(const __grid_constant__ Batch batch, Outcome* outcomes, uint8_t* written) {
  constexpr int kRows = thread_rows(sizeof(typename F::Bits), kAligned);
  int j = 0;
  while (j + 1 < batch.count && blockIdx.x >= batch.jobs[j + 1].first_tile) ++j;
  const Job& job = batch.jobs[j];
  const Item& item = job.item;
  if (kMode == Mode::kUndo && (item.code == nullptr || !written[blockIdx.x])) return;

  const unsigned number = blockIdx.x - job.first_tile;
  const Tile<F, kRows> tile{
      job, static_cast<int64_t>(number / job.col_tiles) * tile_rows(kRows),
      static_cast<int64_t>(number % job.col_tiles) * kTileCols};
  const int64_t row = tile.row + tile.mine.row, col = tile.col + tile.mine.col;
  const Part<typename F::Bits, kAligned> weights(
      item.weight, item, item.weight_view, job.weight, row, col, kRows);
  const Part<int8_t, kAligned> codes(item.code, item, item.code_view, job.code, row, col, kRows);

  Group<F> weight[kRows] = {};
  uint32_t code[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // before the sums, which hide the wait for it
    weights.load(r, weight[r]);
    if (kMode != Mode::kMerge) codes.load(r, code[r]);
  }
  Sums<F, kRows> sums;

  if constexpr (kMode == Mode::kMerge) {
    __shared__ Gathered<typename F::Bits> gathered;
    if (threadIdx.x == 0) gathered.count = 0;
    __syncthreads();
    sums.compute(item, tile.row, tile.col, tile.mine);
    Outcome& outcome = outcomes[job.index];
    bool good = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      good = tile.merge_row(r, sums.value[r], weight[r], code[r], outcome, gathered) && good;
    }
    const bool all_good = __syncthreads_and(good) && tile.hand_over(outcome, gathered);
    if (threadIdx.x == 0) written[blockIdx.x] = all_good;
    if (!all_good) return;
  } else {
    sums.compute(item, tile.row, tile.col, tile.mine);
    const auto scaling = static_cast<typename F::Compute>(item.scaling);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      weight[r] = unmerge_row<F>(weight[r], sums.value[r], scaling, code[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    weights.store(r, weight[r]);
    if (kMode == Mode::kMerge && item.code != nullptr) codes.store(r, code[r]);
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
