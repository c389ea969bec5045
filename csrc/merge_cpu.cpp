// merge_ and unmerge_ on the CPU: one pass over the weights, in tiles that stay in the L1 cache.
//
// A tile is written only once all of it is known to be good, and each task counts the tiles that it
// wrote. So when one weight can't be merged, exactly what was written is taken back, with no copy.
#include "merge.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <string>

#include "merge_cpu_kernels.h"
#include "module.h"

namespace lora_fast {
namespace {

// Part of an item: whole tiles, worked through row by row of tiles by one thread.
struct Task {
  size_t item;
  int64_t row, row_end, col, col_end;
};

// Up to kTileRows x kTileCols weights.
struct Tile {
  int64_t row, rows, col, cols;

  int64_t index(const Item& item, int64_t r) const { return (row + r) * item.cols + col; }
};

// What the threads find out about one item, and how far each task got.
struct Outcome {
  std::atomic<int64_t> overflow{0};  // entries written to the item's list
  std::atomic<int64_t> verdict{0};   // 0 or why it can't be merged
};

enum class Mode { kMerge, kUnmerge };

// Subnormals must count, and rounding must be to nearest, whatever the calling thread has set.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// Walks a view in logical order and copies between it and a dense buffer.
class Cursor {
 public:
  Cursor(const View& view, int64_t index) : view_(view) {
    for (int d = view.dims - 1; d >= 0; --d) {
      at_[d] = index % view.size[d];
      offset_ += at_[d] * view.stride[d];
      index /= view.size[d];
    }
  }

  // Null unless the next count elements lie side by side.
  template <class E>
  E* direct(E* base, int64_t count) const {
    const int inner = view_.dims - 1;
    const bool together = view_.stride[inner] == 1 && count <= view_.size[inner] - at_[inner];
    return together ? base + offset_ : nullptr;
  }

  // Calls run(offset, stride, n) for stretches of the innermost dimension, count elements in all.
  template <class Run>
  void each_run(int64_t count, const Run& run) {
    const int inner = view_.dims - 1;
    while (count > 0) {
      const int64_t n = std::min(count, view_.size[inner] - at_[inner]);
      run(offset_, view_.stride[inner], n);
      count -= n;
      at_[inner] += n;
      offset_ += n * view_.stride[inner];
      for (int d = inner; d > 0 && at_[d] == view_.size[d]; --d) {
        offset_ += view_.stride[d - 1] - view_.size[d] * view_.stride[d];
        at_[d] = 0;
        ++at_[d - 1];
      }
    }
  }

 private:
  const View& view_;
  int64_t at_[kMaxDims] = {};
  int64_t offset_ = 0;
};

// The elements themselves where they lie side by side, or a copy of them in buffer.
template <class E>
E* gather(E* base, const View& view, int64_t index, int64_t count, E* buffer) {
  Cursor cursor(view, index);
  if (E* direct = cursor.direct(base, count)) return direct;
  E* to = buffer;
  cursor.each_run(count, [&](int64_t offset, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) *to++ = base[offset + i * stride];
  });
  return buffer;
}

template <class E>
void scatter(E* base, const View& view, int64_t index, int64_t count, const E* buffer) {
  Cursor cursor(view, index);
  if (E* direct = cursor.direct(base, count)) {
    std::memcpy(direct, buffer, count * sizeof(E));
    return;
  }
  cursor.each_run(count, [&](int64_t offset, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) base[offset + i * stride] = *buffer++;
  });
}

// factor[i, j], ..., factor[i, j + count - 1], rounded to what F computes in.
template <class F>
void load_factor(
    const Factor& factor, int64_t i, int64_t j, int64_t count, typename F::Compute* to) {
  dispatch_format(factor.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const auto* from = static_cast<const typename Stored::Bits*>(factor.data) + i * factor.stride0 +
        j * factor.stride1;
    for (int64_t c = 0; c < count; ++c) {
      to[c] = static_cast<typename F::Compute>(Stored::widen(from[c * factor.stride1]));
    }
  });
}

template <class F>
class Merger {
  using Bits = typename F::Bits;
  using Compute = typename F::Compute;

 public:
  explicit Merger(const std::vector<Item>& items)
      : items_(items), outcomes_(items.size()), kernels_(choose_kernels<F>()) {
    const int64_t threads = torch::stable::get_num_threads();
    for (size_t i = 0; i < items.size(); ++i) add_tasks(i, threads);
    written_.assign(tasks_.size(), 0);
  }

  // Returns, for each item, the entries in its overflow list or why it can't be merged.
  std::vector<int64_t> merge() {
    run(Mode::kMerge);
    std::vector<int64_t> status;
    for (const Outcome& outcome : outcomes_) {
      status.push_back(failed_ ? std::min<int64_t>(outcome.verdict, 0) : outcome.overflow.load());
    }
    if (failed_) {
      run(Mode::kUnmerge);
      for (size_t i = 0; i < items_.size(); ++i) restore_overflow(items_[i], outcomes_[i].overflow);
    }
    return status;
  }

