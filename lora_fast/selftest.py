"""Every op against the reference on this machine: the self-test of `lora-fast doctor`.

Small inputs, forward and every gradient. The oracle is `lora_fast.reference` in float64, and an
error is told as a part of the budget of `lora_fast.testing`: above 1 the op is wrong.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lora_fast import backend, decisions, functional, reference
from lora_fast.commands import in_one_line
from lora_fast.testing import budget_used

N, K, R = 40, 24, 4
SCALING = 0.5
_MANY_ROWS = 2**16 // K + 1  # from 2**16 elements on the eager Linear has a dropout of its own
_LOG = "lora_fast.dispatch"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What became of one op on one device in one implementation.

    Attributes:
        used: the largest error of all results, in units of the budget; None if it did not run.
        problem: what is wrong with it, if something is.
        skipped: why it did not run, if so.
    """

    op: str
    device: str
    dtype: str
    implementation: str
    used: float | None = None
    problem: str | None = None
    skipped: str | None = None

    def __str__(self) -> str:
        """The outcome in a line."""
        what = f"{self.op:20} {self.device:5} {self.dtype:9} {self.implementation:10}"
        if self.skipped is not None:
            return f"{what} skipped: {self.skipped}"
        if self.problem is not None:
            return f"{what} FAILED: {self.problem}"
        return f"{what} ok, {f'{self.used:.2f} of the error budget' if self.used else 'exact'}"


def outcomes() -> Iterator[Outcome]:
    """Run every op on every device: by what serves it, and by its fused kernel where it has one."""
    usual = decisions.what_runs()
    done = set()
    for outcome in _outcomes(usual):
        done.add((outcome.op, outcome.device, outcome.implementation))
        yield outcome
    with backend.use_backend("triton"):
        fused = [d for d in decisions.what_runs() if backend.has_kernel(d.op) and d[:3] not in done]
        yield from _outcomes(fused)


def _outcomes(told: Sequence[decisions.Decision]) -> Iterator[Outcome]:
    """The outcomes of the ops that are told of, once for each device."""
    for op, device in dict.fromkeys(decision[:2] for decision in told):
        implementation, reason = next(d[2:4] for d in told if d[:2] == (op, device))
        if implementation == "none":
            yield Outcome(op, device, "", "triton", skipped=reason)
            continue
        for dtype in decisions.DTYPES:
            name = str(dtype).removeprefix("torch.")
            yield from _by_implementation(Outcome(op, device, name, implementation), dtype)


def _by_implementation(expected: Outcome, dtype: torch.dtype) -> Iterator[Outcome]:
    """The outcome of each implementation that the dispatch chose for a case, in their order."""
    found: dict[str, Outcome] = {}
    for case in _cases(expected.op, expected.device):
        chosen: dict[str, str] = {}
        with decisions_told(chosen.__setitem__):
            outcome = _outcome(expected, case, dtype)
        implementation = chosen.get(expected.op, expected.implementation)
        outcome = replace(outcome, implementation=implementation)
        known = found.setdefault(implementation, outcome)
        is_worse = outcome.problem is not None or (outcome.used or 0.0) > (known.used or 0.0)
        if known.problem is None and is_worse:
            found[implementation] = outcome
    yield from found.values()


def _outcome(expected: Outcome, case: "_Case | None", dtype: torch.dtype) -> Outcome:
    op, device = expected.op, expected.device
    try:
        if case is None:
            used = _merge_error(op, device, dtype)
        else:
            used = _case_error(op, case, device, dtype)
    except Exception as error:  # whatever it is, it belongs into the report
        return replace(expected, problem=in_one_line(error))
    if not used <= 1.0:
        return replace(expected, used=used, problem=f"error {used:.3g} times the budget")
    return replace(expected, used=used)


