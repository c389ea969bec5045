#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can tell, most valuable first, within nine minutes:
#     make gpu [OUT=folder] [PYTHON=python3] [SECONDS_IN_ALL=540] [STAGES="build tests ..."]
# It takes the torch that is there and asks no registry; wheels of what is missing may lie in wheels/,
# and compiled ops in lora_fast/ serve with LORA_FAST_BUILD=none.
# Every stage leaves its log in OUT, gets the time that is left at most, and survives the failure of
# another.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-gpu-out}
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-540}
stages=${STAGES:-build doctor hopper tests questions linear merge gpu-tests tune layers models demo model}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONDONTWRITEBYTECODE=1

stage() {
  local name=$1 limit=$2 start=$SECONDS left=$((in_all - SECONDS))
  shift 2
  if [[ " $stages " != *" $name "* ]]; then return; fi
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
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  # The nvcc on the path may be a script that stands elsewhere: it knows where its libraries are.
  CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')}
  export TORCH_CUDA_ARCH_LIST CUDA_HOME
  # All but the merge can be measured without the CUDA ops.
  if [ "${LORA_FAST_BUILD:-auto}" = auto ]; then
    install cuda || install cpu
  else
    install "$LORA_FAST_BUILD"
  fi
}

install() {
  LORA_FAST_BUILD=$1 "$python" -m pip install -v --no-index --no-deps --no-build-isolation -e .
}

# The checkout on sys.path would hide the installed package. Not -P, which Python 3.10 has not.
safely="env PYTHONSAFEPATH=1"
bench() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" $safely "$python" -m pytest -q -p no:cacheprovider --benchmark --quick \
    --out "$out/results" --benchmark-json "$out/$name.json" "$@"
}

lora_fast() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" $safely "$python" -c \
    'import sys; from lora_fast.cli import main; sys.exit(main())' "$@"
}

has() {
  "$python" -c "import $1" 2> /dev/null
}

# Compiling is the tests' work, and that is the CPU's: as many processes as it has cores. A kernel
# that hangs costs its own process a minute.
tests() {
  local name=$1 limit=$2 options=()
  shift 2
  if has xdist; then options+=(-n "$(nproc)" --dist loadgroup); fi
  if has pytest_timeout; then options+=(--timeout 60 --timeout-method thread); fi
  # -W default: the warnings of a torch that is not the one of constraints.txt fail no test.
  OMP_NUM_THREADS=1 stage "$name" "$limit" $safely "$python" -m pytest -q -p no:cacheprovider \
    -W default --tb short --maxfail 200 "${options[@]}" "$@"
}

export -f build install
export python
hopper=tests/kernels/test_lora_gemm_hopper.py
: > "$out/stages.txt"
stage build 150 bash -c build
lora_fast doctor 40 doctor
# Warps that wait for one another: by itself, for what it may leave behind.
tests hopper 40 "$hopper"
tests tests 120 --ignore "$hopper" tests/kernels tests/csrc tests/fused tests/test_autograd.py
bench questions 40 bench/bench_gemm.py
bench linear 100 bench/bench_linear.py --budget 0.3 \
  --peers 'loralib*,peft,addmm-order,lora-first,lora_fast:decode,lora_fast:library,lora_fast:reference'
bench merge 40 bench/bench_merge.py --budget 0.3
tests gpu-tests 60 -m gpu --continue-on-collection-errors --ignore tests/csrc \
  --ignore tests/kernels --ignore tests/fused tests
lora_fast tune 45 tune --shapes 8192,4096,4096,16 1,4096,4096,16 --minutes 0.6 \
  --out "$out/tuned.json"
bench layers 60 bench/bench_layers.py --budget 0.3 --peers 'loralib*,peft,lora_fast:*'
bench models 60 bench/bench_models.py --budget 0.5 --peers loralib,peft
lora_fast demo 60 demo --steps 60 --pretrain-steps 60 --out "$out/demo"
stage model 20 "$python" bench/model_table.py "$out/results"

if [ -f "$out/doctor.log" ]; then cat "$out/doctor.log"; fi
tail -n 3 "$out"/{hopper,tests,gpu-tests}.log
cat "$out/stages.txt"
for table in gemm linear merge layers models; do
  [ -f "$out/results/$table.md" ] && printf '\n%s\n' "$table" && tail -n +5 "$out/results/$table.md"
done
[ -f "$out/model.log" ] && cat "$out/model.log"
exit 0
