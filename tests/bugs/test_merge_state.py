"""What `eval()` and `train()` leave behind: the base weight, the flags, the warnings."""

import copy
import threading
import warnings
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast as lora
from lora_fast.testing import randomize_


def bits(tensor: Tensor) -> Tensor:
    """A copy that compares bit by bit: -0.0 is not 0.0, NaN is itself."""
    return tensor.detach().contiguous().view(torch.uint8).clone()


def test_b01_eval_and_train_return_the_layer(case: Any) -> None:
    layer = case.build()
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.train(False) is layer
    assert layer.requires_grad_(False).train().training


def test_b01_loralib_returns_none(old_case: Any) -> None:
    assert old_case.build(loralib).eval() is None


@pytest.mark.usefixtures("backend")
def test_b05_a_hundred_merges_leave_every_bit_of_the_base(case: Any, dtype: torch.dtype) -> None:
    layer = case.build(dtype=dtype)
    before, x = bits(case.weight(layer)), case.input(dtype)
    base = case.weight(layer).detach().clone()
    for i in range(100):
        randomize_(layer, 0.1)
        layer.scaling = 0.5 + i
        layer.eval()
        assert layer.merged
        if i % 25 == 0:
            case.assert_right(layer, x, base=base)
        randomize_(layer, 0.3)
        layer.scaling = 2.0
        layer.train()
        assert torch.equal(bits(case.weight(layer)), before)
    case.assert_right(layer, x)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_b05_loralib_drifts(old_case: Any, low: torch.dtype) -> None:
    layer = old_case.build(loralib, dtype=low)
    before = old_case.weight(layer).detach().clone()
    for _ in range(20):
        layer.eval()
        layer.train()
        randomize_(layer)
    drift = (old_case.weight(layer) - before).abs().max() / before.abs().max()
    assert drift > 1e-3


@pytest.mark.usefixtures("backend")
def test_b05_special_values_of_the_base_survive(linear_case: Any, dtype: torch.dtype) -> None:
    """Infinities, NaN and negative zeros of the base come back; the merge is not refused."""
    layer = linear_case.build(dtype=dtype)
    with torch.no_grad():
        layer.weight.flatten()[:4] = torch.tensor([float("inf"), float("nan"), -0.0, 0.0])
        layer.weight[0, 0], layer.weight[1, 1], layer.weight[2, 2] = torch.inf, torch.nan, -0.0
    before = bits(layer.weight)
    assert layer.eval().merged
    assert not torch.equal(bits(layer.weight), before)
    assert torch.equal(bits(layer.train().weight), before)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_b06_a_merge_that_overflows_is_refused(case: Any, name: str) -> None:
    low = getattr(torch, name)
    layer = case.build(dtype=low, std=1.0)
    layer.scaling = torch.finfo(low).max
    before = bits(case.weight(layer))
    with pytest.warns(RuntimeWarning, match="not merged.*overflow"):
        layer.eval()
    assert not layer.merged
    assert not layer.training
    assert torch.equal(bits(case.weight(layer)), before)
    layer.scaling = 0.5
    case.assert_right(layer, case.input(low))
    assert torch.equal(bits(case.weight(layer.train())), before)
    assert layer.eval().merged  # what fits again is merged again


def test_b06_outputs_of_the_refused_layer_are_right() -> None:
    """The update is too large for the weight's dtype but, with this input, not for the output's."""
    layer = lora.Linear(8, 8, r=1, dtype=torch.float16)
    with torch.no_grad():
        layer.lora_A.fill_(300.0)
        layer.lora_B.fill_(300.0)
    with pytest.warns(RuntimeWarning, match="overflow"):
        layer.eval()
    x = torch.full((2, 8), 2.0**-9, dtype=torch.float16)
    expected = layer.weight.double() @ x[0].double() + layer.bias + 300.0 * 300.0 * 8 * 2.0**-9
    torch.testing.assert_close(layer(x)[1].double(), expected, rtol=1e-3, atol=1e-2)


