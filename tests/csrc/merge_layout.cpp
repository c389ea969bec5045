// What csrc/merge_cuda_jobs.h says of a matrix in memory, for test_merge_layout.py.
#include "../../csrc/merge_cuda_jobs.h"

extern "C" int is_aligned(
    const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t element_size) {
  const lora_fast::View view = {2, {rows, cols}, {row_stride, 1}};
  return lora_fast::layout_of(view, cols, data, element_size).is_aligned;
}
