"""One row of a table: all peers built, timed in turns, and checked against float64."""

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.clock import Candidate, Clock, Samples, Step
from harness.floor import Ceilings
from harness.names import FROZEN, OURS
from harness.selection import Level, at_most
from harness.shapes import dtype_name
from lora_fast.commands import in_one_line
from lora_fast.testing import budget_used, saved_bytes

Outputs = dict[str, Tensor]
OUT_OF_MEMORY = "out of memory"
_LONGEST_REASON = 200


class Absent(Exception):  # noqa: N818 - nothing went wrong
    """A peer does not take part in a row; the message says why."""


@dataclass
class Contestant:
    """What one peer does in one row.

    Attributes:
        steps: the timed work, on one copy of the data each.
        around: what must hold while anything of it runs.
        forward: the forward pass, for what it keeps for backward; `known` does not count.
        outputs: the results by name, the same names as the row's oracle has.
        expected: what the oracle's results are for this peer, where its parameters are others.
        told: more columns, known before the measurement.
        after: more columns, found out after it.
    """

    steps: Sequence[Step]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    forward: Step | None = None
    known: Sequence[Tensor] = ()
    outputs: Callable[[], Outputs] | None = None
    expected: Callable[[Outputs], Outputs] = lambda results: results
    told: dict[str, Any] = field(default_factory=dict)
    after: Callable[[], dict[str, Any]] | None = None


class Lab:
    """Where rows are measured: the device, its clock, its ceilings, and what peers need to know."""

    def __init__(
        self, device: torch.device, level: Level, clock: Clock, lorafusion: str | None = None
    ) -> None:
        self.device, self.level, self.clock, self.lorafusion = device, level, clock, lorafusion
        self._rates: dict[torch.dtype, float] = {}

    @property
    def is_toy(self) -> bool:
        """Whether nothing is measured: the run only shows that all works."""
        return self.level == "toy"

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy that no cache holds."""
        size = 2**12 if self.is_toy else 2**31 if self.clock.is_cuda else 2**28
        source = torch.zeros(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        samples = self.clock.interleave({"copy": Candidate([lambda: target.copy_(source)])})
        return 2 * size / samples.median("copy")

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Return what this device did in this run: a large dense product, a large copy."""
        if dtype not in self._rates:
            n = 64 if self.is_toy else 8192 if self.clock.is_cuda else at_most(2048, dtype)
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            samples = self.clock.interleave({"mm": Candidate([lambda: a @ b])})
            self._rates[dtype] = 2 * n**3 / samples.median("mm")
        return Ceilings(self._rates[dtype], self.bandwidth)

    def facts(self) -> dict[str, float]:
        """Return the ceilings that were measured so far."""
        rates = {f"{dtype_name(d)} TFLOP/s": r / 1e12 for d, r in self._rates.items()}
        return {**rates, "copy GB/s": self.bandwidth / 1e9} if rates else {}


