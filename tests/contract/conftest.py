"""Layers drawn at random, built by both libraries, and how their results are compared.

A test that takes `drawn` runs once for every drawn layer, one that takes `drawn_linear`,
`drawn_merged_linear`, `drawn_embedding` or `drawn_conv` once for those of one class. A drawn layer
depends on nothing but its class and its number, so a failure's id is enough to see it again.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast.testing import assert_within_budget, randomize_

Settings = dict[str, Any]
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
RANKS = (0, 1, 2, 3, 4, 8, 1, 2, 3, 4, 8, -1)
ALPHAS = (1, 2, 8, 16, 0.5, 3)
RATES = (0.0, 0.0, 0.1, 0.5, 1.0)
# How many of each class, and how many of its arguments can be given by position.
DRAWS = {
    "Linear": 60,
    "MergedLinear": 60,
    "Embedding": 60,
    "Conv2d": 60,
    "Conv1d": 30,
    "Conv3d": 30,
}
FUSED = 10  # how many `drawn_fused` is: layers that run as kernels, which are slow to interpret
CLASSES = {
    "drawn": tuple(DRAWS),
    "drawn_linear": ("Linear",),
    "drawn_merged_linear": ("MergedLinear",),
    "drawn_embedding": ("Embedding",),
    "drawn_conv": ("Conv1d", "Conv2d", "Conv3d"),
}


@dataclass(frozen=True)
class Drawn:
    """The settings of one layer in the order of loralib's arguments, and inputs for it."""

    cls: str
    number: int
    settings: Settings
    positional: int

    @property
    def has_adapter(self) -> bool:
        return self.settings["r"] > 0

    @property
    def dtype(self) -> torch.dtype:
        return self.settings["dtype"]

    def but(self, **settings: Any) -> "Drawn":
        """The same layer with some settings replaced."""
        return replace(self, settings={**self.settings, **settings})

    def build(self, library: ModuleType) -> Any:
        """Construct the layer from the seed that is this layer's own."""
        torch.manual_seed(self.number)
        values = list(self.settings.items())
        args = [value for _, value in values[: self.positional]]
        return getattr(library, self.cls)(*args, **dict(values[self.positional :]))

    def pair(self) -> tuple[Any, Any]:
        """The layer of lora_fast and that of loralib, with the same random A and B."""
        layers = self.build(lora_fast), self.build(loralib)
        for layer in layers:
            torch.manual_seed(self.number + 1)
            randomize_(layer)
        return layers

    def input(self) -> Tensor:
        rng = random.Random(f"input of {self.cls} {self.number}")
        generator = torch.Generator().manual_seed(self.number + 2)
        s = self.settings
        if self.cls == "Embedding":
            shape = rng.choice(((), (5,), (2, 3), (2, 1, 3), (0,)))
            dtype = rng.choice((torch.int64, torch.int32))
            return torch.randint(0, s["num_embeddings"], shape, generator=generator, dtype=dtype)
        if "in_channels" in s:
            dims = int(self.cls[4])
            batch = rng.choice(((), (1,), (2,), (3,)))
            shape = (*batch, s["in_channels"], *(rng.randint(7, 9) for _ in range(dims)))
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            as_last = dims == 2 and batch and rng.random() < 0.3
            return x.to(memory_format=torch.channels_last) if as_last else x
        leading = rng.choice(((), (1,), (6,), (0,), (2, 3), (3, 0), (2, 1, 3)))
        width, step = s["in_features"], rng.choice((1, 1, 2))
        wide = torch.randn((*leading, width * step), generator=generator, dtype=torch.float64)
        return wide.to(self.dtype)[..., ::step]

    def oracle(self, layer: nn.Module, x: Tensor) -> Any:
        """A copy of `layer` in float64 that drops what the layer drops of `x` with this seed."""
        wide = copy.deepcopy(layer).double()
        p = self.settings.get("lora_dropout", 0.0)
        if p > 0.0 and "in_features" in self.settings:
            torch.manual_seed(self.number + 3)
            wide.lora_dropout = _Mask(F.dropout(torch.ones_like(x), p) != 0, p)
        return wide

    def results(self, layer: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        """The output of `layer` for `x`, and the gradients of `x` and of every parameter."""
        wide = x.double() if x.is_floating_point() else x
        x = wide.to(next(layer.parameters()).dtype) if x.is_floating_point() else x.detach()
        if x.is_floating_point():
            x.requires_grad_()
        torch.manual_seed(self.number + 3)
        y = layer(x)
        found: dict[str, Tensor | None] = {"output": y.detach()}
        if y.requires_grad:
            generator = torch.Generator().manual_seed(self.number + 4)
            dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            y.backward(dy.to(self.dtype).to(y.dtype))
        for name, leaf in (("input", x), *layer.named_parameters()):
            found[f"gradient of {name}"] = leaf.grad
        return found


class _Mask(nn.Module):
    """Dropout with a fixed mask."""

    def __init__(self, kept: Tensor, p: float) -> None:
        super().__init__()
        self.kept = kept
        self.factor = 1.0 / (1.0 - p) if p < 1.0 else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept * self.factor if self.training else x


def _draw(cls: str, number: int) -> Drawn:
    rng = random.Random(f"{cls} {number}")
    named, keywords = _DRAW[cls](rng)
    keywords["dtype"] = rng.choice(DTYPES)
    # The rounding of a few numbers is luck, which no budget can judge.
    if cls.startswith("Conv") and named["in_channels"] * named["out_channels"] < 8:
        keywords["dtype"] = torch.float64
    positional = rng.randint(3 if "kernel_size" in named else 2, len(named))
    return Drawn(cls, number, {**named, **keywords}, positional)


def _draw_adapter(rng: random.Random) -> Settings:
    return {"r": rng.choice(RANKS), "lora_alpha": rng.choice(ALPHAS)}


def _flag(rng: random.Random) -> bool:
    return rng.random() < 0.5


def _draw_linear(rng: random.Random) -> tuple[Settings, Settings]:
    named = {
        "in_features": rng.randint(1, 24),
        "out_features": rng.randint(1, 24),
        **_draw_adapter(rng),
        "lora_dropout": rng.choice(RATES),
        "fan_in_fan_out": _flag(rng),
        "merge_weights": rng.random() < 0.7,
    }
    return named, {"bias": _flag(rng)}


def _draw_merged_linear(rng: random.Random) -> tuple[Settings, Settings]:
    enable = [_flag(rng) for _ in range(rng.randint(1, 4))]
    enable[rng.randrange(len(enable))] = True  # loralib cannot run with none
    named = {
        "in_features": rng.randint(1, 24),
        "out_features": rng.randint(1, 8) * len(enable),
        **_draw_adapter(rng),
        "lora_dropout": rng.choice(RATES),
        "enable_lora": enable,
        "fan_in_fan_out": _flag(rng),
        "merge_weights": rng.random() < 0.7,
    }
    return named, {"bias": _flag(rng)}


def _draw_embedding(rng: random.Random) -> tuple[Settings, Settings]:
    num = rng.randint(1, 20)
    named = {
        "num_embeddings": num,
        "embedding_dim": rng.randint(1, 16),
        **_draw_adapter(rng),
        "merge_weights": rng.random() < 0.7,
    }
    by_freq = _flag(rng)
    keywords = {
        "padding_idx": rng.choice((None, 0, num - 1, -1, -num)),
        "scale_grad_by_freq": by_freq,
        # torch has no sparse gradient by frequency, loralib's adapter none at all.
        "sparse": named["r"] <= 0 and not by_freq and _flag(rng),
        "_freeze": rng.random() < 0.2,
    }
    return named, keywords


def _draw_conv(rng: random.Random, kernels: tuple[int, ...]) -> tuple[Settings, Settings]:
    groups = rng.choice((1, 1, 2, 3))
    depthwise = rng.random() < 0.2
    kernel, dilation = rng.choice(kernels), rng.choice((1, 1, 2))
    padding = rng.choice((0, 1, 2, "valid", "same"))
    if padding == "same" and kernel % 2 == 0:
        padding = 1  # torch warns about the copy that this takes
    named = {
        "in_channels": groups * (1 if depthwise else rng.randint(1, 3)),
        "out_channels": groups * rng.randint(1, 3),
        "kernel_size": kernel,
        **_draw_adapter(rng),
        "lora_dropout": 0.0,
        "merge_weights": rng.random() < 0.7,
    }
    keywords = {
        "stride": 1 if padding == "same" else rng.choice((1, 1, 2)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": _flag(rng),
        "padding_mode": rng.choice(("zeros", "zeros", "circular", "reflect", "replicate")),
    }
    return named, keywords


_DRAW: dict[str, Callable[[random.Random], tuple[Settings, Settings]]] = {
    "Linear": _draw_linear,
    "MergedLinear": _draw_merged_linear,
    "Embedding": _draw_embedding,
    "Conv2d": lambda rng: _draw_conv(rng, (1, 2, 3, 3)),
    "Conv1d": lambda rng: _draw_conv(rng, (1,)),  # loralib's others do not run
    "Conv3d": lambda rng: _draw_conv(rng, (1,)),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, classes in CLASSES.items():
        if argument in metafunc.fixturenames:
            draws = [_draw(cls, number) for cls in classes for number in range(DRAWS[cls])]
            metafunc.parametrize(argument, draws, ids=[f"{d.cls}-{d.number}" for d in draws])
    if "drawn_fused" in metafunc.fixturenames:
        draws = [d for d in (_draw("Linear", n) for n in range(DRAWS["Linear"])) if _is_fused(d)]
        draws = draws[:FUSED]
        metafunc.parametrize("drawn_fused", draws, ids=[f"{d.cls}-{d.number}" for d in draws])


def _is_fused(drawn: Drawn) -> bool:
    """Whether the kernels serve the layer, and draw no mask, which would not be loralib's."""
    rate = drawn.settings.get("lora_dropout", 0.0)
    return drawn.has_adapter and drawn.dtype is not torch.float64 and rate in (0.0, 1.0)


def _assert_same_results(
    drawn: Drawn, ours: nn.Module, theirs: nn.Module, x: Tensor | None = None
) -> None:
    x = drawn.input() if x is None else x
    wide = drawn.oracle(theirs, x)
    expected, actual = drawn.results(theirs, x), drawn.results(ours, x)
    exact = drawn.results(wide, x)
    assert actual.keys() == expected.keys()
    for what, value in expected.items():
        if value is None:
            assert actual[what] is None, what
        else:
            _assert_same(actual[what], value, exact[what], what)


def _assert_same(actual: Any, theirs: Tensor, oracle: Tensor | None, what: str) -> None:
    """Hold `actual` against loralib's value, in low precision against that in float64."""
    assert isinstance(actual, Tensor), f"{what}: loralib has one, lora_fast none"
    assert actual.layout == theirs.layout, what
    actual, theirs = actual.to_dense(), theirs.to_dense()
    if theirs.dtype == torch.float64:
        torch.testing.assert_close(
            actual, theirs, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}"
        )
        return
    assert oracle is not None, what
    assert_within_budget(actual, theirs, oracle.to_dense(), what=what)


@pytest.fixture
def assert_same_results() -> Callable[..., None]:
    """Run both layers on one input and hold outputs and gradients against each other."""
    return _assert_same_results


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Hold one tensor against loralib's: closely in float64, else within the error budget."""
    return _assert_same
