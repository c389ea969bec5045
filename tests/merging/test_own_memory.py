"""Memory that a layer shares with states, processes or inference mode, and moves out of."""

import copy
import signal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from each_layer import base_of, weight_of
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import interrupts
from lora_fast.testing import randomize_


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_keeps_its_values_when_the_layer_is_converted(
    layer: Any, dtype: torch.dtype
) -> None:
    base, target = base_of(layer), copy.deepcopy(layer)
    nn.init.normal_(weight_of(target))
    state = layer.eval().state_dict()
    values = {key: value.clone() for key, value in state.items()}
    layer.to(dtype)
    for key, value in values.items():
        assert torch.equal(state[key], value), key
    target.load_state_dict(state)
    torch.testing.assert_close(weight_of(target).detach(), base)
    layer.train()
    target.load_state_dict(state)
    torch.testing.assert_close(weight_of(target).detach(), base)


def test_a_dict_that_was_assigned_is_not_written_to(layer: Any) -> None:
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    values = {key: value.clone() for key, value in state.items()}
    for _ in range(2):
        layer.load_state_dict(state, assign=True)
        layer.eval()
        for key, value in values.items():
            assert torch.equal(state[key], value), key
        layer.train()


def test_a_dict_without_the_weight_costs_no_copy_of_it(layer: Any) -> None:
    state = {k: v.clone() for k, v in layer.state_dict().items() if "lora_" in k}
    layer.load_state_dict(state, strict=False, assign=True)
    kept, address = layer.state_dict(), weight_of(layer).data_ptr()
    assert weight_of(layer.eval()).data_ptr() == address
    assert kept


def test_memory_that_only_the_layer_has_is_merged_where_it_is(layer: Any) -> None:
    layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    address = weight_of(layer).data_ptr()
    assert weight_of(layer.eval()).data_ptr() == address


def test_memory_of_several_processes_is_left_to_the_others(layer: Any) -> None:
    layer.share_memory()
    shared = weight_of(layer).data  # as another process sees it
    base = shared.clone()
    expected = layer.effective_weight().detach()
    layer.eval()
    assert torch.equal(shared, base)
    torch.testing.assert_close(weight_of(layer), expected)
    assert torch.equal(weight_of(layer.train()), base)

    merged = layer.eval()
    merged.share_memory()
    assert weight_of(merged).is_shared()
    shared = weight_of(merged).data
    values = shared.clone()
    merged.train()
    assert torch.equal(shared, values)
    assert torch.equal(weight_of(merged), base)


def numpy_twin(layer: Any, base: Any) -> Any:
    """A copy of a layer whose weight lies in an array of numpy."""
    twin = copy.deepcopy(layer)
    state = {next(k for k, p in layer.named_parameters() if p is weight_of(layer)): base}
    state = {key: torch.from_numpy(value) for key, value in state.items()}
    twin.load_state_dict(state, strict=False, assign=True)
    return twin


def test_an_array_of_numpy_is_left_to_whoever_else_has_it(layer: Any) -> None:
    array = base_of(layer).contiguous().numpy()
    values, expected = array.copy(), layer.effective_weight().detach()
    first, second = numpy_twin(layer, array), numpy_twin(layer, array)
    for twin in (first, second):
        twin.eval()
        torch.testing.assert_close(weight_of(twin).detach(), expected)
    assert (array == values).all()
    for twin in (first, second):
        assert torch.equal(weight_of(twin.train()).detach(), torch.from_numpy(values))


def test_a_file_that_is_mapped_is_not_written_to(layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "base.npy"
    numpy.save(path, base_of(layer).contiguous().numpy())
    written = path.read_bytes()
    twin = numpy_twin(layer, numpy.load(path, mmap_mode="r+"))
    twin.eval()
    torch.testing.assert_close(weight_of(twin), layer.effective_weight())
    assert path.read_bytes() == written


@pytest.mark.parametrize("merges_first", [False, True])
def test_autocast_forgets_what_a_weight_that_learns_was(merges_first: bool) -> None:
    layer: Any = randomize_(lora.Linear(64, 64, r=4))
    layer.weight.requires_grad_()
    x = torch.randn(5, 64)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        layer.train(not merges_first)(x)
        found = layer.train(merges_first)(x)
    torch.testing.assert_close(found.float().detach(), expected, rtol=0.05, atol=0.1)


def test_weights_of_inference_mode_are_restored_outside_of_it(layer: Any) -> None:
    with torch.inference_mode():
        made = copy.deepcopy(layer)
        base = base_of(made)
        made.eval()
    assert weight_of(made).is_inference()
    assert torch.equal(weight_of(made.train()), base)
    made.eval()
    assert made.merged
    assert torch.equal(weight_of(made.train()), base)


@pytest.mark.parametrize("moves", ["share_memory", "float"])
def test_weights_of_inference_mode_are_taken_out_of_others_memory(moves: str) -> None:
    with torch.inference_mode():
        layer = randomize_(lora.Linear(8, 12, r=2))
    base = base_of(layer)
    state = layer.eval().state_dict()
    getattr(layer, moves)()
    assert layer.merged and state
    assert torch.equal(layer.train().weight, base)
    assert layer.eval().merged
    assert torch.equal(layer.train().weight, base)


def test_ctrl_c_while_a_layer_is_converted_leaves_no_trace() -> None:
    layer = randomize_(lora.Linear(8, 12, r=2)).eval()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            layer._apply(interrupting)
    finally:
        signal.signal(signal.SIGINT, before)
    layer.share_memory()
    layer.train()
    shared = layer.weight.data
    layer.share_memory()
    shared = layer.weight.data
    base = shared.clone()
    layer.eval()
    assert torch.equal(shared, base)


def interrupting(tensor: Tensor) -> Tensor:
    """A conversion in which Ctrl-C comes so late that the merge after it hears it."""
    original = interrupts.held_back.__exit__

    def late(self: Any, *error: object) -> None:
        interrupts.held_back.__exit__ = original  # type: ignore[method-assign]
        signal.raise_signal(signal.SIGINT)
        original(self, *error)

    interrupts.held_back.__exit__ = late  # type: ignore[method-assign]
    return tensor.double()


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_layer_is_converted_by_swapping_beside_its_state(keep_vars: bool) -> None:
    """torch refuses to swap what has weak references."""
    layer = randomize_(lora.Linear(4, 5, r=2)).eval()
    state = layer.state_dict(keep_vars=keep_vars)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert layer.weight.dtype is torch.float64
    assert "weight" in state
