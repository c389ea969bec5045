"""`lora.Linear` and the merge on a GPU: against the frozen layer, loralib and PEFT.

    python bench/bench_gpu.py [--quick] [--out FOLDER]

Every time is the median over interleaved rounds with a cold L2 cache, in us. Efficiency is
T_ideal / T, where T_ideal adds to the measured time of the frozen layer what a fused adapter must
move and compute at least: 2 M K [+ M K / 8 with dropout] bytes forward, 2 M N + 2 M K [+ M K / 4]
backward, at the measured copy bandwidth, and 4 (8) M r (K + N) operations at the measured rate.
With --device cpu it only shows that it runs.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Step, machine, markdown, write
from torch import Tensor, nn

import lora_fast
from lora_fast.testing import randomize_

SHAPES = ((4096, 4096), (4096, 14336), (8192, 8192), (1024, 1024))  # K, N
L2_BYTES = 256 * 2**20


class Clock:
    """Times calls in turns on one device, the L2 cache emptied before each."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.is_cuda = device.type == "cuda"
        self.flush = torch.empty(L2_BYTES if self.is_cuda else 1, dtype=torch.int8, device=device)

    def medians(self, candidates: dict[str, Step]) -> dict[str, float]:
        """Return the median time of each candidate in us."""
        for call in candidates.values():
            for _ in range(3):
                call()
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        names = list(candidates)
        for i in range(self.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                samples[name].append(self._once(candidates[name]))
        return {name: statistics.median(times) for name, times in samples.items()}

    def _once(self, call: Step) -> float:
        self.flush.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


@dataclass(frozen=True)
class Ceiling:
    """What the device did in this run: operations a second, bytes a second."""

    rate: float
    bandwidth: float


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rows: int
    k: int
    n: int
    r: int
    dropout: float

    def ideal_extra(self, ceiling: Ceiling, backward: bool) -> float:
        """Return what the adapter must cost at least beside the frozen layer, in us."""
        m, k, n = self.rows, self.k, self.n
        moved = 2 * m * k + (m * k / 8 if self.dropout else 0)
        operations = 2 * m * self.r * (k + n)
        if backward:
            moved += 2 * m * n + 2 * m * k + (m * k / 4 if self.dropout else 0)
            operations *= 3
        return (moved / ceiling.bandwidth + operations / ceiling.rate) * 1e6


def ceilings(clock: Clock, size: int) -> Ceiling:
    """Measure the rate of a large 16-bit product and the bandwidth of a copy."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size * size * 8, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    times = clock.medians({"mm": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceiling(2 * size**3 / times["mm"] * 1e6, 2 * source.numel() / times["copy"] * 1e6)


def questions(clock: Clock, rows: int, shapes: Any) -> Iterator[dict[str, Any]]:
    """The three measurements that decide between the forward's implementations."""
    from lora_fast.kernels.configs import architecture, gemm_config
    from lora_fast.kernels.lora_gemm import lora_gemm

    for k, n in shapes:
        made = {"device": clock.device, "dtype": torch.bfloat16}
        x, weight = torch.randn(rows, k, **made), torch.randn(n, k, **made)
        y, t, up = (
            torch.zeros(rows, n, **made),
            torch.randn(rows, 16, **made),
            torch.randn(n, 16, **made),
        )
        config = gemm_config(architecture(clock.device), rows, torch.bfloat16)
        steps: dict[str, Step] = {
            "mm": lambda x=x, weight=weight: x @ weight.t(),
            "addmm_": lambda x=x, weight=weight, y=y: y.addmm_(x, weight.t()),
        }
        if clock.is_cuda:
            steps["triton"] = lambda a=(x, weight, up), t=t, c=config: lora_gemm(*a, t=t, config=c)
        times = clock.medians(steps)
        row: dict[str, Any] = {"M": rows, "K": k, "N": n} | {f"{s} us": v for s, v in times.items()}
        row["addmm_/mm"] = times["addmm_"] / times["mm"]
        row["triton/mm"] = times.get("triton", float("nan")) / times["mm"]
        yield row


def layers(case: Case, device: torch.device) -> dict[str, nn.Module]:
    """Return the layer of each library, with the names of those that are installed."""
    kw = {"device": device, "dtype": torch.bfloat16}
    made: dict[str, nn.Module] = {"frozen": nn.Linear(case.k, case.n, **kw).requires_grad_(False)}
    for name in ("loralib", "lora_fast"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        layer = library.Linear(case.k, case.n, r=case.r, lora_dropout=case.dropout, **kw)
        library.mark_only_lora_as_trainable(layer)
        made[name] = randomize_(layer, 0.02)
    try:
        import peft

        config = peft.LoraConfig(r=case.r, lora_dropout=case.dropout, target_modules=["0"])
        base = nn.Sequential(nn.Linear(case.k, case.n, **kw))
        made["peft"] = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    except ImportError:
        pass
    return made


def linear(clock: Clock, case: Case, ceiling: Ceiling) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, of all libraries."""
    x = torch.randn(
        case.rows, case.k, device=clock.device, dtype=torch.bfloat16, requires_grad=True
    )
    dy = torch.randn(case.rows, case.n, device=clock.device, dtype=torch.bfloat16)
    for backward in (False, True):
        steps = {name: _step(m, x, dy, backward) for name, m in layers(case, clock.device).items()}
        times = clock.medians(steps)
        ideal = times["frozen"] + case.ideal_extra(ceiling, backward)
        row: dict[str, Any] = dict(vars(case)) | {"pass": "fwd+bwd" if backward else "fwd"}
        row |= {f"{name} us": value for name, value in times.items()}
        row["ideal us"] = ideal
        row["efficiency"] = ideal / times["lora_fast"]
        row["fast/frozen"] = times["lora_fast"] / times["frozen"]
        row["loralib/fast"] = times.get("loralib", float("nan")) / times["lora_fast"]
        yield row


def _step(layer: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Step:
    wanted = [*(p for p in layer.parameters() if p.requires_grad), x]
    if not backward:
        return lambda: layer(x.detach())
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def merge(clock: Clock, size: int, r: int, ceiling: Ceiling) -> dict[str, Any]:
    """One merge and one unmerge, as parts of the copy bandwidth."""
    layer = randomize_(
        lora_fast.Linear(size, size, r=r, device=clock.device, dtype=torch.bfloat16), 0.02
    )
    times = clock.medians({"cycle": lambda: layer.eval().train()})
    moved = 2 * size * size * (2 * 2 + 1)  # read, write, and the code, twice
    return {
        "size": size,
        "r": r,
        "cycle us": times["cycle"],
        "of the copy bandwidth": moved / ceiling.bandwidth * 1e6 / times["cycle"],
    }


def main() -> None:
    """Measure, print, write after every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    clock = Clock(device, arguments.rounds)
    facts = machine()
    if clock.is_cuda:
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    small = not clock.is_cuda
    ceiling = ceilings(clock, 128 if small else 8192)
    facts |= {"TFLOP/s": ceiling.rate / 1e12, "GB/s": ceiling.bandwidth / 1e9}
    shapes, rows = (((64, 48),), 32) if small else (SHAPES, 8192)
    tables: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "questions": lambda: questions(clock, rows, shapes),
        "linear": lambda: _linear_rows(clock, shapes, rows, ceiling, arguments.quick),
        "merge": lambda: iter(merge(clock, 64 if small else 4096, r, ceiling) for r in (1, 16, 64)),
    }
    for name, table in tables.items():
        found = list(table())
        write(arguments.out, f"gpu_{name}", facts, found)
        print(f"\n{name}\n{markdown(found)}", flush=True)


def _linear_rows(
    clock: Clock, shapes: Any, rows: int, ceiling: Ceiling, quick: bool
) -> Iterator[dict[str, Any]]:
    for k, n in shapes:
        for m in (rows,) if quick else (rows, 2048, 16, 1):
            for r in (16,) if quick else (16, 64):
                for p in (0.0, 0.1):
                    yield from linear(clock, Case(m, k, n, r, p), ceiling)


if __name__ == "__main__":
    main()
