// lora_delta_fwd_ and lora_delta_bwd_ on the CPU: what an adapter adds to a linear layer's output
// and its gradients, all products of a direction in one call.
//
//   forward    S = X A^T                  Y[:, g] += scaling S_g B_g^T
//   backward   T = dY[:, g] B_g           dX += scale T A * keep
//              dB_g = scaling dY[:, g]^T S_g         dA = scale T^T (X * keep)
//
// X holds what dropout left in forward, and what it was given in backward; there only dA reads it,
// and only dB reads S. With few rows a product of torch's takes longer to begin than to sum, and
// there is one for each block and each factor.
#include <torch/csrc/stable/library.h>

#include <array>
#include <memory>
#include <optional>
#include <utility>

#include "float_environment.h"
#include "lora_delta_matrices.h"
#include "small_products.h"
#include "tensors.h"

namespace lora_fast {
namespace {

// Multiply-adds that are worth the waking of another thread.
constexpr int64_t kAlone = 1 << 17;

// Multiply-adds of a direction up to which this was measured to be the faster.
constexpr int64_t kMost = 1 << 23;

constexpr int64_t kDotRows = 4;  // of both factors of a dot product, at a time

// Calls function(begin, end) for parts of [0, count), on as many threads as so many multiply-adds
// are worth.
template <class Function>
void for_ranges(int64_t count, int64_t operations, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, count * kAlone / std::max<int64_t>(1, operations));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;  // else the small numbers of fp16 may be flushed
    function(begin, end);
  });
}

