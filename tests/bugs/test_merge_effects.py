"""What a merge must not do to others: saved graphs, computed weights, compilers."""

import copy
import logging
from typing import Any

import loralib
import pytest
import torch
import torch._dynamo.exc
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fast as lora
from lora_fast.testing import randomize_


@pytest.mark.parametrize("needs_dx", [True, False], ids=["with_dx", "without_dx"])
def test_b19_backward_after_a_flip_is_right_or_refused(case: Any, needs_dx: bool) -> None:
    """Never silently the gradient at another weight."""
    layer, x = case.build(), case.input()
    x = x.requires_grad_(needs_dx and x.is_floating_point())
    inputs = [layer.lora_A, layer.lora_B] + ([x] if x.requires_grad else [])
    y = layer(x)
    seed = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, seed, retain_graph=True)
    layer.eval()
    try:
        got = torch.autograd.grad(y, inputs, seed)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert needs_dx  # without dX the weight plays no part
    else:
        torch.testing.assert_close(got, expected)


def test_b19_backward_after_a_flip_and_back_is_right(case: Any) -> None:
    """As in loralib, whose weight is only nearly the same then."""
    layer, x = case.build(), case.input()
    x = x.requires_grad_(x.is_floating_point())
    inputs = [layer.lora_A, layer.lora_B] + ([x] if x.requires_grad else [])
    y = layer(x)
    seed = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, seed, retain_graph=True)
    for _ in range(3):
        layer.eval()
        layer.train()
    for found, right in zip(torch.autograd.grad(y, inputs, seed), expected, strict=True):
        assert torch.equal(found, right)


def test_b19_backward_of_a_merged_forward_after_train(case: Any) -> None:
    layer, x = case.build().eval(), case.input()
    if not x.is_floating_point():
        x = x.double().long()
        assert not layer(x).requires_grad
        return
    x.requires_grad_()
    y = layer(x).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)
    (again,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(again, expected)


def test_b19_loralib_is_silently_wrong() -> None:
    layer, x = randomize_(loralib.Linear(4, 4, r=2)), torch.randn(1, 4, requires_grad=True)
    y = layer(x).sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.eval()
    (got,) = torch.autograd.grad(y, x)
    assert (got - expected).abs().max() > 0.01


def merge_records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lora_fast.merge"]


def test_b20_training_in_eval_mode_fails_as_in_loralib_and_says_why(
    case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer = case.build()
    lora.mark_only_lora_as_trainable(layer)
    layer.eval()
    with caplog.at_level(logging.INFO, logger="lora_fast.merge"):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="does not require grad"):
                layer(case.input()).sum().backward()
    (message,) = merge_records(caplog)
    assert type(layer).__name__ in message
    assert "train()" in message
    assert layer.lora_A.grad is None


def test_b20_every_layer_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        lora.Linear(4, 5, r=1), lora.Linear(5, 6, r=1, lora_dropout=0.1), lora.Conv1d(2, 3, 1, r=1)
    ).eval()
    for _ in range(2):
        model[2](model[:2](torch.randn(2, 4))[None])
    # In one line each, of what holds a module too.
    assert [m.split(",")[0] for m in merge_records(caplog)] == [
        "Linear(in_features=4",
        "Linear(in_features=5",
        "Conv1d(2",
    ]


def test_b20_inference_and_frozen_adapters_are_silent(
    case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = case.build().eval(), case.input()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)
    layer(x)
    case.build()(x)
    case.build(merge_weights=False).eval()(x)
    assert merge_records(caplog) == []


def test_b20_loralib_raises_the_same() -> None:
    layer = loralib.Linear(4, 4, r=2)
    loralib.mark_only_lora_as_trainable(layer)
    layer.eval()
    with pytest.raises(RuntimeError, match="does not require grad"):
        layer(torch.randn(1, 4)).sum().backward()


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


