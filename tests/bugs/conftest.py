"""The layers that the bugs are about, and what they must compute, worked out in another way.

A test is named after its bug, B01 to B55 in docs/differences.md, and runs over the layers that the
bug is about. Where it is cheap it runs loralib too, so that it is known to be able to fail.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast
from lora_fast.testing import assert_within_budget, randomize_

sys.path.insert(0, str(Path(__file__).parent))  # for attention

QKV = {"enable_lora": [True, False, True]}


@dataclass(frozen=True)
class Case:
    """A kind of layer: how it is built, what it reads, and the formula of its output."""

    name: str
    make: Callable[..., Any]
    shape: tuple[int, ...]

    def build(self, lib: ModuleType = lora_fast, std: float = 0.5, **kwargs: Any) -> Any:
        """A layer of `lib` with random A and B."""
        return randomize_(self.make(lib, **kwargs), std)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.name == "embedding":
            return torch.randint(0, 10, self.shape)
        return torch.randn(self.shape, dtype=dtype)

    def weight(self, layer: Any) -> Tensor:
        """The layer's weight; the layers of loralib's release have it in `conv`."""
        return getattr(layer, "conv", layer).weight

    def delta(self, layer: Any) -> Tensor:
        """What the adapter adds to the weight, in fp64 and in the weight's layout."""
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        delta = _block_diagonal(a, b, layer) if self.name.startswith("merged") else b @ a
        if self.name == "embedding" or self.name.endswith("transposed"):
            delta = delta.t()
        return layer.scaling * delta.reshape(self.weight(layer).shape)

    def plain(self, layer: Any, x: Tensor, weight: Tensor, bias: bool = True) -> Tensor:
        """The output of a layer without adapter whose weight is `weight`, in its dtype."""
        if self.name == "embedding":
            return F.embedding(x, weight)
        x, owner = x.to(weight.dtype), getattr(layer, "conv", layer)
        b = owner.bias.detach().to(weight.dtype) if bias else None
        if self.name.startswith("conv"):
            convolve = getattr(F, self.name[:6])
            return convolve(x, weight, b, owner.stride, owner.padding, 1, owner.groups)
        return F.linear(x, weight.t() if self.name.endswith("transposed") else weight, b)

    def assert_right(
        self, layer: Any, x: Tensor, *, base: Tensor | None = None, got: Tensor | None = None
    ) -> None:
        """Fail unless the layer's output is as near to the fp64 answer as torch's would be.

        `base` is the base weight where the layer's own is merged, `got` an output made before.
        """
        base = (self.weight(layer) if base is None else base).detach()
        delta = self.delta(layer)
        oracle = self.plain(layer, x, base.double() + delta)
        if layer.merged or self.name.startswith("conv"):
            eager = self.plain(layer, x, (base.double() + delta).to(base.dtype))
        else:
            update = self.plain(layer, x, delta.to(base.dtype), bias=False)
            eager = self.plain(layer, x, base) + update
        got = layer(x) if got is None else got
        factor = 8.0 if base.dtype == torch.float64 else 2.0  # the oracle is no wider than fp64
        assert_within_budget(got.detach(), eager, oracle, factor=factor, what=self.name)


def _block_diagonal(a: Tensor, b: Tensor, layer: Any) -> Tensor:
    rank, row, group, blocks = b.shape[1], 0, 0, []
    widths = getattr(layer, "out_splits", None) or [4, 4, 4]
    for width, on in zip(widths, layer.enable_lora, strict=True):
        if on:
            blocks.append(b[row : row + width] @ a[group * rank : (group + 1) * rank])
            row, group = row + width, group + 1
        else:
            blocks.append(b.new_zeros(width, a.shape[1]))
    return torch.cat(blocks)


def _cases() -> dict[str, Case]:
    transposed = {"fan_in_fan_out": True}
    ragged = {"out_splits": [6, 2, 4]}
    makers: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
        "linear": (lambda lib, **kw: lib.Linear(8, 12, r=2, lora_alpha=3, **kw), (5, 8)),
        "linear_transposed": (
            lambda lib, **kw: lib.Linear(8, 12, r=2, **transposed, **kw),
            (2, 5, 8),
        ),
        "merged": (lambda lib, **kw: lib.MergedLinear(8, 12, r=2, **QKV, **kw), (5, 8)),
        "merged_transposed": (
            lambda lib, **kw: lib.MergedLinear(8, 12, r=2, **QKV, **transposed, **kw),
            (5, 8),
        ),
        "merged_ragged": (
            lambda lib, **kw: lib.MergedLinear(8, 12, r=2, **QKV, **ragged, **kw),
            (5, 8),
        ),
        "embedding": (lambda lib, **kw: lib.Embedding(10, 6, r=2, lora_alpha=3, **kw), (3, 4)),
        "conv1d": (lambda lib, **kw: lib.Conv1d(4, 6, 3, r=2, **kw), (2, 4, 7)),
        "conv2d": (lambda lib, **kw: lib.Conv2d(4, 6, 3, r=2, padding=1, **kw), (2, 4, 5, 5)),
        "conv2d_grouped": (
            lambda lib, **kw: lib.Conv2d(4, 6, 3, r=1, groups=2, stride=2, **kw),
            (2, 4, 7, 7),
        ),
        "conv3d": (lambda lib, **kw: lib.Conv3d(2, 4, 2, r=1, groups=2, **kw), (2, 2, 4, 3, 3)),
    }
    return {name: Case(name, make, shape) for name, (make, shape) in makers.items()}


CASES = _cases()
LORALIB_CANNOT = {"merged_ragged", "conv1d", "conv3d"}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of layer."""
    return CASES[request.param]


@pytest.fixture(params=[name for name in CASES if name not in LORALIB_CANNOT])
def old_case(request: pytest.FixtureRequest) -> Case:
    """Every kind of layer that works in loralib."""
    return CASES[request.param]


@pytest.fixture(params=[name for name in CASES if name.startswith(("linear", "merged"))])
def linear_case(request: pytest.FixtureRequest) -> Case:
    """Every kind of linear layer."""
    return CASES[request.param]


@pytest.fixture(params=[name for name in CASES if name.startswith("conv")])
def conv_case(request: pytest.FixtureRequest) -> Case:
    """Every kind of convolution."""
    return CASES[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that a weight may have."""
    return request.param
