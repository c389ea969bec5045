// Strided weights and codes, read and written in stretches that lie side by side.
#pragma once

#include <algorithm>
#include <cstring>

#include "merge.h"

namespace lora_fast {

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

}  // namespace lora_fast
