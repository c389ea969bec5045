"""The layers of real models, by name: which sizes, ranks and numbers of rows are measured."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One linear layer: K in_features, N out_features."""

    name: str
    K: int
    N: int
    bias: bool = False


# A layer that occurs twice with one size in a model is listed once, under both names.
SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "square": tuple(Shape(f"square-{n}", n, n, bias=True) for n in (768, 1024, 4096)),
    "gpt2-medium": (
        Shape("gpt2-medium.c_attn", 1024, 3072, bias=True),
        Shape("gpt2-medium.attn_proj", 1024, 1024, bias=True),
        Shape("gpt2-medium.c_fc", 1024, 4096, bias=True),
        Shape("gpt2-medium.mlp_proj", 4096, 1024, bias=True),
    ),
    "roberta-large": (
        Shape("roberta-large.qkv", 1024, 1024, bias=True),
        Shape("roberta-large.intermediate", 1024, 4096, bias=True),
        Shape("roberta-large.output", 4096, 1024, bias=True),
    ),
    "llama-3-8b": (
        Shape("llama-3-8b.qo", 4096, 4096),
        Shape("llama-3-8b.kv", 4096, 1024),
        Shape("llama-3-8b.gate_up", 4096, 14336),
        Shape("llama-3-8b.down", 14336, 4096),
    ),
    "llama-3-70b": (
        Shape("llama-3-70b.q", 8192, 8192),
        Shape("llama-3-70b.down", 28672, 8192),
    ),
}
TOY = Shape("toy", 32, 48, bias=True)
TOKENS = (1, 16, 512, 2048, 8192)
RANKS = (4, 8, 16, 64, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def find_shapes(names: Iterable[str]) -> tuple[Shape, ...]:
    """Return the shapes of the named sets, or single shapes, each size once.

    Raises:
        ValueError: a name is neither a set nor a shape of one.
    """
    single = {shape.name: shape for shapes in SHAPE_SETS.values() for shape in shapes}
    found: dict[tuple[int, int, bool], Shape] = {}
    for name in names:
        if name not in SHAPE_SETS and name not in single:
            known = ", ".join([*SHAPE_SETS, *single])
            raise ValueError(f"unknown shape set {name!r}; known are {known}")
        for shape in SHAPE_SETS.get(name) or (single[name],):
            found.setdefault((shape.K, shape.N, shape.bias), shape)
    return tuple(found.values())


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
