// merge_ and unmerge_ on CUDA: one pass over the weights, many weights in one launch.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "merge.h"
#include "merge_cuda_kernels.cuh"
#include "module.h"

namespace lora_fast {
namespace {

#if defined(__CUDACC__)  // who compiles this for a CPU has a start of his own
template <class... Parameters, class... Arguments>
void start(
    void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
    Arguments&&... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

template <class F>
class Launcher {
  using Bits = typename F::Bits;

 public:
  Launcher(const std::vector<Item>& items, int32_t device)
      : items_(items), plan_(items, sizeof(Bits)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // written: a flag for each tile, or null.
  template <Mode kMode>
  void run(Outcome* outcomes, uint8_t* written) {
    launch<kMode, true>(plan_.aligned, outcomes, written);
    launch<kMode, false>(plan_.strided, outcomes, written);
  }

  void restore(size_t index, int64_t count) {
    if (count == 0) return;
    const int64_t blocks = (count + kThreads - 1) / kThreads;
    start(restore_kernel<Bits>, blocks, kThreads, stream_, items_[index], count);
  }

  int64_t tiles() const { return plan_.tiles; }
  cudaStream_t stream() const { return stream_; }

 private:
  template <Mode kMode, bool kAligned>
  void launch(const Queue& queue, Outcome* outcomes, uint8_t*& written) {
    for (const auto& [batch, tiles] : queue.batches) {
      const auto kernel = merge_kernel<F, kMode, kAligned>;
      start(kernel, tiles, kThreads, stream_, *batch, outcomes, written);
      if (written != nullptr) written += tiles;
    }
  }

  const std::vector<Item>& items_;
  Plan plan_;
  cudaStream_t stream_ = nullptr;
};

Tensor bytes_on(const Tensor& like, int64_t size) {
  return torch::stable::empty({&size, 1}, ScalarType::Byte, std::nullopt, like.device());
}

template <class F>
std::vector<int64_t> merge(const std::vector<Item>& items, const Tensor& first) {
  Launcher<F> launcher(items, first.get_device_index());
  const int64_t size = static_cast<int64_t>(items.size() * sizeof(Outcome));
  Tensor outcome_bytes = bytes_on(first, size), written = bytes_on(first, launcher.tiles());
  auto* outcomes = static_cast<Outcome*>(outcome_bytes.mutable_data_ptr());
  auto* flags = static_cast<uint8_t*>(written.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(outcomes, 0, size, launcher.stream()));
  // Before anything is written to: for want of memory nothing must be left half done.
  std::vector<Outcome> found(items.size());
  std::vector<int64_t> status;
  status.reserve(items.size());
  launcher.template run<Mode::kMerge>(outcomes, flags);
  STD_CUDA_CHECK(
      cudaMemcpyAsync(found.data(), outcomes, size, cudaMemcpyDeviceToHost, launcher.stream()));
  STD_CUDA_CHECK(cudaStreamSynchronize(launcher.stream()));

  bool has_failed = false;
  for (const Outcome& outcome : found) {
    const int64_t verdict = outcome.not_finite ? kNotFinite : outcome.list_full ? kListFull : 0;
    has_failed = has_failed || verdict != 0;
    status.push_back(verdict != 0 ? verdict : static_cast<int64_t>(outcome.overflow));
  }
  if (!has_failed) return status;
  launcher.template run<Mode::kUndo>(nullptr, flags);
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t listed = static_cast<int64_t>(found[i].overflow);
    launcher.restore(i, std::min<int64_t>(listed, items[i].overflow_size));
    status[i] = std::min<int64_t>(status[i], 0);
  }
  return status;
}

template <class F>
void unmerge(const std::vector<Item>& items, const Tensor& first) {
  Launcher<F> launcher(items, first.get_device_index());
  launcher.template run<Mode::kUnmerge>(nullptr, nullptr);
  for (size_t i = 0; i < items.size(); ++i) launcher.restore(i, items[i].overflow_size);
}

void merge_cuda(
    Tensors weight, Tensors lora_a, Tensors lora_b, std::vector<double> scaling, Tensors code,
    Tensors overflow_index, Tensors overflow_value, Tensor status) {
  const std::vector<Item> items =
      make_items(weight, lora_a, lora_b, scaling, code, overflow_index, overflow_value);
  int64_t* found = status_of(status, items);
  if (items.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(weight[0].get_device_index());
  dispatch_format(dtype_of(weight[0], "weight"), [&](auto format) {
    const std::vector<int64_t> merged = merge<decltype(format)>(items, weight[0]);
    std::copy(merged.begin(), merged.end(), found);
  });
}

void unmerge_cuda(
    Tensors weight, Tensors lora_a, Tensors lora_b, std::vector<double> scaling, Tensors code,
    Tensors overflow_index, Tensors overflow_value, Tensor status) {
  const std::vector<Item> items =
      make_items(weight, lora_a, lora_b, scaling, code, overflow_index, overflow_value);
  int64_t* done = status_of(status, items);
  if (items.empty()) return;
  for (const Item& item : items) {
    STD_TORCH_CHECK(item.code != nullptr || item.numel() == 0, "unmerge_ needs the code of merge_");
  }
  const torch::stable::accelerator::DeviceGuard guard(weight[0].get_device_index());
  dispatch_format(dtype_of(weight[0], "weight"), [&](auto format) {
    unmerge<decltype(format)>(items, weight[0]);
  });
  std::fill_n(done, items.size(), 0);
}

}  // namespace
}  // namespace lora_fast

STABLE_TORCH_LIBRARY_IMPL(lora_fast, CUDA, m) {
  m.impl("merge_", TORCH_BOX(&lora_fast::merge_cuda));
  m.impl("unmerge_", TORCH_BOX(&lora_fast::unmerge_cuda));
}

LORA_FAST_MODULE(_C_cuda)
