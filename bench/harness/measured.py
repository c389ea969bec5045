"""From the contest to pytest: results are kept on disk and handed to pytest-benchmark."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.contest import OUT_OF_MEMORY, Lab, Row, measure
from harness.names import is_ours
from harness.profiling import profile
from harness.progress import Progress
from harness.rendered import write_folder
from harness.results import write_json
from harness.selection import Selection

OUTPUT_FAILED = 74  # EX_IOERR of sysexits.h, as lora_fast's commands


class Replay:
    """A timer for pytest-benchmark that goes forward by one sample between two readings."""

    __name__ = "CUDA events" if torch.cuda.is_available() else "time.perf_counter"

    def __init__(self) -> None:
        self.now, self._samples, self._running = 0.0, iter([0.0]), False

    def load(self, samples: list[float]) -> None:
        """Set what the next readings tell."""
        self._samples, self._running = iter(samples), False

    def __call__(self) -> float:
        """Return the time."""
        if self._running:
            self.now += next(self._samples)
        self._running = not self._running
        return self.now


class Measured:
    """One peer in one row.

    Args:
        held_to_budget: whether too large an error is a failure, or only told.
    """

    def __init__(
        self,
        entry: dict[str, Any],
        samples: list[float],
        benchmark: Any,
        replay: Replay,
        *,
        held_to_budget: bool,
    ) -> None:
        self.entry, self._samples = entry, samples
        self._benchmark, self._replay = benchmark, replay
        self._held_to_budget = held_to_budget

    def check(self) -> None:
        """Hand the samples on, and fail if the peer failed or is wrong."""
        if "absent" in self.entry:
            pytest.skip(self.entry["absent"])
        if self.entry.get("failed", "").endswith(OUT_OF_MEMORY):
            pytest.skip(self.entry["failed"])
        problem = self.entry.get("failed") or self.entry.get("incomplete")
        if problem:  # told from inside, so that pytest-benchmark knows of it
            self._benchmark.pedantic(_fail, args=(problem,))
        self._benchmark.extra_info.update(self.entry)
        self._replay.load(self._samples)
        self._benchmark.pedantic(_nothing, rounds=len(self._samples))
        if self._held_to_budget:
            assert self.entry.get("error", 0.0) <= 1.0, "further from float64 than its budget"


class Store:
    """All that was measured; every row is on disk as soon as it is there.

    Args:
        out: where; None to write nothing.
        published: where the tables go too, once all of them are whole.
    """

    def __init__(
        self,
        lab: Lab,
        selection: Selection,
        facts: dict[str, Any],
        out: Path | None,
        published: Path | None = None,
    ) -> None:
        self.lab, self.selection, self.facts = lab, selection, facts
        self.out, self.published = out, published
        self.progress = Progress()
        self.asked: list[Callable[[Selection], Iterable[Row]]] = []  # the rows of each table
        self.problem = ""  # why results could not be written
        self.tables: dict[str, list[dict[str, Any]]] = {}
        # pytest may run the items of a row apart from each other, failed ones first, say.
        self._rows: dict[tuple[str, str], tuple[dict[str, Any], dict[str, list[float]]]] = {}

    def measured(
        self, row: Row, peers: list[str], peer: str, benchmark: Any, replay: Replay
    ) -> Measured:
        """Return a peer's part of a row, which is measured first if it was not."""
        if (row.table, row.id) not in self._rows:
            with warnings.catch_warnings():
                # What torch.compile says of loralib is not ours to repair; and where times are
                # taken, no warning of another library costs a row.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
                if not self.lab.is_toy:
                    warnings.simplefilter("default")
                result = measure(row, self.lab, peers)
            # The single samples go to pytest-benchmark's own file.
            samples = {p: entry.pop("samples", []) for p, entry in result["peers"].items()}
            self.tables.setdefault(row.table, []).append(result)
            self._rows[row.table, row.id] = (result, samples)
            self._write_or_stop(row.table)
        self.progress.ran(row.table, row.id, peer)
        result, samples = self._rows[row.table, row.id]
        # How near others come is theirs; at toy sizes it shows that they were built right.
        held = self.lab.is_toy or is_ours(peer)
        return Measured(
            result["peers"][peer], samples[peer], benchmark, replay, held_to_budget=held
        )

    def profiled(self, row: Row, peer: str, benchmark: Any) -> Measured:
        """Write a peer's profile in the place of its times."""
        assert self.out is not None
        entry = profile(row, self.lab, peer, self.out)
        return Measured(entry, [0.0], benchmark, Replay(), held_to_budget=False)

    def all_facts(self) -> dict[str, Any]:
        """Return the machine's facts and the ceilings measured so far."""
        return self.facts | self.lab.facts()

    def _write(self, folder: Path, table: str) -> None:
        facts = self.all_facts()
        if part := self.progress.part(table):
            facts["narrowed by"] = facts.get("narrowed by", {}) | {"items": part}
        write_json(folder, table, facts, self.tables[table])

    def _write_or_stop(self, table: str) -> None:
        """Keep what was measured; to go on would be in vain where that fails."""
        if self.out is None:
            return
        try:
            self._write(self.out, table)
        except OSError as error:
            pytest.exit(f"results cannot be written: {error}", returncode=OUTPUT_FAILED)

    def finish(self) -> bool:
        """Write the tables and pictures of what was measured; return whether that went well."""
        if self.out is None or not self.tables:
            return True
        folders = [self.out]
        if self.published is not None and self.progress.is_whole:
            folders.append(self.published)
        for folder in folders:
            try:
                for table in self.tables:
                    self._write(folder, table)
                write_folder(folder)
            except (OSError, ValueError) as error:
                self.problem = f"results cannot be written: {error}"
                return False
            self.out = folder
        return True

    def summary(self) -> list[str]:
        """Return the last lines of the terminal."""
        lines = [f"{p}: missing, {why}" for p, why in self.facts["missing"].items()]
        for name, rows in self.tables.items():
            for row in rows:
                for peer, entry in row["peers"].items():
                    if problem := _problem(entry):
                        lines.append(f"{name} {row['id']} {peer}: {problem}")
        parts = {name: self.progress.part(name) for name in self.tables}
        lines += [f"{name}: {part} items were run" for name, part in parts.items() if part]
        lines += [self.problem] if self.problem else []
        return [*lines, f"results: {self.out}"]


def _problem(entry: dict[str, Any]) -> str:
    if "unchecked" in entry:
        return f"error not checked, {entry['unchecked']}"
    return entry.get("failed") or entry.get("incomplete") or ""


def _nothing() -> None:
    pass


def _fail(problem: str) -> None:
    raise AssertionError(problem)
