"""A layer of each kind, and the input that it takes, for compilers and tracers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_fast as lora

QKV = {"enable_lora": [True, False, True]}


@dataclass(frozen=True)
class Case:
    """A layer and the input that it takes."""

    make: Callable[..., Any]
    input: Callable[[int], Tensor]
    dropout: bool = False


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


CASES = {
    "linear": Case(lambda **kw: lora.Linear(8, 12, r=4, lora_alpha=6, **kw), _floats(8), True),
    "linear_transposed": Case(
        lambda **kw: lora.Linear(8, 12, r=4, fan_in_fan_out=True, **kw), _floats(5, 8), True
    ),
    "merged": Case(lambda **kw: lora.MergedLinear(8, 12, r=2, **QKV, **kw), _floats(8), True),
    "merged_ragged": Case(
        lambda **kw: lora.MergedLinear(8, 12, r=2, out_splits=[6, 2, 4], **QKV, **kw),
        _floats(5, 8),
        True,
    ),
    "embedding": Case(
        lambda **kw: lora.Embedding(10, 6, r=2, padding_idx=1, **kw),
        lambda batch: torch.randint(0, 10, (batch, 4)),
    ),
    "conv1d": Case(lambda **kw: lora.Conv1d(4, 6, 3, r=2, **kw), _floats(4, 9)),
    "conv2d": Case(lambda **kw: lora.Conv2d(4, 6, 3, r=2, padding=1, **kw), _floats(4, 7, 7)),
    "conv3d": Case(lambda **kw: lora.Conv3d(2, 4, 3, r=1, groups=2, **kw), _floats(2, 4, 5, 5)),
}
WITH_DROPOUT = [name for name, case in CASES.items() if case.dropout]


def build(name: str, **kwargs: Any) -> Any:
    """The named layer with random A and B."""
    torch.manual_seed(0)
    layer = CASES[name].make(**kwargs)
    randomize(layer)
    return layer


def randomize(model: nn.Module) -> None:
    """Give every A and B random values: a fresh layer's update is zero."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.5)


def grads(layer: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients of a non-uniform sum of `output` for the trainable parameters."""
    trainable = {k: p for k, p in layer.named_parameters() if p.requires_grad}
    seed = torch.linspace(-1.0, 2.0, output.numel()).view(output.shape)
    found = torch.autograd.grad(output, list(trainable.values()), seed)
    return dict(zip(trainable, found, strict=True))


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
