# `make demo` and `make test` set up all that they need in $(VENV), once, and then do their job.
#
#   PYTHON   the interpreter that makes the environment; the first one >= 3.10 is taken
#   VENV     the environment; one that already has a torch keeps it
#   TORCH    what pip installs where torch is missing, e.g. TORCH="torch==2.12.1"
#   JOBS     test processes
#   OUT      where `make gpu` leaves its logs and tables
#   GPU_PYTHON   the Python there, for `make wheels`
#   DIST     where `make wheel` writes
#   LORA_FAST_BUILD   auto, none, cpu or cuda: which part of csrc/ is compiled

PYTHON ?= python3
VENV ?= .venv
TORCH ?= -c constraints.txt torch "triton; platform_system == 'Linux'"
JOBS ?= 2
DIST ?= dist
OUT ?= gpu-out
GPU_PYTHON ?= 3.12
# A borrowed pytest has no script in $(BIN), and -m would put this folder on sys.path, where kernels/
# hides any other package of that name.
PYTEST ?= $(BIN)/python -c 'import sys; sys.path[:] = filter(None, sys.path); import pytest; \
  sys.exit(pytest.console_main())'
PYTEST_ARGS ?= -n $(JOBS) --dist loadgroup
export LORA_FAST_BUILD ?= auto

ifneq ($(words $(VENV)),1)
$(error VENV must be one path without spaces, got '$(VENV)')
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
READY := $(VENV)/.lora_fast-installed
MADE := $(VENV)/.lora_fast-made
# Every test process computes on one thread, and Inductor compiles in it: the processes are the
# parallelism.
ONE_THREAD := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1

.PHONY: demo test bench wheels gpu lint wheel setup clean

demo: $(READY)
	$(BIN)/lora-fast demo $(DEMO_ARGS)

test: $(READY)
	$(ONE_THREAD) $(PYTEST) $(PYTEST_ARGS)

# All peers in turns, into bench/results/<device>, then the README's numbers from there. A few rows
# into bench-out/: make bench BENCH_ARGS=--quick
bench: $(READY)
	@$(PYTEST) bench --benchmark $(BENCH_ARGS); status=$$?; \
	  $(BIN)/python bench/report.py && exit $$status

# For a GPU machine that reaches no registry: carry wheels/ there.
wheels: $(READY)
	$(BIN)/python -m pip download -q --no-deps -c constraints.txt -d wheels \
	  --only-binary :all: --python-version $(GPU_PYTHON) \
	  loralib hypothesis sortedcontainers safetensors tqdm platformdirs setuptools

gpu:
	OUT="$(OUT)" PYTHON="$(PYTHON)" bench/gpu.sh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run -Werror

wheel: $(READY)
	$(BIN)/python -m build --no-isolation --outdir "$(DIST)" .

setup: $(READY)

$(READY): pyproject.toml constraints.txt $(wildcard setup.py csrc/*)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue; \
	    echo "making $(VENV) with $$($$python --version)"; \
	    test -e $(VENV) || { mkdir -p $(VENV) && touch $(MADE); }; \
	    exec $$python -m venv $(VENV); \
	  done; \
	  echo "no Python >= 3.10 found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "installing torch into $(VENV)"; $(PIP) $(TORCH); }
	@# The torch that is here stays, whichever version it is, and so do Triton and setuptools, of
	@# which older ones take older versions.
	@sed -E '/^(torch|triton|setuptools)==/d' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  >> $(VENV)/constraints.txt
	@echo "installing lora_fast and its tools into $(VENV)"
	@$(PIP) -c $(VENV)/constraints.txt "setuptools>=77,!=77.0.3" wheel ninja
	@$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e ".[test,bench,demo,lint]"
	@touch $@

# Of environments only those that `make` made: another one is its owner's.
clean:
	@if test -e "$(MADE)"; then rm -rf "$(VENV)"; \
	elif test -e "$(VENV)"; then echo "keeping $(VENV), which make has not made"; fi
	rm -rf build dist lora_fast.egg-info
	find lora_fast kernels -name '*.so' -delete