// The same, one by one.
template <class Function>
void for_each(int64_t count, int64_t operations, const Function& function) {
  for_ranges(count, operations, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

int64_t parts(int64_t length, int64_t most) { return (length + most - 1) / most; }

// Where the gradients go; none where one is not needed.
template <class F>
struct Gradients {
  std::optional<Rows<F>> dx, da, db;
};

// What the gradients are made of.
template <class F>
struct Operands {
  const Wide<F> dy;
  const std::optional<Wide<F>> x;
  const Rows<F> lora_a, lora_b;
  const std::optional<Rows<F>> s;
};

template <class F>
class Delta {
 public:
  Delta(Sizes sizes, double scaling)
      : sizes_(std::move(sizes)),
        ranks_(sizes_.ranks()),
        scaling_(static_cast<float>(scaling)),
        products_(choose_products<F>()) {}

  Rows<F> tokens(const Tensor& tensor, const char* name, int64_t cols) const {
    return {tensor, name, sizes_.tokens, cols};
  }
  Rows<F> like_x(const Tensor& tensor, const char* name) const {
    return tokens(tensor, name, sizes_.in);
  }
  Rows<F> like_a(const Tensor& tensor, const char* name) const {
    return {tensor, name, ranks_, sizes_.in};
  }
  Rows<F> like_b(const Tensor& tensor, const char* name) const {
    return {tensor, name, sizes_.adapted, sizes_.rank};
  }

  void forward(
      const Rows<F>& x, const Rows<F>& a, const Rows<F>& b, const Rows<F>& y,
      const Rows<F>& s) const {
    const Wide<F> wide_x(x);
    widen({&wide_x});
    const auto sums = std::make_unique_for_overwrite<float[]>(sizes_.tokens * ranks_);
    sum_ranks(wide_x, a, s, sums.get());
    add_blocks(sums.get(), b, y);
  }

  void backward(
      const Operands<F>& of, const uint8_t* keep, double keep_scale, const Gradients<F>& to) const {
    widen(to.da ? std::vector{&of.dy, &*of.x} : std::vector{&of.dy});
    if (to.db) gradient_of_b(of, *to.db);
    if (!to.dx && !to.da) return;
    const auto sums = std::make_unique_for_overwrite<float[]>(sizes_.tokens * ranks_);
    sum_blocks(of, sums.get());
    gradients_of_input(of, sums.get(), keep, static_cast<float>(keep_scale) * scaling_, to);
  }

 private:
  // sums = X A^T, and the same rounded in s.
  void sum_ranks(const Wide<F>& x, const Rows<F>& a, const Rows<F>& s, float* sums) const {
    const int64_t row_parts = parts(sizes_.tokens, kDotRows), col_parts = parts(ranks_, kDotRows);
    for_each(row_parts * col_parts, sizes_.tokens * ranks_ * sizes_.in, [&](int64_t i) {
      const int64_t m = i % row_parts * kDotRows, r = i / row_parts * kDotRows;
      const int64_t rows = std::min(kDotRows, sizes_.tokens - m);
      const int64_t cols = std::min(kDotRows, ranks_ - r);
      float* to = sums + m * ranks_ + r;
      products_.dot(x.at(m, 0), rows, a.from(r, 0), cols, sizes_.in, to, ranks_);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < cols; ++c) *s.at(m + row, r + c) = F::round(to[row * ranks_ + c]);
      }
    });
  }

  // Y[:, g] += scaling sums_g B_g^T
  void add_blocks(const float* sums, const Rows<F>& b, const Rows<F>& y) const {
    const int64_t rank = sizes_.rank, tokens = sizes_.tokens;
    const std::vector<Cell> cells = cells_of(sizes_, kCellCols);
    for_ranges(cells.size(), tokens * sizes_.adapted * rank, [&](int64_t first, int64_t last) {
      const auto panel = std::make_unique_for_overwrite<Fp32::Bits[]>(rank * kCellCols);
      for (int64_t i = first; i < last; ++i) {
        const auto [g, begin, end] = cells[i];
        const Block& block = sizes_.blocks[g];
        products_.transpose(
            b.at(block.row + begin, 0), b.row, rank, end - begin,
            reinterpret_cast<float*>(panel.get()));
        for (int64_t m = 0; m < tokens; m += kCellRows) {
          product<true>(
              {sums + m * ranks_ + g * rank, ranks_}, std::min(kCellRows, tokens - m),
              Stored<Fp32>{panel.get(), kCellCols}, end - begin, rank,
              {y.at(m, block.lo + begin), y.row, scaling_});
        }
      }
    });
  }

  // dB_g = scaling dY[:, g]^T S_g
  void gradient_of_b(const Operands<F>& of, const Rows<F>& db) const {
    const int64_t rank = sizes_.rank, tokens = sizes_.tokens;
    const std::vector<Cell> cells = cells_of(sizes_, kCellRows);
    for_each(cells.size(), tokens * sizes_.adapted * rank, [&](int64_t i) {
      const auto [g, begin, end] = cells[i];
      const Strided dy = of.dy.at(0, sizes_.blocks[g].lo + begin);
      for (int64_t r = 0; r < rank; r += kCellCols) {
        product<false>(
            {dy.data, 1, dy.row}, end - begin, of.s->from(0, g * rank + r),
            std::min(kCellCols, rank - r), tokens,
            {db.at(sizes_.blocks[g].row + begin, r), db.row, scaling_});
      }
    });
  }

  // sums_g = dY[:, g] B_g
  void sum_blocks(const Operands<F>& of, float* sums) const {
    const int64_t rank = sizes_.rank, tokens = sizes_.tokens;
    const int64_t row_parts = parts(tokens, kCellRows), col_parts = parts(rank, kCellCols);
    const int64_t count = row_parts * col_parts * static_cast<int64_t>(sizes_.blocks.size());
    for_each(count, tokens * sizes_.adapted * rank, [&](int64_t i) {
      const int64_t m = i % row_parts * kCellRows, g = i / row_parts / col_parts;
      const int64_t r = i / row_parts % col_parts * kCellCols;
      const Block& block = sizes_.blocks[g];
      products_.multiply(
          of.dy.at(m, block.lo), std::min(kCellRows, tokens - m), of.lora_b.from(block.row, r),
          std::min(kCellCols, rank - r), block.hi - block.lo, sums + m * ranks_ + g * rank + r,
          ranks_);
    });
  }

  // dX += scale sums A * keep, dA = scale sums^T X, as X was widened.
  void gradients_of_input(
      const Operands<F>& of, const float* sums, const uint8_t* keep, float scale,
      const Gradients<F>& to) const {
    const int64_t tokens = sizes_.tokens, in = sizes_.in;
    const int64_t products = (to.dx ? 1 : 0) + (to.da ? 1 : 0);
    for_each(parts(in, kCellCols), products * tokens * in * ranks_, [&](int64_t i) {
      const int64_t k = i * kCellCols, cols = std::min(kCellCols, in - k);
      for (int64_t m = 0; to.dx && m < tokens; m += kCellRows) {
        const uint8_t* kept = keep == nullptr ? nullptr : keep + m * in + k;
        product<true>(
            {sums + m * ranks_, ranks_}, std::min(kCellRows, tokens - m), of.lora_a.from(0, k),
            cols, ranks_, {to.dx->at(m, k), to.dx->row, scale, kept, in});
      }
      for (int64_t r = 0; to.da && r < ranks_; r += kCellRows) {
        product<false>(
            {sums + r, 1, ranks_}, std::min(kCellRows, ranks_ - r), of.x->from(0, k), cols, tokens,
            {to.da->at(r, k), to.da->row, scale});
      }
    });
  }

  void widen(const std::vector<const Wide<F>*>& matrices) const {
    int64_t rows = 0, size = 0;
    std::vector<std::pair<const Wide<F>*, int64_t>> copies;
    for (const Wide<F>* matrix : matrices) {
      if (!matrix->is_copy()) continue;
      copies.push_back({matrix, rows});
      rows += matrix->rows();
      size += matrix->size();
    }
    for_each(rows, size, [&](int64_t i) {
      size_t which = copies.size() - 1;
      while (copies[which].second > i) --which;
      copies[which].first->widen(products_, i - copies[which].second);
    });
  }

  // A cell of left right, set or added to what to names.
  template <bool kAdd, class R>
  void product(
      const Strided& left, int64_t rows, const Stored<R>& right, int64_t cols, int64_t steps,
      const Result<F>& to) const {
    alignas(64) float cell[kCellRows * kCellCols];
    if constexpr (std::is_same_v<R, F>) {
      products_.multiply(left, rows, right, cols, steps, cell, kCellCols);
    } else {
      products_.multiply_wide(left, rows, right, cols, steps, cell, kCellCols);
    }
    (kAdd ? products_.add : products_.set)(cell, rows, cols, to);
  }

  const Sizes sizes_;
  const int64_t ranks_;
  const float scaling_;
  const Products<F> products_;
};

