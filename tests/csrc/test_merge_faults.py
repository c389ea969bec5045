"""What goes wrong while weights are merged leaves them as they were, or merged with a way back."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_fast as lora
from lora_fast import functional, interrupts, native, ops, torch_internals, whole_model
from lora_fast.testing import randomize_


def test_no_memory_for_a_list_undoes_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(randomize_(lora.Linear(64, 64, r=2)) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight[0, :3] = 1e-30  # too far from what the way back gives: into the list
    bases = [layer.weight.detach().clone() for layer in model]
    fitted, calls = native._trimmed, iter(range(9))

    def failing(*args: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return fitted(*args)

    monkeypatch.setattr(native, "_trimmed", failing)
    with pytest.raises(MemoryError):
        lora.merge(model)
    for layer, base in zip(model, bases, strict=True):
        assert not layer.merged
        assert torch.equal(layer.weight, base)


def test_a_copy_that_fails_in_an_unmerge_leaves_every_record_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(randomize_(lora.Linear(32, 32, r=2)) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.mul_(1e-12)  # its way back is a copy
    bases = [layer.weight.detach().clone() for layer in model]
    lora.merge(model)
    assert [layer._merge_state.record.original is None for layer in model] == [True, False, True]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            lora.unmerge(model)
    model.train()
    for layer, base in zip(model, bases, strict=True):
        assert torch.equal(layer.weight, base)


def test_merges_of_two_threads() -> None:
    layer = randomize_(lora.Linear(64, 64, r=4))
    base = layer.weight.detach().clone()

    def whole() -> None:
        for _ in range(300):
            for change in (lora.merge, lora.unmerge):
                with suppress(ValueError):  # the other thread was faster
                    change(layer)

    def modes() -> None:
        for _ in range(300):
            layer.eval()
            layer.train()

    threads = [threading.Thread(target=f) for f in (whole, whole, modes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    layer.train()
    assert torch.equal(layer.weight, base)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    layer = randomize_(lora.Linear(8, 8, r=2))
    merging_now, told = threading.Event(), threading.Event()

    def merge_slowly() -> None:
        with interrupts.merge_lock:
            merging_now.set()
            told.wait(1.0)

    thread = threading.Thread(target=merge_slowly)
    thread.start()
    merging_now.wait(60)
    child = os.fork()  # when the other thread is done, and not in the middle of its merge
    if child == 0:
        signal.alarm(20)  # ends a child that waits
        layer.eval()
        os._exit(int(not layer.merged))
    told.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    layer.eval()
    assert layer.merged


def test_a_negated_view_is_served_by_torch() -> None:
    weight = torch.randn(8, 6, dtype=torch.complex64).conj().imag
    assert weight.is_neg()
    before, (a, b) = weight.clone(), (torch.randn(2, 6), torch.randn(8, 2))
    record = functional.merge_(weight, a, b, 0.5)
    torch.testing.assert_close(weight.resolve_neg(), before + 0.5 * b @ a)
    functional.unmerge_(weight, record)
    assert torch.equal(weight, before)


def test_nobody_merges_between_the_question_and_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomize_(lora.Linear(16, 16, r=4))
    base = layer.weight.detach().clone()
    batch = whole_model._merge_batch

    def late(layers: Any) -> None:
        other = threading.Thread(target=layer.eval)
        other.start()
        other.join(0.2)  # it waits for the lock
        batch(layers)

    monkeypatch.setattr(whole_model, "_merge_batch", late)
    lora.merge(layer)
    assert torch.equal(layer.train().weight, base)


def test_factors_elsewhere_are_refused() -> None:
    layer = randomize_(lora.Linear(16, 16, r=4))
    base = layer.weight.detach().clone()
    layer.lora_A = nn.Parameter(layer.lora_A.detach().to("meta"))
    with pytest.raises(ValueError, match="on one device, got cpu, meta and cpu"):
        functional.merge_(layer.weight.detach(), layer.lora_A, layer.lora_B, 1.0)
    with pytest.warns(RuntimeWarning, match="was not merged"):
        assert not layer.eval().merged
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_is_lost_under_fake_tensors(backend: str) -> None:
    """They would swallow the writes to a weight that is none of them."""
    layer = randomize_(lora.Embedding(6, 8, r=2))
    base = layer.weight.detach().clone()
    with lora.use_backend(backend):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.warns(RuntimeWarning, match="Fake"):
            layer.eval()
        assert not layer.merged
        layer.eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            with pytest.raises(RuntimeError, match="unmerge: under FakeTensorMode nothing is writ"):
                layer.train()
            with pytest.raises(RuntimeError, match="under FakeTensorMode nothing is written"):
                lora.unmerge(layer)
        assert layer.merged
        assert torch.equal(layer.train().weight, base)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_fake_weight_is_refused(backend: str) -> None:
    with lora.use_backend(backend), FakeTensorMode():
        weight, lora_A, lora_B = torch.zeros(4, 3), torch.ones(2, 3), torch.ones(4, 2)
        with pytest.raises(RuntimeError, match="merge_: under FakeTensorMode nothing is written"):
            functional.merge_(weight, lora_A, lora_B, 0.5)


def test_a_record_can_be_compared_kept_in_a_set_and_printed() -> None:
    weights = [torch.zeros(4, 3) for _ in range(2)]
    factors = torch.ones(2, 3), torch.ones(4, 2)
    one, two = (functional.merge_(weight, *factors, 0.5) for weight in weights)
    assert one == one and one != two
    assert len({one, two, one}) == 2
    assert "scaling=0.5" in repr(one)
    assert "tensor" not in repr(one)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int32"):
        functional.merge_(
            torch.ones(3, 2, dtype=torch.int32), torch.ones(1, 2), torch.ones(3, 1), 1
        )


@pytest.mark.parametrize("strides", [(3, 2), (1, 1), (2, 47)], ids=str)
def test_a_weight_whose_elements_share_memory_is_refused(strides: Any) -> None:
    memory = torch.randn(4000)
    before = memory.clone()
    weight = torch.as_strided(memory, (64, 48), strides)
    with pytest.raises(ValueError, match="weight must have memory of its own for each element"):
        functional.merge_(weight, torch.randn(2, 48), torch.randn(64, 2), 1.0)
    assert torch.equal(memory, before)


def test_a_weight_whose_rows_lie_among_each_other() -> None:
    """Each element has memory of its own, which its strides alone do not tell."""
    weight = torch.as_strided(torch.randn(8), (3, 2), (2, 3))
    base, lora_A, lora_B = weight.clone(), torch.randn(1, 2), torch.randn(3, 1)
    assert torch_internals.may_overlap(weight)
    record = functional.merge_(weight, lora_A, lora_B, 1.0)
    torch.testing.assert_close(weight, base + lora_B @ lora_A)
    functional.unmerge_(weight, record)
    assert torch.equal(weight, base)


@pytest.mark.parametrize("strides", [(48, 1), (1, 64), (100, 2), (3, 200)], ids=str)
def test_gaps_are_no_overlap(strides: Any) -> None:
    weight = torch.as_strided(torch.randn(20000), (64, 48), strides)
    assert not torch_internals.may_overlap(weight)
    assert native.why_not(weight, torch.randn(2, 48), torch.randn(64, 2)) is None


# From torch 2.14 on it tells of every sparse tensor that it checks.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_file_of_other_values_loads_nothing(tmp_path: Path, kind: str) -> None:
    model = nn.Sequential(randomize_(lora.Linear(4, 4, r=2)), randomize_(lora.Linear(4, 4, r=2)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: torch.zeros_like(v) for k, v in lora.lora_state_dict(model).items()}
    last = "1.lora_B"
    state[last] = state[last].to_sparse() if kind == "sparse" else state[last].to("meta")
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"1\.lora_B: the file has no plain values"):
        lora.load(model, tmp_path / "a.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_file_with_other_keys_or_words_loads_nothing(tmp_path: Path) -> None:
    layer = lora.Linear(4, 4, r=2)
    torch.save({1: torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        lora.load(layer, tmp_path / "a.pt")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_factors_in_the_memory_of_the_weight(backend: str) -> None:
    weight, lora_A = torch.randn(64, 64), torch.randn(4, 64)
    base = weight.clone()
    expected = base + 0.5 * base[:4].t() @ lora_A
    with lora.use_backend(backend):
        record = functional.merge_(weight, lora_A, weight[:4].t(), 0.5)
        torch.testing.assert_close(weight, expected)
        functional.unmerge_(weight, record)
    assert torch.equal(weight, base)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_factors_that_another_thread_trains(backend: str) -> None:
    layer = randomize_(lora.Linear(256, 256, r=8))
    base = layer.weight.detach().clone()
    stop = threading.Event()

    def train() -> None:
        with torch.no_grad():
            while not stop.is_set():
                layer.lora_A.add_(1e-3)

    trainer = threading.Thread(target=train)
    with lora.use_backend(backend):
        trainer.start()
        try:
            for _ in range(30):
                layer.eval()
                layer.train()
        finally:
            stop.set()
            trainer.join()
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("freed", ["weight", "lora_A", "lora_B"])
def test_memory_that_was_freed_is_refused(freed: str, offset: int) -> None:
    """As FSDP1 frees it, below the tensors."""
    shapes = {"weight": (6, 4), "lora_A": (2, 4), "lora_B": (6, 2)}
    named = {
        name: torch.randn(offset + 24)[offset:][: a * b].view(a, b)
        for name, (a, b) in shapes.items()
    }
    code = [torch.empty(6, 4, dtype=torch.int8)]
    lists = [torch.empty(0, dtype=torch.int32)], [torch.empty(0)]
    named[freed].untyped_storage().resize_(0)
    tensors = [[tensor] for tensor in named.values()]
    with pytest.raises(RuntimeError, match=f"{freed} has no memory: it was freed"):
        ops.merge_(*tensors, [1.0], code, *lists, torch.zeros(1, dtype=torch.int64))


def test_memory_that_was_freed_is_refused_by_the_other_ops() -> None:
    x, dropped, keep = torch.randn(2, 4), torch.empty(2, 4), torch.ones(2, 4, dtype=torch.bool)
    state = torch.get_rng_state()
    keep.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="keep has no memory: it was freed"):
        ops.dropout_(x, dropped, keep, state, 0.5, 2.0)


def test_sizes_whose_product_no_integer_holds() -> None:
    """20 times the columns are 4 beyond 2^64, as many as the weight has elements."""
    lora_A, lora_B = torch.empty(0, 922337203685477581), torch.empty(20, 0)
    code, index = torch.empty(4, dtype=torch.int8), torch.empty(0, dtype=torch.int32)
    tensors = [[t] for t in (torch.zeros(4), lora_A, lora_B)]
    status = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"2\*\*31 - 1 elements must be passed in parts"):
        ops.merge_(*tensors, [1.0], [code], [index], [torch.empty(0)], status)


class _StopError(BaseException):
    """What a thread is told to raise as soon as it comes back from what it is in."""


def then_stopped(op: Any) -> Any:
    calls = iter(range(99))

    def stopped(*args: Any) -> None:
        op(*args)
        if next(calls) == 0:
            raise _StopError

    return stopped


def three_layers() -> tuple[nn.Sequential, list[torch.Tensor]]:
    model = nn.Sequential(*(randomize_(lora.Linear(32, 32, r=2)) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.mul_(1e-12)  # its way back is a copy
    return model, [layer.weight.detach().clone() for layer in model]


def test_stopped_at_the_end_of_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bases = three_layers()
    with monkeypatch.context() as patch:
        patch.setattr(ops, "merge_", then_stopped(ops.merge_))
        with pytest.raises(_StopError):
            lora.merge(model)
    for layer, base in zip(model, bases, strict=True):
        assert not layer.merged
        assert torch.equal(layer.weight, base)


def test_stopped_at_the_end_of_an_unmerge(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bases = three_layers()
    lora.merge(model)
    merged = [layer.weight.detach().clone() for layer in model]
    with monkeypatch.context() as patch:
        patch.setattr(ops, "unmerge_", then_stopped(ops.unmerge_))
        with pytest.raises(_StopError):
            lora.unmerge(model)
    for layer, weight in zip(model, merged, strict=True):
        assert layer.merged
        assert torch.equal(layer.weight, weight)
    model.train()
    for layer, base in zip(model, bases, strict=True):
        assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("merge", [lora.merge, nn.Module.eval], ids=["merge", "eval"])
def test_stopped_before_a_merge_is_remembered(merge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bases = three_layers()
    remember, calls = lora.Linear._remember, iter(range(99))

    def stopped(self: Any, *args: Any) -> None:
        if next(calls) == 1:
            raise _StopError
        remember(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(lora.Linear, "_remember", stopped)
        with pytest.raises(_StopError):
            merge(model)
    model.train()
    for layer, base in zip(model, bases, strict=True):
        assert not layer.merged
        assert torch.equal(layer.weight, base)
