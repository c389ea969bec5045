"""`lora_fast.merge(model)` and `unmerge(model)`: every layer or none."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional, interrupts, native, ops, whole_model
from lora_fast.testing import randomize_


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(
        lora.Embedding(30, 16, r=2),
        lora.MergedLinear(16, 24, r=2, enable_lora=[True, False, True], merge_weights=False),
        nn.ReLU(),
        lora.Linear(24, 12, r=2),
        lora.Linear(12, 4),
    )
    return randomize_(made)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a process that a shell begins in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")]


def merged(model: nn.Module) -> list[bool]:
    return [m.merged for m in model.modules() if hasattr(m, "lora_A")]


def test_merge_and_unmerge(model: nn.Module) -> None:
    before, ids = weights(model), torch.randint(30, (5,))
    expected = model(ids)
    assert lora.merge(model) == 3
    assert merged(model) == [True] * 3
    torch.testing.assert_close(model(ids), expected)
    randomize_(model)
    assert lora.unmerge(model) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_layers_that_are_merged_already_stay_so(model: nn.Module) -> None:
    before = weights(model)
    model[3].eval()
    assert lora.merge(model) == 2
    assert lora.unmerge(model) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_nothing_to_do_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no LoRA layer of the model is merged"):
        lora.unmerge(model)
    lora.merge(model)
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(model)
    with pytest.raises(ValueError, match="r > 0"):
        lora.merge(nn.Linear(2, 2))


def test_progress_goes_to_stderr(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    lora.merge(model, progress=True)
    assert "3/3" in capsys.readouterr().err
    lora.unmerge(model)
    assert capsys.readouterr().err == ""


def test_an_overflow_in_the_last_layer_names_it_and_merges_nothing() -> None:
    model = randomize_(nn.Sequential(*(lora.Linear(8, 8, r=1, dtype=torch.half) for _ in "abc")))
    before = weights(model)
    model[2].scaling = 1e6
    with pytest.raises(RuntimeError, match=r"nothing was merged. 2: .*float16"):
        lora.merge(model)
    assert merged(model) == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_tied_weight_is_named_before_anything_is_merged() -> None:
    model = nn.Sequential(lora.Linear(8, 8, r=1), lora.Linear(8, 8, r=1), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    with pytest.raises(RuntimeError, match="1: the weight is tied"):
        lora.merge(model)
    assert merged(model) == [False] * 2


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["merge", "unmerge"])
@pytest.mark.parametrize("batches", ["of a layer each", "of a dtype each"])
def test_an_exception_in_the_middle_leaves_every_layer_as_it_was(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    batches: str,
    name: str,
    error: type[BaseException],
) -> None:
    if batches == "of a layer each":
        monkeypatch.setattr(whole_model, "_BATCH", 1)
    else:
        model[3].bfloat16()
    if name == "unmerge":
        lora.merge(model)
    before, states = weights(model), merged(model)
    original, calls = getattr(native, name), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return original(*args)

    monkeypatch.setattr(native, name, failing)
    with pytest.raises(error):
        getattr(lora, name)(model)
    assert merged(model) == states
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.fixture
def close(model: nn.Module) -> nn.Module:
    """The model with deltas far below the weights, whose code is enough."""
    with torch.no_grad():
        for layer in (model[0], model[1], model[3]):
            layer.lora_B.mul_(1e-3)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every call of the ops: its name, and how many blocks it was given."""
    seen = []

    def counting(name: str, op: Any) -> Any:
        def call(weight: list[Tensor], *args: Any) -> Any:
            seen.append((name, len(weight)))
            return op(weight, *args)

        return call

    for name in ("merge_", "unmerge_"):
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return seen


def test_layers_of_one_dtype_are_merged_by_one_call(
    close: nn.Module, calls: list[tuple[str, int]]
) -> None:
    """The Embedding, two blocks of the MergedLinear, and in another dtype the Linear."""
    close[3].bfloat16()
    before = weights(close)
    lora.merge(close)
    lora.unmerge(close)
    assert calls == [("merge_", 3), ("merge_", 1), ("unmerge_", 3), ("unmerge_", 1)]
    assert all(torch.equal(a, b) for a, b in zip(weights(close), before, strict=True))


def test_batches_are_of_a_size(
    close: nn.Module, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_model, "_BATCH", 30 * 16 + 1)
    lora.merge(close)
    assert calls == [("merge_", 3), ("merge_", 1)]


def test_a_layer_that_needs_a_copy_is_merged_beside_the_others(
    close: nn.Module, calls: list[tuple[str, int]]
) -> None:
    """Deltas far above the weights of one layer: all are put back, and the others merged anew."""
    with torch.no_grad():
        close[3].lora_B.mul_(1e9)
    before = weights(close)
    lora.merge(close)
    assert [m._merge_state.record.original is None for m in (close[0], close[1], close[3])] == [
        1,
        1,
        0,
    ]
    assert calls == [("merge_", n) for n in (4, 1, 3)]
    lora.unmerge(close)
    assert all(torch.equal(a, b) for a, b in zip(weights(close), before, strict=True))


