"""The project's targets on a CPU, and what each machine has measured of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.names import CLONES, FROZEN, LORALIB, OURS
from harness.results import number
from harness.tables import ordered

PEAK = "peak B/weight"
CYCLE = "eval+train"


@dataclass(frozen=True)
class Target:
    """What rows of some layers are to reach.

    Attributes:
        what: the rows, in words.
        limit: the least ratio, or with `peak` the most bytes.
        layer: of the rows.
        passes: of the rows.
        peer: whose time is divided by lora_fast's.
        peak: whether it is the most memory that is limited, in bytes a weight.
        only: what else the columns of the rows must be.
    """

    what: str
    limit: float
    layer: str
    passes: tuple[str, ...] = (CYCLE,)
    peer: str = LORALIB
    peak: bool = False
    only: tuple[tuple[str, Any], ...] = ()

    def values(self, tables: dict[str, Any]) -> list[float]:
        """Return what was measured, of each row that it is about."""
        return [
            value
            for row in _rows(tables)
            if row["columns"].get("layer") == self.layer
            and row["columns"].get("pass") in self.passes
            and all(row["columns"].get(name) == wanted for name, wanted in self.only)
            for value in self._of(row["peers"])
        ]

    def _of(self, peers: dict[str, Any]) -> list[float]:
        if self.peak:
            return [peers[OURS][PEAK]] if PEAK in peers.get(OURS, {}) else []
        ratio = peers.get(self.peer, {}).get("ratio")
        return [] if ratio is None else [ratio[0]]

    def cell(self, values: list[float]) -> str:
        """Return the value that is furthest from the target, and how many rows reach it."""
        if not values:
            return ""
        reached = sum(v <= self.limit if self.peak else v >= self.limit for v in values)
        worst = max(values) if self.peak else min(values)
        return number(worst) if len(values) == 1 else f"{worst:.2f} ({reached} of {len(values)})"


_BIG = (("shape", "4096 x 4096"), ("r", 16))
_STEPS = ("fwd", "fwd+bwd")
TARGETS = (
    *(
        Target(f"{layer}: loralib's time, all rows", 0.97, layer, _STEPS)
        for layer in ("Linear", "Embedding", "Conv2d")
    ),
    Target("MergedLinear, forward + backward: loralib's time", 2.3, "MergedLinear", ("fwd+bwd",)),
    Target(
        "MergedLinear, forward + backward: the frozen layer's time",
        1 / 1.2,
        *("MergedLinear", ("fwd+bwd",), FROZEN),
    ),
    *(
        Target(
            f"eval + train of 4096 x 4096, r = 16, {dtype}: loralib's time",
            8.0,
            "Linear",
            only=(*_BIG, ("dtype", dtype)),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Target(
        "the same, float32: the time of two clones of the weight",
        1 / 1.5,
        "Linear",
        peer=CLONES,
        only=(*_BIG, ("dtype", "float32")),
    ),
    *(
        Target(f"eval + train of {layer}: loralib's time", 4.0, layer)
        for layer in ("MergedLinear", "Embedding", "Conv2d")
    ),
    Target(
        "eval + train of 4096 x 4096, r = 16: most memory beside, bytes a weight",
        1.1,
        "Linear",
        peak=True,
        only=_BIG,
    ),
    *(
        Target(f"eval + train of {layer}: the same", 1.1, layer, peak=True)
        for layer in ("MergedLinear", "Embedding", "Conv2d")
    ),
)


def target_rows(machines: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each target that was measured, with a column for each machine."""
    lines = []
    for target in TARGETS:
        found = {name: target.values(tables) for name, tables in machines.items()}
        if any(found.values()):
            sign = "<=" if target.peak else ">="
            line = {"what": target.what, "target": f"{sign} {target.limit:.3g}"}
            lines.append(line | {name: target.cell(values) for name, values in found.items()})
    return lines


def _rows(tables: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for _, table in ordered(tables):
        yield from table["rows"]