def test_b06_an_ordinary_merge_is_silent(case: Any, dtype: torch.dtype) -> None:
    layer = case.build(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.eval().merged
        assert not layer.train().merged


def test_b06_loralib_is_destroyed() -> None:
    layer = randomize_(loralib.Linear(8, 8, r=2, dtype=torch.float16), 500.0)
    layer.eval()
    layer.train()
    assert layer.weight.isnan().any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_b07_autocast_does_not_round_the_merge(
    case: Any, low: torch.dtype, dtype: torch.dtype
) -> None:
    layer, twin = case.build(dtype=dtype), case.make(lora, dtype=dtype)
    twin.load_state_dict(layer.state_dict())
    assert_merge_ignores_autocast(case, layer, twin, low)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", ["conv2d", "conv2d_grouped"], indirect=True)
def test_b07_nor_that_of_a_kernel_in_channels_last(case: Any) -> None:
    layer = case.build().to(memory_format=torch.channels_last)
    assert not layer.weight.is_contiguous()
    assert_merge_ignores_autocast(case, layer, copy.deepcopy(layer), torch.bfloat16)


def assert_merge_ignores_autocast(case: Any, layer: Any, twin: Any, low: torch.dtype) -> None:
    before = bits(case.weight(layer))
    with torch.autocast("cpu", dtype=low):
        layer.eval()
    assert layer.merged
    assert torch.equal(case.weight(layer), case.weight(twin.eval()))
    layer.train()
    assert torch.equal(bits(case.weight(layer)), before)
    layer.eval()
    with torch.autocast("cpu", dtype=low):
        layer.train()
    assert torch.equal(bits(case.weight(layer)), before)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_b07_loading_under_autocast_is_exact(case: Any, low: torch.dtype) -> None:
    saved = case.build().eval()
    state = saved.state_dict()
    exact, loaded = case.make(lora), case.make(lora)
    exact.load_state_dict(state)
    with torch.autocast("cpu", dtype=low):
        loaded.load_state_dict(state)
    assert torch.equal(case.weight(loaded), case.weight(exact))


def test_b07_loralib_rounds_in_autocast() -> None:
    layer = randomize_(loralib.Linear(64, 64, r=4))
    before = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.eval()
    layer.train()
    assert (layer.weight - before).abs().max() > 1e-3


CHANGES = {
    "scaling": lambda layer: setattr(layer, "scaling", 7.0),
    "alpha": lambda layer: setattr(layer, "lora_alpha", 64),
    "rank": lambda layer: setattr(layer, "r", 1),
    "factors": lambda layer: randomize_(layer, 3.0),
    "new_factors": lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A * 2)),
    "nan": lambda layer: layer.lora_B.data.fill_(torch.nan),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("change", CHANGES)
def test_b21_changes_while_merged_do_not_reach_the_base(case: Any, change: str) -> None:
    layer = case.build()
    before, x = bits(case.weight(layer)), case.input()
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
        CHANGES[change](layer)
        assert torch.equal(layer(x), expected)
    layer.train()
    assert torch.equal(bits(case.weight(layer)), before)


@pytest.mark.usefixtures("backend")
def test_b21_the_new_scaling_counts_from_then_on(case: Any, dtype: torch.dtype) -> None:
    layer, x = case.build(dtype=dtype).eval(), case.input(dtype)
    layer.scaling *= 2
    case.assert_right(layer.train(), x)
    base = case.weight(layer).detach().clone()
    case.assert_right(layer.eval(), x, base=base)


def test_b21_loralib_loses_the_base(old_case: Any) -> None:
    layer = old_case.build(loralib)
    before = old_case.weight(layer).detach().clone()
    layer.eval()
    layer.scaling *= 2
    layer.train()
    assert (old_case.weight(layer) - before).abs().max() > 0.1


@pytest.mark.usefixtures("backend")
def test_b22_switching_merging_off_unmerges_at_once(case: Any, dtype: torch.dtype) -> None:
    layer, x = case.build(dtype=dtype), case.input(dtype)
    before = bits(case.weight(layer))
    layer.eval()
    layer.merge_weights = False
    assert not layer.merged
    assert not layer.training
    assert torch.equal(bits(case.weight(layer)), before)
    case.assert_right(layer, x)
    assert not layer.eval().merged
    layer.train()
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


