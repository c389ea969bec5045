"""Training one model, and two in turns on the same batches."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from lora_fast.demo.text import Corpus
from lora_fast.testing import saved_bytes

_WARM_UP = 5  # steps that are not timed: allocators and caches fill


@dataclass
class Run:
    """One model's fine-tuning, as far as it got.

    Attributes:
        name: of the layer library.
        model: the model that is trained.
        losses: training loss of every step.
        seconds: time of every step.
        memory: bytes that a step takes; see `step_memory`.
        valid_before: validation loss before the first step.
        valid_after: after the last.
        base: the weights of the adapted layers before the first step.
    """

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    valid_before: float | None = None
    valid_after: float | None = None
    base: dict[str, Tensor] = field(default_factory=dict)

    def step_seconds(self) -> float | None:
        """Return the median time of a step, the first few left out."""
        timed = self.seconds[_WARM_UP:] or self.seconds
        return statistics.median(timed) if timed else None

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


def language_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the cross entropy, in nats, of every next id in `windows` (batch, context + 1)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def pretrain(
    model: nn.Module, corpus: Corpus, context: int, batch: int, steps: int, seed: int
) -> None:
    """Train all of `model` on `corpus`, in place."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    model.train()
    for step in (bar := tqdm(range(steps), desc="pretraining on prose", unit="step")):
        _set_rate(optimizer, 2e-3, step, steps)
        loss = language_loss(model, corpus.batch(batch, context, generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def fine_tune(
    runs: list[Run], corpus: Corpus, context: int, batch: int, steps: int, seed: int
) -> None:
    """Train the adapters of all runs, step by step in turns, on the same batches and seeds."""
    device = next(runs[0].model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    held_out = corpus.validation(8, context).to(device)
    optimizers = [torch.optim.AdamW(run.trainable(), lr=3e-3, weight_decay=0.0) for run in runs]
    for run in runs:
        run.valid_before = evaluate(run.model, held_out)
        run.model.train()
    for step in (bar := tqdm(range(steps), desc="fine-tuning", unit="step")):
        windows = corpus.batch(batch, context, generator).to(device)
        for i in _turns(len(runs), step):
            _set_rate(optimizers[i], 3e-3, step, steps)
            torch.manual_seed(seed + step)  # the same dropout for all where it is drawn alike
            _timed_step(runs[i], optimizers[i], windows)
        bar.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in runs})
    windows = corpus.batch(batch, context, generator).to(device)
    for run in runs:
        run.memory = step_memory(run.model, windows)
        run.valid_after = evaluate(run.model, held_out)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """Return the validation loss, in evaluation mode; the mode is as before."""
    was_training = model.training
    model.eval()
    loss = language_loss(model, windows).item()
    model.train(was_training)
    return loss


def step_memory(model: nn.Module, windows: Tensor) -> int:
    """Return what a training step takes beside the parameters.

    On CUDA the peak of allocated memory over what was there before; elsewhere the bytes that
    forward saves for backward, every storage once.
    """
    model.train()
    if windows.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        language_loss(model, windows).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return saved_bytes(lambda: language_loss(model, windows), model.parameters())


def _timed_step(run: Run, optimizer: torch.optim.Optimizer, windows: Tensor) -> None:
    if windows.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = language_loss(run.model, windows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    value = loss.item()  # waits for the device
    if windows.is_cuda:
        torch.cuda.synchronize()
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(value)


def _turns(count: int, step: int) -> Iterator[int]:
    """Who begins changes with every step: what comes second finds warmer caches."""
    for i in range(count):
        yield (i + step) % count


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """A short rise, then half a cosine down to a tenth."""
    rise = max(1, steps // 20)
    if step < rise:
        rate = peak * (step + 1) / rise
    else:
        rate = peak * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    for group in optimizer.param_groups:
        group["lr"] = rate