  void unmerge() {
    written_.assign(tasks_.size(), std::numeric_limits<int64_t>::max());
    run(Mode::kUnmerge);
    for (const Item& item : items_) restore_overflow(item, item.overflow_size);
  }

 private:
  struct Scratch {
    std::vector<Compute> right;  // [column tile][rank][kTileCols], zeros beyond the last column
    std::vector<Compute> left;   // [kTileRows][rank]
    alignas(64) Compute acc[kTileRows * kTileCols];
    alignas(64) Bits before[kTileCols];
    alignas(64) Bits after[kTileRows * kTileCols];
    alignas(64) int8_t code[kTileRows * kTileCols];
  };

  void add_tasks(size_t index, int64_t threads) {
    const Item& item = items_[index];
    if (item.numel() == 0) return;
    weights_ += item.numel();
    const int64_t fair = (item.rows + 4 * threads - 1) / (4 * threads);
    const int64_t rows = std::min(kTaskRows, (fair + kTileRows - 1) / kTileRows * kTileRows);
    const int64_t bytes = std::max<int64_t>(1, item.rank * kTileCols * sizeof(Compute));
    const int64_t cols = std::max<int64_t>(1, kRightBytes / bytes) * kTileCols;
    for (int64_t row = 0; row < item.rows; row += rows) {
      for (int64_t col = 0; col < item.cols; col += cols) {
        tasks_.push_back(
            {index, row, std::min(row + rows, item.rows), col, std::min(col + cols, item.cols)});
      }
    }
  }

  void run(Mode mode) {
    const int64_t count = static_cast<int64_t>(tasks_.size());
    // Waking another thread costs as much as kAlone weights.
    constexpr int64_t kAlone = 1 << 15;
    const int64_t grain = std::max<int64_t>(1, count * kAlone / std::max<int64_t>(1, weights_));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      const DefaultFloatEnvironment environment;
      auto scratch = std::make_unique<Scratch>();
      for (int64_t t = begin; t < end; ++t) run_task(t, mode, *scratch);
    });
  }

  void run_task(int64_t index, Mode mode, Scratch& scratch) {
    const Task& task = tasks_[index];
    const Item& item = items_[task.item];
    if (mode == Mode::kUnmerge && (written_[index] == 0 || item.code == nullptr)) return;
    pack_right(item, task, scratch);
    int64_t done = 0;
    Tile tile;
    for (tile.row = task.row; tile.row < task.row_end; tile.row += kTileRows) {
      tile.rows = std::min<int64_t>(kTileRows, task.row_end - tile.row);
      pack_left(item, tile, scratch);
      for (tile.col = task.col; tile.col < task.col_end; tile.col += kTileCols) {
        tile.cols = std::min<int64_t>(kTileCols, task.col_end - tile.col);
        if (mode == Mode::kUnmerge ? done++ == written_[index] : failed_.load()) return;
        const Compute* right = scratch.right.data() + (tile.col - task.col) * item.rank;
        kernels_.accumulate(
            scratch.left.data(), right, item.rank, tile.rows, tile.cols, scratch.acc);
        if (mode == Mode::kUnmerge) {
          unmerge_tile(item, tile, scratch);
        } else {
          if (!merge_tile(item, task.item, tile, scratch)) return;
          ++written_[index];
        }
      }
    }
  }

  void pack_right(const Item& item, const Task& task, Scratch& scratch) {
    const int64_t tiles = (task.col_end - task.col + kTileCols - 1) / kTileCols;
    scratch.right.assign(tiles * item.rank * kTileCols, Compute{0});
    Compute* to = scratch.right.data();
    for (int64_t col = task.col; col < task.col_end; col += kTileCols) {
      const int64_t cols = std::min<int64_t>(kTileCols, task.col_end - col);
      for (int64_t j = 0; j < item.rank; ++j, to += kTileCols) {
        load_factor<F>(item.right, j, col, cols, to);
      }
    }
  }

  void pack_left(const Item& item, const Tile& tile, Scratch& scratch) {
    scratch.left.assign(kTileRows * item.rank, Compute{0});
    for (int64_t r = 0; r < tile.rows; ++r) {
      load_factor<F>(item.left, tile.row + r, 0, item.rank, scratch.left.data() + r * item.rank);
    }
  }

  // False, with the weights untouched, if this tile can't be merged.
  bool merge_tile(const Item& item, size_t index, const Tile& tile, Scratch& scratch) {
    Bits* weight = static_cast<Bits*>(item.weight);
    const Compute scaling = static_cast<Compute>(item.scaling);
    TileFlags flags;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = r * kTileCols;
      kernels_.merge(
          gather(weight, item.weight_view, tile.index(item, r), tile.cols, scratch.before),
          scratch.acc + at, scaling, tile.cols, scratch.after + at, scratch.code + at, flags);
    }
    if (!flags.finite) return fail(index, kNotFinite);
    if (item.code != nullptr && flags.overflow && !list_overflow(item, index, tile, scratch)) {
      return fail(index, kListFull);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = r * kTileCols, to = tile.index(item, r);
      scatter(weight, item.weight_view, to, tile.cols, scratch.after + at);
      if (item.code == nullptr) continue;
      scatter(item.code, item.code_view, to, tile.cols, scratch.code + at);
    }
    return true;
  }

  bool fail(size_t index, int64_t verdict) {
    outcomes_[index].verdict = verdict;
    failed_ = true;
    return false;
  }

  // Appends the weights of a tile whose code is kOverflow; false if they don't all fit.
  bool list_overflow(const Item& item, size_t index, const Tile& tile, const Scratch& scratch) {
    int64_t count = 0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int8_t* code = scratch.code + r * kTileCols;
      count += std::count(code, code + tile.cols, kOverflow);
    }
    std::atomic<int64_t>& size = outcomes_[index].overflow;
    int64_t at = size;
    do {
      if (at + count > item.overflow_size) return false;
    } while (!size.compare_exchange_weak(at, at + count));
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t c = 0; c < tile.cols; ++c) {
        if (scratch.code[r * kTileCols + c] != kOverflow) continue;
        item.overflow_index[at] =
            static_cast<int32_t>(item.passed_index(tile.row + r, tile.col + c));
        static_cast<Bits*>(item.overflow_value)[at++] =
            static_cast<const Bits*>(item.weight)[item.weight_view.offset(tile.index(item, r) + c)];
      }
    }
    return true;
  }

  void unmerge_tile(const Item& item, const Tile& tile, Scratch& scratch) {
    Bits* weight = static_cast<Bits*>(item.weight);
    const Compute scaling = static_cast<Compute>(item.scaling);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = tile.index(item, r);
      kernels_.unmerge(
          gather(weight, item.weight_view, at, tile.cols, scratch.before),
          scratch.acc + r * kTileCols, scaling,
          gather(item.code, item.code_view, at, tile.cols, scratch.code), tile.cols, scratch.after);
      scatter(weight, item.weight_view, at, tile.cols, scratch.after);
    }
  }

  void restore_overflow(const Item& item, int64_t count) {
    torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = item.own_index(item.overflow_index[i]);
        static_cast<Bits*>(item.weight)[item.weight_view.offset(index)] =
            static_cast<const Bits*>(item.overflow_value)[i];
      }
    });
  }

  const std::vector<Item>& items_;
  std::vector<Outcome> outcomes_;
  const Kernels<F> kernels_;
  std::vector<Task> tasks_;
  int64_t weights_ = 0;
  std::vector<int64_t> written_;  // tiles, for each task
  std::atomic<bool> failed_{false};
};

