"""B12: modules that read one layer's weight in several threads, within one another, interrupted."""

import copy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention import attended, attention, effective
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import bypasses
from lora_fast.testing import randomize_


def test_b12_attention_in_several_threads() -> None:
    """Each finds the effective weight, also while another's forward ends."""
    module, x = attention(merge_weights=False).eval(), torch.randn(3, 5, 8)
    expected = attended(module, x, effective(module.out_proj))

    def worst(_: int) -> float:
        with torch.no_grad():
            outputs = [module(x, x, x)[0] for _ in range(300)]
        return max((y - expected).abs().max().item() for y in outputs)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert max(pool.map(worst, range(4))) < 1e-5
    finally:
        sys.setswitchinterval(interval)
    assert "weight" not in vars(module.out_proj)


def test_b12_attention_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls no hook after a KeyboardInterrupt; the next forward is right all the same."""
    module, x = attention(merge_weights=False), torch.randn(3, 5, 8)
    expected = attended(module, x, effective(module.out_proj))

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module(x, x, x)
    torch.testing.assert_close(module(x, x, x)[0], expected)
    assert "weight" not in vars(module.out_proj)


@pytest.mark.parametrize("ends", [False, True], ids=["main thread", "thread that is gone"])
def test_b12_attention_in_another_thread_after_an_interrupt(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = attention(merge_weights=False), torch.randn(3, 5, 8)
    expected = attended(module, x, effective(module.out_proj))

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def run_interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                module(x, x, x)

    if ends:
        thread = threading.Thread(target=run_interrupted)
        thread.start()
        thread.join()
    else:
        run_interrupted()
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(module(x, x, x)[0]), daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive()
    torch.testing.assert_close(found[0], expected)
    assert "weight" not in vars(module.out_proj)


class _ReadsTwo(nn.Module):
    """Computes with the weights of two layers that others hold, named in some order."""

    def __init__(self, one: nn.Module, two: nn.Module, *names: str) -> None:
        super().__init__()
        self.one, self.two = one, two
        lora.utils.expose_effective_weight(self, *names)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.one.weight), self.two.weight)


def test_b12_two_readers_of_the_same_layers_do_not_wait_for_each_other() -> None:
    one, two = (randomize_(lora.Linear(4, 4, r=2)) for _ in range(2))
    readers = [_ReadsTwo(one, two, *names) for names in (("one", "two"), ("two", "one"))]
    x = torch.randn(3, 4)
    expected = readers[0](x)

    def read(module: nn.Module) -> None:
        for _ in range(300):
            torch.testing.assert_close(module(x), expected)

    threads = [threading.Thread(target=read, args=(m,), daemon=True) for m in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


class _ReadsWithin(nn.Module):
    """Reads a layer's weight after a forward that does so too, perhaps one that fails."""

    def __init__(self, layer: nn.Module, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.layer, self.error = layer, error
        self.inner: nn.Module = self
        lora.utils.expose_effective_weight(self, "layer")

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth:
            try:
                x = self.inner(x, depth - 1)
            except (ValueError, KeyboardInterrupt):
                x = F.linear(x, self.layer.weight, self.layer.bias)
        elif self.error is not None:
            raise self.error
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_other", [False, True])
def test_b12_a_reader_within_a_reader(is_other: bool, error: Any) -> None:
    layer, x = randomize_(lora.Linear(4, 4, r=2)), torch.randn(3, 4)
    reader = _ReadsWithin(layer, error)
    if is_other:
        reader.inner = _ReadsWithin(layer, error)
    expected = layer(layer(layer(x)))
    for _ in range(2):
        torch.testing.assert_close(reader(x), expected)
    torch.testing.assert_close(layer(x), F.linear(x, effective(layer), layer.bias))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(reader(x)), daemon=True)
    thread.start()
    thread.join(20)
    torch.testing.assert_close(found[0], expected)
    assert "weight" not in vars(layer)


@pytest.mark.parametrize("own", [None, torch.zeros(1)])
def test_b12_what_is_exposed_is_taken_back_after_ctrl_c(own: Any) -> None:
    """At any line; here after the first change of a dictionary that says when it is changed."""

    class Interrupted(dict[str, Any]):
        left = 1

        def changed(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        def pop(self, *args: Any) -> Any:
            self.changed()
            return super().pop(*args)

        def __setitem__(self, *args: Any) -> None:
            self.changed()
            super().__setitem__(*args)

        def __delitem__(self, name: str) -> None:
            self.changed()
            super().__delitem__(name)

    attributes = Interrupted({bypasses._OWN_WEIGHT: own, "weight": torch.ones(1)})
    with pytest.raises(KeyboardInterrupt):
        bypasses.without_exposed(attributes)
    attributes.left = 9
    bypasses.without_exposed(attributes)
    assert attributes.get("weight") is own
    assert bypasses._OWN_WEIGHT not in attributes


def test_b12_attention_waits_for_a_long_forward_in_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = attention(merge_weights=False), torch.randn(3, 5, 8)
    order, inside = [], threading.Event()
    forward = module.forward

    def slow(*args: Any, **options: Any) -> Any:
        inside.set()
        time.sleep(4 * bypasses._PATIENCE)
        order.append("slow")
        return forward(*args, **options)

    monkeypatch.setattr(module, "forward", slow)
    first = threading.Thread(target=module, args=(x, x, x))
    first.start()
    inside.wait(20)
    monkeypatch.setattr(module, "forward", lambda *args: order.append("next"))
    module(x, x, x)
    first.join()
    assert order == ["slow", "next"]


def test_b12_what_an_interrupted_forward_exposed_is_not_merged() -> None:
    module, x = attention(), torch.randn(3, 5, 8)
    layer: Any = module.out_proj
    base = layer.weight.detach().clone()
    expected = attended(module, x, effective(layer))
    bypasses._expose(module, ())  # and Ctrl-C, which no hook hears of
    assert torch.equal(copy.deepcopy(layer).weight, base)
    module.eval()
    torch.testing.assert_close(module(x, x, x)[0], expected)
    module.train()
    assert torch.equal(layer.weight, base)
