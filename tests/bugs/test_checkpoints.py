"""What is saved and what is loaded: merged or not, old keys, half a checkpoint, another scaling."""

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

State = dict[str, Tensor]


def through_file(state: State) -> State:
    """As it comes back from `torch.save` and the safe `torch.load`."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


HANDED_OVER: dict[str, Callable[[State], State]] = {
    "directly": lambda state: state,
    "through_a_file": through_file,
}


def tolerance(dtype: torch.dtype) -> float:
    """What one merge and one subtraction may cost: two roundings of a weight of at most 4."""
    return 8 * torch.finfo(dtype).eps


def assert_loaded(case: Any, target: Any, source: Any, base: Tensor) -> None:
    """Fail unless `target` computes what `source`, whose base is `base`, does: in both modes."""
    x, atol = case.input(base.dtype), tolerance(base.dtype)
    oracle = case.plain(source, x, base.double() + case.delta(source))
    modes = [target.training, not target.training, target.training]
    for i, training in enumerate(modes):
        if i > 0:  # it must be right before the first change of mode
            target.train(training)
        assert target.merged is not training
        torch.testing.assert_close(target(x).double(), oracle, rtol=4 * atol, atol=4 * atol)
    target.train()
    torch.testing.assert_close(case.weight(target).detach(), base, rtol=0.0, atol=atol)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("how", HANDED_OVER)
@pytest.mark.parametrize("into_merged", [False, True], ids=["into_train", "into_eval"])
@pytest.mark.parametrize("saved_merged", [False, True], ids=["from_train", "from_eval"])
def test_b02_b03_saved_and_loaded_merged_or_not(
    case: Any, dtype: torch.dtype, saved_merged: bool, into_merged: bool, how: str
) -> None:
    source, target = case.build(dtype=dtype), case.build(dtype=dtype)
    base = case.weight(source).detach().clone()
    source.train(not saved_merged)
    target.train(not into_merged)
    assert (source.merged, target.merged) == (saved_merged, into_merged)
    keys = target.load_state_dict(HANDED_OVER[how](source.state_dict()))
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_loaded(case, target, source, base)
    assert torch.equal(case.weight(source.train()), base)


def test_b02_unmerged_checkpoints_are_loaded_exactly(case: Any, dtype: torch.dtype) -> None:
    source, target = case.build(dtype=dtype), case.build(dtype=dtype).eval()
    target.load_state_dict(source.state_dict())
    target.train()
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_b02_a_model_saved_after_its_evaluation_goes_on_as_before() -> None:
    """As the trainers do it: evaluate, save, load into a new model, go on."""

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 8),
            nn.ModuleDict({"q": lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])})[
                "q"
            ],
            nn.Unflatten(1, (3, 4)),
            lora.Conv1d(3, 5, 3, r=1),
            nn.Flatten(),
            lora.Linear(10, 3, r=2, lora_alpha=8),
        )

    source, x = randomize_(model()), torch.randn(6, 4)
    expected = source(x)
    target = model()
    target.load_state_dict(through_file(source.eval().state_dict()))
    for mode in (True, False, True):
        torch.testing.assert_close(target.train(mode)(x), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in source.train().named_parameters():
        torch.testing.assert_close(target.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_b02_the_merged_keys_and_values_are_loralibs(old_case: Any) -> None:
    """People export that way: the saved weight of a merged layer is the merged one."""
    layer = old_case.build()
    base, delta = old_case.weight(layer).detach().clone(), old_case.delta(layer)
    state = layer.eval().state_dict()
    key = "conv.weight" if "conv" in old_case.name else "weight"
    torch.testing.assert_close(state[key].double(), base.double() + delta)
    theirs = old_case.build(loralib)
    theirs.eval()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(through_file(state))
    x = old_case.input()
    torch.testing.assert_close(theirs(x), layer(x))


def test_b02_loralib_counts_the_delta_twice(old_case: Any) -> None:
    source, target, x = old_case.build(loralib), old_case.make(loralib), old_case.input()
    expected = source(x)
    source.eval()
    target.load_state_dict(source.state_dict())
    target.eval()
    assert (target(x) - expected).abs().max() > 0.01


def test_b03_loralib_ignores_and_then_subtracts_the_adapter(old_case: Any) -> None:
    source, target, x = old_case.build(loralib), old_case.build(loralib), old_case.input()
    expected = source(x)
    target.eval()
    target.load_state_dict(source.state_dict())
    assert (target(x) - expected).abs().max() > 0.01
    target.train()
    assert (old_case.weight(target) - old_case.weight(source)).abs().max() > 0.01


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("merged", [False, True], ids=["into_train", "into_eval"])
def test_b04_an_adapter_alone_replaces_the_adapter(
    case: Any, dtype: torch.dtype, merged: bool, assign: bool
) -> None:
    layer, other = case.build(dtype=dtype), case.build(dtype=dtype)
    base = case.weight(layer).detach().clone()
    layer.train(not merged)
    state = {k: v.clone() for k, v in lora.lora_state_dict(other.eval()).items()}
    keys = layer.load_state_dict(state, strict=False, assign=assign)
    assert not keys.unexpected_keys
    assert torch.equal(layer.lora_A, other.lora_A)
    x = case.input(dtype)
    assert layer.merged is merged
    case.assert_right(layer, x, base=base)
    layer.train(merged)
    assert layer.merged is not merged
    case.assert_right(layer, x, base=base)
    assert torch.equal(case.weight(layer.train()), base)


def test_b04_half_an_adapter_leaves_the_base_alone(case: Any) -> None:
    layer = case.build().eval()
    base = case.weight(layer.train()).detach().clone()
    layer.eval().load_state_dict({"lora_B": torch.randn_like(layer.lora_B)}, strict=False)
    case.assert_right(layer, case.input(), base=base)
    assert torch.equal(case.weight(layer.train()), base)


@pytest.mark.parametrize("merged", [False, True], ids=["into_train", "into_eval"])
def test_b04_a_checkpoint_that_does_not_fit_changes_nothing(case: Any, merged: bool) -> None:
    layer = case.build().train(not merged)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()} | {"lora_A": torch.zeros(7, 3)}
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(state)
    assert layer.merged is merged
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_b04_loralib_corrupts_the_base(old_case: Any) -> None:
    layer, other = old_case.build(loralib), old_case.build(loralib)
    base = old_case.weight(layer).detach().clone()
    layer.eval()
    layer.load_state_dict(loralib.lora_state_dict(other), strict=False)
    layer.train()
    assert (old_case.weight(layer) - base).abs().max() > 0.1


def conv_state(case: Any, names: str) -> tuple[State, Any]:
    """The state of a convolution under the keys of a version of loralib, and the convolution."""
    layer = case.build()
    state = layer.state_dict()
    adapter = {k: state[k] for k in ("lora_A", "lora_B")}
    plain = {"weight": state["conv.weight"], "bias": state["conv.bias"]}
    released = {"conv." + k: v for k, v in plain.items()}
    found = {
        "0.1.1": {**plain, **adapter},
        "0.1.2": {**adapter, **released},
        "newest": {**plain, **adapter, **released},
        "pretrained": plain,
        "pretrained_and_adapter": {**plain, **adapter},
    }[names]
    return {k: v.clone() for k, v in found.items()}, layer


@pytest.mark.parametrize("merged", [False, True], ids=["into_train", "into_eval"])
@pytest.mark.parametrize("names", ["0.1.1", "0.1.2", "newest"])
def test_b09_every_generation_of_keys_loads(conv_case: Any, names: str, merged: bool) -> None:
    state, source = conv_state(conv_case, names)
    layer = conv_case.build().train(not merged)
    layer.load_state_dict(state, strict=True)
    assert_loaded(conv_case, layer, source, source.weight.detach())


@pytest.mark.parametrize("names", ["0.1.1", "0.1.2", "newest"])
def test_b09_inside_a_model_too(conv_case: Any, names: str) -> None:
    state, source = conv_state(conv_case, names)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Identity(), conv_case.build())})
    keys = model.load_state_dict({f"body.1.{k}": v for k, v in state.items()}, strict=True)
    assert not keys.missing_keys
    x = conv_case.input()
    assert torch.equal(model["body"](x), source(x))


def test_b09_pretrained_convolutions_load_as_the_readme_says(conv_case: Any) -> None:
    """Both steps with strict=False: first the pretrained weights, then the adapters."""
    pretrained, source = conv_state(conv_case, "pretrained")
    layer = conv_case.build()
    keys = layer.load_state_dict(pretrained, strict=False)
    assert keys.missing_keys == ["lora_A", "lora_B"]
    assert not keys.unexpected_keys
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer.bias, source.bias)
    layer.load_state_dict(lora.lora_state_dict(source), strict=False)
    x = conv_case.input()
    assert torch.equal(layer(x), source(x))


def test_b09_the_plain_convolution_of_torch_loads(conv_case: Any) -> None:
    layer = conv_case.build()
    plain = type(layer.conv)(
        layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups
    )
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(layer.weight, plain.weight)


def test_b09_wrong_keys_are_still_reported(conv_case: Any) -> None:
    state, _ = conv_state(conv_case, "0.1.1")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weihgt"):
        conv_case.build().load_state_dict({**state, "weihgt": state["weight"]})
    del state["weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.weight"):
        conv_case.build().load_state_dict(state)


@pytest.mark.parametrize("training", [True, False])
def test_b09_a_state_updated_by_a_plain_convolutions(conv_case: Any, training: bool) -> None:
    """The pretrained weight is meant, not the layer's own that the state holds beside it."""
    layer = conv_case.build().train(training)
    pretrained, source = conv_state(conv_case, "pretrained")
    factors = lora.lora_state_dict(layer)
    expected = {name: tensor.clone() for name, tensor in factors.items()}
    state = layer.state_dict()
    state.update(pretrained)
    assert not any(layer.load_state_dict(state))
    assert torch.equal(layer.train().weight, source.weight)
    assert torch.equal(layer.bias, source.bias)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in expected.items())