class Row:
    """One line of a table. Subclasses are frozen dataclasses that say what is built."""

    table: ClassVar[str]
    graph: bool = False

    @property
    def id(self) -> str:
        """The name of the row, without blanks."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        raise NotImplementedError

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer ready to run.

        Raises:
            Absent: the peer does not take part.
        """
        raise NotImplementedError

    def oracle(self, lab: Lab) -> tuple[Outputs, Outputs] | None:
        """Return plain torch's results in the row's dtype and in float64, where there is one."""
        return None

    def extra_seconds(self, lab: Lab) -> float | None:
        """Return what a fused adapter must cost beside the frozen layer, by the byte model."""
        return None

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return more columns of a peer that takes so long."""
        return {}


def measure(row: Row, lab: Lab, peers: Sequence[str]) -> dict[str, Any]:
    """Return everything about a row, ready for JSON.

    A peer that fails is recorded as such and the others go on.
    """
    entries: dict[str, dict[str, Any]] = {}
    contestants: dict[str, Contestant] = {}
    for peer in peers:
        try:
            contestants[peer] = row.build(peer, lab)
            entries[peer] = dict(contestants[peer].told)
        except Absent as reason:
            entries[peer] = {"absent": str(reason)}
        except Exception as error:
            entries[peer] = {"failed": explain(error)}
    candidates = _candidates(row, lab, contestants, entries)
    samples = lab.clock.interleave(candidates)
    for peer, error in samples.failures.items():
        entries[peer] = {"failed": explain(error)}
    for peer in samples.seconds:
        entries[peer] |= _times(row, samples, peer)
        _guarded(entries[peer], lambda p=peer: _extras(row, lab, contestants[p]))
    _add_errors(row, lab, {p: contestants[p] for p in samples.seconds}, entries)
    result: dict[str, Any] = {"id": row.id, "columns": row.columns(), "peers": entries}
    extra = row.extra_seconds(lab)
    if extra is not None and FROZEN in samples.seconds:
        ideal = samples.median(FROZEN) + extra
        result["ideal_us"] = ideal * 1e6
        for peer in samples.seconds:
            entries[peer]["efficiency"] = ideal / samples.median(peer)
    result["gpu"] = lab.clock.state()
    contestants.clear()
    _free(lab)
    return result


def _candidates(
    row: Row,
    lab: Lab,
    contestants: dict[str, Contestant],
    entries: dict[str, dict[str, Any]],
) -> dict[str, Candidate]:
    candidates = {p: Candidate(c.steps, c.around) for p, c in contestants.items()}
    if not row.graph:
        return candidates
    for peer in list(candidates):
        try:
            candidates[peer] = lab.clock.captured(candidates[peer])
        except Exception as error:
            entries[peer] = {"failed": f"in a CUDA graph: {explain(error)}"}
            del candidates[peer]
    return candidates


def _times(row: Row, samples: Samples, peer: str) -> dict[str, Any]:
    seconds = samples.median(peer)
    low, high = samples.spread(peer)
    found: dict[str, Any] = {"us": seconds * 1e6, "us_low": low * 1e6, "us_high": high * 1e6}
    if OURS in samples.seconds:
        found["ratio"] = list(samples.ratio(peer, OURS))
    found["samples"] = samples.seconds[peer]
    return found | row.summary(seconds)


def _extras(row: Row, lab: Lab, contestant: Contestant) -> dict[str, Any]:
    """Memory, and the host's time where it launches every kernel."""
    eager = Candidate(contestant.steps, contestant.around)
    found: dict[str, Any] = {"peak_bytes": lab.clock.peak_bytes(eager)}
    host = None if row.graph else lab.clock.host_seconds(eager, calls=1 if lab.is_toy else 10)
    if host is not None:
        found["host_us"] = host * 1e6
    if contestant.forward is not None:
        with contestant.around():
            found["saved_bytes"] = saved_bytes(contestant.forward, contestant.known)
    if contestant.after is not None:
        found |= contestant.after()
    return found


def _add_errors(
    row: Row, lab: Lab, contestants: dict[str, Contestant], entries: dict[str, dict[str, Any]]
) -> None:
    checked = {p: c for p, c in contestants.items() if c.outputs is not None}
    if not checked:
        return
    try:
        expected = row.oracle(lab)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        for peer in checked:  # the row has its times; it was the float64 oracle that failed
            entries[peer]["unchecked"] = f"the oracle was {OUT_OF_MEMORY}"
        return
    if expected is None:
        return
    for peer, contestant in checked.items():
        _guarded(entries[peer], lambda c=contestant: {"error": _error(c, *expected)})


def _error(contestant: Contestant, eager: Outputs, oracle: Outputs) -> float:
    """Return the largest error of any result as a part of its budget; at most 1 is right."""
    assert contestant.outputs is not None
    with contestant.around():
        found = contestant.outputs()
    eager, oracle = contestant.expected(eager), contestant.expected(oracle)
    return max(budget_used(found[name], eager[name], wide) for name, wide in oracle.items())


def _guarded(entry: dict[str, Any], more: Callable[[], dict[str, Any]]) -> None:
    """Add what `more` returns; where that fails, the times stay and the entry says so."""
    try:
        entry |= more()
    except Exception as error:
        entry["incomplete"] = explain(error)


def explain(error: BaseException) -> str:
    """Return one line that says what went wrong."""
    return OUT_OF_MEMORY if is_out_of_memory(error) else in_one_line(error)[:_LONGEST_REASON]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was too small, on a GPU or a CPU, for which torch has no class."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )


def _free(lab: Lab) -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # its limit of recompilations counts per function, not per row
    gc.collect()
    if lab.clock.is_cuda:
        torch.cuda.empty_cache()
