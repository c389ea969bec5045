// What is merged into one weight, and where it lies, without anything of torch's tensors.
#pragma once

#include <cstdint>
#include <optional>

#include "merge_math.h"

namespace lora_fast {

constexpr int kMaxDims = 8;

// A strided tensor in row-major logical order; dimensions that continue one another are joined.
struct View {
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  LORA_FAST_INLINE int64_t offset(int64_t index) const {
    int64_t result = 0;
#if defined(__CUDACC__)
#pragma unroll 1  // a division of 64 bits has a hundred instructions
#endif
    for (int d = dims - 1; d > 0; --d) {
      result += index % size[d] * stride[d];
      index /= size[d];
    }
    return result + index * stride[0];
  }

  // How far apart rows of so many elements are, if the elements of each lie side by side.
  std::optional<int64_t> row_stride(int64_t cols) const {
    if (dims == 1 && stride[0] == 1) return cols;
    if (dims == 2 && size[1] == cols && stride[1] == 1) return stride[0];
    return std::nullopt;
  }
};

// lora_A or lora_B, or its transpose: data[i * stride0 + j * stride1].
struct Factor {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFp32;
  int64_t stride0 = 0, stride1 = 0;

  Factor transposed() const { return {data, dtype, stride1, stride0}; }
};

// W[i, k] += scaling * sum_j left[i, j] * right[j, k] over one weight. Where memory runs down the
// columns of the weight (fan_in_fan_out, Embedding), all of it is transposed.
struct Item {
  void* weight = nullptr;
  int8_t* code = nullptr;  // null: no way back is kept
  View weight_view, code_view;
  Factor left, right;
  int64_t rows = 0, cols = 0, rank = 0;
  bool transposed = false;
  double scaling = 0;
  int32_t* overflow_index = nullptr;  // row-major in the weight as it was passed
  void* overflow_value = nullptr;
  int32_t overflow_size = 0;  // merge_: room in the list; unmerge_: entries

  LORA_FAST_INLINE int64_t numel() const { return rows * cols; }

  LORA_FAST_INLINE int64_t passed_index(int64_t row, int64_t col) const {
    return transposed ? col * rows + row : row * cols + col;
  }

  LORA_FAST_INLINE int64_t own_index(int64_t passed) const {
    return transposed ? passed % rows * cols + passed / rows : passed;
  }
};

}  // namespace lora_fast