@pytest.mark.parametrize(
    ("what", "ran"),
    [("_merge_with_copy", [4]), ("_copy_factors", [])],
    ids=["weight", "factors"],
)
def test_no_memory_for_a_copy_leaves_every_layer_as_it_was(
    close: nn.Module,
    calls: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    ran: list[int],
) -> None:
    """Of a weight, after all were put back and before others are merged; of A and B, at first."""
    with torch.no_grad():
        close[3].lora_B.mul_(1e9)
    before = weights(close)

    def no_memory(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(native, what, no_memory)
    with pytest.raises(MemoryError):
        lora.merge(close)
    assert [n for name, n in calls if name == "merge_"] == ran
    assert merged(close) == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(weights(close), before, strict=True))


def test_a_weight_that_was_written_to_while_merged_keeps_the_change(close: nn.Module) -> None:
    before = weights(close)
    lora.merge(close)
    with torch.no_grad():
        close[3].weight.add_(0.5)
    lora.unmerge(close)
    now = weights(close)
    torch.testing.assert_close(now.pop(2), before.pop(2) + 0.5)
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def test_what_the_ops_do_not_serve_is_merged_beside_the_rest(
    close: nn.Module, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = native.why_not
    refused = close[3].weight

    def refusing(weight: Tensor, *factors: Tensor) -> str | None:
        return "no" if weight.data_ptr() == refused.data_ptr() else original(weight, *factors)

    monkeypatch.setattr(native, "why_not", refusing)
    before, ids = weights(close), torch.randint(30, (5,))
    expected = close(ids)
    lora.merge(close)
    assert calls == [("merge_", 3)]
    torch.testing.assert_close(close(ids), expected)
    lora.unmerge(close)
    assert all(torch.equal(a, b) for a, b in zip(weights(close), before, strict=True))


def test_a_merge_that_ctrl_c_hits_is_finished_first(ctrl_c: None) -> None:
    """Python sees the signal when the op returns: between the write and the record of it."""
    layer = randomize_(lora.Linear(1500, 1500, r=64))
    before = layer.weight.detach().clone()
    seen = False
    for delay in (0.001, 0.002, 0.004, 0.008):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for _ in range(50):
                layer.eval()
                layer.train()
        except KeyboardInterrupt:
            seen = True
        finally:
            timer.join()
        layer.train()
        assert not layer.merged
        assert torch.equal(layer.weight, before)
    assert seen


def test_held_back_delivers_once_and_restores_the_handler(ctrl_c: None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    finished = False
    with pytest.raises(KeyboardInterrupt), interrupts.held_back():
        os.kill(os.getpid(), signal.SIGINT)
        finished = True
    assert finished
    assert signal.getsignal(signal.SIGINT) is handler


class _TimeLimitError(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[None]:
    """A time limit as pytest-timeout and others set it: a handler of SIGALRM that raises."""

    def expire(number: int, frame: object) -> None:
        raise _TimeLimitError

    before = signal.signal(signal.SIGALRM, expire)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_time_limit_in_the_middle_loses_nothing(alarm: None, backend: str) -> None:
    layer = randomize_(lora.Linear(300, 300, r=4))
    before = layer.weight.detach().clone()
    expired = 0
    with lora.use_backend(backend):
        for microseconds in range(20, 1500, 10):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
                    layer.eval()
                    layer.train()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except _TimeLimitError:
                expired += 1
            layer.train()
            assert torch.equal(layer.weight, before), microseconds
    assert expired > 0


def test_held_back_delivers_each_signal_and_restores_each_handler(
    ctrl_c: None, alarm: None
) -> None:
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.held_back():
        for number in (signal.SIGINT, signal.SIGALRM, signal.SIGALRM):
            signal.raise_signal(number)
    assert isinstance(caught.value.__context__, _TimeLimitError)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers


def test_eval_forgets_nothing_that_another_thread_has_merged() -> None:
    """What a load has noted is taken back under the lock of the merge, or the record would go."""
    layer = randomize_(lora.Linear(8, 6, r=2)).eval()
    layer.load_state_dict(layer.state_dict())
    thread = threading.Thread(target=layer.eval)
    with interrupts.merge_lock:
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
    thread.join()
    assert not layer._merge_state.by_loading


def test_two_threads_merge_their_own_layers() -> None:
    layers = [randomize_(lora.Linear(200, 200, r=8)) for _ in range(2)]
    before = [layer.weight.detach().clone() for layer in layers]

    def flip(layer: lora.Linear) -> None:
        for _ in range(30):
            layer.eval()
            layer.train()

    with ThreadPoolExecutor() as pool:
        list(pool.map(flip, layers))  # raises what a thread has raised
    assert all(torch.equal(m.weight, w) for m, w in zip(layers, before, strict=True))


def test_functional_names_the_ops_that_ran(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(4, 4)
    with caplog.at_level("DEBUG", "lora_fast.dispatch"):
        functional.merge_(weight, torch.randn(1, 4), torch.randn(4, 1), 1.0)
        with lora.use_backend("reference"):
            functional.merge_(weight, torch.randn(1, 4), torch.randn(4, 1), 1.0)
    assert "merge_ -> native" in caplog.text
    assert "merge_ -> reference: chosen by set_backend" in caplog.text
