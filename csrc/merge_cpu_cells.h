// merge_ and unmerge_ of fp32 and bf16 weights in registers, kCellRows x kCellCols at a time.
//
// Included once for each instruction set, inside its namespace and after its vectors: so no "pragma
// once". It does what merge_math.h says for the weights that nearly all are, finite and with a code
// that fits, and leaves the others alone.

constexpr int kVectors = 2;
constexpr int kCellCols = kVectors * kLanes;

// A weight as it is stored is already the word and the fp32 number that it stands for.
struct Fp32Vectors : Fp32Lanes {
  using Bits = uint32_t;
  static constexpr int kPacks = 2;

  struct Rounding {
    LORA_FAST_VECTOR Words round(Words exact) const { return exact; }
    LORA_FAST_VECTOR Words clear(Words rounded) const { return rounded; }
  };

  static LORA_FAST_VECTOR Words wide(const Bits* from, int v) {
    return load_words(from + v * kLanes);
  }
  static LORA_FAST_VECTOR void pack(const Words (&word)[2], Words (&packed)[2]) {
    packed[0] = word[0];
    packed[1] = word[1];
  }
  static LORA_FAST_VECTOR bool any_bits_above(const Words (&a)[2], Words limit) {
    return any_above(a[0], a[1], limit);
  }
};

using Sums = Floats[kCellRows][kVectors];

// sum[r] = fma over all j of left[j, r] * right[j, 0:kCellCols], as accumulate_tile sums.
LORA_FAST_VECTOR void accumulate_cell(
    const float* __restrict left, const float* __restrict right, int64_t rank, Sums& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kCellRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = as_floats(repeat(0));
  }
  for (int64_t j = 0; j < rank; ++j) {
    Floats value[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) value[v] = load_floats(right + j * kTileCols + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCellRows; ++r) {
      const Floats factor = repeat(left[j * kTileRows + r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(factor, value[v], sum[r][v]);
    }
  }
}

// What every row of every cell needs.
template <class F>
struct Constants {
  Floats scaling;
  typename F::Rounding rounding;
  Words magnitude = keep(repeat(0x7fffffff));
  // The largest sum that does not round to infinity, and the largest stored weight.
  Words largest_sum = keep(repeat(F::kPacks == 1 ? 0x7f7f7fff : 0x7f7fffff));
  Words largest = keep(F::repeat_bits(F::kPacks == 1 ? 0x7f7f : 0x7f7fffff));
  Words magnitude_bits = keep(F::repeat_bits(F::kPacks == 1 ? 0x7fff : 0x7fffffff));
  Words far = keep(F::repeat_bits(127)), farthest = keep(F::repeat_bits(254));

  // ordered() and unordered(), each of which undoes the other: negatives have their bits flipped.
  LORA_FAST_VECTOR Words ordered(Words bits) const {
    return xor_and(bits, F::signs(bits), magnitude_bits);
  }
};

// False, with nothing written, where a weight of the row needs merge_weight.
template <class F>
LORA_FAST_VECTOR bool merge_cell_row(
    typename F::Bits* weight, int8_t* code, const Floats (&sum)[kVectors], const Constants<F>& k) {
  Words exact[kVectors], merged[kVectors], back[kVectors], before[F::kPacks];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Words word = keep(F::wide(weight, v));
    if constexpr (F::kPacks == kVectors) before[v] = word;
    exact[v] = as_words(fma(k.scaling, sum[v], as_floats(word)));
    merged[v] = k.rounding.clear(k.rounding.round(exact[v]));
    back[v] = k.rounding.round(as_words(fma_negated(k.scaling, sum[v], as_floats(merged[v]))));
    exact[v] = bits_and(exact[v], k.magnitude);
  }
  if constexpr (F::kPacks == 1) before[0] = load_words(weight);
  Words after[F::kPacks], distance[F::kPacks], spread[F::kPacks];
  F::pack(merged, after);
  F::pack(back, distance);
#pragma GCC unroll 2
  for (int p = 0; p < F::kPacks; ++p) {
    distance[p] = F::minus(k.ordered(before[p]), k.ordered(distance[p]));
    spread[p] = F::plus(distance[p], k.far);
  }
  // A finite result has a finite weight behind it, and finite sums.
  const bool is_infinite = any_above(exact[0], exact[1], k.largest_sum);
  if (is_infinite | F::any_bits_above(spread, k.farthest)) return false;
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
  Words back[kVectors], magnitude[F::kPacks], before[F::kPacks];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Words merged = keep(F::wide(weight, v));
    if constexpr (F::kPacks == kVectors) magnitude[v] = bits_and(merged, k.magnitude_bits);
    back[v] = k.rounding.round(as_words(fma_negated(k.scaling, sum[v], as_floats(merged))));
  }
  if constexpr (F::kPacks == 1) magnitude[0] = bits_and(load_words(weight), k.magnitude_bits);
  if (F::any_bits_above(magnitude, k.largest)) return false;
  F::pack(back, before);
#pragma GCC unroll 2
  for (int p = 0; p < F::kPacks; ++p) {
    const Words original = k.ordered(F::plus(k.ordered(before[p]), F::load_codes(code, p)));
    store_words(weight + p * kCellCols / F::kPacks, original);
  }
  return true;
}

// From column begin on, until fewer columns than a cell has are left before end, or until a row of
// a cell needs more than this.
template <class F, bool kMerge>
LORA_FAST_TARGET Stop run_cells(
    const float* left, const float* right, int64_t rank, float scaling,
    const TileRows<typename F::Bits>& rows, int64_t begin, int64_t end) {
  const Constants<F> constants = {repeat(scaling)};
  int64_t col = begin;
  for (; col + kCellCols <= end; col += kCellCols) {
    for (int first = 0; first < kTileRows; first += kCellRows) {
      Sums sum;
      accumulate_cell(left + first, right + col, rank, sum);
#pragma GCC unroll 8
      for (int r = 0; r < kCellRows; ++r) {
        typename F::Bits* weight = rows.weight[first + r] + col;
        int8_t* code = rows.code[first + r] + col;
        bool is_done;
        if constexpr (kMerge) {
          is_done = merge_cell_row<F>(weight, code, sum[r], constants);
        } else {
          is_done = unmerge_cell_row<F>(weight, code, sum[r], constants);
        }
        if (!is_done) return {first + r, col};
      }
    }
  }
  return {kTileRows, col};
}

template <class F>
Cells<F> cells() {
  if constexpr (std::is_same_v<F, Fp32>) {
    return {run_cells<Fp32Vectors, true>, run_cells<Fp32Vectors, false>, kCellCols};
  } else if constexpr (std::is_same_v<F, Bf16>) {
    return {run_cells<Bf16Vectors, true>, run_cells<Bf16Vectors, false>, kCellCols};
  } else {
    return {};
  }
}
