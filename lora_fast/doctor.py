"""`lora-fast doctor`: what is installed, what runs where and why, and whether it is right here.

What it prints is what a bug report should hold.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import lora_fast
from lora_fast import decisions, ops, selftest
from lora_fast.tune import show

_PACKAGES = ("triton", "numpy", "safetensors", "transformers", "peft", "loralib")
_SETTINGS = ("TRITON_INTERPRET", "TORCH_CUDA_ARCH_LIST", "CUDA_VISIBLE_DEVICES")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the status is 1 if an op fails its self-test."""
    for title, lines in (
        ("versions", _versions()),
        ("GPUs", _gpus()),
        ("native ops", _native()),
        ("settings", _settings()),
        ("what runs where", decisions.explanation().splitlines()),
        ("measured tables", show.tables_in_force(rows=False)),
    ):
        _print_section(title, lines)
    failed = 0
    print("\nself-test against the reference in float64")
    for outcome in selftest.outcomes():
        failed += outcome.problem is not None
        print(f"  {_without_home(str(outcome))}", flush=True)
    print(f"\n{failed} failed" if failed else "\nall well")
    return 1 if failed else 0


def _print_section(title: str, lines: Iterable[str]) -> None:
    print(f"\n{title}")
    for line in lines:
        print(f"  {_without_home(line)}", flush=True)


def _without_home(text: str) -> str:
    """The text without the name of the user, which is in the path of the home folder."""
    home = os.path.expanduser("~")
    if not Path(home).is_absolute() or home == "/":
        return text
    return re.sub(rf"{re.escape(home)}(?!\.?[\w-])", "~", text)  # no part of a longer name


def _versions() -> Iterator[str]:
    yield f"lora_fast {lora_fast.__version__}"
    yield f"python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
    for package in _PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package}: not installed"


def _gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "none that torch can use"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.1f} GiB"
        capability = f"capability {found.major}.{found.minor}"
        processors = f"{found.multi_processor_count} multiprocessors"
        yield f"cuda:{index} {found.name}, {capability}, {processors}, {memory}"
    driver = _driver()
    if driver:
        yield f"driver {driver}"


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return ", ".join(dict.fromkeys(done.stdout.split())) or None


def _native() -> Iterator[str]:
    for device in ("cpu", "cuda"):
        yield f"{device}: {ops.load_native(device) or 'built'}"


def _settings() -> Iterator[str]:
    ours = sorted(name for name in os.environ if name.startswith("LORA_FAST_"))
    for name in (*ours, *(name for name in _SETTINGS if name in os.environ)):
        yield f"{name}={os.environ[name]}"
    yield f"{torch.get_num_threads()} threads"
    yield f"fp32 products on CUDA: {torch.backends.cuda.matmul.fp32_precision}"
    yield f"deterministic algorithms: {torch.are_deterministic_algorithms_enabled()}"
