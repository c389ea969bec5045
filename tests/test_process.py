"""What a process starts with: the environment's choice of the backend, a Triton that is absent."""

import os
import subprocess
import sys

import pytest


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, warnings as errors, with these environment variables."""
    names = ("LORA_FAST_BACKEND", "TRITON_INTERPRET")
    env = {k: v for k, v in os.environ.items() if k not in names} | environment
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_auto_is_the_default() -> None:
    done = python("import lora_fast; print(lora_fast.get_backend())")
    assert done.stdout == "auto\n", done.stderr


@pytest.mark.parametrize("name", ["auto", "triton", "reference"])
def test_the_environment_sets_the_first_choice(name: str) -> None:
    done = python("import lora_fast; print(lora_fast.get_backend())", LORA_FAST_BACKEND=name)
    assert done.stdout == f"{name}\n", done.stderr


def test_an_empty_variable_is_none() -> None:
    done = python("import lora_fast; print(lora_fast.get_backend())", LORA_FAST_BACKEND="")
    assert done.stdout == "auto\n", done.stderr


@pytest.mark.parametrize("name", ["Triton", "cuda", "eager"])
def test_the_environment_is_checked_at_import(name: str) -> None:
    done = python("import lora_fast", LORA_FAST_BACKEND=name)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message == (
        f"ValueError: LORA_FAST_BACKEND must be one of auto, triton, reference, got {name!r}"
    )


_BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""

_EVERYTHING = """
import torch, lora_fast as lora
layers = [lora.Linear(4, 6, r=2, lora_dropout=0.5),
          lora.MergedLinear(4, 6, r=2, enable_lora=[True, False]), lora.Conv1d(4, 6, 3, r=1)]
for layer in layers:
    x = torch.randn(5, 4, 4)
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None
    layer.eval()(x)
    layer.train()
table = lora.Embedding(9, 4, r=2)
table(torch.tensor([1, 8])).sum().backward()
lora.explain()
lora.set_backend("triton")
try:
    layers[0](x)
except RuntimeError as error:
    print(error)
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_works_where_triton_is_absent(interpret: str) -> None:
    done = python(_BLOCKED + _EVERYTHING, TRITON_INTERPRET=interpret)
    assert done.returncode == 0, done.stderr
    reason = "triton is not installed" if interpret == "1" else "the kernels need CUDA"
    assert reason in done.stdout.splitlines()[-1]
