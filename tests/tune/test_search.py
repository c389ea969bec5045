"""The search: what it keeps, what it drops, and when it stops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels import tables
from lora_fast.tune import search

CALL = tables.Call("op", 1, 1, 1, 1, "float32", False)


@dataclass(frozen=True)
class Plan:
    """A plan for the searches here: a choice and a tile."""

    impl: str
    tile: int = 1


@dataclass
class Problem:
    """A call whose time is told by a function of the plan."""

    job: "FakeJob"

    def check(self, plan: Plan) -> None:
        if plan in self.job.wrong:
            raise self.job.wrong[plan]

    def call(self, plan: Plan) -> Callable[[], object]:
        return lambda: next(self.job.times(plan))


@dataclass
class FakeJob:
    """A job with the rule's plan, steps and times of its choice."""

    times: Callable[[Plan], Iterator[float]]
    steps: list[list[dict[str, Any]]]
    wrong: dict[Plan, Exception]
    rule: Plan = Plan("rule")
    call: Any = CALL

    def prepare(self, device: torch.device) -> Problem:
        return Problem(self)


class FakeClock:
    """Takes a second for each call, whose result is its time in us."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def once(self, call: Callable[[], object]) -> float:
        self.seconds += 1.0
        time = call()
        assert isinstance(time, float)
        return time

    def now(self) -> float:
        return self.seconds


def job(
    times: dict[Plan, float],
    steps: list[list[dict[str, Any]]],
    *,
    noise: float = 0.0,
    wrong: dict[Plan, Exception] | None = None,
) -> FakeJob:
    """A job whose times alternate by `noise` around those given."""
    turn = iter(range(10**9))

    def stream(plan: Plan) -> Iterator[float]:
        yield times[plan] + (noise if next(turn) % 3 else -noise)

    return FakeJob(stream, steps, wrong or {})


def searched(
    *jobs: FakeJob, seconds: float = 1e9, clock: search.Clock | None = None
) -> tuple[search.Found, int]:
    """What a search finds, and how many candidates it told of."""
    found, tried = search.Found(), []
    search.search(jobs, torch.device("cpu"), clock or FakeClock(), seconds, found, tried.append)  # type: ignore[arg-type]
    return found, len(tried)


STEPS = [[{"impl": "a"}, {"impl": "b"}], [{"tile": 2}, {"tile": 3}]]
TIMES = {
    **{Plan("rule"): 10.0, Plan("a"): 9.0, Plan("b"): 8.0},
    **{Plan("b", 2): 7.0, Plan("b", 3): 8.5, Plan("rule", 2): 1.0, Plan("rule", 3): 1.0},
}


def test_the_best_of_every_step_is_kept() -> None:
    found, tried = searched(job(TIMES, STEPS))
    (row,) = found.rows
    assert (row.plan, row.us, row.rule_us) == ({"impl": "b", "tile": 2}, 7.0, 10.0)
    assert tried == 4
    assert (len(found.jobs), found.dropped) == (1, [])


def test_a_rule_that_nothing_beats_gets_no_row() -> None:
    found, _ = searched(job({**TIMES, Plan("rule"): 0.5}, STEPS))
    assert (found.rows, len(found.jobs)) == ([], 1)


@pytest.mark.parametrize(("noise", "rows"), [(0.1, 1), (2.0, 0)])
def test_a_gain_within_the_spread_is_no_gain(noise: float, rows: int) -> None:
    found, _ = searched(job(TIMES, STEPS[:1], noise=noise))
    assert len(found.rows) == rows


def test_wrong_and_failing_candidates_are_dropped_and_named() -> None:
    wrong: dict[Plan, Exception] = {
        Plan("b"): AssertionError("y: largest error 1.0\nsecond line"),
        Plan("a", 3): RuntimeError("out of resource: shared memory"),
    }
    times = {**TIMES, Plan("a", 2): 8.0, Plan("b"): 0.0, Plan("a", 3): 0.0}
    found, tried = searched(job(times, STEPS, wrong=wrong))
    assert found.rows[0].plan == {"impl": "a", "tile": 2}
    assert [line.partition("}: ")[2] for line in found.dropped] == [
        "AssertionError: y: largest error 1.0",
        "RuntimeError: out of resource: shared memory",
    ]
    assert "'impl': 'b'" in found.dropped[0]
    assert tried == 4


def test_a_call_whose_default_fails_is_reported_and_the_next_one_measured() -> None:
    bad = job(TIMES, STEPS, wrong={Plan("rule"): torch.OutOfMemoryError("no memory")})
    found, tried = searched(bad, job(TIMES, STEPS))
    assert len(found.rows) == len(found.jobs) == 1
    assert found.dropped[0].endswith("the default: OutOfMemoryError: no memory")
    assert tried == 8


@pytest.mark.parametrize("seconds", [1.0, 20.0, 95.0, 100.0, 150.0, 200.0, 300.0])
def test_the_time_is_a_bound_and_finished_jobs_are_kept(seconds: float) -> None:
    one = FakeClock()
    searched(job(TIMES, STEPS), clock=one)
    clock, found = FakeClock(), search.Found()
    many = [job(TIMES, STEPS) for _ in range(10)]
    with pytest.raises(search.OutOfTimeError):
        search.search(many, torch.device("cpu"), clock, seconds, found, lambda job: None)  # type: ignore[arg-type]
    assert clock.seconds <= seconds + 1.0
    assert abs(len(found.jobs) - seconds / one.seconds) < 1.0
    assert len(found.jobs) <= len(found.rows) <= len(found.jobs) + 1


def test_when_the_time_gets_short_the_best_of_what_was_tried_is_kept() -> None:
    clock, found, tried = FakeClock(), search.Found(), []
    # Enough for one candidate beside the rule, and to confirm it; not for two.
    with pytest.raises(search.OutOfTimeError):
        search.search([job(TIMES, STEPS)], torch.device("cpu"), clock, 95.0, found, tried.append)  # type: ignore[arg-type,list-item]
    (row,) = found.rows
    assert (row.plan, row.us) == ({"impl": "a", "tile": 1}, 9.0)
    assert (len(tried), found.jobs) == (1, [])
    assert clock.seconds < 95.0


def test_spread_is_the_distance_of_the_quartiles() -> None:
    assert search.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == 4.0


def test_the_clock_times_what_it_calls() -> None:
    clock = search.DeviceClock(torch.device("cpu"))
    calls: list[int] = []
    before = clock.now()
    us = clock.once(lambda: calls.append(1))
    assert (calls, before <= clock.now()) == ([1], True)
    assert 0.0 < us < 1e6


def test_the_clock_forgets_a_slow_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the device must be kept busy follows the host, down as well as up."""

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: "Event") -> float:
            return 0.1

    monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event())
    clock = search.DeviceClock(torch.device("cpu"))
    clock.is_cuda, clock.seconds_of_a_flush = True, 1e-4
    clock.flushes = 40
    for _ in range(45):
        clock.once(lambda: None)
    assert clock.flushes < 10
