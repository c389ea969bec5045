"""What may happen to a layer between `eval()` and `train()`: its base weight comes back."""

import copy
import logging
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional, restoring
from lora_fast.testing import randomize_

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: lora.Linear(8, 12, r=2),
    "transposed": lambda: lora.Linear(8, 12, r=2, fan_in_fan_out=True),
    "merged_linear": lambda: lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True]),
    "embedding": lambda: lora.Embedding(12, 8, r=2),
    "conv": lambda: lora.Conv2d(4, 6, 3, r=2),
}


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    """With the native merge, and with the one that keeps a copy."""
    with lora.use_backend(request.param):
        yield request.param


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, backend: str) -> Any:
    """A layer whose adapter does something."""
    return randomize_(LAYERS[request.param]())


def weight_of(layer: Any) -> Any:
    return getattr(layer, "conv", layer).weight


def base_of(layer: Any) -> Tensor:
    found: Tensor = weight_of(layer).detach().clone()
    return found


def test_an_adapter_that_is_off_in_eval_mode_is_not_taken_out(layer: Any) -> None:
    base = base_of(layer)
    layer.r = 0
    layer.eval()
    assert layer.merged  # as in loralib
    layer.r = 2
    assert not layer.merged
    expected = layer.effective_weight().detach()
    layer.eval()
    torch.testing.assert_close(weight_of(layer), expected)
    layer.train()
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("again", [False, True])
def test_an_adapter_that_is_given_in_eval_mode_is_not_taken_out(again: bool) -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    lora_A, base, expected = layer.lora_A, base_of(layer), layer.effective_weight().detach()
    del layer.lora_A
    layer.eval()
    layer.lora_A = lora_A
    if again:
        torch.testing.assert_close(layer.eval().weight, expected)
    layer.train()
    assert torch.equal(layer.weight, base)


def test_a_state_of_a_layer_without_its_adapter_is_not_marked(layer: Any) -> None:
    base = base_of(layer)
    layer.r = 0
    state = copy.deepcopy(layer.eval().state_dict())
    layer.r = 2
    layer.train().load_state_dict(state)
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("change", ["B", "A", "data", "new", "scaling", "off"])
def test_eval_again_merges_what_the_adapter_is_now(layer: Any, change: str) -> None:
    base = base_of(layer)
    fresh = copy.deepcopy(layer)
    layer.eval()
    for changed in (layer, fresh):
        with torch.no_grad():
            if change in "AB":
                getattr(changed, f"lora_{change}").mul_(-3.0)
            elif change == "data":
                changed.lora_A.data = -3.0 * changed.lora_A
            elif change == "new":  # twice, as the second may be where the first one was
                for factor in (1.0, -3.0):
                    changed.lora_A = nn.Parameter(factor * changed.lora_A)
            elif change == "scaling":
                changed.scaling = 7.0
            else:
                changed.r = 0
    expected = fresh.eval()
    layer.eval()
    assert torch.equal(weight_of(layer), weight_of(expected))
    layer.train()
    assert torch.equal(weight_of(layer), base)


def test_eval_again_of_what_has_not_changed_does_nothing(layer: Any) -> None:
    layer.eval()
    record, version = layer._record, weight_of(layer)._version
    layer.eval()
    assert layer._record is record
    assert weight_of(layer)._version == version
    copied = copy.deepcopy(layer)  # whose tensors are others
    record = copied._record
    assert copied.eval()._record is record


def test_a_base_that_is_put_back_while_merged_stays(layer: Any) -> None:
    """As by averages of weights: store, copy to, evaluate, restore, and then train()."""
    stored = [p.detach().clone() for p in layer.parameters()]
    layer.eval()
    with torch.no_grad():
        for parameter, before in zip(layer.parameters(), stored, strict=True):
            parameter.copy_(before)
    layer.train()
    for parameter, before in zip(layer.parameters(), stored, strict=True):
        assert torch.equal(parameter, before)
    expected = layer.effective_weight().detach()
    torch.testing.assert_close(weight_of(layer.eval()), expected)


def test_a_base_that_is_put_back_beside_a_list_in_another_order() -> None:
    """Several threads write the list of what the code can't tell, in whichever order."""
    layer = randomize_(lora.Linear(64, 64, r=2))
    with torch.no_grad():
        layer.weight[0, ::7] = 1e-30
    base = base_of(layer)
    layer.eval()
    (code,) = layer._record.codes
    assert len(code.overflow_index) > 1
    for part in (code.overflow_index, code.overflow_value):
        part.copy_(part.flip(0))
    with torch.no_grad():
        layer.weight.copy_(base)
    assert torch.equal(layer.train().weight, base)


def test_a_code_of_zeros_recognises_no_base() -> None:
    """As of sums that are exact: every weight of whole numbers has it."""
    weight = torch.arange(64.0).view(8, 8)
    record = functional.merge_(weight, torch.ones(1, 8), torch.ones(8, 1), 1.0)
    assert not any(code.code.any() for code in record.codes)
    assert not restoring._is_base(torch.full((8, 8), 5.0), record)


def test_another_write_while_merged_is_told(layer: Any, caplog: pytest.LogCaptureFixture) -> None:
    base = base_of(layer)
    layer.eval()
    with torch.no_grad():
        weight_of(layer).add_(1.0)
    with caplog.at_level(logging.WARNING, "lora_fast.merge"):
        layer.train()
    assert "was written to while the adapter was merged" in caplog.text
    torch.testing.assert_close(weight_of(layer).detach(), base + 1.0)


