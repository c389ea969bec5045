"""What comes in the middle of a merge or an unmerge, in any thread: no weight loses its base."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lora_fast as lora
from lora_fast import merging
from lora_fast.interrupts import merge_lock
from lora_fast.testing import randomize_

PACKAGE = Path(lora.__file__).parent
LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: lora.Linear(6, 5, r=2),
    "merged": lambda: lora.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]),
    "conv": lambda: lora.Conv1d(2, 3, 3, r=2),
}


class Stop(BaseException):
    """As a limit of time raises it in another thread."""


class Stopping:
    """Raise `Stop` where the package begins its n-th line, but for those that hold signals."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        path = Path(frame.f_code.co_filename)
        if PACKAGE not in path.parents or path.name == "interrupts.py":
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Stop
        return self


def stops(do: Callable[[], object], every: int = 1) -> Iterator[int]:
    """Do it again and again, each time stopped some lines later, until it reaches its end."""
    n = 0
    while True:
        n += every
        stopping = Stopping(n)
        thread = threading.Thread(target=_stopped, args=(do, stopping))
        thread.start()
        thread.join()
        yield n
        if stopping.left > 0:
            return


def _stopped(do: Callable[[], object], stopping: Stopping) -> None:
    sys.settrace(stopping)
    try:
        do()
    except Stop:
        pass
    finally:
        sys.settrace(None)
        # An error of the trace function itself, at the end of a `with`, is none within it.
        while merge_lock._is_owned():  # type: ignore[attr-defined]
            merge_lock.release()


def weight_of(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = getattr(layer, "conv", layer).weight
    return weight.detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_an_unmerge_that_is_stopped_anywhere(kind: str, backend: str) -> None:
    layer = randomize_(LAYERS[kind]())
    base = weight_of(layer).clone()
    layer.eval()
    n = 0
    for n in stops(layer.train):
        assert torch.equal(weight_of(layer), base) is not layer.merged
        layer.train()
        assert torch.equal(weight_of(layer), base), f"stopped at line {n}"
        layer.eval()
        assert not torch.equal(weight_of(layer), base)
    assert n > 50


def test_no_memory_for_what_a_merge_notes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(randomize_(lora.Linear(8, 8, r=2)) for _ in range(3)))
    bases = [layer.weight.detach().clone() for layer in model]
    for allowed in range(3):
        left = allowed

        def some_of(weight: torch.Tensor) -> torch.Tensor:
            nonlocal left
            if left == 0:
                raise torch.OutOfMemoryError("no memory")
            left -= 1
            return weight[:1].clone()

        monkeypatch.setattr(merging, "some_of", some_of)
        with pytest.raises(torch.OutOfMemoryError):
            lora.merge(model)
        assert not any(layer.merged for layer in model)
        assert all(torch.equal(m.weight, base) for m, base in zip(model, bases, strict=True))


@pytest.mark.filterwarnings("ignore:.*was not merged. no memory:RuntimeWarning")
@pytest.mark.parametrize("merge", [lora.merge, nn.Module.eval])
def test_no_memory_for_the_way_back_either(
    merge: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be unmerged counts as merged, by its record, and what can be is."""
    model = nn.Sequential(*(randomize_(lora.Linear(8, 8, r=2)) for _ in range(3)))
    bases, x = [weight_of(layer).clone() for layer in model], torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
    unmerge, restored = merging.unmerge_many, []

    def unmerge_many(weights: list[torch.Tensor], records: Any) -> None:
        restored.append(weights[0])
        if len(restored) % 2:
            raise MemoryError("no memory")
        unmerge(weights, records)

    def merged(weight: torch.Tensor, original: int | None) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(merging, "unmerge_many", unmerge_many)
    monkeypatch.setattr(merging.versions, "merged", merged)
    with pytest.raises(MemoryError) if merge is lora.merge else contextlib.nullcontext():
        merge(model)
    monkeypatch.undo()
    assert any(layer.merged for layer in model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    model.train()
    assert not any(layer.merged for layer in model)
    assert all(torch.equal(m.weight, base) for m, base in zip(model, bases, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_merge_that_is_stopped_anywhere(kind: str, backend: str) -> None:
    layer = randomize_(LAYERS[kind]())
    base, n = weight_of(layer).clone(), 0
    for n in stops(layer.eval):
        layer.train()
        assert torch.equal(weight_of(layer), base), f"stopped at line {n}"
    assert n > 50


@pytest.mark.parametrize("change", [lora.merge, lora.unmerge])
def test_a_model_that_is_stopped_anywhere(change: Any, backend: str) -> None:
    """With a layer of another dtype, whose merge is a call of its own."""
    layers = [randomize_(lora.Linear(6, 5, r=2)) for _ in range(3)]
    model, x = nn.Sequential(*layers[:2], layers[2].double()), torch.randn(2, 6)
    bases = [weight_of(layer).clone() for layer in layers]
    expected = [layer(x.to(layer.weight.dtype)).detach() for layer in layers]
    n = 0

    def prepare() -> None:
        if change is lora.unmerge and not all(layer.merged for layer in layers):
            lora.merge(model)

    prepare()
    for n in stops(lambda: change(model), every=3):
        for layer, y in zip(layers, expected, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(layer(x.to(y.dtype)), y)
        model.train()
        for layer, base in zip(layers, bases, strict=True):
            assert torch.equal(weight_of(layer), base), f"stopped at line {n}"
        prepare()
    assert n > 50
