// merge_ and unmerge_ of fp32 and bf16 weights in registers, kCellRows x kCellCols at a time.
//
// Included once for each instruction set, inside its namespace and after its vectors: so no "pragma
// once". It does what merge_math.h says for the weights that nearly all are, finite and with a code
// that fits, and has pass.slow do a row that holds others.
//
// A step of the sums is one of left's rows times one of right's, or two in one step where both hold
// pairs of bf16 numbers: merge_cpu_pack.h.

constexpr int kVectors = 2;
constexpr int kCellCols = kVectors * kLanes;
static_assert(kPanelCols % kCellCols == 0, "a cell reads one panel");

// A weight as it is stored is already the word and the fp32 number that it stands for.
struct Fp32Vectors : Fp32Lanes {
  using Bits = uint32_t;
  static constexpr int kPacks = 2;
  static constexpr bool kFlushes = false;

  struct Rounded {
    Words wide[2];
    LORA_FAST_VECTOR Words pack(int p) const { return wide[p]; }
  };

  struct Convert {
    LORA_FAST_VECTOR Rounded round(const Words (&exact)[2]) const { return {exact[0], exact[1]}; }
    LORA_FAST_VECTOR Words wide(const Bits* from, int v) const {
      return load_words(from + v * kLanes);
    }
  };
  static LORA_FAST_VECTOR bool any_bits_above(const Words (&a)[2], Words limit) {
    return any_above(a[0], a[1], limit);
  }
};

using Sums = Floats[kCellRows][kVectors];

// sum[r] = fma over all steps of left[step, r] * right[step, 0:kCellCols], as accumulate_tile sums.
LORA_FAST_VECTOR void accumulate_cell(
    const float* __restrict left, const float* __restrict right, int64_t steps, Sums& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kCellRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = as_floats(repeat(0));
  }
  for (int64_t j = 0; j < steps; ++j) {
    Floats value[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) value[v] = load_floats(right + j * kPanelCols + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCellRows; ++r) {
      const Floats factor = repeat(left[j * kTileRows + r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = add_step(factor, value[v], sum[r][v]);
    }
  }
}

// What every row of every cell needs.
template <class F>
struct Constants {
  Floats scaling;
  typename F::Convert convert;
  Words magnitude = keep(repeat(0x7fffffff));
  // The largest sum that does not round to infinity, and the largest stored weight.
  Words largest_sum = keep(repeat(F::kPacks == 1 ? 0x7f7f7fff : 0x7f7fffff));
  Words largest = keep(F::repeat_bits(F::kPacks == 1 ? 0x7f7f : 0x7f7fffff));
  Words least_normal = keep(F::repeat_bits(F::kPacks == 1 ? 0x80 : 0x800000));
  Words magnitude_bits = keep(F::repeat_bits(F::kPacks == 1 ? 0x7fff : 0x7fffffff));
  Words far = keep(F::repeat_bits(127)), farthest = keep(F::repeat_bits(254));

  // ordered() and unordered(), each of which undoes the other: negatives have their bits flipped.
  LORA_FAST_VECTOR Words ordered(Words bits) const {
    return xor_and(bits, F::signs(bits), magnitude_bits);
  }

  // Whether merge_weight might find another result, an infinite one for one. A finite one has a
  // finite weight behind it, and finite sums.
  LORA_FAST_VECTOR bool doubts(
      const Words (&exact)[kVectors], const Words (&before)[F::kPacks],
      const Words (&after)[F::kPacks]) const {
    if constexpr (F::kFlushes) {
      const Words size[2] = {
          bits_and(before[0], magnitude_bits), bits_and(after[0], magnitude_bits)};
      return F::any_below(size[0], size[1], least_normal) | F::any_bits_above({size[1]}, largest);
    } else {
      return any_above(bits_and(exact[0], magnitude), bits_and(exact[1], magnitude), largest_sum);
    }
  }

  // Whether unmerge_weight might find another weight than magnitude and back say.
  LORA_FAST_VECTOR bool doubts_back(
      const Words (&merged_magnitude)[F::kPacks], const Words (&back)[F::kPacks]) const {
    const bool is_large = F::any_bits_above(merged_magnitude, largest);
    if constexpr (F::kFlushes) {
      return is_large | F::any_zero(bits_and(back[0], magnitude_bits));
    } else {
      return is_large;
    }
  }
};

// False, with nothing written, where a weight of the row needs merge_weight.
template <class F>
LORA_FAST_VECTOR bool merge_cell_row(
    typename F::Bits* weight, int8_t* code, const Floats (&sum)[kVectors], const Constants<F>& k) {
  Words exact[kVectors], exact_back[kVectors];
  Words before[F::kPacks], after[F::kPacks], distance[F::kPacks], spread[F::kPacks];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Words word = keep(k.convert.wide(weight, v));
    if constexpr (F::kPacks == kVectors) before[v] = word;
    exact[v] = as_words(fma(k.scaling, sum[v], as_floats(word)));
  }
  if constexpr (F::kPacks == 1) before[0] = load_words(weight);
  const typename F::Rounded merged = k.convert.round(exact);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    exact_back[v] = as_words(fma_negated(k.scaling, sum[v], as_floats(merged.wide[v])));
  }
  const typename F::Rounded back = k.convert.round(exact_back);
