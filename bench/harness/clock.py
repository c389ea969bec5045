"""Timing several candidates against each other, on a CPU or a GPU, and what memory they take.

Absolute times on a shared machine drift; ratios of samples that were taken in turns do not. So all
candidates of a row are measured in one process, in rounds, and a ratio is the median over rounds.
Device time comes from CUDA events; copies of the data that are together twice as large as the L2
cache are used in turn, so that every call finds its operands in memory.
"""

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

Step = Callable[[], object]
MAX_COPIES = 64
MIN_ROUNDS = 5


@dataclass
class Candidate:
    """What is timed: `steps` do the same work on different copies of the data.

    Attributes:
        around: what must hold while the steps run; entered outside of the timed region.
    """

    steps: Sequence[Step]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Samples:
    """Times of all candidates, the i-th of all taken in the same round.

    Attributes:
        seconds: for each candidate its time for one step in every round.
        failures: for each candidate that raised, why; it has no times.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Return the median time of one step, in seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """Return the quartiles of the time of one step, in seconds."""
        return quartiles(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Return how many times as long `slow` takes: median over the rounds, and its quartiles."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        ratios = [a / b for a, b in pairs]
        return statistics.median(ratios), *quartiles(ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the values a quarter from below and from above."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[quarter], ordered[-1 - quarter]


class Clock:
    """Takes times and memory on one device.

    Args:
        device: where the candidates run.
        rounds: the most rounds.
        budget: seconds to spend on all candidates of a row; `MIN_ROUNDS` are made in any case.
        sample: seconds that a sample lasts at least; quick steps are repeated. By default 2 ms, on
            a GPU 10, of which the wait for the first launch is then a small part.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rounds: int = 31,
        budget: float = 1.0,
        sample: float | None = None,
    ) -> None:
        self.device, self.rounds, self.budget = device, rounds, budget
        self.is_cuda = device.type == "cuda"
        self.sample = (1e-2 if self.is_cuda else 2e-3) if sample is None else sample

    def copies(self, moved: int) -> int:
        """Return how many copies of data of `moved` bytes a call the caches cannot hold."""
        if not self.is_cuda:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(MAX_COPIES, -(-2 * cache // max(moved, 1))))

    def interleave(self, candidates: dict[str, Candidate]) -> Samples:
        """Time all candidates in turns; one that raises drops out and the others go on."""
        samples = Samples()
        loops: dict[str, int] = {}
        for name, candidate in candidates.items():
            with _excused(samples, name):
                loops[name] = self._loops(candidate)
                samples.seconds[name] = []
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            begin = time.perf_counter()
            for i in range(self.rounds):
                if i >= MIN_ROUNDS and time.perf_counter() - begin > self.budget:
                    break
                names = list(samples.seconds)
                for name in names[i % len(names) :] + names[: i % len(names)] if names else ():
                    with _excused(samples, name):
                        seconds = self._once(candidates[name], loops[name])
                        samples.seconds[name].append(seconds)
        finally:
            if was_enabled:
                gc.enable()
        return samples

    def _loops(self, candidate: Candidate) -> int:
        """Warm up, and return how many turns through the copies a sample takes."""
        self._once(candidate, 1)  # allocates, compiles
        if not self.sample:
            return 1
        steps = max(1, round(self.sample / self._once(candidate, 1)))
        return -(-steps // len(candidate.steps))

    def _once(self, candidate: Candidate, loops: int) -> float:
        """Return the seconds of one step, from `loops` turns through the copies."""
        calls = loops * len(candidate.steps)
        with candidate.around():
            if not self.is_cuda:
                start = time.perf_counter()
                for _ in range(loops):
                    for step in candidate.steps:
                        step()
                return max(time.perf_counter() - start, 1e-9) / calls
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(loops):
                for step in candidate.steps:
                    step()
            end.record()
            end.synchronize()
        return max(begin.elapsed_time(end) * 1e-3, 1e-9) / calls

    def captured(self, candidate: Candidate) -> Candidate:
        """Return the candidate as the replay of one CUDA graph that holds a turn of its steps."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with candidate.around():
            with torch.cuda.stream(stream):
                for step in candidate.steps:
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                for step in candidate.steps:
                    step()
        # One replay is a whole turn: it stands where the first step stood, the others do nothing.
        return Candidate([graph.replay, *[_nothing] * (len(candidate.steps) - 1)])

    def host_seconds(self, candidate: Candidate, calls: int = 10) -> float | None:
        """Return how long the host is busy with one step, or None where it does all the work."""
        if not self.is_cuda:
            return None
        times = []
        with candidate.around():
            for i in range(calls):
                torch.cuda.synchronize()
                start = time.perf_counter()
                candidate.steps[i % len(candidate.steps)]()
                times.append(time.perf_counter() - start)
            torch.cuda.synchronize()
        return statistics.median(times)

    def peak_bytes(self, candidate: Candidate) -> int:
        """Return the most memory that one step holds above what was there."""
        with candidate.around():
            if not self.is_cuda:
                return _cpu_peak_bytes(candidate.steps[0])
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            candidate.steps[0]()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

    def state(self) -> dict[str, str]:
        """Return clocks, temperature and power of the GPU, as nvidia-smi tells them."""
        wanted = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
        if not self.is_cuda:
            return {}
        values = nvidia_smi(*wanted)
        return dict(zip(wanted, values, strict=True)) if values else {}


def nvidia_smi(*fields: str) -> list[str]:
    """Return what nvidia-smi says of the first visible GPU, or nothing where there is none."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    values = [value.strip() for value in done.stdout.split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else []


def cpus() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pin_cpu(threads: int) -> None:
    """Compute on `threads` threads, bound to as many cores."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


@contextmanager
def _excused(samples: Samples, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        samples.failures[name] = error.with_traceback(None)  # a traceback keeps tensors alive
        samples.seconds.pop(name, None)


def _nothing() -> None:
    pass


def _cpu_peak_bytes(call: Step) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of every start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities,
        profile_memory=True,
        acc_events=True,  # torch 2.11 warns without it
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