def test_b09_loralib_leaves_the_base_random() -> None:
    layer, pretrained = loralib.Conv2d(2, 2, 3, r=1), nn.Conv2d(2, 2, 3)
    layer.load_state_dict(pretrained.state_dict(), strict=False)
    assert not torch.equal(layer.conv.weight, pretrained.weight)


TRANSPOSED = ["linear_transposed", "merged_transposed"]


def test_b39_a_transposed_weight_keeps_its_layout(linear_case: Any, tmp_path: Path) -> None:
    """Its strides are loralib's; lora_fast.save writes it as safetensors all the same."""
    layer, twin = linear_case.build(), linear_case.build()
    transposed = linear_case.name in TRANSPOSED
    assert layer.weight.is_contiguous() is not transposed
    assert layer.weight.stride() == ((1, 8) if transposed else (8, 1))
    file = tmp_path / "all.safetensors"
    lora.save(layer, file, lora_only=False)
    lora.load(twin, file)
    assert twin.weight.stride() == layer.weight.stride()
    x = linear_case.input()
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.eval()(x), layer.eval()(x))


def test_b39_safetensors_alone_refuses_it(tmp_path: Path) -> None:
    for lib in (lora, loralib):
        layer = lib.Linear(4, 6, r=2, fan_in_fan_out=True)
        with pytest.raises(ValueError, match="non contiguous"):
            safetensors.torch.save_file(layer.state_dict(), tmp_path / "x.safetensors")


