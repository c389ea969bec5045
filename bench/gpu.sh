#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can tell, most valuable first, within nine minutes:
#     make gpu [OUT=folder] [PYTHON=python3] [SECONDS_IN_ALL=540]
# It takes the torch that is there and asks no registry; wheels of what is missing may lie in wheels/.
# Every stage leaves its log in OUT, gets the time that is left at most, and survives the failure of
# another.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-gpu-out}
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-540}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONDONTWRITEBYTECODE=1

stage() {
  local name=$1 limit=$2 start=$SECONDS left=$((in_all - SECONDS))
  shift 2
  if [ "$left" -le 5 ]; then
    printf '%-12s not begun, no time left\n' "$name" | tee -a "$out/stages.txt"
    return
  fi
  # SIGINT first: what a stage has measured until then, it writes.
  timeout --signal INT --kill-after 10 "$((limit < left ? limit : left))" "$@" \
    > "$out/$name.log" 2>&1
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

# -P: the checkout on sys.path would hide the installed package.
bench() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" -P -m pytest -q -p no:cacheprovider --benchmark --quick \
    --out "$out/results" --benchmark-json "$out/$name.json" "$@"
}

export -f build
export python
: > "$out/stages.txt"
stage build 180 bash -c build
stage tests 150 "$python" -P -m pytest -q -p no:cacheprovider --maxfail 30 \
  tests/kernels tests/csrc tests/fused tests/test_autograd.py
bench questions 40 bench/bench_gemm.py
bench linear 100 bench/bench_linear.py --budget 0.3 \
  --peers 'loralib,peft,addmm-order,lora-first,lora_fast:*'
bench merge 40 bench/bench_merge.py --budget 0.3
stage gpu-tests 60 "$python" -P -m pytest -q -p no:cacheprovider --maxfail 30 -m gpu \
  --continue-on-collection-errors --ignore tests/csrc --ignore tests/kernels tests
stage tune 45 "$python" -P -c 'import sys; from lora_fast.cli import main; sys.exit(main())' \
  tune --shapes 8192,4096,4096,16 1,4096,4096,16 --minutes 0.6 --out "$out/tuned.json"
bench layers 60 bench/bench_layers.py --budget 0.3 --peers 'loralib,peft,lora_fast:*'
bench models 60 bench/bench_models.py --budget 0.5
stage model 20 "$python" bench/model_table.py "$out/results"

tail -n 3 "$out/tests.log" "$out/gpu-tests.log"
cat "$out/stages.txt"
for table in gemm linear merge layers models; do
  [ -f "$out/results/$table.md" ] && printf '\n%s\n' "$table" && tail -n +5 "$out/results/$table.md"
done
[ -f "$out/model.log" ] && cat "$out/model.log"
exit 0
