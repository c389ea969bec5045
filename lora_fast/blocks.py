"""The blocks of a `MergedLinear`: where each lies in the output, and its factors in A and B."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Spans = tuple[tuple[int, int], ...]
"""First and last + 1 output feature of every block that has an adapter, ascending."""


class Block(NamedTuple):
    """One block of the output, of the rows of a weight.

    Attributes:
        begin: its first output feature.
        end: its last + 1.
        enabled: whether it has an adapter.
        row: where B has its rows, or would have them.
        adapter: how many blocks before it have an adapter.
    """

    begin: int
    end: int
    enabled: bool
    row: int
    adapter: int

    @property
    def width(self) -> int:
        """How many output features it has."""
        return self.end - self.begin

    def factors(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Its own (R, K) of A and (width, R) of B, as views."""
        rank = lora_B.shape[1]
        return lora_A.narrow(0, self.adapter * rank, rank), lora_B.narrow(0, self.row, self.width)


def block_widths(
    out_features: int, enable_lora: list[bool], out_splits: list[int] | None
) -> list[int]:
    """Width of every block; equal ones where `out_splits` is None."""
    if out_splits is None:
        return [out_features // len(enable_lora)] * len(enable_lora)
    return out_splits


def output_blocks(
    out_features: int, enable_lora: list[bool], out_splits: list[int] | None
) -> list[Block]:
    """Every block, from the first on."""
    found = []
    begin = row = adapter = 0
    widths = block_widths(out_features, enable_lora, out_splits)
    for width, enabled in zip(widths, enable_lora, strict=True):
        end = begin + width  # a tensor while torch.jit traces: nothing is added in place
        found.append(Block(begin, end, enabled, row, adapter))
        begin = end
        if enabled:
            row, adapter = row + width, adapter + 1
    return found


def spans(out_features: int, enable_lora: list[bool], out_splits: list[int] | None) -> Spans:
    """Where the blocks lie that have an adapter."""
    found, begin = [], 0  # not by way of `output_blocks`, which takes twice as long, in every call
    widths = block_widths(out_features, enable_lora, out_splits)
    for width, enabled in zip(widths, enable_lora, strict=True):
        end = begin + width
        if enabled:
            found.append((begin, end))
        begin = end
    return tuple(found)


def edges(spans: Spans) -> list[int]:
    """Spans as the operators take them, one after the other."""
    return [edge for span in spans for edge in span]


def columns(s: Tensor, rank: int, spans: Spans) -> list[Tensor]:
    """S = X A^T, (..., R * adapters), of each adapter."""
    return [s.narrow(-1, i * rank, rank) for i in range(len(spans))]


def rows(lora_B: Tensor, spans: Spans) -> tuple[Tensor, ...]:
    """B, (sum of their widths, R), of each adapter."""
    # Not split(), a function in Python around this one.
    parts: tuple[Tensor, ...] = lora_B.split_with_sizes([hi - lo for lo, hi in spans])
    return parts


def from_edges(edges: Sequence[int], out_features: int) -> tuple[list[bool], list[int]]:
    """`enable_lora` and `out_splits` that give these `edges`."""
    enable_lora, widths, column = [], [], 0
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        if first != column:
            enable_lora.append(False)
            widths.append(first - column)
        enable_lora.append(True)
        widths.append(end - first)
        column = end
    if column != out_features:
        enable_lora.append(False)
        widths.append(out_features - column)
    return enable_lora, widths
