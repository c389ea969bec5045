"""Dropout on a CPU: what `torch.nn.functional.dropout` draws, several times faster.

torch asks its generator for one number after another (not so on an Intel CPU, where it has MKL do
it). The op of csrc takes the generator's state, makes the same draws hundreds at a time, and gives
the state back as torch would leave it.
"""

import functools
import threading

import torch
from torch import Tensor

from lora_fast import interrupts, ops

# Below, handing over the generator's state takes longer than the draws.
_FEW = 2048

# Between taking the generator's state and giving it back nobody else may draw; torch's own draws
# have a lock of theirs. Not so this thread: a signal's handler may fork in the middle of it.
_drawing = interrupts.free_in_children(threading.RLock())


def keep_scale(p: float) -> float:
    """What dropout multiplies by what it keeps: 1 / (1 - p), which is 0 where it keeps nothing."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return `F.dropout(x, p)`, bit for bit, and what of x was kept.

    Args:
        x: a plain tensor, any shape and strides; what is not on a CPU is torch's to draw.
        p: rate in (0, 1].

    Returns:
        The dropped x, and a bool tensor of its shape.
    """
    if p == 1.0:
        return x * 0.0, torch.zeros_like(x, dtype=torch.bool)
    if x.is_cpu and x.numel() >= _FEW and x.is_contiguous() and _draws_are_known(x.dtype):
        with _drawing:
            return _draw(x, p, torch.default_generator) or _drawn_by_torch(x, p)
    return _drawn_by_torch(x, p)


def _drawn_by_torch(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    noise = torch.empty_like(x).bernoulli_(1.0 - p)
    keep = noise.bool()
    return noise.div_(1.0 - p).mul_(x), keep


def _draw(x: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Draw with the op of csrc, or return None if torch drew for another thread meanwhile."""
    dropped = torch.empty_like(x)
    keep = torch.empty_like(x, dtype=torch.bool)
    before = generator.get_state()
    state = before.clone()
    ops.dropout_(x, dropped, keep, state, 1.0 - p, _scale(p, x.dtype))
    if not torch.equal(generator.get_state(), before):
        return None
    generator.set_state(state)
    return dropped, keep


@functools.lru_cache(maxsize=64)
def _scale(p: float, dtype: torch.dtype) -> float:
    """What is kept is multiplied by this: 1 / (1 - p) as `dtype` holds it."""
    return torch.ones((), dtype=dtype, device="cpu").div_(1.0 - p).item()


@functools.cache
def _draws_are_known(dtype: torch.dtype) -> bool:
    """Tell whether the op is there and makes torch's draws: asked of torch itself, once."""
    if dtype not in ops.NATIVE_DTYPES or ops.load_native("cpu") is not None:
        return False
    x = torch.ones(2000, dtype=dtype, device="cpu")
    mine, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    drawn = _draw(x, 0.3, mine)
    noise = torch.empty_like(x).bernoulli_(0.7, generator=other)
    return (
        drawn is not None
        and torch.equal(drawn[1], noise.bool())
        and torch.equal(drawn[0], noise.div_(0.7))
        and torch.equal(mine.get_state(), other.get_state())
    )
