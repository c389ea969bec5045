// Dropout on the CPU with the draws of torch's generator, a whole state of it at a time.
//
// torch draws with mt19937 and compares the lower 53 bits of two words with the rate, one number
// after another. The same words, 624 at a time and as vectors, give the same mask and leave the
// same state. Source: M. Matsumoto, T. Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998);
// aten/src/ATen/core/MT19937RNGEngine.h and DistributionsHelper.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu_isa.h"
#include "tensors.h"

namespace lora_fast {
namespace {

constexpr int kWords = 624, kShift = 397;
constexpr int64_t kBlock = 512;  // elements that are drawn at a time

// The head of what torch.Generator.get_state() holds; normal_() keeps a spare number behind it.
struct State {
  uint64_t seed;
  int32_t left;  // 625 - the words that were used, also before the first use
  int32_t seeded;
  uint64_t next;
  uint64_t words[kWords];
};

LORA_FAST_INLINE uint32_t twisted(uint32_t a, uint32_t b) {
  const uint32_t mixed = (a & 0x80000000) | (b & 0x7fffffff);
  return (mixed >> 1) ^ ((0 - (b & 1)) & 0x9908b0df);
}

LORA_FAST_INLINE void next_state(uint32_t* __restrict words, uint32_t* __restrict old) {
  std::copy_n(words, kWords, old);
  old[kWords] = 0;
  for (int i = 0; i < kWords - kShift; ++i)
    words[i] = old[i + kShift] ^ twisted(old[i], old[i + 1]);
  // From here on, new words are those of kWords - kShift before, more than a vector ago.
  constexpr int kAgo = kWords - kShift;
  for (int first = kAgo; first < kWords - 1; first += kAgo) {
    const int end = std::min(first + kAgo, kWords - 1);
    uint32_t* __restrict to = words + first;
    for (int i = 0; i < end - first; ++i) {
      to[i] = words[first + i - kAgo] ^ twisted(old[first + i], old[first + i + 1]);
    }
  }
  words[kWords - 1] = words[kShift - 1] ^ twisted(old[kWords - 1], words[0]);
}

LORA_FAST_INLINE void temper(
    const uint32_t* __restrict words, int64_t count, uint32_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t y = words[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    to[i] = y ^ (y >> 18);
  }
}

struct Twister {
  uint32_t words[kWords], old[kWords + 1];
  int used;
};

// keep[i] and to[i] for count <= kBlock elements.
template <class F>
LORA_FAST_INLINE void drop_block(
    Twister& twister, const typename F::Bits* __restrict x, int64_t count, uint64_t threshold,
    typename F::Compute scale, typename F::Bits* __restrict to, uint8_t* __restrict keep) {
  alignas(64) uint32_t drawn[2 * kBlock];
  for (int64_t done = 0; done < 2 * count;) {
    if (twister.used == kWords) {
      next_state(twister.words, twister.old);
      twister.used = 0;
    }
    const int64_t some = std::min<int64_t>(kWords - twister.used, 2 * count - done);
    temper(twister.words + twister.used, some, drawn + done);
    twister.used += static_cast<int>(some);
    done += some;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t upper = drawn[2 * i] & 0x1fffff;
    keep[i] = (upper << 32 | drawn[2 * i + 1]) < threshold;
    // A product with 0, as torch's: it leaves NaN and the sign.
    to[i] = F::round(F::widen(x[i]) * (keep[i] ? scale : 0));
  }
}

template <class F>
LORA_FAST_INLINE void drop_all(
    Twister& twister, const typename F::Bits* x, int64_t count, uint64_t threshold,
    typename F::Compute scale, typename F::Bits* to, uint8_t* keep) {
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t some = std::min(kBlock, count - at);
    drop_block<F>(twister, x + at, some, threshold, scale, to + at, keep + at);
  }
}

#define LORA_FAST_DROP(NAME, TARGET)                                                  \
  template <class F>                                                                  \
  TARGET void NAME(                                                                   \
      Twister& twister, const typename F::Bits* x, int64_t count, uint64_t threshold, \
      typename F::Compute scale, typename F::Bits* to, uint8_t* keep) {               \
    drop_all<F>(twister, x, count, threshold, scale, to, keep);                       \
  }

LORA_FAST_DROP(drop_portable, )
#if defined(__x86_64__)
LORA_FAST_DROP(drop_avx2, __attribute__((target(LORA_FAST_AVX2))))
LORA_FAST_DROP(drop_avx512, __attribute__((target(LORA_FAST_AVX512))))
#endif
#undef LORA_FAST_DROP

template <class F>
auto choose_drop() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return drop_avx512<F>;
    case Isa::kAvx2: return drop_avx2<F>;
#endif
    default: return drop_portable<F>;
  }
}

// dropped = x * scale where the draw is below keep_rate, else x * 0; state as torch leaves it.
void dropout_cpu(
    Tensor x, Tensor dropped, Tensor keep, Tensor state, double keep_rate, double scale) {
  for (const Tensor* tensor : {&x, &dropped, &keep, &state}) {
    STD_TORCH_CHECK(tensor->is_contiguous(), "dropout_: all tensors must be contiguous");
  }
  STD_TORCH_CHECK(
      dropped.scalar_type() == x.scalar_type() && keep.scalar_type() == ScalarType::Bool &&
          state.scalar_type() == ScalarType::Byte,
      "dropout_: dropped must have x's dtype, keep must be bool, state uint8, got ",
      described(dropped), " for ", described(x), ", ", described(keep), " and ", described(state));
  STD_TORCH_CHECK(
      dropped.numel() == x.numel() && keep.numel() == x.numel(),
      "dropout_: dropped and keep must have the size of x, got ", described(dropped), " and ",
      described(keep), " for ", described(x));
  STD_TORCH_CHECK(
      keep_rate >= 0.0 && keep_rate <= 1.0, "dropout_: keep_rate must be in [0, 1], got ",
      keep_rate);
  STD_TORCH_CHECK(
      state.numel() >= static_cast<int64_t>(sizeof(State)), "dropout_: state is no generator's");
  State saved;
  std::memcpy(&saved, read_from(state, "state"), sizeof(State));
  STD_TORCH_CHECK(
      saved.left >= 1 && saved.left <= kWords + 1, "dropout_: state is no mt19937 generator's");
  auto twister = std::make_unique<Twister>();
  std::copy_n(saved.words, kWords, twister->words);
  twister->used = saved.left == 1 ? kWords : kWords + 1 - saved.left;
  dispatch_format(dtype_of(x, "x"), [&](auto format) {
    using F = decltype(format);
    choose_drop<F>()(
        *twister, static_cast<const typename F::Bits*>(read_from(x, "x")), x.numel(),
        static_cast<uint64_t>(std::ceil(std::ldexp(keep_rate, 53))),
        static_cast<typename F::Compute>(scale),
        static_cast<typename F::Bits*>(write_to(dropped, "dropped")),
        static_cast<uint8_t*>(write_to(keep, "keep")));
  });
  if (x.numel() == 0) return;
  std::copy_n(twister->words, kWords, saved.words);
  saved.next = twister->used;
  saved.left = kWords + 1 - twister->used;
  std::memcpy(write_to(state, "state"), &saved, sizeof(State));
}

}  // namespace
}  // namespace lora_fast

STABLE_TORCH_LIBRARY_IMPL(lora_fast, CPU, m) {
  m.impl("dropout_", TORCH_BOX(&lora_fast::dropout_cpu));
}
