// What the CPU and the CUDA side of merge_ and unmerge_ share: the arguments, checked and laid out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "merge_item.h"
#include "merge_math.h"
#include "tensors.h"

namespace lora_fast {

// What merge_ tells of a weight in place of the length of its overflow list.
constexpr int64_t kNotFinite = -1;
constexpr int64_t kListFull = -2;

// How many dimensions have more than one element.
inline int wide_dims(const Tensor& tensor) {
  int count = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) count += tensor.size(d) != 1;
  return count;
}

// transposed: of a tensor with two wide dimensions.
inline View view_of(const Tensor& tensor, bool transposed) {
  View whole;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 1) continue;
    whole.size[whole.dims] = tensor.size(d);
    whole.stride[whole.dims++] = tensor.stride(d);
  }
  if (transposed) {
    std::swap(whole.size[0], whole.size[1]);
    std::swap(whole.stride[0], whole.stride[1]);
  }
  View view;
  view.dims = 1;
  view.size[0] = view.stride[0] = 1;
  for (int d = 0; d < whole.dims; ++d) {
    const int last = view.dims - 1;
    if (view.size[last] == 1) {
      view.size[last] = whole.size[d];
      view.stride[last] = whole.stride[d];
    } else if (view.stride[last] == whole.size[d] * whole.stride[d]) {
      view.size[last] *= whole.size[d];
      view.stride[last] = whole.stride[d];
    } else {
      view.size[view.dims] = whole.size[d];
      view.stride[view.dims++] = whole.stride[d];
    }
  }
  return view;
}

inline Factor factor_of(const Tensor& tensor, const char* name, bool transposed) {
  const int64_t first = tensor.stride(0), second = tensor.stride(1);
  return {
      read_from(tensor, name), dtype_of(tensor, name), transposed ? second : first,
      transposed ? first : second};
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline Item make_item(
    const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling,
    const Tensor& code, const Tensor& overflow_index, const Tensor& overflow_value) {
  STD_TORCH_CHECK(
      lora_a.dim() == 2 && lora_b.dim() == 2 && lora_a.size(0) == lora_b.size(1),
      "lora_A (R, K) and lora_B (N, R) must agree in R, got ", described(lora_a), " and ",
      described(lora_b));
  for (const Tensor* other : {&lora_a, &lora_b, &code, &overflow_index, &overflow_value}) {
    STD_TORCH_CHECK(other->device() == weight.device(), "all tensors must be on weight's device");
  }
  Item item;
  item.rows = lora_b.size(0);
  item.cols = lora_a.size(1);
  item.rank = lora_a.size(0);
  item.scaling = scaling;
  // Before they are multiplied, which a product beyond 64 bits would not tell.
  STD_TORCH_CHECK(
      item.cols == 0 || item.rows <= std::numeric_limits<int32_t>::max() / item.cols,
      "a weight beyond 2**31 - 1 elements must be passed in parts");
  STD_TORCH_CHECK(
      weight.dim() <= kMaxDims && weight.numel() == item.numel(), "weight has ", weight.numel(),
      " elements in ", weight.dim(), " dimensions, lora_B @ lora_A has ", item.rows, " x ",
      item.cols);
  if (item.numel() == 0) return item;

  // One row or column of stride 0 or of a lone element leaves nothing to transpose; where more than
  // two dimensions join to a matrix, swapping two of them is no transposition of it.
  const View plain = view_of(weight, false);
  item.transposed = wide_dims(weight) == 2 && plain.dims == 2 && plain.size[0] == item.rows &&
      plain.size[1] == item.cols && plain.stride[0] < plain.stride[1];
  item.weight = write_to(weight, "weight");
  item.weight_view = view_of(weight, item.transposed);
  item.left = factor_of(lora_b, "lora_B", false);
  item.right = factor_of(lora_a, "lora_A", false);
  if (item.transposed) {
    item.left = factor_of(lora_a, "lora_A", true);
    item.right = factor_of(lora_b, "lora_B", true);
    std::swap(item.rows, item.cols);
  }
  if (code.numel() == 0) return item;

  STD_TORCH_CHECK(
      same_sizes(code, weight) && code.scalar_type() == ScalarType::Char,
      "code must be int8 with the sizes of weight, ", described(weight), ", got ", described(code));
  STD_TORCH_CHECK(
      overflow_index.scalar_type() == ScalarType::Int && overflow_index.is_contiguous() &&
          overflow_value.scalar_type() == weight.scalar_type() && overflow_value.is_contiguous() &&
          overflow_index.numel() == overflow_value.numel() &&
          overflow_index.numel() <= weight.numel(),
      "overflow_index (int32) and overflow_value (weight's dtype) must be contiguous and as long as "
      "each other, and no longer than weight, ",
      described(weight), ", got ", described(overflow_index), " and ", described(overflow_value));
  item.code = static_cast<int8_t*>(write_to(code, "code"));
  item.code_view = view_of(code, item.transposed);
  item.overflow_index = static_cast<int32_t*>(write_to(overflow_index, "overflow_index"));
  item.overflow_value = write_to(overflow_value, "overflow_value");
  item.overflow_size = static_cast<int32_t>(overflow_index.numel());
  return item;
}

inline std::vector<Item> make_items(
    const Tensors& weight, const Tensors& lora_a, const Tensors& lora_b,
    const std::vector<double>& scaling, const Tensors& code, const Tensors& overflow_index,
    const Tensors& overflow_value) {
  const size_t count = weight.size();
  STD_TORCH_CHECK(
      lora_a.size() == count && lora_b.size() == count && scaling.size() == count &&
          code.size() == count && overflow_index.size() == count && overflow_value.size() == count,
      "the lists must be as long as that of the weights, ", count);
  std::vector<Item> items;
  items.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(
        weight[i].scalar_type() == weight[0].scalar_type() &&
            weight[i].device() == weight[0].device(),
        "the weights of one call must share dtype and device");
    items.push_back(make_item(
        weight[i], lora_a[i], lora_b[i], scaling[i], code[i], overflow_index[i],
        overflow_value[i]));
  }
  return items;
}

// Where merge_ and unmerge_ tell what became of each item, once all is done: by it a caller whom an
// exception takes away from what they return knows whether they ran.
inline int64_t* status_of(const Tensor& status, const std::vector<Item>& items) {
  STD_TORCH_CHECK(
      status.scalar_type() == ScalarType::Long && status.is_contiguous() && status.is_cpu() &&
          status.numel() == static_cast<int64_t>(items.size()),
      "status must be int64 on the CPU, a number for each of ", items.size(), " weights, got ",
      described(status));
  return static_cast<int64_t*>(write_to(status, "status"));
}

}  // namespace lora_fast
