"""For want of memory a merge or an unmerge is not done at all: no weight is left half written."""

import os
import resource
import subprocess
import sys

import pytest

STEP = 1 << 17

COMMON = """
import resource, sys, warnings
import torch
import lora_fast as lora

warnings.simplefilter("ignore")
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)


def adapted(*layers):
    for layer in layers:
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    return torch.nn.Sequential(*layers)


def with_little_memory(change, extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, -1))
    try:
        change()
    except (MemoryError, RuntimeError):
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""

MERGES = """
model = adapted(*{layers})
change = {change}
change()
model.train()
bases = [layer.weight.detach().clone() for layer in model]
refused = 0
for extra in range(0, 1 << 25, {step}):
    with_little_memory(change, extra)
    for layer, base in zip(model, bases):
        assert layer.merged or torch.equal(layer.weight, base), extra
    merged = [layer.merged for layer in model]
    refused += not any(merged)
    model.train()
    for layer, base in zip(model, bases):
        assert torch.equal(layer.weight, base), extra
    if all(merged):
        break
assert all(merged) and refused
"""

UNMERGES = """
model = adapted(lora.Linear(1024, 1024, r=256))
layer = model[0]
base = layer.weight.detach().clone()
refused = 0
for extra in range(0, 1 << 23, {step}):
    layer.eval()
    with_little_memory(layer.train, extra)
    refused += layer.merged
    layer.train()
    assert torch.equal(layer.weight, base), extra
assert refused
"""

ALONE = "lora.Linear(1024, 1024, r=256),"
TWO = "lora.Linear(512, 512, r=4), lora.Linear(512, 512, r=512)"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is on Linux' address space")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves the whole space"
)
@pytest.mark.parametrize(
    ("script", "threads"),
    [
        (MERGES.format(layers=f"({ALONE})", change="model.eval", step=STEP), 2),
        (MERGES.format(layers=f"({TWO})", change="lambda: lora.merge(model)", step=STEP), 1),
        (MERGES.format(layers=f"({TWO})", change="lambda: lora.merge(model)", step=STEP), 2),
        (UNMERGES.format(step=STEP), 2),
    ],
    ids=["eval", "merge", "merge-in-threads", "train"],
)
def test_a_limit_of_the_memory(script: str, threads: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, str(threads)],
        # Else the C library keeps memory from before, and never meets the limit.
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