#pragma GCC unroll 2
  for (int p = 0; p < F::kPacks; ++p) {
    after[p] = merged.pack(p);
    distance[p] = F::minus(k.ordered(before[p]), k.ordered(back.pack(p)));
    spread[p] = F::plus(distance[p], k.far);
  }
  if (k.doubts(exact, before, after) | F::any_bits_above(spread, k.farthest)) return false;
#pragma GCC unroll 2
  for (int p = 0; p < F::kPacks; ++p) store_words(weight + p * kCellCols / F::kPacks, after[p]);
  F::store_codes(code, distance);
  return true;
}

// False, with nothing written, where a weight of the row needs unmerge_weight.
template <class F>
LORA_FAST_VECTOR bool unmerge_cell_row(
    typename F::Bits* weight, const int8_t* code, const Floats (&sum)[kVectors],
    const Constants<F>& k) {
  Words exact[kVectors], magnitude[F::kPacks], before[F::kPacks];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Words merged = keep(k.convert.wide(weight, v));
    if constexpr (F::kPacks == kVectors) magnitude[v] = bits_and(merged, k.magnitude_bits);
    exact[v] = as_words(fma_negated(k.scaling, sum[v], as_floats(merged)));
  }
  if constexpr (F::kPacks == 1) magnitude[0] = bits_and(load_words(weight), k.magnitude_bits);
  const typename F::Rounded back = k.convert.round(exact);
#pragma GCC unroll 2
  for (int p = 0; p < F::kPacks; ++p) before[p] = back.pack(p);
  if (k.doubts_back(magnitude, before)) return false;
#pragma GCC unroll 2
  for (int p = 0; p < F::kPacks; ++p) {
    const Words original = k.ordered(F::plus(k.ordered(before[p]), F::load_codes(code, p)));
    store_words(weight + p * kCellCols / F::kPacks, original);
  }
  return true;
}

template <class F, bool kMerge>
LORA_FAST_VECTOR bool cell_row(
    typename F::Bits* weight, int8_t* code, const Floats (&sum)[kVectors], const Constants<F>& k) {
  if constexpr (kMerge) {
    return merge_cell_row<F>(weight, code, sum, k);
  } else {
    return unmerge_cell_row<F>(weight, code, sum, k);
  }
}

// Weights of zero are no reason to leave the cells.
template <class F, bool kMerge>
LORA_FAST_TARGET __attribute__((noinline)) bool cell_row_with_subnormals(
    typename F::Bits* weight, int8_t* code, Floats sum, Floats next_sum, float scaling) {
  return cell_row<F, kMerge>(weight, code, {sum, next_sum}, {repeat(scaling)});
}

template <class F>
LORA_FAST_TARGET __attribute__((noinline)) bool slow_row(
    const CellPass<F>& pass, int64_t row, int64_t col, Floats sum, Floats next_sum) {
  float sums[kCellCols];
  store_words(sums, as_words(sum));
  store_words(sums + kLanes, as_words(next_sum));
  return pass.slow(pass.context, row, col, sums);
}

// F is the format, V the vectors for it.
template <class F, class V, bool kMerge>
LORA_FAST_TARGET Stop run_cells(const CellPass<F>& pass) {
  const Constants<V> constants = {repeat(pass.scaling)};
  int64_t col = 0;
  for (; col + kCellCols <= pass.cols; col += kCellCols) {
    const float* right = panel_at(pass.right, pass.steps, col);
    for (int first = 0; first < kTileRows; first += kCellRows) {
      Sums sum;
      accumulate_cell(pass.left + first, right, pass.steps, sum);
#pragma GCC unroll 8
      for (int r = 0; r < kCellRows; ++r) {
        typename V::Bits* weight = pass.rows.weight[first + r] + col;
        int8_t* code = pass.rows.code[first + r] + col;
        bool is_done = cell_row<V, kMerge>(weight, code, sum[r], constants);
        if constexpr (V::kFlushes) {
          is_done = is_done ||
              cell_row_with_subnormals<typename V::Exact, kMerge>(
                        weight, code, sum[r][0], sum[r][1], pass.scaling);
        }
        if (!is_done && !slow_row<F>(pass, first + r, col, sum[r][0], sum[r][1])) {
          return {first + r, col};
        }
      }
    }
  }
  return {kTileRows, col};
}

template <class F>
Cells<F> cells() {
  if constexpr (std::is_same_v<F, Bf16>) {
    return {run_cells<F, Bf16Vectors, true>, run_cells<F, Bf16Vectors, false>, kCellCols};
  } else if constexpr (std::is_same_v<F, Fp32> && !Bf16Vectors::kFlushes) {
    return {run_cells<F, Fp32Vectors, true>, run_cells<F, Fp32Vectors, false>, kCellCols};
  } else {
    return {};
  }
}