# torch deprecates the older weight_norm; models in the wild have it.
OLD_WEIGHT_NORM = "ignore:.*weight_norm.* is deprecated:FutureWarning"
COMPUTED = {
    "prune": lambda owner: prune.custom_from_mask(owner, "weight", owner.weight.abs() > 0.05),
    "parametrize": lambda owner: parametrize.register_parametrization(owner, "weight", _Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings(OLD_WEIGHT_NORM)
@pytest.mark.parametrize("how", COMPUTED)
def test_b24_a_computed_weight_is_not_merged(case: Any, how: str) -> None:
    layer, x = case.build(), case.input()
    owner = layer._weight_owner()
    COMPUTED[how](owner)
    own = {k: p.detach().clone() for k, p in layer.named_parameters()}
    expected = layer(x)
    case.assert_right(layer, x, got=expected)
    layer.eval()
    assert not layer.merged
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.testing.assert_close(layer(x), expected)
    for key, parameter in layer.named_parameters():
        assert torch.equal(parameter, own[key])
    assert lora.lora_state_dict(layer).keys() == {"lora_A", "lora_B"}


COMPUTED_BIAS = {
    "prune": lambda conv: prune.custom_from_mask(conv, "bias", torch.arange(len(conv.bias)) % 2),
    "prune twice": lambda conv: prune.identity(COMPUTED_BIAS["prune"](conv), "bias"),
    "prune both": lambda conv: COMPUTED["prune"](COMPUTED_BIAS["prune"](conv)),
    "parametrize": lambda conv: parametrize.register_parametrization(conv, "bias", _Doubled()),
    "old_weight_norm": lambda conv: nn.utils.weight_norm(conv, "bias"),
    "old_spectral_norm": lambda conv: nn.utils.spectral_norm(conv, "bias"),
}


@pytest.mark.filterwarnings(OLD_WEIGHT_NORM)
@pytest.mark.parametrize("how", COMPUTED_BIAS)
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_b24_a_computed_bias_is_that_of_now(kind: str, how: str) -> None:
    layer = randomize_(getattr(lora, kind)(4, 6, 3, r=2))
    COMPUTED_BIAS[how](layer.conv)
    x = torch.randn(2, 4, *[5] * (layer.weight.dim() - 2))
    for _ in range(2):  # the second backward needs a bias of its own
        layer(x).sum().backward()
    keys = ("bias", "parametrizations.bias")
    originals = [p for key, p in layer.conv.named_parameters() if key.startswith(keys)]
    assert all(original.grad is not None for original in originals)
    with torch.no_grad():
        for original in originals:
            original.add_(10.0)
        found = layer(x)
        torch.testing.assert_close(layer.eval()(x), found)


def test_b24_loralib_loses_the_adapter(old_case: Any) -> None:
    layer, x = old_case.build(loralib), old_case.input()
    prune.identity(getattr(layer, "conv", layer), "weight")
    expected = layer(x)
    layer.eval()
    assert (layer(x) - expected).abs().max() > 0.01


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_b24_pruning_a_merged_layer_keeps_the_base(case: Any, copied: bool) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()
    mask = before.abs() > before.abs().median()
    prune.custom_from_mask(layer.eval()._weight_owner(), "weight", mask)
    layer = copy.deepcopy(layer) if copied else layer
    layer.train()
    assert torch.equal(layer._weight_owner().weight_orig, before)
    case.assert_right(layer, x, base=before * mask)
    case.assert_right(layer.eval(), x, base=before * mask)


@pytest.mark.filterwarnings(OLD_WEIGHT_NORM)
@pytest.mark.parametrize("how", ["weight_norm", "old_weight_norm"])
def test_b24_decomposing_a_merged_weight_is_refused_at_train(case: Any, how: str) -> None:
    """The base cannot be had back from the norm; a wrong model would be worse than an error."""
    layer, x = case.build().eval(), case.input()
    expected = layer(x)
    COMPUTED[how](layer._weight_owner())
    with pytest.raises(RuntimeError, match="while the adapter was merged"):
        layer.train()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


def test_b24_a_parametrized_merged_weight_keeps_its_base(case: Any) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()
    owner = layer.eval()._weight_owner()
    parametrize.register_parametrization(owner, "weight", _Doubled())
    layer.train()
    assert torch.equal(owner.parametrizations.weight.original, before)
    case.assert_right(layer, x)


def flip_and_run(layer: Any, x: Tensor) -> Tensor:
    layer.eval()
    y = layer(x)
    layer.train()
    return y


def test_b48_compiled_code_that_flips_the_mode_breaks_the_graph_and_is_right(case: Any) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()
    run = torch.compile(flip_and_run, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(layer, x), layer(x))
        assert not layer.merged
        assert torch.equal(case.weight(layer), before)


def test_b48_compiled_code_that_merges_again_merges_what_has_changed(case: Any) -> None:
    layer, x = case.build(), case.input()

    def validate(x: Tensor) -> Tensor:
        layer.eval()
        return layer(x)

    run = torch.compile(validate, backend="aot_eager")
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            layer.lora_B.mul_(2)
            got = run(x)
            torch.testing.assert_close(got, layer.train()(x), rtol=1e-5, atol=1e-5)
            layer.eval()


def test_b48_compiled_code_merges_a_whole_model(case: Any) -> None:
    layer, x = case.build(), case.input()
    before = case.weight(layer).detach().clone()

    def run(x: Tensor) -> Tensor:
        lora.merge(layer)
        y = layer(x)
        lora.unmerge(layer)
        return y

    with torch.no_grad():
        got = torch.compile(run, backend="aot_eager")(x)
        torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(case.weight(layer), before)


def test_b48_a_flip_in_one_graph_is_refused(case: Any) -> None:
    run = torch.compile(flip_and_run, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(case.build(), case.input())


def test_b48_the_compiled_layer_alone_follows_flips(case: Any) -> None:
    layer, x = case.build(), case.input()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (True, False, True, False):
        randomize_(layer.train())
        expected = layer(x).detach()
        layer.train(mode)
        torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_b48_loralib_fails() -> None:
    layer = randomize_(loralib.Linear(8, 6, r=2))
    run = torch.compile(flip_and_run, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="frozen storage"):
        run(layer, torch.randn(2, 8))
