// csrc/merge_cuda.cu with its kernels run by a CPU, as lora_fast_on_cpu::merge_ and unmerge_.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)
#define DeviceGuard NoGuard
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, device, m) \
  _STABLE_TORCH_LIBRARY_IMPL(lora_fast_on_cpu, CPU, m, C10_UID)
#include "../../../csrc/merge_cuda.cu"
