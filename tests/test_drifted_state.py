"""Merged states without a mark whose base weight is not quite the one that is here."""

import copy
import logging
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import sums
from lora_fast.testing import randomize_

SPLIT = {"enable_lora": [True, False, True]}
MAKERS = {
    "linear": lambda lib: lib.Linear(24, 32, r=2, lora_alpha=3),
    "transposed": lambda lib: lib.Linear(24, 32, r=2, fan_in_fan_out=True),
    "merged_linear": lambda lib: lib.MergedLinear(24, 48, r=2, **SPLIT),
    "embedding": lambda lib: lib.Embedding(30, 16, r=2),
    "conv2d": lambda lib: lib.Conv2d(4, 6, 3, r=2),
}
State = dict[str, Tensor]


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def owner(layer: Any) -> Any:
    return getattr(layer, "conv", layer)


def plain(layer: Any) -> State:
    """Copies, which carry no mark; what a file of safetensors holds."""
    return {key: value.clone() for key, value in layer.state_dict().items()}


def key_of(layer: Any) -> str:
    return str(layer._weight_key())


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A layer, and a twin of it with other factors."""
    layer = randomize_(MAKERS[name](lora), 0.1).to(dtype)
    twin = copy.deepcopy(layer)
    for factor in (twin.lora_A, twin.lora_B):
        nn.init.normal_(factor, std=0.1)
    return layer, twin


# --- taken for merged


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_validations_with_loralib(
    name: str, dtype: torch.dtype, training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Each leaves the rounding of a sum in the base weight, of other factors each time."""
    layer, twin = pair(name, dtype)
    source = MAKERS[name](loralib).to(dtype)
    source.load_state_dict(plain(twin), strict=False)  # loralib's mask is a buffer
    for std in 11 * [5.0 if dtype is torch.float32 else 0.1] + [0.1]:
        source.train()
        for factor in (source.lora_A, source.lora_B):
            nn.init.normal_(factor, std=std)
        source.eval()
    merged = owner(source).weight.detach().clone()
    state = plain(source)
    layer.train(training)
    with caplog.at_level(logging.WARNING, logger="lora_fast.merge"):
        for _ in range(2):
            layer.load_state_dict(state, strict=False)
    told = [r for r in caplog.records if "taken for merged" in r.getMessage()]
    assert len(told) == 1
    assert layer.merged is not training
    source.train()
    kind: dict[str, Any] = {"rtol": 0.0, "atol": 4 * torch.finfo(dtype).eps * merged.abs().max()}
    torch.testing.assert_close(owner(layer.eval()).weight.detach(), merged, **kind)
    torch.testing.assert_close(owner(layer.train()).weight, owner(source).weight, **kind)


def test_an_average_of_merged_states(name: str) -> None:
    """Of clients that began with the same factors, as in federated learning."""
    layer, client = pair(name)
    base, states = owner(layer).weight.detach().clone(), []
    for _ in range(3):
        own = copy.deepcopy(client)
        for factor in (own.lora_A, own.lora_B):
            factor.data += 0.02 * torch.randn_like(factor)
        states.append(plain(own.eval()))
    mean = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    layer.load_state_dict(mean)
    off = owner(layer).weight.detach() - base
    delta = layer.effective_weight().detach() - owner(layer).weight.detach()
    assert off.norm() < 0.2 * delta.norm()


def test_users_of_loralib_say_that_it_is_merged(name: str) -> None:
    layer, twin = pair(name)
    owner(twin).weight.data += 1e-3 * torch.randn_like(owner(twin).weight)
    base, state = owner(twin).weight.detach().clone(), plain(twin.eval())
    layer.load_state_dict(state)
    layer.merged = True
    torch.testing.assert_close(owner(layer).weight.detach(), state[key_of(layer)])
    torch.testing.assert_close(owner(layer.train()).weight.detach(), base)


# --- not taken for merged


def fine_tuned(layer: Any, twin: Any) -> State:
    state = plain(twin)
    state[key_of(layer)] += 1e-3 * torch.randn_like(state[key_of(layer)])
    return state


def without_factors(layer: Any, twin: Any) -> State:
    state = plain(twin)
    state[key_of(layer)] += 0.1 * torch.randn_like(state[key_of(layer)])
    return {**state, "lora_B": torch.zeros_like(state["lora_B"])}


def folded_and_trained_on(layer: Any, twin: Any) -> State:
    """ReLoRA's: the adapter that is here has become part of the base, and another one begins."""
    folded = layer.effective_weight().detach()
    return {**plain(twin), key_of(layer): folded + 1e-3 * torch.randn_like(folded)}


def taken_out(layer: Any, twin: Any) -> State:
    base = owner(twin).weight.detach()
    return {**plain(twin), key_of(layer): 2 * base - twin.effective_weight().detach()}


UNMERGED = {
    "the same base": lambda layer, twin: plain(twin),
    "rounded": lambda layer, twin: {k: v.bfloat16().float() for k, v in plain(twin).items()},
    "a base that was fine-tuned": fine_tuned,
    "another base": lambda layer, twin: plain(another(twin)),
    "merged by half": lambda layer, twin: {
        **plain(twin),
        key_of(layer): (owner(twin).weight + twin.effective_weight()).detach() / 2,
    },
    "factors of zero": without_factors,
    "folded": folded_and_trained_on,
    "subtracted": taken_out,
}


def another(twin: Any) -> Any:
    found = copy.deepcopy(twin)
    nn.init.normal_(owner(found).weight, std=float(owner(twin).weight.detach().std()))
    return found


@pytest.mark.parametrize("what", UNMERGED)
def test_what_is_a_base_is_loaded_as_it_is(
    name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer, twin = pair(name)
    state = UNMERGED[what](layer, twin)
    for training in (True, False):
        found = copy.deepcopy(layer).train(training)
        found.load_state_dict({key: value.clone() for key, value in state.items()})
        assert torch.equal(owner(found.train()).weight, state[key_of(layer)])
    # That an adapter is added to it in eval mode, the first layer of a process says.
    assert not [r for r in caplog.records if "taken for merged" in r.getMessage()]


def test_the_state_of_another_layer(name: str) -> None:
    layer, other = randomize_(MAKERS[name](lora), 0.1), randomize_(MAKERS[name](lora), 0.1)
    state = plain(other.eval())
    layer.load_state_dict(state)
    assert torch.equal(owner(layer).weight, state[key_of(layer)])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_base_that_was_trained_along(optimizer: Any) -> None:
    """Its change and the adapter's delta answer to the same gradients."""
    layer = MAKERS["linear"](lora)
    trained = copy.deepcopy(layer)
    x, target = torch.randn(64, 24), torch.randn(64, 32)
    steps = optimizer(trained.parameters(), lr=0.1)
    for _ in range(30):
        steps.zero_grad()
        (trained(x) - target).square().mean().backward()
        steps.step()
    assert trained.lora_B.any()
    layer.load_state_dict(plain(trained))
    assert torch.equal(layer.weight, trained.weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_diverged_weight_is_no_sum(value: float) -> None:
    base, lora_A, lora_B = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    weight = base + lora_B @ lora_A
    assert sums.is_nearer_to_sum(weight, base, lora_A, lora_B, 1.0)
    assert not sums.is_nearer_to_sum(weight, base, lora_A, lora_B, 2.0)
    weight[0, 0] = value
    assert not sums.is_nearer_to_sum(weight, base, lora_A, lora_B, 1.0)
