// Tensors of torch's stable ABI, by short names, and the format of what they hold.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "formats.h"

namespace lora_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// For messages: "Float [3, 4]".
inline std::string described(const Tensor& tensor) {
  std::string sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    sizes += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  }
  return std::string(torch::headeronly::toString(tensor.scalar_type())) + " [" + sizes + "]";
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::kFp64;
    case ScalarType::Float: return Dtype::kFp32;
    case ScalarType::Half: return Dtype::kFp16;
    case ScalarType::BFloat16: return Dtype::kBf16;
    default:
      STD_TORCH_CHECK(
          false, name, " must be float64, float32, float16 or bfloat16, got ", described(tensor));
  }
}

// Where a tensor's elements are. FSDP1, for one, frees memory whose tensors live on.
template <class Pointer>
Pointer in_memory(Pointer found, const Tensor& tensor, const char* name) {
  int64_t bytes = 0;  // of the pointer an offset may be left
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const bool is_there = found != nullptr && bytes > 0;
  STD_TORCH_CHECK(is_there || tensor.numel() == 0, name, " has no memory: it was freed");
  return found;
}

inline const void* read_from(const Tensor& tensor, const char* name) {
  return in_memory(tensor.const_data_ptr(), tensor, name);
}

inline void* write_to(const Tensor& tensor, const char* name) {
  return in_memory(tensor.mutable_data_ptr(), tensor, name);
}

// Calls function(format) for the format of a dtype.
template <class Function>
void dispatch_format(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFp64: return function(Fp64{});
    case Dtype::kFp32: return function(Fp32{});
    case Dtype::kFp16: return function(Fp16{});
    case Dtype::kBf16: return function(Bf16{});
  }
}

}  // namespace lora_fast