def test_b22_switching_merging_on_merges_at_the_next_eval(case: Any) -> None:
    layer = case.build(merge_weights=False).eval()
    layer.merge_weights = True
    assert not layer.merged
    assert layer.eval().merged
    assert not layer.train().merged


def test_b22_loralib_stays_merged(old_case: Any) -> None:
    layer = old_case.build(loralib)
    layer.eval()
    layer.merge_weights = False
    layer.train()
    assert layer.merged
    assert layer.training


class _Raises(nn.Module):
    """A module whose change of mode fails, as a user's override may."""

    def train(self, mode: bool = True) -> Any:
        raise LookupError("no such mode")


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_b23_a_change_of_mode_that_raises_leaves_layers_consistent(case: Any, mode: bool) -> None:
    layers = [case.build(), case.build()]
    bases = [case.weight(layer).detach().clone() for layer in layers]
    model = nn.ModuleList([layers[0].train(not mode), _Raises(), layers[1].train(not mode)])
    with pytest.raises(LookupError):
        model.train(mode)
    x = case.input()
    for layer, base in zip(layers, bases, strict=True):
        assert layer.merged is not layer.training
        case.assert_right(layer, x, base=base)
        assert torch.equal(case.weight(layer.train()), base)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_b23_an_interrupted_merge_leaves_the_layer_unmerged(
    case: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight is written, then the error comes: the base is back, the layer still right."""
    layer, x = case.build(), case.input()
    before = bits(case.weight(layer))

    def fail(weight: Tensor, original: Tensor) -> bool:
        assert not torch.equal(weight, original)
        raise error("stop")

    with monkeypatch.context() as patch, lora.use_backend("reference"):
        patch.setattr("lora_fast.reference.finite_where", fail)
        if issubclass(error, Exception):
            with pytest.warns(RuntimeWarning, match="not merged"):
                layer.eval()
        else:
            with pytest.raises(error):
                layer.eval()
    assert not layer.merged
    assert torch.equal(bits(case.weight(layer)), before)
    case.assert_right(layer, x)
    base = case.weight(layer).detach().clone()
    assert layer.eval().merged
    case.assert_right(layer, x, base=base)


@pytest.mark.usefixtures("backend")
def test_b46_threads_do_not_corrupt_the_base(case: Any) -> None:
    layer = case.build()
    before, errors = bits(case.weight(layer)), []

    def flip() -> None:
        try:
            for _ in range(40):
                layer.eval()
                layer.train()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=flip) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert not layer.merged
    assert torch.equal(bits(case.weight(layer)), before)


class _LargeTensors(TorchDispatchMode):
    """Counts the new tensors that have as many elements as a given one."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = isinstance(result, Tensor) and not any(result is arg for arg in args)
        if is_new and not func.is_view and result.numel() >= self.numel:
            self.made += 1
        return result


def large_tensors_of_a_merge(layer: Any) -> tuple[int, int]:
    """How many tensors of the weight's size `eval()` makes, and what autograd would keep."""
    kept: list[Tensor] = []
    counter = _LargeTensors(layer.weight.numel())
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t), counter:
        layer.eval()
    return counter.made, len(kept)


@pytest.mark.usefixtures("backend")
def test_b49_a_merge_makes_no_temporary_of_the_weights_size(linear_case: Any) -> None:
    """At most one: the copy from which the base comes back."""
    layer = linear_case.build()
    made, kept = large_tensors_of_a_merge(layer)
    assert made <= 1
    assert kept == 0
    assert layer.merged


@pytest.mark.usefixtures("backend")
def test_b49_a_merge_in_low_precision_widens_a_slice_at_a_time() -> None:
    layer = randomize_(lora.Linear(2048, 1024, r=2, dtype=torch.bfloat16), 0.1)
    made, kept = large_tensors_of_a_merge(layer)
    assert made <= 1
    assert kept == 0


def test_b49_loralib_makes_several_and_records_for_autograd() -> None:
    layer = randomize_(loralib.Linear(8, 12, r=2))
    made, kept = large_tensors_of_a_merge(layer)
    assert made >= 2
    assert kept > 0
