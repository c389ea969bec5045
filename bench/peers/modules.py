"""The layers of every kind from the same weights: a library's, PEFT's, the frozen one, the oracle.

A kind is the name of loralib's class. All of a row's layers compute the same function of x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contest import Outputs
from harness.names import QKV
from lora_fast import reference

SCALING = 2.0


@dataclass(frozen=True)
class Weights:
    """What all peers share.

    Attributes:
        kind: `Linear`, `MergedLinear`, `Embedding`, `Conv1d`, `Conv2d` or `Conv3d`.
        r: the rank that the constructor gets.
        weight: as the kind has it.
        bias: of each output, or None.
        a: lora_A in loralib's shape.
        b: lora_B in loralib's shape.
        p: dropout rate.
    """

    kind: str
    r: int
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    p: float = 0.0

    @property
    def dimensions(self) -> int:
        """Return how many a convolution has, 0 where it is none."""
        return self.weight.dim() - 2

    @property
    def kernel_size(self) -> int:
        """Return a convolution's."""
        return self.weight.shape[-1]

    def frozen(self) -> list[Tensor]:
        """Return what is not trained."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def arguments(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return what torch's and loralib's constructors of this kind take alike."""
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        first, second = self.weight.shape[:2]
        if self.kind == "Embedding":
            return (first, second), options
        options |= {"bias": self.bias is not None}
        if not self.dimensions:
            return (second, first), options
        k = self.kernel_size
        return (second, first, k), options | {"padding": k // 2}


@dataclass
class Layer:
    """A peer's layer.

    Attributes:
        forward: its function of x; the result has `parts` tensors, which others have side by side.
        trained: the A's, then the B's.
        frozen: what else it has.
        parts: how many tensors a result is, a tuple from 2 on.
        expected: what the oracle's results are in its own factors, where they are not loralib's.
    """

    forward: Callable[[Tensor], Any]
    trained: list[Tensor]
    frozen: list[Tensor] = field(default_factory=list)
    parts: int = 1
    expected: Callable[[Outputs], Outputs] = lambda results: results

    def divided(self, y: Tensor) -> Any:
        """Return what others have in one tensor as this layer has it."""
        if self.parts == 1:
            return y
        return tuple(part.contiguous() for part in y.chunk(self.parts, -1))

    def joined(self, y: Any) -> Tensor:
        """Return a result in one tensor."""
        return y if self.parts == 1 else torch.cat(y, -1)


def normal(*shape: int, std: float, **made: Any) -> Tensor:
    """Return N(0, std^2), drawn in its own dtype."""
    return torch.randn(*shape, **made).mul_(std)


def drawn(kind: str, shape: Sequence[int], r: int, *, bias: bool, p: float, **made: Any) -> Weights:
    """Return random weights; the update is about as large as the frozen output.

    Args:
        kind: as in `Weights`.
        shape: of the weight.
        r: rank.
        bias: whether there is one.
        p: dropout rate.
        made: generator, device and dtype.
    """
    n, width = shape[:2]
    std = (width if kind == "Embedding" else math.prod(shape[1:])) ** -0.5
    if kind == "Embedding":
        a_shape, b_shape = (r, n), (width, r)
    elif kind == "MergedLinear":
        a_shape, b_shape = (r * sum(QKV), width), (n // len(QKV) * sum(QKV), r)
    elif kind == "Linear":
        a_shape, b_shape = (r, width), (n, r)
    else:
        k, d = shape[-1], len(shape) - 2
        a_shape, b_shape = (r * k, width * k), (n * k ** (d - 1), r * k)
    weight, a = normal(*shape, std=std, **made), normal(*a_shape, std=std, **made)
    b = normal(*b_shape, std=r**-0.5, **made)
    if kind.startswith("Conv"):
        b = _as_peft_has_it(b, r, k, d)
    return Weights(kind, r, weight, normal(n, std=1.0, **made) if bias else None, a, b, p)


def channels_between(r: int, k: int, d: int) -> int | None:
    """Return the rank at which PEFT's A is as large as loralib's, of a kernel k in d dimensions.

    loralib's A (r k, C k) is then that A (rank, C k^d), and its B the Kronecker product of PEFT's
    and the identity of size k^(d-1). None where r k is no multiple of that size.
    """
    rank, rest = divmod(r * k, k ** (d - 1))
    return None if rest else rank


def _as_peft_has_it(b: Tensor, r: int, k: int, d: int) -> Tensor:
    """Return B (n k^(d-1), r k) with zeros where PEFT has no factor, if one of its ranks fits."""
    blocks, rank = k ** (d - 1), channels_between(r, k, d)
    if rank is None:
        return b
    identity = torch.eye(blocks, device=b.device, dtype=b.dtype)
    return torch.kron(b[::blocks, ::blocks].contiguous(), identity)


def layer_of(library: Any, weights: Weights) -> nn.Module:
    """Return the layer of loralib or of lora_fast with these weights."""
    sizes, options = weights.arguments()
    if weights.kind in ("Linear", "MergedLinear"):
        options |= {"lora_dropout": weights.p}
    if weights.kind == "MergedLinear":
        options |= {"enable_lora": QKV}
    layer: nn.Module = getattr(library, weights.kind)(
        *sizes, r=weights.r, lora_alpha=SCALING * weights.r, **options
    )
    library.mark_only_lora_as_trainable(layer)
    fill(getattr(layer, "conv", layer), weight=weights.weight, bias=weights.bias)
    fill(layer, lora_A=weights.a, lora_B=weights.b)
    return layer


def module(layer: nn.Module, **more: Any) -> Layer:
    """Return a module that is trained as its `requires_grad` say, A before B."""
    trained: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    return Layer(layer, trained, [p for p in layer.parameters() if not p.requires_grad], **more)


def frozen(weights: Weights) -> Layer:
    """torch's function without an adapter."""
    weight, bias = weights.weight, weights.bias
    function: Callable[[Tensor], Tensor]
    if weights.kind == "Embedding":
        function = partial(F.embedding, weight=weight)
    elif weights.dimensions:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[weights.dimensions - 1]
        function = partial(convolution, weight=weight, bias=bias, padding=weights.kernel_size // 2)
    else:
        function = lambda x: F.linear(x, weight, bias)  # noqa: E731 - cheaper than a partial
    return Layer(function, [], weights.frozen())


def oracle(weights: Weights, dtype: torch.dtype) -> Layer:
    """`lora_fast.reference`, plain torch, in another dtype."""
    a, b = (t.to(dtype).requires_grad_() for t in (weights.a, weights.b))
    options: dict[str, Any] = {}
    if weights.bias is not None:
        options["bias"] = weights.bias.to(dtype)
    function: Callable[..., Tensor] = reference.lora_linear
    if weights.kind == "Embedding":
        function = reference.lora_embedding
    elif weights.kind == "MergedLinear":
        function = partial(reference.lora_merged_linear, enable_lora=QKV)
    elif weights.dimensions:
        function = partial(reference.lora_conv, padding=weights.kernel_size // 2)
    weight = weights.weight.to(dtype)
    return Layer(
        partial(function, weight=weight, lora_A=a, lora_B=b, scaling=SCALING, **options), [a, b]
    )


def bare(weights: Weights) -> nn.Module:
    """Return torch's module, nothing of it trained."""
    sizes, options = weights.arguments()
    layer: nn.Module = getattr(nn, weights.kind)(*sizes, **options)
    fill(layer, weight=weights.weight, bias=weights.bias)
    return layer.requires_grad_(False)


@torch.no_grad()
def fill(layer: nn.Module, **values: Tensor | None) -> None:
    """Copy values, where there are any, into a layer's parameters."""
    for name, value in values.items():
        if value is not None:
            getattr(layer, name).copy_(value)
