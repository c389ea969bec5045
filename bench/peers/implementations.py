"""Every way in which lora_fast can run a layer, and what its dispatch chose.

The names come from the types of `lora_fast.kernels.plans`, so a new implementation there takes
part here without being listed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

import lora_fast
from harness.contest import Absent
from harness.names import OURS
from lora_fast import backend, functional
from lora_fast.selftest import decisions_told

REFERENCE = f"{OURS}:reference"
EAGER_LORA_FIRST = f"{OURS}:eager_lora_first"
MERGED_WEIGHT = f"{OURS}:merged_weight"

_BACKWARD = (f"{OURS}:dx_", f"{OURS}:sb_")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# In which module a plan is asked for, by which name, and which field of it is the choice.
_PLANS = {
    "forward": ("lora_linear_fwd", "forward_plan", "impl"),
    "dx": ("lora_linear_bwd", "backward_plan", "input_grad"),
    "sb": ("lora_linear_bwd", "backward_plan", "library_sb"),
}


def forced() -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Return, by the name of a peer, what makes lora_fast run one implementation.

    `lora_fast:split` and the like choose the forward and leave the rest to the dispatch,
    `lora_fast:dx_fused` and the like choose dx, `lora_fast:sb_library` and `lora_fast:sb_kernel`
    who computes dS and dB; `lora_fast:reference` is plain torch. On Hopper
    `lora_fast:specialised` takes the products whose warps divide the work, both ways.
    `lora_fast:merged_weight` forms a convolution's weight by the kernel, also a small one;
    `lora_fast:eager_lora_first` takes torch's kernels, the update first, also for a large layer.
    """
    found: dict[str, Callable[[], AbstractContextManager[None]]] = {
        REFERENCE: partial(lora_fast.use_backend, "reference"),
        EAGER_LORA_FIRST: _eager_lora_first,
    }
    if not _HAS_TRITON:
        return found
    found[MERGED_WEIGHT] = partial(lora_fast.use_backend, "triton")
    for what, (_, _, field) in _PLANS.items():
        for name, value in _choices(what).items():
            prefix = "" if what == "forward" else f"{what}_"
            found[f"{OURS}:{prefix}{name}"] = partial(_force, what, **{field: value})
    if torch.cuda.is_available():
        configs = importlib.import_module("lora_fast.kernels.configs")
        gemm = configs.architecture(torch.device("cuda")).gemm_specialised
        if gemm is not None:
            found[f"{OURS}:specialised"] = partial(_specialised, gemm)
    return found


def _choices(what: str) -> dict[str, Any]:
    """Return the values of a plan's field, by the names that they have here."""
    plans = importlib.import_module("lora_fast.kernels.plans")
    if what == "sb":
        return {"library": True, "kernel": False}
    choices = {"forward": plans.ForwardImpl, "dx": plans.InputGradImpl}[what]
    return {name: name for name in get_args(choices)}


def of(kind: str, *, backward: bool) -> list[str]:
    """Return those between which the dispatch can choose for a kind of layer on a GPU.

    For an embedding there is one kernel, whose tiles alone depend on the call.
    """
    if kind in ("Linear", "MergedLinear"):
        others = (MERGED_WEIGHT,) if kind == "Linear" else (MERGED_WEIGHT, EAGER_LORA_FIRST)
        products = [peer for peer in forced() if peer not in others]
        return [peer for peer in products if backward or not peer.startswith(_BACKWARD)]
    return [REFERENCE] if kind == "Embedding" else [REFERENCE, MERGED_WEIGHT]


@contextmanager
def _specialised(gemm: Any) -> Iterator[None]:
    with (
        _force("forward", impl="split", gemm=gemm),
        _force("dx", input_grad="fused", gemm=gemm),
    ):
        yield


@contextmanager
def _force(what: str, **chosen: Any) -> Iterator[None]:
    module, function, _ = _PLANS[what]
    kernels = importlib.import_module(f"lora_fast.kernels.{module}")
    plan = getattr(kernels, function)
    plans = importlib.import_module("lora_fast.kernels.plans")

    def forced_plan(*args: Any, **kwargs: Any) -> Any:
        arch, *sizes = args[:7]  # the last one, whether A and B are wide, is of no kind of call
        forced = replace(plan(*args, **kwargs), **chosen)
        if chosen.get("impl") == "one_pass":  # which takes more shared memory than the others
            M, _, _, _, dtype, *_ = sizes
            forced = replace(forced, gemm=plans.gemm_config(arch, M, dtype, one_pass=True))
        reason = plans.why_not(arch, forced, plans.Call.of(module, *sizes, **kwargs))
        if reason is not None:
            raise Absent(reason)
        return forced

    setattr(kernels, function, forced_plan)
    try:
        with on_kernels():
            yield
    finally:
        setattr(kernels, function, plan)


@contextmanager
def on_kernels() -> Iterator[None]:
    """Run the fused kernels, of a small layer too; on a CPU that takes Triton's interpreter."""
    with lora_fast.use_backend("triton"):
        yield


@contextmanager
def _eager_lora_first() -> Iterator[None]:
    """Run `lora_linear` on torch's kernels, whatever the size."""
    choose = functional.choose

    def chosen(op: str, *tensors: Any, **kwargs: Any) -> backend.Backend:
        if op == "lora_linear":
            return backend.decided(op, backend.Backend.EAGER_LORA_FIRST, "forced")
        return choose(op, *tensors, **kwargs)

    functional.choose = chosen  # type: ignore[attr-defined]
    try:
        yield
    finally:
        functional.choose = choose  # type: ignore[attr-defined]


@contextmanager
def noted() -> Iterator[dict[str, str]]:
    """Note what the dispatch chooses while the body runs: `{"forward": "split", ...}`.

    Of every op its backend, `{"merged_weight": "triton"}`, and of the kernels of `_PLANS` the plan.
    """
    seen: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(decisions_told(seen.__setitem__))
        if _HAS_TRITON:
            for what in _PLANS:
                stack.enter_context(_noted_plan(what, seen))
        yield seen


@contextmanager
def _noted_plan(what: str, seen: dict[str, str]) -> Iterator[None]:
    module, function, field = _PLANS[what]
    names = {value: name for name, value in _choices(what).items()}
    kernels = importlib.import_module(f"lora_fast.kernels.{module}")
    plan = getattr(kernels, function)

    def noting(*args: Any, **kwargs: Any) -> Any:
        chosen = plan(*args, **kwargs)
        seen[what] = names[getattr(chosen, field)]
        return chosen

    setattr(kernels, function, noting)
    try:
        yield
    finally:
        setattr(kernels, function, plan)


def fused_gemm(
    x: torch.Tensor, weight: torch.Tensor, *, specialised: bool
) -> Callable[[], object] | None:
    """Return the fused kernel's product of x (M, K) and weight (N, K) with a rank of 16 added.

    `specialised` takes the tile whose warps divide the work; None where the chip has none.
    """
    gemm = importlib.import_module("lora_fast.kernels.lora_gemm").lora_gemm
    configs = importlib.import_module("lora_fast.kernels.configs")
    arch = configs.architecture(x.device)
    config = arch.gemm_specialised if specialised else configs.gemm_config(arch, len(x), x.dtype)
    if config is None or (specialised and not x.is_cuda):
        return None
    s, up = x.new_ones(x.shape[0], 16), weight.new_ones(weight.shape[0], 16)
    return lambda: gemm(x, weight, up, t=s, config=config)
