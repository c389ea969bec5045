"""Which implementation serves each op on each device of this machine, and why: `explain()`."""

from typing import NamedTuple, get_args

import torch

from lora_fast import ops
from lora_fast.backend import (
    LAUNCHED_SOONER,
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
_MERGES = {
    Backend.NATIVE: "one pass, about a byte a weight while merged",
    Backend.REFERENCE: "keeps a copy of the weight",
}
# What auto takes instead for some calls, and for which.
_SOME_CALLS = {
    ("lora_linear", "cuda", Backend.TRITON): (
        Backend.EAGER_LORA_FIRST,
        f"where {LAUNCHED_SOONER}",
    ),
    ("lora_linear", "cpu", Backend.REFERENCE): (
        Backend.EAGER,
        "where many numbers are dropped, or a few rows of 16 bits added to",
    ),
}


class Decision(NamedTuple):
    """What serves an op on a device, "none" where nothing can, and why."""

    op: str
    device: str
    implementation: str
    reason: str


def what_runs() -> list[Decision]:
    """Return which implementation serves each op on each device of this machine, and why."""
    found = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for op in OPS:
            chosen, reason = _decision(op, device)
            found.append(Decision(op, device, "none" if chosen is None else chosen.value, reason))
            others = _SOME_CALLS.get((op, device, chosen)) if chosen is not None else None
            if others is not None and get_backend() == "auto":
                found.append(Decision(op, device, others[0].value, others[1]))
    return found


def _decision(op: str, device: str) -> tuple[Backend | None, str]:
    if op in ("merge_", "unmerge_"):
        chosen, reason = merge_choice(lambda: ops.load_native(device))
        what = _MERGES[chosen]
        return chosen, what if chosen is Backend.NATIVE else f"{what}: {reason}"
    x = torch.empty(0, device=device, dtype=torch.int64 if op == "lora_embedding" else None)
    try:
        return choice(op, (x,))
    except ForcedInVainError as error:
        return None, error.reason


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
    for op, device, implementation, reason in what_runs():
        rows.append(f"{op:20} {device:5} -> {implementation:16} {reason}")
    return "\n".join(rows)