def test_b51_the_adapters_state_shares_its_memory(case: Any) -> None:
    layer = case.build()
    state = lora.lora_state_dict(layer)
    for key, value in state.items():
        assert value.data_ptr() == layer.get_parameter(key).data_ptr()
        assert not value.requires_grad
    with torch.no_grad():
        layer.lora_A.fill_(7.0)
    assert torch.equal(state["lora_A"], layer.lora_A)


FORMATS = ["adapter.safetensors", "adapter.pt"]


@pytest.mark.parametrize("name", FORMATS)
def test_b52_rank_and_scaling_are_saved_and_checked(case: Any, name: str, tmp_path: Path) -> None:
    source, file = case.build(), tmp_path / name
    lora.save(source, file)
    other = case.build()
    other.scaling = 2 * source.scaling
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"saved with scaling={source.scaling}, the layer has"):
        lora.load(other, file)
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key])
    other.scaling = source.scaling
    lora.load(other, file)
    assert torch.equal(other.lora_A, source.lora_A)
    assert torch.equal(other.lora_B, source.lora_B)


@pytest.mark.parametrize("name", FORMATS)
def test_b52_another_rank_with_the_same_scaling_is_told(name: str, tmp_path: Path) -> None:
    lora.save(lora.Linear(4, 4, r=2, lora_alpha=2), tmp_path / name)
    with pytest.raises(ValueError, match=r"saved with r=2.*has 4"):
        lora.load(lora.Linear(4, 4, r=4, lora_alpha=4), tmp_path / name)


@pytest.mark.parametrize("name", FORMATS)
def test_b52_mistyped_and_missing_keys_are_told(name: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"query": lora.Linear(4, 4, r=2), "value": lora.Linear(4, 4, r=2)})
    lora.save(nn.ModuleDict({"query": model["query"], "valeu": model["value"]}), tmp_path / name)
    with pytest.raises(
        ValueError, match=r"(?s)valeu.lora_A: not in.*value.lora_A: not in the file"
    ):
        lora.load(model, tmp_path / name)


@pytest.mark.parametrize("saved_merged", [False, True], ids=["from_train", "from_eval"])
@pytest.mark.parametrize("into_merged", [False, True], ids=["into_train", "into_eval"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_b52_whole_models_know_whether_they_are_merged(
    case: Any, name: str, saved_merged: bool, into_merged: bool, tmp_path: Path
) -> None:
    source, target = case.build(), case.build().train(not into_merged)
    base = case.weight(source).detach().clone()
    lora.save(source.train(not saved_merged), tmp_path / name, lora_only=False)
    lora.load(target, tmp_path / name)
    assert_loaded(case, target, source, base)


def test_b52_a_plain_load_warns_of_another_scaling(case: Any) -> None:
    source, target = case.build(), case.build()
    target.scaling = 2 * source.scaling
    with pytest.warns(UserWarning, match="was saved with scaling"):
        target.load_state_dict(source.state_dict())


def test_b52_files_of_loralib_load_without_a_check(old_case: Any, tmp_path: Path) -> None:
    source, target = old_case.build(loralib), old_case.build()
    torch.save(loralib.lora_state_dict(source), tmp_path / "theirs.pt")
    lora.load(target, tmp_path / "theirs.pt")
    assert torch.equal(target.lora_A, source.lora_A)


def test_b52_loralib_rescales_silently() -> None:
    source, target = (loralib.Linear(4, 4, r=2, lora_alpha=alpha) for alpha in (1, 32))
    keys = target.load_state_dict(OrderedDict(loralib.lora_state_dict(source)), strict=False)
    assert not keys.unexpected_keys
    assert target.scaling != source.scaling
