// merge_ and unmerge_ on the CPU: one pass over the weights, in tiles that stay in the L1 cache.
//
// A tile is written only once all of it is known to be good, and each task counts the tiles that it
// wrote. So when one weight can't be merged, exactly what was written is taken back, with no copy.
#include "merge.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>

#include "large_pages.h"
#include "merge_cpu_kernels.h"
#include "merge_cpu_pack.h"
#include "merge_cpu_tiles.h"
#include "merge_cpu_views.h"
#include "module.h"

namespace lora_fast {
namespace {

// What the threads find out about one item.
struct Outcome {
  std::atomic<int64_t> overflow{0};  // entries written to the item's list
  std::atomic<int64_t> verdict{0};   // 0 or why it can't be merged
};

enum class Mode { kMerge, kUnmerge };

template <class F>
class Merger {
  using Bits = typename F::Bits;
  using Compute = typename F::Compute;
  using Tile = lora_fast::Tile<Compute>;

 public:
  // Takes all the memory that it will need: for want of some, nothing must be left half done.
  explicit Merger(const std::vector<Item>& items)
      : items_(items), outcomes_(items.size()), kernels_(choose_kernels<F>()) {
    const int64_t threads = torch::stable::get_num_threads();
    for (size_t i = 0; i < items.size(); ++i) add_tasks(i, threads);
    written_.assign(tasks_.size(), 0);
    add_scratch(threads);
  }

  // Tells, for each item, the entries in its overflow list or why it can't be merged.
  void merge(int64_t* status) {
    run(Mode::kMerge);
    if (failed_) {
      run(Mode::kUnmerge);
      for (size_t i = 0; i < items_.size(); ++i) restore_overflow(items_[i], outcomes_[i].overflow);
    }
    for (const Outcome& outcome : outcomes_) {
      *status++ = failed_ ? std::min<int64_t>(outcome.verdict, 0) : outcome.overflow.load();
    }
  }

  void unmerge() {
    written_.assign(tasks_.size(), std::numeric_limits<int64_t>::max());
    run(Mode::kUnmerge);
    for (const Item& item : items_) restore_overflow(item, item.overflow_size);
  }

 private:
  struct Scratch {
    explicit Scratch(bool with_pairs)
        : right(kPanelCols, with_pairs), left(kTileRows, with_pairs) {}

    Panel<F> right;                  // of all column tiles of a task
    const Task* right_of = nullptr;  // a task with this right factor
    Panel<F> left;                   // transposed, of one row of tiles
    alignas(64) Compute acc[kTileRows * kTileCols];
    alignas(64) Bits before[kTileCols];
    alignas(64) Bits after[kTileRows * kTileCols];
    alignas(64) int8_t code[kTileRows * kTileCols];
    // For the rows that a tile lacks, and codes that nobody keeps; zeros, as any other number might
    // stop the cells.
    alignas(64) Bits spare_weight[kTileCols] = {};
    alignas(64) int8_t spare_code[kTileCols] = {};
  };

