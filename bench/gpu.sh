#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can tell, most valuable first, within nine minutes:
#     make gpu [OUT=folder] [PYTHON=python3]
# It takes the torch that is there and asks no registry; wheels of what is missing may lie in wheels/.
# Every stage leaves its log in OUT and survives the failure of another.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-gpu-out}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONDONTWRITEBYTECODE=1

stage() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  printf '%-12s exit %3d  %4d s\n' "$name" $? $((SECONDS - start)) | tee -a "$out/stages.txt"
}

build() {
  if [ -d wheels ]; then
    "$python" -m pip install -q --no-index --no-deps wheels/*.whl
  fi
  nvidia-smi
  TORCH_CUDA_ARCH_LIST=$("$python" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
    LORA_FAST_BUILD=cuda "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
}

export -f build
export python
: > "$out/stages.txt"
stage build 180 bash -c build
# -P: the checkout on sys.path would hide the installed package.
stage tests 200 "$python" -P -m pytest -q -p no:cacheprovider --maxfail 30 \
  tests/csrc tests/kernels tests/test_autograd.py
stage bench 240 "$python" bench/bench_gpu.py --quick --out "$out"
tail -n 3 "$out/tests.log"
cat "$out/stages.txt"
[ -f "$out/gpu_linear.md" ] && tail -n +3 "$out/gpu_linear.md"
exit 0
