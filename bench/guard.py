"""The CPU ratios that must hold before a change lands: lora_fast against loralib, in one run.

    python bench/guard.py

Each ratio is the median over interleaved rounds, above 1 where lora_fast is faster. Its floor lies
below the goal by a head-room for noise, and a row below it is measured again, up to three times: a
busy moment passes, a slow layer stays. Exit status 1 if one stays below its floor.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench_layers import LayerRow
from bench_linear import LinearRow
from bench_merge import MergeRow
from harness.clock import Candidate, Clock, pin_cpu
from harness.contest import Lab, Row
from harness.names import CLONES, LORALIB, OURS
from harness.results import markdown
from harness.shapes import find_shapes
from lora_fast.commands import status_of

ATTEMPTS = 3
SMALL, SQUARE = find_shapes(["square-768", "square-1024"])
FP32 = torch.float32


@dataclass(frozen=True)
class Guard:
    """A ratio: how many times as long as lora_fast `peer` takes, the goal and the floor."""

    row: Row
    peer: str
    goal: float
    floor: float


GUARDS = (
    # What a call costs beside its products.
    Guard(LinearRow(SMALL, 1, 16, 0.0, FP32, True), LORALIB, 0.97, 0.75),
    Guard(LinearRow(SQUARE, 16, 16, 0.0, FP32, True), LORALIB, 0.97, 0.85),
    Guard(LinearRow(SQUARE, 512, 16, 0.0, FP32, True), LORALIB, 0.97, 0.85),
    Guard(LinearRow(SQUARE, 512, 16, 0.1, FP32, True), LORALIB, 0.97, 0.85),
    Guard(LayerRow("MergedLinear", 1024, 512, 16, 0.0, FP32, True), LORALIB, 2.3, 1.6),
    Guard(LayerRow("Embedding", 1024, 512, 16, 0.0, FP32, True), LORALIB, 0.97, 0.85),
    Guard(LayerRow("Conv2d", 64, 1024, 16, 0.0, FP32, True), LORALIB, 0.97, 0.85),
    # With AVX2 alone the sums take longer than memory: 2.5 here on an EPYC
    # of family 25 model 1, 2026-11-27.
    Guard(MergeRow("Linear-4096x4096", 16, FP32), LORALIB, 8.0, 1.8),
    # At most 1.5 times two clones.
    Guard(MergeRow("Linear-4096x4096", 16, FP32), CLONES, 1 / 1.5, 0.4),
)


def measured_ratio(row: Row, peer: str, lab: Lab) -> float:
    """Return how many times as long as lora_fast a peer takes."""
    contestants = {name: row.build(name, lab) for name in (peer, OURS)}
    samples = lab.clock.interleave(
        {name: Candidate(c.steps, c.around) for name, c in contestants.items()}
    )
    for error in samples.failures.values():
        raise error
    return samples.ratio(peer, OURS)[0]


def held(guard: Guard, lab: Lab) -> tuple[float, int]:
    """Return the best ratio and the number of attempts it took."""
    ratios = [measured_ratio(guard.row, guard.peer, lab)]
    while max(ratios) < guard.floor and len(ratios) < ATTEMPTS:
        ratios.append(measured_ratio(guard.row, guard.peer, lab))
    return max(ratios), len(ratios)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print all ratios; return the exit status."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    pin_cpu(2)
    device = torch.device("cpu")
    lab = Lab(device, "quick", Clock(device, rounds=15, budget=1.5))
    lines, low = [], 0
    for guard in GUARDS:
        ratio, attempts = held(guard, lab)
        low += ratio < guard.floor
        lines.append(
            {
                "row": guard.row.id,
                "against": guard.peer,
                "ratio": ratio,
                "goal": guard.goal,
                "floor": guard.floor,
                "attempts": attempts,
                "": "ok" if ratio >= guard.floor else "TOO SLOW",
            }
        )
    print(markdown(lines))
    return int(low > 0)


if __name__ == "__main__":
    sys.exit(status_of("guard.py", main))
