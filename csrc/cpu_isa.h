// Which instruction set the CPU ops use: decided when one is called, so that one binary serves
// every machine.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace lora_fast {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

#define LORA_FAST_AVX2 "avx2,fma"
#define LORA_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"

// The fastest set that this machine has, or the one that LORA_FAST_CPU_ISA names.
inline Isa chosen_isa() {
  const char* forced = std::getenv("LORA_FAST_CPU_ISA");
  const std::string isa = forced == nullptr ? "" : forced;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Measured: a bf16 merge at rank 64 by pairs takes half as long as by fp32 on an EPYC (family 25,
  // model 17), and a third longer on a Xeon (family 6, model 167), whose step of a pair of bf16
  // products takes as long as four of fp32.
  const bool pairs_pay = __builtin_cpu_is("amd");
  if (avx512_bf16 && (isa.empty() ? pairs_pay : isa == "avx512_bf16")) return Isa::kAvx512Bf16;
  if (avx512 && (isa.empty() || isa == "avx512")) return Isa::kAvx512;
  if (avx2 && (isa.empty() || isa == "avx2")) return Isa::kAvx2;
#endif
  STD_TORCH_CHECK(
      isa.empty() || isa == "portable", "LORA_FAST_CPU_ISA is '", isa,
      "', expected portable, or avx2, avx512 or avx512_bf16 on a machine that has them");
  return Isa::kPortable;
}

}  // namespace lora_fast