  void add_tasks(size_t index, int64_t threads) {
    const Item& item = items_[index];
    if (item.numel() == 0) return;
    weights_ += item.numel();
    const int64_t rows = std::min(kTaskRows, even_part(item.rows, 4 * threads, kTileRows));
    const int64_t bytes = std::max<int64_t>(1, item.rank * kTileCols * sizeof(Compute));
    const int64_t most = std::max<int64_t>(1, right_bytes() / bytes) * kTileCols;
    const int64_t cols = even_part(item.cols, (item.cols + most - 1) / most, kTileCols);
    for (int64_t col = 0; col < item.cols; col += cols) {
      for (int64_t row = 0; row < item.rows; row += rows) {
        tasks_.push_back(
            {index, row, std::min(row + rows, item.rows), col, std::min(col + cols, item.cols)});
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(tasks_.size()); }

  // Tasks that one thread does at least: waking another costs as much as kAlone weights.
  int64_t grain() const {
    constexpr int64_t kAlone = 1 << 15;
    return std::max<int64_t>(1, count() * kAlone / std::max<int64_t>(1, weights_));
  }

  // One for each thread, with room for any task.
  void add_scratch(int64_t threads) {
    threads = std::min(threads, (count() + grain() - 1) / grain());
    for (int64_t i = 0; i < threads; ++i) {
      scratch_.push_back(std::make_unique<Scratch>(kernels_.pair_cells.cols > 0));
      for (const Task& task : tasks_) {
        const int64_t rank = items_[task.item].rank;
        scratch_.back()->right.reserve(rank, task.col_end - task.col);
        scratch_.back()->left.reserve(rank, kTileRows);
      }
    }
  }

  void run(Mode mode) {
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, count(), grain(), [&](int64_t begin, int64_t end) {
      const DefaultFloatEnvironment environment;
      Scratch& scratch = *scratch_.at(next++);  // each thread is called once
      for (int64_t t = begin; t < end; ++t) run_task(t, mode, scratch);
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
      scratch.left.pack(item.left.transposed(), item.rank, tile.row, tile.row + tile.rows);
      tile.left = scratch.left.values(0);
      const bool has_pairs = scratch.left.pairs_with(scratch.right);
      tile.left_pairs = has_pairs ? scratch.left.pairs(0) : nullptr;
      for (tile.col = task.col; tile.col < task.col_end; tile.col += kTileCols) {
        tile.cols = std::min<int64_t>(kTileCols, task.col_end - tile.col);
        const int64_t part = (tile.col - task.col) / kPanelCols;
        tile.right = scratch.right.values(part);
        tile.right_pairs = has_pairs ? scratch.right.pairs(part) : nullptr;
        if (mode == Mode::kMerge) {
          if (failed_ || !merge_tile(item, task.item, tile, scratch)) return;
          ++written_[index];
        } else {
          if (done++ == written_[index]) return;
          unmerge_tile(item, tile, scratch);
        }
      }
    }
  }

  void pack_right(const Item& item, const Task& task, Scratch& scratch) {
    const Task* last = std::exchange(scratch.right_of, &task);
    if (last != nullptr && last->item == task.item && last->col == task.col) return;
    scratch.right.pack(item.right, item.rank, task.col, task.col_end);
  }

  // Where the rows of a tile begin, if the weights and the codes of each lie side by side.
  std::optional<TileRows<Bits>> rows_of(const Item& item, const Tile& tile, Scratch& scratch) {
    const std::optional<int64_t> weight = item.weight_view.row_stride(item.cols);
    const std::optional<int64_t> code = item.code_view.row_stride(item.cols);
    if (!weight || (item.code != nullptr && !code)) return std::nullopt;
    TileRows<Bits> rows;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = tile.row + r;
      rows.weight[r] = scratch.spare_weight;
      rows.code[r] = scratch.spare_code;
      if (r >= tile.rows) continue;
      rows.weight[r] = static_cast<Bits*>(item.weight) + row * *weight + tile.col;
      if (item.code != nullptr) rows.code[r] = item.code + row * *code + tile.col;
    }
    return rows;
  }

  // The sums of the columns from begin to end of a tile, in scratch.acc.
  void accumulate(
      const Item& item, const Tile& tile, int64_t begin, int64_t end, Scratch& scratch) {
    kernels_.accumulate(tile.left, tile.right, item.rank, begin, end, scratch.acc);
  }

  // Goes through a tile by cells, and with slow(part, sums), which may refuse, where those don't
  // serve. Returns the row and the column where it was refused; {0, cols} if never.
  template <class Slow>
  Stop walk(
      const Item& item, const Tile& tile, typename Cells<F>::Pass Cells<F>::* which,
      Scratch& scratch, const Slow& slow) {
    const bool has_pairs = tile.left_pairs != nullptr;
    const Cells<F>& cells = has_pairs ? kernels_.pair_cells : kernels_.cells;
    int64_t col = 0;
    const auto rows = cells.*which == nullptr ? std::nullopt : rows_of(item, tile, scratch);
    if (rows) {
      const auto slow_row = [&](int64_t row, int64_t at, const Compute* sums) {
        return row >= tile.rows || slow(tile.part(row, row + 1, at, at + cells.cols), sums);
      };
      using SlowRow = decltype(slow_row);
      const auto call = [](const void* context, int64_t row, int64_t at, const Compute* sums) {
        return (*static_cast<SlowRow*>(context))(row, at, sums);
      };
      const Stop stop = (cells.*which)(
          {has_pairs ? tile.left_pairs : tile.left, has_pairs ? tile.right_pairs : tile.right,
           has_pairs ? scratch.left.steps() : item.rank, static_cast<Compute>(item.scaling), *rows,
           tile.cols, call, &slow_row});
      if (stop.row < kTileRows) return stop;
      col = stop.col;
    }
    if (col == tile.cols) return {0, col};
    accumulate(item, tile, col, tile.cols, scratch);
    const Part rest = tile.part(0, tile.rows, col, tile.cols);
    return {0, slow(rest, scratch.acc + col) ? tile.cols : col};
  }

  // False, with the weights untouched, if this tile can't be merged.
  bool merge_tile(const Item& item, size_t index, const Tile& tile, Scratch& scratch) {
    const auto merge = [&](const Part& part, const Compute* sums) {
      return merge_part(item, index, part, sums, scratch);
    };
    const Stop stop = walk(item, tile, &Cells<F>::merge, scratch, merge);
    if (stop.col == tile.cols) return true;
    if (item.code == nullptr) return false;
    // Take back the rows before the one that was refused, and the columns before it.
    const int64_t end = std::min(stop.col + kernels_.cells.cols, tile.cols);
    accumulate(item, tile, 0, end, scratch);
    unmerge_part(item, tile.part(0, stop.row, stop.col, end), scratch.acc + stop.col, scratch);
    unmerge_part(item, tile.part(0, tile.rows, 0, stop.col), scratch.acc, scratch);
    return false;
  }

  void unmerge_tile(const Item& item, const Tile& tile, Scratch& scratch) {
    const auto unmerge = [&](const Part& part, const Compute* sums) {
      unmerge_part(item, part, sums, scratch);
      return true;
    };
    walk(item, tile, &Cells<F>::unmerge, scratch, unmerge);
  }

  // False, with the weights untouched, if this part of a tile can't be merged.
  bool merge_part(
      const Item& item, size_t index, const Part& part, const Compute* sums, Scratch& scratch) {
    Bits* weight = static_cast<Bits*>(item.weight);
    const Compute scaling = static_cast<Compute>(item.scaling);
    TileFlags flags;
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t at = r * kTileCols;
      kernels_.merge(
          gather(weight, item.weight_view, part.index(item, r), part.cols, scratch.before),
          sums + at, scaling, part.cols, scratch.after + at, scratch.code + at, flags);
    }
    if (!flags.finite) return fail(index, kNotFinite);
    if (item.code != nullptr && flags.overflow && !list_overflow(item, index, part, scratch)) {
      return fail(index, kListFull);
    }
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t at = r * kTileCols, to = part.index(item, r);
      scatter(weight, item.weight_view, to, part.cols, scratch.after + at);
      if (item.code == nullptr) continue;
      scatter(item.code, item.code_view, to, part.cols, scratch.code + at);
    }
    return true;
  }

