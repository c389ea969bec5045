"""Timing several implementations against each other, and what memory they take.

Absolute times on a shared machine drift; ratios of samples that were taken in turns do not. So all
candidates are measured in one process, in rounds, and a ratio is the median over the rounds.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
ROOT = Path(__file__).resolve().parents[1]


class Rounds:
    """Samples of all candidates, a list each, the i-th of all taken in the same round.

    Attributes:
        seconds: for each candidate its time for one call in every round.
    """

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        """Return the median time of one call, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Return how many times as long `slow` takes: median over the rounds, and its quartiles."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        quarter = len(ratios) // 4
        return statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]


def interleave(
    candidates: dict[str, Step], *, budget: float = 1.0, rounds: int = 31, sample: float = 2e-3
) -> Rounds:
    """Time all candidates in turns.

    Args:
        candidates: what is called, by name; each call does its whole work before it returns.
        budget: seconds to spend on all of them; at least five rounds are made.
        rounds: the most rounds.
        sample: seconds that a sample lasts at least; quick calls are repeated.
    """
    loops = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        loops[name] = max(1, round(sample / once))
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        for i in range(rounds):
            if i >= 5 and time.perf_counter() - begin > budget:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                call, count = candidates[name], loops[name]
                start = time.perf_counter()
                for _ in range(count):
                    call()
                seconds[name].append((time.perf_counter() - start) / count)
    finally:
        if was_enabled:
            gc.enable()
    return Rounds(seconds)


def peak_bytes(call: Step) -> int:
    """Return the most memory of torch's CPU allocator that `call` holds above what was there."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of every start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the commit that a measurement belongs to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    # Virtual machines hide the name; family and model still tell the generation.
    numbers = f"family {fields.get('cpu family')} model {fields.get('model')}"
    return f"{fields.get('model name', 'unknown')} ({numbers})"


def write(folder: Path, name: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` as JSON and as a markdown table, headed by the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
    head = ", ".join(f"{key} {value}" for key, value in facts.items())
    (folder / f"{name}.md").write_text(f"{head}\n\n{markdown(rows)}\n")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return `rows` as a markdown table; numbers get three significant digits."""
    columns = list(rows[0]) if rows else []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
