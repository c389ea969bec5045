"""Weights that somebody writes to while an adapter is merged into them."""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from each_layer import base_of, weight_of
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import functional, restoring
from lora_fast.testing import randomize_


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


def moved(weight: nn.Parameter, _: Tensor) -> None:
    weight.data = weight.data.clone()


WRITES: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "the base": lambda weight, base: weight.copy_(base),
    "a copy": moved,
    "itself": lambda weight, _: weight.mul_(1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_writes_that_leave_a_base_that_is_not_finite(
    layer: Any, value: float, write: str, dtype: torch.dtype, backend: str
) -> None:
    """NaN is not equal to itself, and yet as it was."""
    weight = weight_of(layer.to(dtype))
    with torch.no_grad():
        weight[0, 0] = value
    base = base_of(layer)
    layer.eval()
    with torch.no_grad():
        WRITES[write](weight_of(layer), base)
    layer.train()
    torch.testing.assert_close(weight_of(layer).detach(), base, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_cpu_flushes_to_zero_at_one_of_both_ends(
    layer: Any, dtype: torch.dtype, backend: str
) -> None:
    """Subnormal numbers of the base come back, as the sum is recognised without them."""
    weight = weight_of(layer.to(dtype))
    with torch.no_grad():
        layer.lora_A.zero_()
        weight[0] = 1e-41
    base = base_of(layer)
    for flushes in (True, False):
        torch.set_flush_denormal(flushes)
        try:
            layer.eval()
            torch.set_flush_denormal(not flushes)
            layer.train()
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(weight_of(layer), base)


def test_a_base_that_is_put_back_beside_a_list_in_another_order() -> None:
    """Several threads write the list of what the code can't tell, in whichever order."""
    layer = randomize_(lora.Linear(64, 64, r=2))
    with torch.no_grad():
        layer.weight[0, ::7] = 1e-30
    base = base_of(layer)
    layer.eval()
    (code,) = layer._merge_state.record.codes
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_write_that_torch_does_not_count_is_not_thrown_away(
    layer: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor spoilt by the way back of a native merge, which is for most weights a difference."""
    base, added = base_of(layer.to(dtype)), torch.randn_like(weight_of(layer))
    layer.eval()
    weight_of(layer).data.add_(added)
    layer.train()
    assert "was written to while the adapter was merged" in caplog.text
    rounding = 2 * torch.finfo(dtype).eps * (base.abs() + added.abs()).max()
    torch.testing.assert_close(weight_of(layer), base + added, rtol=0, atol=float(rounding) * 4)


def test_the_base_put_back_as_torch_does_not_count(layer: Any) -> None:
    base = base_of(layer)
    weight_of(layer.eval()).data.copy_(base)
    assert torch.equal(weight_of(layer.train()), base)


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


def test_a_resized_weight_is_told_in_terms_of_the_layer() -> None:
    layer = lora.Embedding(10, 4, r=2).eval()
    layer.weight.data = torch.randn(12, 4)
    with pytest.raises(RuntimeError, match=r"Embedding\(.* the shape \(4, 12\), by resizing or"):
        layer.train()


def test_a_write_is_undone_once_for_shallow_copies(layer: Any) -> None:
    base = base_of(layer)
    layer.eval()
    copied = copy.copy(layer)
    with torch.no_grad():
        weight_of(layer).add_(1.0)
    layer.train()
    copied.train()
    torch.testing.assert_close(weight_of(layer).detach(), base + 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_whose_base_is_rounded_otherwise(layer: Any, dtype: torch.dtype) -> None:
    """The average is validated, and what was trained is put back before `train()`."""
    own = {name: p.detach().clone() for name, p in layer.to(dtype).named_parameters()}
    average = {name: value.mul(0.99).add(value, alpha=0.01) for name, value in own.items()}
    layer.load_state_dict(average)
    layer.eval()
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(own[name])
    layer.train()
    assert all(torch.equal(p, own[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize(
    ("dtype", "decay", "steps"), [(torch.float32, 0.9999, 300), (torch.bfloat16, 0.9, 30)], ids=str
)
def test_an_average_that_has_drifted(
    layer: Any, dtype: torch.dtype, decay: float, steps: int
) -> None:
    """It is kept, as `decay e + (1 - decay) p` has left it: not quite the base."""
    with torch.no_grad():
        layer.lora_B.mul_(0.2)
        averages = [p.detach().clone() for p in layer.to(dtype).parameters()]
        for _ in range(steps):
            for e, p in zip(averages, layer.parameters(), strict=True):
                e.copy_(decay * e + (1 - decay) * p)
        layer.eval()
        for e, p in zip(averages, layer.parameters(), strict=True):
            p.copy_(e)
    saved = copy.deepcopy(layer.state_dict())
    fresh = copy.deepcopy(layer).train()
    randomize_(fresh).load_state_dict(saved)
    for kept in (fresh, layer.train()):
        assert all(map(torch.equal, kept.parameters(), averages))


def test_a_base_that_is_put_back_about_is_merged_anew(layer: Any) -> None:
    """And a state of it says that it is not merged."""
    base, merged = base_of(layer), layer.effective_weight().detach()
    layer.eval()
    with torch.no_grad():
        weight_of(layer).copy_(0.9 * base + 0.1 * base)
    saved = copy.deepcopy(layer.state_dict())
    fresh = copy.deepcopy(layer).train()
    randomize_(fresh).load_state_dict(saved)
    torch.testing.assert_close(base_of(fresh), base)
    layer.eval()
    torch.testing.assert_close(base_of(layer), merged)
    torch.testing.assert_close(base_of(layer.train()), base)


SMALL: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda weight: weight.zero_(),
    "a few rows": lambda weight: weight[1:].zero_(),
    "every other row": lambda weight: weight[::2].zero_(),
    "limited": lambda weight: weight.clamp_(-0.02, 0.02),
    "shrunk": lambda weight: weight.mul_(0.2),
}


@pytest.mark.parametrize("write", SMALL)
def test_a_small_weight_is_no_base_beside_a_large_delta(layer: Any, write: str) -> None:
    """`eval()` of a merged layer leaves what somebody has made of the sum."""
    with torch.no_grad():
        weight_of(layer).mul_(0.1)
        layer.eval()
        SMALL[write](weight_of(layer))
    written = base_of(layer)
    layer.eval()
    assert torch.equal(base_of(layer), written)


STRIPPED: dict[str, Callable[[Any], Any]] = {
    "no factors": lambda layer: layer.__dict__["_parameters"].update(lora_A=None, lora_B=None),
    "no adapter": lambda layer: [delattr(layer, n) for n in ("lora_A", "lora_B", "scaling")],
    "several factors": lambda layer: setattr(layer, "scaling", torch.full((8, 1), 0.5)),
}


@pytest.mark.filterwarnings("ignore:.*was not merged:RuntimeWarning")
@pytest.mark.parametrize("how", STRIPPED)
def test_a_written_weight_whose_adapter_makes_no_delta_any_more(layer: Any, how: str) -> None:
    """It can be evaluated and saved as loralib's can; what was merged is known without it."""
    expected = layer.effective_weight().detach() * 0.99
    layer.eval()
    with torch.no_grad():
        weight_of(layer).mul_(0.99)
    STRIPPED[how](layer)
    copied = copy.deepcopy(layer)
    copied.state_dict()
    for each in (layer, copied):
        merged = base_of(each.eval())
        if how != "several factors":  # which stays unmerged from now on
            torch.testing.assert_close(merged, expected)


def test_another_models_merged_weights_of_another_scaling(layer: Any) -> None:
    other = copy.deepcopy(layer)
    other.scaling = 0.04 * layer.scaling
    base = base_of(layer)
    layer.eval()
    with torch.no_grad():
        for mine, its in zip(layer.parameters(), other.eval().parameters(), strict=True):
            mine.copy_(its)
    layer.scaling = other.scaling
    torch.testing.assert_close(base_of(layer.train()), base, rtol=1e-5, atol=1e-5)


def test_a_write_is_told_once_however_many_states_are_taken(
    layer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer.eval()
    with torch.no_grad():
        weight_of(layer).add_(1.0)
        layer.lora_B.add_(1.0)
    for _ in range(3):
        layer.state_dict()
    assert caplog.text.count("was written to") == 1


@pytest.mark.parametrize("small", [0.01, 0.3])
def test_another_models_merged_weights_with_a_small_delta(layer: Any, small: float) -> None:
    """They are that model's base plus its delta, which is close to the base."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.lora_B.mul_(small)
    base = base_of(layer)
    layer.eval()
    with torch.no_grad():
        for mine, its in zip(layer.parameters(), other.eval().parameters(), strict=True):
            mine.copy_(its)
    torch.testing.assert_close(base_of(layer.train()), base)


def test_a_row_of_which_alone_the_elements_tell() -> None:
    """A table of which few rows were trained, one of them put back while merged."""
    table = lora.Embedding(3000, 16, r=2)
    nn.init.normal_(table.lora_B)
    with torch.no_grad():
        table.weight[0] = 0
        table.lora_A.zero_()
        table.lora_A[:, ::375] = 0  # those that are looked at, but the first
        table.lora_A[:, 1:200].normal_()
        table.lora_A[:, 0] = 1
    base = table.weight.detach().clone()
    table.eval()
    with torch.no_grad():
        table.weight[0] = 0
    table.train()
    torch.testing.assert_close(table.weight[1:], base[1:])
