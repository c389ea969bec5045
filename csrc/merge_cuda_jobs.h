// How the CUDA kernels' work is cut into tiles, jobs and launches.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "merge_groups.h"
#include "merge_item.h"

namespace lora_fast {

constexpr int kThreads = 256;

constexpr int kTileCols = 128;
constexpr int kBatch = 48;  // weights in one launch: a kernel's arguments have 32,764 bytes

// Rows of one thread: as many as registers hold. More of them read the factors less often.
LORA_FAST_INLINE constexpr int thread_rows(int element_size, bool is_aligned) {
  return is_aligned && element_size == 2 ? 8 : 4;
}
LORA_FAST_INLINE constexpr int tile_rows(int rows_of_thread) {
  return kThreads * kGroup / kTileCols * rows_of_thread;
}

// Where the element in row and column of an item lies.
struct Layout {
  int64_t row_stride = 0, col_stride = 0;
  bool is_matrix = false;   // else only View::offset tells
  bool is_aligned = false;  // kGroup columns can be moved at once
};

struct Job {
  Item item;
  Layout weight, code;
  uint32_t first_tile = 0, col_tiles = 0;
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

inline Layout layout_of(const View& view, int64_t cols, const void* data, int64_t element_size) {
  Layout layout;
  if (view.dims == 1) {
    layout.is_matrix = true;
    layout.col_stride = view.stride[0];
    layout.row_stride = cols * view.stride[0];
  } else if (view.dims == 2 && view.size[1] == cols) {
    layout.is_matrix = true;
    layout.col_stride = view.stride[1];
    layout.row_stride = view.stride[0];
  }
  const int64_t bytes = element_size * kGroup < 16 ? element_size * kGroup : 16;
  layout.is_aligned = layout.is_matrix && layout.col_stride == 1 && cols % kGroup == 0 &&
      layout.row_stride % kGroup == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  return layout;
}

// Jobs that go into one launch after another.
struct Queue {
  std::vector<std::pair<std::unique_ptr<Batch>, int64_t>> batches;  // with their tiles

  void add(Job job, int64_t tiles) {
    if (batches.empty() || batches.back().first->count == kBatch ||
        batches.back().second + tiles > std::numeric_limits<int32_t>::max()) {
      batches.emplace_back(std::make_unique<Batch>(), 0);
    }
    auto& [batch, used] = batches.back();
    job.first_tile = static_cast<uint32_t>(used);
    used += tiles;
    batch->jobs[batch->count++] = job;
  }
};

// The launches that a call takes: of weights whose rows can be moved in vectors, and of others.
struct Plan {
  Queue aligned, strided;
  int64_t tiles = 0;

  // element_size: bytes of an element of the weights.
  Plan(const std::vector<Item>& items, int element_size) {
    for (size_t i = 0; i < items.size(); ++i) {
      const Item& item = items[i];
      if (item.numel() == 0) continue;
      Job job;
      job.item = item;
      job.index = static_cast<int>(i);
      job.weight = layout_of(item.weight_view, item.cols, item.weight, element_size);
      job.code = layout_of(item.code_view, item.cols, item.code, sizeof(int8_t));
      const bool is_aligned =
          job.weight.is_aligned && (item.code == nullptr || job.code.is_aligned);
      const int64_t height = tile_rows(thread_rows(element_size, is_aligned));
      const int64_t across = (item.cols + kTileCols - 1) / kTileCols;
      job.col_tiles = static_cast<uint32_t>(across);
      const int64_t count = (item.rows + height - 1) / height * across;
      (is_aligned ? aligned : strided).add(job, count);
      tiles += count;
    }
  }
};

}  // namespace lora_fast
