// The operands of lora_delta_fwd_ and lora_delta_bwd_, checked: matrices in memory, and what is cut
// into cells.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "small_products.h"
#include "tensors.h"

namespace lora_fast {

// A tensor's matrix in memory: its columns lie side by side.
template <class F>
struct Rows {
  typename F::Bits* data;
  int64_t rows, cols, row;

  Rows(const Tensor& tensor, const char* name, int64_t rows, int64_t cols)
      : data(static_cast<typename F::Bits*>(const_cast<void*>(read_from(tensor, name)))),
        rows(rows),
        cols(cols),
        row(tensor.stride(0)) {
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols &&
            (tensor.stride(1) == 1 || cols <= 1),
        name, " must be ", rows, " x ", cols, ", with its columns side by side, got ",
        described(tensor));
  }

  typename F::Bits* at(int64_t i, int64_t c) const { return data + i * row + c; }
  Stored<F> from(int64_t i, int64_t c) const { return {at(i, c), row}; }
};

// The same in fp32: the tensor itself, or a copy that widen() fills.
template <class F>
class Wide {
 public:
  Wide(const Rows<F>& from, const uint8_t* keep = nullptr)
      : from_(from), keep_(keep), is_copy_(!std::is_same_v<F, Fp32> || keep != nullptr) {
    if (!is_copy_) return;
    copy_ = std::make_unique_for_overwrite<float[]>(from.rows * from.cols);
  }

  bool is_copy() const { return is_copy_; }
  int64_t rows() const { return from_.rows; }
  int64_t size() const { return from_.rows * from_.cols; }

  void widen(const Products<F>& products, int64_t i) const {
    const int64_t to = i * from_.cols;
    products.widen(
        from_.at(i, 0), keep_ == nullptr ? nullptr : keep_ + to, from_.cols, copy_.get() + to);
  }

  Strided at(int64_t i, int64_t c) const {
    if (is_copy_) return {copy_.get() + i * from_.cols + c, from_.cols};
    return {reinterpret_cast<const float*>(from_.at(i, c)), from_.row};
  }
  Stored<Fp32> from(int64_t i, int64_t c) const {
    const Strided there = at(i, c);
    return {reinterpret_cast<const Fp32::Bits*>(there.data), there.row};
  }

 private:
  const Rows<F> from_;
  const uint8_t* keep_;
  bool is_copy_;
  std::unique_ptr<float[]> copy_;
};

struct Block {
  int64_t lo, hi;  // columns of Y
  int64_t row;     // of B, where its rows begin
};

// What a call adds: the sizes, and the blocks that it adds to.
struct Sizes {
  int64_t tokens, in, out, rank;
  int64_t adapted = 0;  // columns of all blocks
  std::vector<Block> blocks;

  Sizes(
      const Tensor& y, const Tensor& lora_a, const Tensor& lora_b,
      const std::vector<int64_t>& edges)
      : tokens(y.size(0)), in(lora_a.size(1)), out(y.size(1)), rank(lora_b.size(1)) {
    STD_TORCH_CHECK(
        edges.size() % 2 == 0, "edges must hold pairs of columns, got ", edges.size(), " numbers");
    int64_t last = 0;
    for (size_t i = 0; i < edges.size(); i += 2) {
      STD_TORCH_CHECK(
          last <= edges[i] && edges[i] <= edges[i + 1] && edges[i + 1] <= out,
          "edges must ascend within the output of ", out, " columns, got ", edges[i], " to ",
          edges[i + 1]);
      last = edges[i + 1];
      blocks.push_back({edges[i], last, adapted});
      adapted += last - edges[i];
    }
  }

  int64_t ranks() const { return rank * static_cast<int64_t>(blocks.size()); }
};

// One cell of a block's columns.
struct Cell {
  int64_t block, begin, end;
};

inline std::vector<Cell> cells_of(const Sizes& sizes, int64_t width) {
  std::vector<Cell> cells;
  for (size_t g = 0; g < sizes.blocks.size(); ++g) {
    const int64_t count = sizes.blocks[g].hi - sizes.blocks[g].lo;
    for (int64_t c = 0; c < count; c += width) {
      cells.push_back({static_cast<int64_t>(g), c, std::min(c + width, count)});
    }
  }
  return cells;
}

}  // namespace lora_fast