  bool fail(size_t index, int64_t verdict) {
    outcomes_[index].verdict = verdict;
    failed_ = true;
    return false;
  }

  // Appends the weights of a part whose code is kOverflow; false if they don't all fit.
  bool list_overflow(const Item& item, size_t index, const Part& part, const Scratch& scratch) {
    int64_t count = 0;
    for (int64_t r = 0; r < part.rows; ++r) {
      const int8_t* code = scratch.code + r * kTileCols;
      count += std::count(code, code + part.cols, kOverflow);
    }
    std::atomic<int64_t>& size = outcomes_[index].overflow;
    int64_t at = size;
    do {
      if (at + count > item.overflow_size) return false;
    } while (!size.compare_exchange_weak(at, at + count));
    for (int64_t r = 0; r < part.rows; ++r) {
      for (int64_t c = 0; c < part.cols; ++c) {
        if (scratch.code[r * kTileCols + c] != kOverflow) continue;
        item.overflow_index[at] =
            static_cast<int32_t>(item.passed_index(part.row + r, part.col + c));
        static_cast<Bits*>(item.overflow_value)[at++] =
            static_cast<const Bits*>(item.weight)[item.weight_view.offset(part.index(item, r) + c)];
      }
    }
    return true;
  }

  void unmerge_part(const Item& item, const Part& part, const Compute* sums, Scratch& scratch) {
    Bits* weight = static_cast<Bits*>(item.weight);
    const Compute scaling = static_cast<Compute>(item.scaling);
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t at = part.index(item, r);
      kernels_.unmerge(
          gather(weight, item.weight_view, at, part.cols, scratch.before), sums + r * kTileCols,
          scaling, gather(item.code, item.code_view, at, part.cols, scratch.code), part.cols,
          scratch.after);
      scatter(weight, item.weight_view, at, part.cols, scratch.after);
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
  std::vector<std::unique_ptr<Scratch>> scratch_;
  int64_t weights_ = 0;
  std::vector<int64_t> written_;  // tiles, for each task
  std::atomic<bool> failed_{false};
};

void merge_cpu(
    Tensors weight, Tensors lora_a, Tensors lora_b, std::vector<double> scaling, Tensors code,
    Tensors overflow_index, Tensors overflow_value, Tensor status) {
  const std::vector<Item> items =
      make_items(weight, lora_a, lora_b, scaling, code, overflow_index, overflow_value);
  int64_t* found = status_of(status, items);
  if (items.empty()) return;
  for (const Item& item : items) {
    if (item.code != nullptr) ask_for_large_pages(item.code, item.numel());
  }
  dispatch_format(dtype_of(weight[0], "weight"), [&](auto format) {
    Merger<decltype(format)>(items).merge(found);
  });
}

void unmerge_cpu(
    Tensors weight, Tensors lora_a, Tensors lora_b, std::vector<double> scaling, Tensors code,
    Tensors overflow_index, Tensors overflow_value, Tensor status) {
  const std::vector<Item> items =
      make_items(weight, lora_a, lora_b, scaling, code, overflow_index, overflow_value);
  int64_t* done = status_of(status, items);
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
  std::fill_n(done, items.size(), 0);
}

}  // namespace
}  // namespace lora_fast

STABLE_TORCH_LIBRARY_IMPL(lora_fast, CPU, m) {
  m.impl("merge_", TORCH_BOX(&lora_fast::merge_cpu));
  m.impl("unmerge_", TORCH_BOX(&lora_fast::unmerge_cpu));
}

LORA_FAST_MODULE(_C)
