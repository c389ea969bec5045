"""Which implementation serves each op on each device of this machine, and why: `explain()`."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lora_fast import ops
from lora_fast.backend import (
    Backend,
    BackendName,
    ForcedInVainError,
    choice,
    get_backend,
    merge_choice,
)

OPS = (
    *("lora_linear", "lora_merged_linear", "lora_embedding"),
    *("merged_weight", "merge_", "unmerge_"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MERGES = {
    Backend.NATIVE: "one pass, about a byte a weight while merged",
    Backend.REFERENCE: "keeps a copy of the weight",
}
# Functions that leave no choice, and what serves them.
_NO_CHOICE = {
    "lora_conv": ("merged_weight", "torch's convolution, with the weight that this op forms"),
    "merged_delta": (Backend.REFERENCE.value, "there is no kernel for it"),
}


class Size(NamedTuple):
    """A kind of call, in words, and one at its limit: M rows, K in_features, N out_features.

    Of an embedding M indices, K rows and N columns of its table; of a weight (N, K) alone.
    """

    words: str
    M: int = 1
    K: int = 1
    N: int = 1
    drops: bool = False


# By the limits of the dispatch: `tests/test_decisions.py` asks on either side of each.
_SIZES = {
    ("lora_linear", "cpu"): (
        Size("1 row without a gradient of x"),
        Size("2 to 32 rows", 32),
        Size("more than 32 rows", 33),
        Size("dropout of 2^16 numbers or more", 2**16, drops=True),
    ),
    ("lora_linear", "cuda"): (
        Size("up to 64 rows without gradients", 64),
        Size("M K N up to 2^34", 2**17, N=2**17),
        Size("M K N over 2^34", 2**17 + 1, N=2**17),
        Size("dropout of up to 2^21 numbers", 2**21, N=2**13, drops=True),
        Size("dropout of more than 2^21 numbers", 2**21 + 1, drops=True),
    ),
    ("lora_embedding", "cpu"): (
        Size("up to 8 indices", 8),
        Size("more than 8 indices", 9),
    ),
    ("merged_weight", "cuda"): (
        Size("small weights"),
        Size("large weights", K=2**12, N=2**11),
    ),
}


class Call(NamedTuple):
    """A call that stands for all of its dtype and size; nobody reads the values of its tensors."""

    dtype: torch.dtype
    size: Size
    tensors: tuple[Tensor | None, ...]


class Decision(NamedTuple):
    """What serves an op on a device, "none" where nothing can, and why.

    Attributes:
        calls: which of its calls, in words; all if it is empty.
    """

    op: str
    device: str
    implementation: str
    reason: str
    calls: str = ""


def what_runs() -> list[Decision]:
    """Return which implementation serves each op on each device of this machine, and why.

    Calls that are served alike for the same reason are one decision, those of an op in a row.
    """
    found = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for op in OPS:
            answers: dict[tuple[str, str], list[Call]] = {}
            for call in representative_calls(op, device):
                answers.setdefault(_answer(op, device, call), []).append(call)
            for (implementation, reason), calls in answers.items():
                words = _in_words(calls, _sizes(op, device))
                found.append(Decision(op, device, implementation, reason, words))
    return found


def representative_calls(op: str, device: str) -> Iterator[Call]:
    """Yield a call of an op for every dtype and size by which the dispatch may choose."""
    for dtype in DTYPES:
        for size in _sizes(op, device):
            yield Call(dtype, size, _tensors(op, device, dtype, size))


def _tensors(op: str, device: str, dtype: torch.dtype, size: Size) -> tuple[Tensor | None, ...]:
    empty = partial(torch.empty, device=device, dtype=dtype)
    _, m, k, n, _ = size
    factors = (empty(1, k), empty(n, 1))
    if op == "lora_embedding":
        return (torch.zeros(m, device=device, dtype=torch.int64), empty(k, n), *factors)
    if op == "merged_weight":
        return (empty(n, k), *factors)
    return (empty(m, k), empty(n, k), *factors, None)


def _sizes(op: str, device: str) -> tuple[Size, ...]:
    return _SIZES.get((op, device), (Size(""),))


def _answer(op: str, device: str, call: Call) -> tuple[str, str]:
    """The implementation that serves a call, and the reason that the dispatch logs."""
    if op in ("merge_", "unmerge_"):
        chosen, reason = merge_choice(lambda: ops.load_native(device))
        what = _MERGES[chosen]
        return chosen.value, what if chosen is Backend.NATIVE else f"{what}: {reason}"
    try:
        chosen, reason = choice(op, call.tensors, call.size.drops)
    except ForcedInVainError as error:
        return "none", error.reason
    return chosen.value, reason


def _in_words(calls: Iterable[Call], sizes: tuple[Size, ...]) -> str:
    """Which calls these are, of all sizes in all dtypes; nothing where they are all."""
    of_dtype: dict[str, list[Size]] = {}
    for call in calls:
        of_dtype.setdefault(str(call.dtype).removeprefix("torch."), []).append(call.size)
    dtypes_of: dict[str, list[str]] = {}
    for dtype, found in of_dtype.items():
        dtypes_of.setdefault(_sizes_in_words(found, sizes), []).append(dtype)
    parts = []
    for words, dtypes in dtypes_of.items():
        names = "" if len(dtypes) == len(DTYPES) else ", ".join(dtypes)
        parts.append(f"{names} ({words})" if names and words else names or words)
    return "; ".join(parts)


def _sizes_in_words(found: list[Size], sizes: tuple[Size, ...]) -> str:
    others = [size.words for size in sizes if size not in found]
    if len(others) == 1 < len(found):
        return f"all but {others[0]}"
    return ", ".join(size.words for size in found) if others else ""


def explain() -> str:
    """Print which implementation serves each op on each device of this machine, and why.

    Returns:
        The text that was printed.
    """
    text = explanation()
    print(text)
    return text


def explanation() -> str:
    """Return what `explain` prints."""
    choices = ", ".join(get_args(BackendName))
    rows = [f"backend: {get_backend()} (of {choices}), torch {torch.__version__}"]
    if not torch.cuda.is_available():
        rows.append("cuda: not available, nothing is fused on this machine")
    for op, device, implementation, reason, calls in what_runs():
        why = f"{calls}: {reason}" if calls else reason
        rows.append(_row(op, device, implementation, why))
    rows += [_row(op, "any", *served) for op, served in _NO_CHOICE.items()]
    return "\n".join(rows)


def _row(op: str, device: str, implementation: str, why: str) -> str:
    return f"{op:20} {device:5} -> {implementation:16} {why}"
