"""Finding the plan that serves a call best: right first, then fast, within a time.

Plans are timed in turns, each with a cold L2 cache, and compared by the medians of many rounds.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from lora_fast.commands import in_one_line
from lora_fast.tune.problems import Job, Problem

# Rounds in which candidates are told apart, and in which the best is held against the rule.
_ROUNDS = 9
_FINAL_ROUNDS = 31
_WARM_UP = 2
# More than any GPU's L2 cache holds.
_FLUSHED_BYTES = 256 * 2**20
# Seconds; a host that is busy longer with one call does not only launch.
_LONGEST_LAUNCH = 3e-3

_log = logging.getLogger("lora_fast.tune")


class Clock(Protocol):
    """Times calls, and says how late it is."""

    def once(self, call: Callable[[], object]) -> float:
        """Run a call once; return its time in us."""

    def now(self) -> float:
        """Return seconds since some moment."""


class DeviceClock:
    """Times calls on a device, the L2 cache emptied before each.

    The device is kept busy until the host has launched all of the call: it is the device's time,
    as in a training step, where the host is ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        size = _FLUSHED_BYTES if self.is_cuda else 1
        self.flush = torch.empty(size, dtype=torch.int8, device=device)
        self.flushes = 1
        self.seconds_of_a_flush = self._flush_alone() if self.is_cuda else 0.0

    def _flush_alone(self) -> float:
        times: list[float] = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.flush.zero_()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return max(min(times), 1e-6)

    def once(self, call: Callable[[], object]) -> float:
        """Run a call once; return its time on the device in us."""
        for _ in range(self.flushes):
            self.flush.zero_()
        start = time.perf_counter()
        if not self.is_cuda:
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        host = time.perf_counter() - start
        end.synchronize()
        if host < _LONGEST_LAUNCH:  # else it was compiled
            needed = 1 + math.ceil(1.5 * host / self.seconds_of_a_flush)
            self.flushes = max(self.flushes - 1, needed)  # one slow moment is soon forgotten
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds * 1e3

    def now(self) -> float:
        """Return seconds of a clock that is never set back."""
        return time.monotonic()


class OutOfTimeError(Exception):
    """The time that the search may take has passed."""


@dataclass
class Found:
    """What a search has found so far: it is filled while the search runs.

    Attributes:
        jobs: those of which all plans were tried.
        rows: rows of a table, where the best plan that was tried beats the rule's.
        dropped: plans that failed or were wrong, and why.
    """

    jobs: list[Job] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def search(
    jobs: Iterable[Job],
    device: torch.device,
    clock: Clock,
    seconds: float,
    found: Found,
    tried: Callable[[Job], object],
) -> None:
    """Measure the jobs one after the other into `found`.

    Args:
        jobs: what to measure.
        device: where.
        clock: what times the calls.
        seconds: how long it may take; what is running is not cut off.
        found: where the results go.
        tried: called for each candidate.

    Raises:
        OutOfTimeError: the time was too short for the last job.
    """
    deadline = clock.now() + seconds
    for job in jobs:
        turns = _Turns(clock, deadline)
        turns.check()
        reason = None
        try:
            problem = job.prepare(device)
            problem.check(job.rule)
        except Exception as error:  # too large for this GPU, or a kernel that is wrong on it
            reason = in_one_line(error)
        if reason is not None:
            found.dropped.append(f"{job.call}, the default: {reason}")
            for _ in range(sum(map(len, job.steps))):
                tried(job)
            continue
        row, is_whole = _best(problem, turns, found.dropped, tried)
        if row is not None:
            found.rows.append(row)
        if not is_whole:
            raise OutOfTimeError
        found.jobs.append(job)
        del problem  # its memory is the next one's


def _best(
    problem: Problem, turns: "_Turns", dropped: list[str], tried: Callable[[Job], object]
) -> tuple[Any, bool]:
    """The row for the best plan, None if that is the rule's; and whether all plans were tried.

    When the time gets short, the best of those that were tried is held against the rule.
    """
    job = problem.job
    plan, is_whole = job.rule, True
    turns.measure_cost(problem.call(plan))
    for step in job.steps:
        plans = [plan]
        for change in step:
            is_whole = is_whole and turns.leave_time_for(len(plans) + 1)
            if not is_whole:
                break
            candidate = replace(plan, **change)
            reason = _why_wrong(problem, candidate)
            if reason is None:
                plans.append(candidate)
            else:
                dropped.append(f"{job.call}, {change}: {reason}")
            tried(job)
        if len(plans) > 1:
            medians = [statistics.median(times) for times in turns.samples(problem, plans, _ROUNDS)]
            for tried_plan, median in zip(plans, medians, strict=True):
                _log.debug("%s: %.2f us by %s", job.call, median, tried_plan)
            plan = plans[medians.index(min(medians))]
    return (None if plan == job.rule else _row(problem, plan, turns)), is_whole


def _row(problem: Problem, plan: Any, turns: "_Turns") -> Any:
    """The row for a plan, or None where it does not beat the rule by more than the spread."""
    from lora_fast.kernels.tables import Row

    before, after = turns.samples(problem, [problem.job.rule, plan], _FINAL_ROUNDS)
    rule_us, us = statistics.median(before), statistics.median(after)
    if rule_us - us <= max(spread(before), spread(after)):
        return None
    return Row(problem.job.call, asdict(plan), round(us, 3), round(rule_us, 3))


def spread(times: Sequence[float]) -> float:
    """Return the distance between the quartiles."""
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def _why_wrong(problem: Problem, plan: Any) -> str | None:
    try:
        problem.check(plan)
    except Exception as error:  # it does not compile, fit the chip, or compute the right thing
        return in_one_line(error)
    return None


@dataclass
class _Turns:
    """Samples of several plans that take turns, until the deadline."""

    clock: Clock
    deadline: float
    cost: float = 0.0

    def measure_cost(self, call: Callable[[], object]) -> None:
        """Note how many seconds a sample takes, with all that comes with it."""
        start = self.clock.now()
        self.clock.once(call)
        self.cost = self.clock.now() - start

    def leave_time_for(self, plans: int) -> bool:
        """Tell whether so many plans can still be told apart and the best be confirmed."""
        samples = plans * (_WARM_UP + _ROUNDS) + 2 * (_WARM_UP + _FINAL_ROUNDS)
        return self.clock.now() + samples * self.cost < self.deadline

    def check(self) -> None:
        """Raise OutOfTimeError if it is too late to begin anything."""
        if self.clock.now() >= self.deadline:
            raise OutOfTimeError

    def samples(self, problem: Problem, plans: list[Any], rounds: int) -> list[list[float]]:
        """Return the times of each plan in us, one for each round."""
        calls = [problem.call(plan) for plan in plans]
        for call in calls:
            for _ in range(_WARM_UP):
                call()
        times: list[list[float]] = [[] for _ in calls]
        for i in range(rounds):
            for j in range(len(calls)):
                self.check()
                turn = (i + j) % len(calls)
                times[turn].append(self.clock.once(calls[turn]))
        return times
