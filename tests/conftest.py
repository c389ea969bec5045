"""What every test gets: a device, a seed, fresh compiler state, and NaN in uninitialised memory."""

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads it when it is imported: without a GPU, kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("lora_fast", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lora_fast")

TESTS = Path(__file__).parent
# Kernels and compiled code write into memory that they were given; a gap must show.
FILLED_WITH_NAN = {
    *("kernels", "csrc", "fused", "test_fused_linear.py"),
    *("test_autograd.py", "test_autograd_merged.py", "test_ops.py"),
}
# Once, torch notes which functions a default device changes: before any of them is replaced here.
with torch.device("cpu"):
    torch.empty(0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_CUDA else ["cpu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Take what pytest holds, hundreds of thousands of objects, out of the collector's sight.

    A collection and a scan for modules, which many tests make, take a third of the time so.
    """
    gc.collect()
    gc.freeze()
    readers: Any = sys.modules.get("lora_fast.readers")
    if readers is not None:
        readers._FROZEN = gc.get_freeze_count()  # as if it were imported now


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Let a test freeze and unfreeze what it will."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    pytest_collection_finish()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine that PyTorch can use."""
    return torch.device(request.param)


@pytest.fixture
def kernel_device() -> torch.device:
    """The one device on which Triton's kernels run in this process."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What serves a call, or plain torch: of merges the native ops, or those that keep a copy."""
    import lora_fast  # when a test runs, as some look at what importing it does

    with lora_fast.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Force the kernels: what they can't serve raises."""
    import lora_fast

    with lora_fast.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give each test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        return None


@pytest.fixture
def without_gradient() -> Callable[[torch.Tensor], torch.Tensor]:
    """A copy that gives what it is made of no gradient, not even zeros."""
    return _Stop.apply  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget what `torch.compile` compiled; its limit of recompilations counts per function."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make `torch.empty`, called by the package, hold NaN, or the largest integer."""
    if request.path.relative_to(TESTS).parts[0] not in FILLED_WITH_NAN:
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _filling(getattr(owner, name)))


def _filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("lora_fast.") or tensor.is_meta or tensor.dtype is torch.bool:
            return tensor
        is_number = tensor.is_floating_point() or tensor.is_complex()
        return tensor.fill_(float("nan") if is_number else torch.iinfo(tensor.dtype).max)

    return filled