@pytest.mark.parametrize("name", LAYERS)
def test_a_write_that_torch_does_not_count_is_not_thrown_away(name: str) -> None:
    """Where a copy is kept; the native merge's way back is for most weights a difference."""
    layer = randomize_(LAYERS[name]())
    base = base_of(layer)
    with lora.use_backend("reference"):
        layer.eval()
        weight_of(layer).data.add_(1.0)
        layer.train()
    torch.testing.assert_close(weight_of(layer).detach(), base + 1.0)


def test_a_state_of_changed_factors_has_their_scaling() -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    layer.eval()
    layer.scaling = 5.0
    layer.lora_A.data.mul_(2.0)
    assert layer.state_dict()._metadata[""]["lora_scaling"] == 5.0


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * x


def test_a_state_of_a_computed_factor_that_changed_has_the_base() -> None:
    from torch.nn.utils import parametrize

    layers = [randomize_(lora.Linear(8, 12, r=2)) for _ in range(2)]
    for layer in layers:
        parametrize.register_parametrization(layer, "lora_A", Tripled())
    base = base_of(layers[0])
    layers[0].eval()
    with torch.no_grad():
        layers[0].parametrizations.lora_A.original.mul_(3.0)  # type: ignore[operator]
    layers[1].load_state_dict(copy.deepcopy(layers[0].state_dict()))
    assert torch.equal(layers[1].weight, base)


def test_merging_a_model_merges_anew_what_has_changed() -> None:
    model = nn.Sequential(randomize_(lora.Linear(8, 8, r=2)), randomize_(lora.Linear(8, 8, r=2)))
    bases = [layer.weight.detach().clone() for layer in model]
    model[0].eval()
    with torch.no_grad():
        model[0].lora_B.mul_(2.0)
    expected = model[0].scaling * model[0].lora_B @ model[0].lora_A + bases[0]
    assert lora.merge(model) == 2
    torch.testing.assert_close(model[0].weight.detach(), expected.detach())
    with pytest.raises(ValueError, match="all 2 LoRA layers of the model are merged already"):
        lora.merge(model)
    lora.unmerge(model)
    assert all(torch.equal(layer.weight, base) for layer, base in zip(model, bases, strict=True))


def test_the_base_in_another_dtype_is_no_merged_weight() -> None:
    """Also where the delta is so small that it is near both."""
    layer = lora.Linear(64, 64, r=4)
    nn.init.normal_(layer.lora_B, std=0.01)
    base = base_of(layer)
    state = layer.eval().state_dict()
    del state._metadata[""]["lora_sample"]
    layer.train()
    state["weight"] = base.half()
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.weight.detach(), base.half().float(), rtol=0.0, atol=1e-6)


def test_another_layers_whole_state_while_merged(layer: Any) -> None:
    """As by DistributedDataParallel, which broadcasts all parameters of rank 0."""
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    base = base_of(other)
    layer.eval(), other.eval()
    with torch.no_grad():
        for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(weight_of(layer.train()).detach(), base)


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


def test_a_resized_weight_is_told_in_terms_of_the_layer() -> None:
    layer = lora.Embedding(10, 4, r=2).eval()
    layer.weight.data = torch.randn(12, 4)
    with pytest.raises(RuntimeError, match=r"Embedding\(.* the shape \(4, 12\), by resizing or"):
        layer.train()


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_adapter_that_hooks_compute_stays_unmerged(name: str) -> None:
    """The value that they left is that of the last forward, one step old."""
    from torch.nn.utils import prune

    layer = randomize_(lora.Linear(8, 12, r=4))
    prune.l1_unstructured(layer, name, amount=0.5)
    optimizer = torch.optim.SGD((p for p in layer.parameters() if p.requires_grad), lr=0.1)
    x = torch.randn(4, 8)
    layer(x).square().mean().backward()
    optimizer.step()
    trained = layer(x)
    assert not layer.eval().merged
    assert torch.equal(layer(x), trained)
    other = randomize_(lora.Linear(8, 12, r=4))
    prune.identity(other, name)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other.train()(x), trained)


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
    from lora_fast import interrupts

    original = interrupts.held_back.__exit__

    def late(self: Any, *error: object) -> None:
        interrupts.held_back.__exit__ = original  # type: ignore[method-assign]
        signal.raise_signal(signal.SIGINT)
        original(self, *error)

    interrupts.held_back.__exit__ = late  # type: ignore[method-assign]
    return tensor.double()


def test_the_state_of_a_merged_subclass() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    layer = randomize_(lora.Linear(8, 12, r=2))
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(two_tensor(weight.clone(), weight.clone()), requires_grad=False)
    assert layer.eval().merged
    assert "weight" in layer.state_dict()


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
def test_copies_of_a_compiled_layer_compute_with_their_own_weights(copier: Any) -> None:
    layer, x = randomize_(lora.Linear(4, 5, r=2)), torch.randn(3, 4)
    layer.compile(backend="eager")
    layer(x)
    copied = copier(layer)
    copied.weight = nn.Parameter(torch.zeros(5, 4))
    copied.bias = copied.lora_B = None
    copied.r = 0
    assert torch.equal(copied(x), torch.zeros(3, 5))


def test_a_compiled_layer_is_pickled() -> None:
    import pickle

    layer, x = randomize_(lora.Linear(4, 5, r=2)), torch.randn(3, 4)
    layer.compile(backend="eager")
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


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


def test_a_refused_state_lacks_no_key_that_it_has() -> None:
    layer = lora.Conv2d(4, 6, 3, r=2)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for lora_A") as error:
        layer.load_state_dict(lora.Conv2d(4, 6, 3, r=1).state_dict())
    assert "Missing" not in str(error.value)
    assert "Unexpected" not in str(error.value)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