class _Listener(logging.Handler):
    """Passes on which implementation was chosen for an op, by what the dispatch logs."""

    def __init__(self, note: Callable[[str, str], object]) -> None:
        super().__init__(logging.DEBUG)
        self.note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of a decision; pass on what else is logged, of tables that are ignored, say."""
        if record.levelno > logging.DEBUG:
            logging.getLogger("lora_fast").handle(record)
            return
        if record.name == _LOG:  # and not the choice of a plan, which loggers below it tell
            op, implementation, _ = cast("tuple[str, str, str]", record.args)
            self.note(op, implementation)


@contextmanager
def decisions_told(note: Callable[[str, str], object]) -> Iterator[None]:
    """Call `note` with an op and its implementation whenever the dispatch chooses in the body.

    The log stays silent of it; what else the dispatch's logger says goes its way.
    """
    log = logging.getLogger(_LOG)
    level, propagate, listener = log.level, log.propagate, _Listener(note)
    log.addHandler(listener)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = propagate
        log.setLevel(level)
        log.removeHandler(listener)


@dataclass(frozen=True)
class _Case:
    """Arguments of an op: sizes of its floating-point tensors, and the rest.

    Attributes:
        function: the one to call where it isn't named like the op.
        draws: whether the results depend on random numbers, which are the reference's on a CPU.
    """

    sizes: dict[str, tuple[int, ...]]
    others: dict[str, Any]
    function: str | None = None
    draws: bool = False


def _linear(*rows: int, dropout_p: float = 0.0) -> _Case:
    sizes = {"x": (*rows, K), "weight": (N, K), "bias": (N,), "lora_A": (R, K), "lora_B": (N, R)}
    others = {"dropout_p": dropout_p, "training": dropout_p > 0.0}
    return _Case(sizes, others, draws=0.0 < dropout_p < 1.0)


def _merged(*rows: int) -> _Case:
    sizes = {"x": (*rows, K), "weight": (N, K), "bias": (N,)}
    factors = {"lora_A": (2 * R, K), "lora_B": (N // 2, R)}
    return _Case({**sizes, **factors}, {"enable_lora": [True, False, True, False]})


def _embedding(*shape: int) -> _Case:
    """Indices of either end of the table and more, each twice."""
    indices = (torch.arange(math.prod(shape)) // 2 * (N - 1) % N).view(shape)
    return _Case({"weight": (N, K), "lora_A": (R, N), "lora_B": (K, R)}, {"input": indices})


_CASES = {
    # Where everything is dropped no result depends on the random numbers.
    "lora_linear": (
        *(_linear(1), _linear(33), _linear(2, 3, 5), _linear(0)),
        _linear(33, dropout_p=1.0),
        _linear(_MANY_ROWS, dropout_p=0.5),
    ),
    "lora_merged_linear": (_merged(1), _merged(33)),
    "lora_embedding": (_embedding(2, 3), _embedding(3, 17), _embedding(0)),
    "merged_weight": (
        _Case({"weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}, {}),
        _Case({"weight": (8, 6, 3, 3), "lora_A": (R * 3, 18), "lora_B": (24, R * 3)}, {}),
        _Case(  # a convolution is dispatched by its weight
            {"x": (2, 6, 9, 9), "weight": (8, 6, 3, 3), "bias": (8,)}
            | {"lora_A": (R * 3, 6 * 3), "lora_B": (8 * 3, R * 3)},
            {"padding": 1},
            "lora_conv",
        ),
    ),
}


def _cases(op: str, device: str) -> Sequence[_Case | None]:
    """The cases of an op; None stands for the one of a merge."""
    draws_the_same = device == "cpu" and backend.get_backend() != "triton"
    return [
        case for case in _CASES.get(op, (None,)) if case is None or draws_the_same or not case.draws
    ]


def _case_error(op: str, case: _Case, device: str, dtype: torch.dtype) -> float:
    """The largest error of the outputs and of every gradient, in units of the budget."""
    tensors = _drawn(case.sizes, device, dtype)
    others = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.others.items()}
    name = case.function or op
    found = _results(getattr(functional, name), tensors, others)
    eager = _results(getattr(reference, name), tensors, others)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    oracle = _results(getattr(reference, name), wide, others)
    return max(budget_used(found[key], eager[key], oracle[key]) for key in oracle)


def _results(function: Callable[..., Tensor], tensors: Tensors, others: dict[str, Any]) -> Tensors:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        y = function(**leaves, **others, scaling=SCALING)
    drawn = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=drawn).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _merge_error(op: str, device: str, dtype: torch.dtype) -> float:
    """The error of the merged weight; unmerging must restore it bit for bit."""
    sizes = {"weight": (N, K), "lora_A": (R, K), "lora_B": (N, R)}
    tensors = _drawn(sizes, device, dtype)
    weight, eager = tensors["weight"].clone(), tensors["weight"].clone()
    factors = (tensors["lora_A"], tensors["lora_B"], SCALING)
    record = functional.merge_(weight, *factors)
    if op == "unmerge_":
        functional.unmerge_(weight, record)
        if not torch.equal(weight, tensors["weight"]):
            raise AssertionError("the weight is not restored bit for bit")
        return 0.0
    reference.merge_(eager, *factors)
    wide = tensors["weight"].double()
    reference.merge_(wide, tensors["lora_A"].double(), tensors["lora_B"].double(), SCALING)
    return budget_used(weight, eager, wide)


def _drawn(sizes: Mapping[str, tuple[int, ...]], device: str, dtype: torch.dtype) -> Tensors:
    drawn = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(size, generator=drawn) * 0.5).to(device, dtype)
        for name, size in sizes.items()
    }