Tensor merge_cpu(
    Tensors weight, Tensors lora_a, Tensors lora_b, std::vector<double> scaling, Tensors code,
    Tensors overflow_index, Tensors overflow_value) {
  const std::vector<Item> items =
      make_items(weight, lora_a, lora_b, scaling, code, overflow_index, overflow_value);
  std::vector<int64_t> status;
  if (!items.empty()) {
    dispatch_format(dtype_of(weight[0], "weight"), [&](auto format) {
      status = Merger<decltype(format)>(items).merge();
    });
  }
  return status_tensor(status);
}

void unmerge_cpu(
    Tensors weight, Tensors lora_a, Tensors lora_b, std::vector<double> scaling, Tensors code,
    Tensors overflow_index, Tensors overflow_value) {
  const std::vector<Item> items =
      make_items(weight, lora_a, lora_b, scaling, code, overflow_index, overflow_value);
  if (items.empty()) return;
  for (const Item& item : items) {
    STD_TORCH_CHECK(item.code != nullptr || item.numel() == 0, "unmerge_ needs the code of merge_");
    for (int32_t i = 0; i < item.overflow_size; ++i) {
      STD_TORCH_CHECK(
          item.overflow_index[i] >= 0 && item.overflow_index[i] < item.numel(),
          "overflow_index points outside weight");
    }
  }
  dispatch_format(dtype_of(weight[0], "weight"), [&](auto format) {
    Merger<decltype(format)>(items).unmerge();
  });
}

}  // namespace
}  // namespace lora_fast

STABLE_TORCH_LIBRARY_IMPL(lora_fast, CPU, m) {
  m.impl("merge_", TORCH_BOX(&lora_fast::merge_cpu));
  m.impl("unmerge_", TORCH_BOX(&lora_fast::unmerge_cpu));
}

LORA_FAST_MODULE(_C)