// Whether these lie in memory as they are read here, and are few enough numbers to be sooner done
// than by torch.
bool serves(const Tensor& output, const std::vector<const Tensor*>& others) {
  const auto lies_in_rows = [](const Tensor& tensor) {
    return tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) == 1);
  };
  const Tensor &lora_a = *others[0], &lora_b = *others[1];
  if (!lies_in_rows(output)) return false;
  for (const Tensor* tensor : others) {
    if (!lies_in_rows(*tensor)) return false;
    STD_TORCH_CHECK(
        tensor->scalar_type() == output.scalar_type() && tensor->device() == output.device(),
        "lora_delta: all tensors must have one dtype and device");
  }
  return output.size(0) * (lora_a.numel() + output.size(1) * lora_b.size(1)) <= kMost;
}

template <class Function>
void dispatch_fp32_sums(const Tensor& x, const Function& function) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return function(Fp32{});
    case ScalarType::Half: return function(Fp16{});
    case ScalarType::BFloat16: return function(Bf16{});
    default:
      STD_TORCH_CHECK(
          false, "lora_delta: x must be float32, float16 or bfloat16, got ", described(x));
  }
}

// False where nothing was done.
bool lora_delta_fwd_cpu(
    Tensor x, Tensor lora_a, Tensor lora_b, double scaling, std::vector<int64_t> edges, Tensor y,
    Tensor s) {
  if (!serves(y, {&lora_a, &lora_b, &x, &s})) return false;
  dispatch_fp32_sums(x, [&](auto format) {
    const Delta<decltype(format)> delta(Sizes(y, lora_a, lora_b, edges), scaling);
    delta.forward(
        delta.like_x(x, "x"), delta.like_a(lora_a, "lora_A"), delta.like_b(lora_b, "lora_B"),
        delta.tokens(y, "y", y.size(1)), delta.tokens(s, "s", lora_a.size(0)));
  });
  return true;
}

// False where nothing was done.
bool lora_delta_bwd_cpu(
    Tensor dy, std::optional<Tensor> x, Tensor lora_a, Tensor lora_b, std::optional<Tensor> s,
    std::optional<Tensor> keep, double scaling, double keep_scale, std::vector<int64_t> edges,
    std::optional<Tensor> dx, std::optional<Tensor> da, std::optional<Tensor> db) {
  std::vector<const Tensor*> tensors = {&lora_a, &lora_b};
  for (const std::optional<Tensor>* tensor : {&x, &s, &dx, &da, &db}) {
    if (*tensor) tensors.push_back(&**tensor);
  }
  if (!serves(dy, tensors) || (keep && !keep->is_contiguous())) return false;
  STD_TORCH_CHECK((!da || x) && (!db || s), "lora_delta: dA is made of x, and dB of s");
  STD_TORCH_CHECK(
      !keep ||
          (keep->scalar_type() == ScalarType::Bool && keep->numel() == dy.size(0) * lora_a.size(1)),
      "lora_delta: keep must be bool and of the size of x");
  const auto* kept = keep ? static_cast<const uint8_t*>(read_from(*keep, "keep")) : nullptr;
  dispatch_fp32_sums(dy, [&](auto format) {
    using F = decltype(format);
    const Delta<F> delta(Sizes(dy, lora_a, lora_b, edges), scaling);
    // All of them, and so all checks, before anything is written.
    std::optional<Wide<F>> wide_x;
    if (da) wide_x.emplace(delta.like_x(*x, "x"), kept);
    std::optional<Rows<F>> s_rows;
    if (db) s_rows = delta.tokens(*s, "s", lora_a.size(0));
    const Operands<F> operands = {
        delta.tokens(dy, "dy", dy.size(1)), std::move(wide_x), delta.like_a(lora_a, "lora_A"),
        delta.like_b(lora_b, "lora_B"), s_rows};
    Gradients<F> to;
    if (dx) to.dx = delta.like_x(*dx, "dx");
    if (da) to.da = delta.like_a(*da, "dA");
    if (db) to.db = delta.like_b(*db, "dB");
    delta.backward(operands, kept, keep_scale, to);
  });
  return true;
}

}  // namespace
}  // namespace lora_fast

STABLE_TORCH_LIBRARY_IMPL(lora_fast, CPU, m) {
  m.impl("lora_delta_fwd_", TORCH_BOX(&lora_fast::lora_delta_fwd_cpu));
  m.impl("lora_delta_bwd_", TORCH_BOX(&lora_fast::lora_delta_bwd_cpu));
}
