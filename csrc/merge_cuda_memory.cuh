// How the CUDA kernels read and write a weight and its code: by vectors where memory allows.
#pragma once

#include "merge_cuda_jobs.h"
#include "merge_groups.h"

namespace lora_fast {

// So many bytes at once, by one instruction where there is one for as many.
template <int kBytes>
__device__ __forceinline__ void load_bytes(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
    }
  }
#else
  memcpy(to, from, kBytes);
#endif
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  // An assignment is compiled to several stores at times.
  if constexpr (kBytes == 4) {
    __stwb(static_cast<uint32_t*>(to), *static_cast<const uint32_t*>(from));
  } else if constexpr (kBytes == 8) {
    __stwb(static_cast<uint2*>(to), *static_cast<const uint2*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      __stwb(static_cast<uint4*>(to) + i, static_cast<const uint4*>(from)[i]);
    }
  }
#else
  memcpy(to, from, kBytes);
#endif
}

// What a thread has of a weight or its code: groups of four neighbours, one below the other.
template <class E, bool kAligned>
struct Part {
  E* base;
  const Item& item;
  const View& view;
  const Layout& layout;
  int64_t row, col;  // of the first element
  int rows;          // that are there

  __device__ __forceinline__ Part(
      void* data, const Item& its_item, const View& its_view, const Layout& its_layout,
      int64_t first_row, int64_t first_col, int most)
      : base(static_cast<E*>(data)),
        item(its_item),
        view(its_view),
        layout(its_layout),
        row(first_row),
        col(first_col),
        rows(0) {
    const int64_t rest = item.rows - row;
    if (col < item.cols && rest > 0) rows = rest < most ? static_cast<int>(rest) : most;
    if constexpr (kAligned) base += row * layout.row_stride + col;
  }

  // `group`: of the row r, kGroup elements in as many bytes as they have in memory.
  template <class Packed>
  __device__ __forceinline__ void load(int r, Packed& group) const {
    static_assert(sizeof(Packed) == kGroup * sizeof(E));
    if (r >= rows) return;
    if constexpr (kAligned) {
      load_bytes<sizeof(Packed)>(&group, base + r * layout.row_stride);
    } else {
      E lanes[kGroup] = {};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (col + i < item.cols) lanes[i] = at(r, i);
      }
      memcpy(&group, lanes, sizeof(Packed));
    }
  }

  template <class Packed>
  __device__ __forceinline__ void store(int r, const Packed& group) const {
    static_assert(sizeof(Packed) == kGroup * sizeof(E));
    if (r >= rows) return;
    if constexpr (kAligned) {
      store_bytes<sizeof(Packed)>(base + r * layout.row_stride, &group);
    } else {
      E lanes[kGroup];
      memcpy(lanes, &group, sizeof(Packed));
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (col + i < item.cols) at(r, i) = lanes[i];
      }
    }
  }

 private:
  __device__ __forceinline__ E& at(int r, int i) const {
    if (layout.is_matrix)
      return base[(row + r) * layout.row_stride + (col + i) * layout.col_stride];
    return base[view.offset((row + r) * item.cols + col + i)];
  }
};

}  // namespace lora_fast
