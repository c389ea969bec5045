// Enough of CUDA to compile and run csrc/merge_cuda.cu on a CPU: a thread for each of a block's,
// and one block after another.
#pragma once

#include <atomic>
#include <barrier>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Dim3 threadIdx;
inline Dim3 blockIdx, blockDim;

using cudaStream_t = void*;
using cudaError_t = int32_t;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  memset(to, value, size);
  return 0;
}
inline cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, size);
  return 0;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return 0; }
// What torch's STD_CUDA_CHECK calls.
inline void torch_c10_cuda_check_msg(
    int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
}
inline void torch_c10_cuda_free_error_msg(char*) {}

// The threads of a block. They stay for the blocks to come.
class Block {
 public:
  explicit Block(unsigned size) : barrier_(size), end_(size + 1), begin_(size + 1) {
    for (unsigned i = 0; i < size; ++i) {
      threads_.emplace_back([this, i] {
        threadIdx.x = i;
        while (true) {
          begin_.arrive_and_wait();
          if (!body_) return;
          body_();
          end_.arrive_and_wait();
        }
      });
    }
  }
  ~Block() {
    body_ = nullptr;
    begin_.arrive_and_wait();
    for (auto& thread : threads_) thread.join();
  }
  void run(std::function<void()> body) {
    body_ = std::move(body);
    begin_.arrive_and_wait();
    end_.arrive_and_wait();
  }
  void wait() { barrier_.arrive_and_wait(); }
  bool all(bool mine) {
    if (!mine) some_not_ = true;
    wait();
    const bool result = !some_not_;
    wait();
    some_not_ = false;  // by every thread, before any can set it again
    wait();
    return result;
  }

 private:
  std::barrier<> barrier_, end_, begin_;
  std::atomic<bool> some_not_{false};
  std::function<void()> body_;
  std::vector<std::thread> threads_;
};

inline Block* running = nullptr;
inline void __syncthreads() { running->wait(); }
inline bool __syncthreads_and(bool mine) { return running->all(mine); }

template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value);
}

template <class... Parameters, class... Arguments>
void start(
    void (*kernel)(Parameters...), int64_t blocks, unsigned threads, cudaStream_t,
    Arguments&&... arguments) {
  Block block(threads);
  running = &block;
  blockDim.x = threads;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    block.run([&] { kernel(arguments...); });
  }
  running = nullptr;
}
