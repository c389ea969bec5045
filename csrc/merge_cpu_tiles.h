// How the weights of an item are divided: into tasks of a thread, and those into tiles.
#pragma once

#include <cstdint>

#include "merge.h"

namespace lora_fast {

// Part of an item: whole tiles, worked through row by row of tiles by one thread.
struct Task {
  size_t item;
  int64_t row, row_end, col, col_end;
};

// Some of the weights of an item.
struct Part {
  int64_t row, rows, col, cols;

  int64_t index(const Item& item, int64_t r) const { return (row + r) * item.cols + col; }

  // Some of its rows and columns, counted from its first.
  Part part(int64_t first_row, int64_t end_row, int64_t first_col, int64_t end_col) const {
    return {row + first_row, end_row - first_row, col + first_col, end_col - first_col};
  }
};

// Up to kTileRows x kTileCols weights, and what is summed for them.
template <class Compute>
struct Tile : Part {
  const Compute* left;                  // [rank][kTileRows]
  const Compute* right;                 // panels of [rank][kPanelCols]
  const Compute* left_pairs = nullptr;  // the same as pairs, where their products are exact
  const Compute* right_pairs = nullptr;
};

// One of so many parts of a length, in whole steps.
inline int64_t even_part(int64_t length, int64_t parts, int64_t step) {
  return (length + parts * step - 1) / (parts * step) * step;
}

}  // namespace lora_fast
