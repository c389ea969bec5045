// The element arithmetic of csrc/merge_math.h, which the CPU and the CUDA kernels share, for
// ctypes.
#include "../../csrc/merge_math.h"

using namespace lora_fast;

template <class F>
void widen_all(const typename F::Bits* bits, typename F::Compute* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = F::widen(bits[i]);
}

template <class F>
void round_all(const typename F::Compute* values, typename F::Bits* bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bits[i] = F::round(values[i]);
}

template <class F>
void order_all(
    const typename F::Bits* bits, typename F::Word* words, typename F::Bits* back, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    words[i] = ordered<F>(bits[i]);
    back[i] = unordered<F>(words[i]);
  }
}

// kind[i]: 0 the plain path holds, 1 it hands over; both must agree wherever it holds.
template <class F>
int64_t disagreements(
    const typename F::Bits* weights, const typename F::Compute* acc, double scaling,
    int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto s = static_cast<typename F::Compute>(scaling);
    const Merged<F> merged = merge_weight<F>(weights[i], acc[i], s);
    const PlainMerged<F> plain = merge_plain_weight<F>(weights[i], acc[i], s);
    if (!plain.not_plain && (plain.bits != merged.bits || plain.code != merged.code)) ++found;
    if (merged.code == kOverflow || merged.infinite) continue;
    if (unmerge_weight<F>(merged.bits, acc[i], s, merged.code) != weights[i]) ++found;
  }
  return found;
}

#define EXPORT(NAME, F)                                                                  \
  extern "C" void widen_##NAME(const F::Bits* bits, F::Compute* values, int64_t count) { \
    widen_all<F>(bits, values, count);                                                   \
  }                                                                                      \
  extern "C" void round_##NAME(const F::Compute* values, F::Bits* bits, int64_t count) { \
    round_all<F>(values, bits, count);                                                   \
  }                                                                                      \
  extern "C" void order_##NAME(                                                          \
      const F::Bits* bits, F::Word* words, F::Bits* back, int64_t count) {               \
    order_all<F>(bits, words, back, count);                                              \
  }                                                                                      \
  extern "C" int64_t disagreements_##NAME(                                               \
      const F::Bits* weights, const F::Compute* acc, double scaling, int64_t count) {    \
    return disagreements<F>(weights, acc, scaling, count);                               \
  }

EXPORT(float16, Fp16)
EXPORT(bfloat16, Bf16)
EXPORT(float32, Fp32)
EXPORT(float64, Fp64)
