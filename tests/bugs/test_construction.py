"""What a layer is once it is built: shapes, arguments, attributes, names, values."""

import re
from typing import Any

import loralib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_fast as lora
from lora_fast.testing import randomize_

SPATIAL = {1: lora.Conv1d, 2: lora.Conv2d, 3: lora.Conv3d}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("d", SPATIAL)
def test_b08_convolutions_of_every_dimension_work(d: int, kernel: int, groups: int) -> None:
    options = {"groups": groups, "padding": 1, "dtype": torch.float64}
    layer = randomize_(SPATIAL[d](4, 6, kernel, r=2, lora_alpha=3, **options))
    assert layer.lora_A.shape == (2 * kernel, 4 * kernel)
    assert layer.lora_B.shape == (6 // groups * kernel ** (d - 1), 2 * kernel)
    x = torch.randn(2, 4, *[5] * d, dtype=torch.float64, requires_grad=True)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    weight = layer.weight + 1.5 * (b @ a).reshape(layer.weight.shape)
    convolve = getattr(torch.nn.functional, f"conv{d}d")
    expected = convolve(x, weight, layer.bias, padding=1, groups=groups)
    seed = torch.randn_like(expected)
    got = layer(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, [layer.lora_A, layer.lora_B, layer.bias, x], seed),
        torch.autograd.grad(expected, [a, b, layer.bias, x], seed),
    )
    assert layer.eval().merged
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("d", [1, 3])
def test_b08_loralib_refuses_at_the_first_forward(d: int) -> None:
    layer = {1: loralib.Conv1d, 3: loralib.Conv3d}[d](4, 6, 3, r=2)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.randn(1, 4, *[5] * d))


def test_b11_pretrained_embeddings_are_kept(dtype: torch.dtype) -> None:
    table = torch.randn(5, 3, dtype=dtype)
    before = table.clone()
    layer = lora.Embedding.from_pretrained(table)
    assert torch.equal(table, before)
    assert torch.equal(layer.weight, before)
    assert not layer.weight.requires_grad
    assert torch.equal(layer(torch.tensor([4, 0])), before[[4, 0]])
    assert lora.Embedding.from_pretrained(table, freeze=False).weight.requires_grad


def test_b11_a_given_weight_is_adapted_and_not_written_to(dtype: torch.dtype) -> None:
    table = torch.randn(5, 3, dtype=dtype)
    before = table.clone()
    layer = lora.Embedding(5, 3, r=2, _weight=table)
    assert torch.equal(layer(torch.arange(5)), before)  # a fresh adapter changes nothing
    assert layer.lora_B.abs().max() > 0
    assert not layer.weight.requires_grad
    randomize_(layer)
    assert layer.eval().merged
    assert not torch.equal(layer.weight, before)
    assert torch.equal(table, before)
    assert torch.equal(layer.train().weight, before)


def test_b11_loralib_overwrites_the_callers_table() -> None:
    table = torch.arange(8.0).view(4, 2)
    before = table.clone()
    loralib.Embedding.from_pretrained(table)
    assert not torch.equal(table, before)


TRUTHY = [
    [1, 0, 1],
    (True, False, 2),
    [np.bool_(True), np.bool_(False), np.bool_(True)],
    torch.tensor([True, False, True]),
]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enable", TRUTHY, ids=["ints", "tuple", "numpy", "tensor"])
def test_b15_blocks_may_be_enabled_by_any_truth_value(enable: Any, fan_in_fan_out: bool) -> None:
    kwargs = {"r": 2, "fan_in_fan_out": fan_in_fan_out}
    layer = randomize_(lora.MergedLinear(4, 6, enable_lora=enable, **kwargs))
    twin = lora.MergedLinear(4, 6, enable_lora=[True, False, True], **kwargs)
    twin.load_state_dict(layer.state_dict())
    assert layer.enable_lora == [True, False, True]
    assert layer.lora_ind.tolist() == [True, True, False, False, True, True]
    x = torch.randn(3, 4)
    update = layer(x) - torch.nn.functional.linear(x, layer._as_delta(layer.weight), layer.bias)
    assert update[:, 2:4].abs().max() < 1e-6
    assert update[:, [0, 1, 4, 5]].abs().min(0).values.max() > 1e-3
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.eval().weight, twin.eval().weight)


def test_b15_loralib_adapts_the_wrong_rows() -> None:
    wrong = loralib.MergedLinear(4, 6, r=2, enable_lora=[1, 0, 1]).lora_ind
    assert wrong.tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enable", [{}, {"enable_lora": [False, False]}], ids=["default", "none"])
def test_b16_no_enabled_block_is_a_plain_linear(
    enable: dict[str, Any], fan_in_fan_out: bool
) -> None:
    layer = lora.MergedLinear(4, 6, r=2, fan_in_fan_out=fan_in_fan_out, **enable)
    x, weight = torch.randn(3, 4), layer.weight.detach()
    expected = torch.nn.functional.linear(x, weight.t() if fan_in_fan_out else weight, layer.bias)
    for training in (True, False, True):
        assert torch.equal(layer.train(training)(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not hasattr(layer, "lora_A")
    assert not hasattr(layer, "scaling")
    assert lora.lora_state_dict(layer) == {}


def test_b16_loralib_raises_in_forward() -> None:
    with pytest.raises(AttributeError, match="lora_A"):
        loralib.MergedLinear(4, 6, r=2)(torch.randn(1, 4))


def test_b18_dropout_of_a_convolution_warns_and_does_nothing(conv_case: Any) -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.9 has no effect"):
        layer = conv_case.build(lora_dropout=0.9)
    x = conv_case.input()
    generator = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), generator)
    conv_case.assert_right(layer, x)
    assert isinstance(layer.lora_dropout, nn.Dropout)  # it is in named_modules, as in loralib


def test_b18_loralib_ignores_the_dropout_silently() -> None:
    layer, x = loralib.Conv2d(2, 2, 3, r=2, lora_dropout=0.9), torch.randn(1, 2, 5, 5)
    assert torch.equal(randomize_(layer)(x), layer(x))


@pytest.mark.parametrize("d", SPATIAL)
def test_b36_square_kernels_may_be_tuples(d: int) -> None:
    given, plain = SPATIAL[d](4, 6, (3,) * d, r=2), SPATIAL[d](4, 6, 3, r=2)
    assert given.conv.kernel_size == plain.conv.kernel_size == (3,) * d
    shapes = {k: v.shape for k, v in plain.state_dict().items()}
    assert {k: v.shape for k, v in given.state_dict().items()} == shapes
    assert given(torch.randn(1, 4, *[4] * d)).shape == (1, 6, *[2] * d)


@pytest.mark.parametrize("kernel", [(3, 5), (), 2.5, "3", (2.0, 2.0), None], ids=repr)
def test_b36_other_kernels_are_refused_with_a_reason(kernel: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {kernel!r}")):
        lora.Conv2d(4, 6, kernel, r=2)


def test_b36_without_an_adapter_any_kernel_serves() -> None:
    layer, plain = lora.Conv2d(4, 6, (3, 5)), nn.Conv2d(4, 6, (3, 5))
    layer.conv.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, 7, 7)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_pruning_a_convolution_is_left_to_its_convolution(name: str) -> None:
    layer = lora.Conv2d(4, 6, 3, r=2)
    before = list(layer.state_dict())
    with pytest.raises(ValueError, match=f"no {name} of its own .* apply it to layer.conv"):
        prune.l1_unstructured(layer, name, 0.5)
    assert list(layer.state_dict()) == before
    prune.l1_unstructured(layer.conv, name, 0.5)
    assert layer(torch.randn(1, 4, 5, 5)).isfinite().all()


OTHER_MODULES = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Identity]


@pytest.mark.parametrize("module", [*OTHER_MODULES, None, "Conv2d"], ids=str)
def test_a_convolution_that_no_adapter_fits_is_refused(module: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"conv_module must be nn\.Conv1d, nn"):
        lora.ConvLoRA(module, 3, 4, 3, r=2)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"conv_module must be .*ConvTranspose2d"):
        lora.ConvLoRA(lambda *args: nn.ConvTranspose2d(*args), 3, 4, 3, r=2)


def test_loralib_returns_nothing_from_a_transposed_convolution() -> None:
    assert loralib.ConvLoRA(nn.ConvTranspose2d, 3, 4, 3, r=2)(torch.randn(1, 3, 5, 5)) is None


@pytest.mark.parametrize("lib", [lora, loralib], ids=["lora_fast", "loralib"])
def test_without_an_adapter_any_convolution_serves(lib: Any) -> None:
    layer, plain = lib.ConvLoRA(nn.ConvTranspose2d, 3, 4, 3), nn.ConvTranspose2d(3, 4, 3)
    layer.conv.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 5, 5)
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(x), plain(x))


class _Padded(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(torch.nn.functional.pad(input, (1, 1, 1, 1)), weight, bias)


@pytest.mark.parametrize("module", [_Padded, lambda *args: _Padded(*args)], ids=["class", "made"])
def test_a_subclass_of_a_convolution_is_adapted(module: Any) -> None:
    layer = randomize_(lora.ConvLoRA(module, 3, 4, 3, r=2))
    x = torch.randn(1, 3, 5, 5)
    expected = torch.nn.functional.conv2d(x, layer.effective_weight(), layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_b36_loralib_refuses_tuples_without_a_word() -> None:
    with pytest.raises(AssertionError, match=r"^$"):
        loralib.Conv2d(4, 6, (3, 3), r=2)


@pytest.mark.parametrize(("kernel", "r"), [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_b37_the_rank_of_a_convolution_is_r_times_k(kernel: int, r: int) -> None:
    """Mirrored: B A has rank r k, and up to r k^2 as a matrix of output rows."""
    layers = [randomize_(lib.Conv2d(12, 18, kernel, r=r)) for lib in (lora, loralib)]
    for layer in layers:
        delta = layer.lora_B @ layer.lora_A
        assert torch.linalg.matrix_rank(delta) == r * kernel
        rows = torch.linalg.matrix_rank(delta.view(18, -1))
        assert rows == min(18, r * kernel**2)


SETTINGS = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
SETTINGS += ["groups", "padding_mode", "transposed", "output_padding"]


def test_b38_a_convolution_shows_its_settings(conv_case: Any) -> None:
    layer = conv_case.build()
    for name in SETTINGS:
        assert getattr(layer, name) == getattr(layer.conv, name)
    assert layer.weight is layer.conv.weight
    assert layer.bias is layer.conv.bias
    assert conv_case.build(bias=False).bias is None
    assert not isinstance(layer, type(layer.conv))  # mirrored
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layer.nonsense  # noqa: B018
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "conv.weight", "conv.bias"}


def test_b38_a_setting_that_is_written_is_what_the_convolution_has(conv_case: Any) -> None:
    layer, x = conv_case.build(), conv_case.input()
    space = x.dim() - 2
    layer.stride, layer.padding, layer.padding_mode = (2,) * space, (1,) * space, "zeros"
    assert layer.conv.stride == layer.stride == (2,) * space
    assert not {"stride", "padding", "padding_mode"} & vars(layer).keys()
    conv_case.assert_right(layer, x)
    base = layer.weight.detach().clone()
    conv_case.assert_right(layer.eval(), x, base=base)


def test_b38_loralib_has_no_weight() -> None:
    with pytest.raises(AttributeError):
        loralib.Conv2d(2, 2, 1, r=1).weight  # noqa: B018


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_b40_a_transposed_weight_is_redrawn_with_its_own_fan(kind: str) -> None:
    kwargs = {"enable_lora": [True]} if kind == "MergedLinear" else {}
    layer = getattr(lora, kind)(4, 400, r=2, fan_in_fan_out=True, **kwargs)
    plain = nn.Linear(4, 400)
    for module in (plain, layer):
        torch.manual_seed(3)
        module.reset_parameters()
    assert torch.equal(layer.weight, plain.weight.t())
    assert torch.equal(layer.bias, plain.bias)
    assert 0.4 < layer.weight.abs().max() <= 0.5
    assert layer.lora_A.abs().max() > 0
    assert layer.lora_B.abs().max() == 0


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_b40_redrawing_goes_by_the_parameter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers marks parameters that were loaded, and its `nn.init` leaves those alone."""
    kwargs = {"enable_lora": [True]} if kind == "MergedLinear" else {}
    layer = getattr(lora, kind)(4, 12, r=2, fan_in_fan_out=True, **kwargs)
    drawn: list[Tensor] = []
    for name in ("kaiming_uniform_", "uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: drawn.append(tensor))
    layer.reset_parameters()
    assert {id(t) for t in drawn} == {id(p) for p in layer.parameters()}


def test_b40_reset_parameters_of_a_merged_layer(case: Any) -> None:
    """New values, no update, and the adapter comes out of them without a trace."""
    layer = case.build().eval()
    base = case.weight(layer).detach().clone()
    layer.reset_parameters()
    assert layer.merged
    assert not torch.equal(case.weight(layer), base)
    assert case.delta(layer).abs().max() == 0
    drawn = case.weight(layer).detach().clone()
    assert torch.equal(case.weight(layer.train()), drawn)


def test_b40_loralib_draws_from_another_range() -> None:
    layer = loralib.Linear(4, 400, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    assert layer.weight.abs().max() < 0.1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enable_lora": []}, "enable_lora must have an entry"),
        ({"enable_lora": [True] * 4}, "must divide out_features"),
        ({"enable_lora": [True, True], "out_splits": [4, 3]}, "out_splits must be 2 positive"),
        ({"enable_lora": [True, True], "out_splits": [6]}, "out_splits must be 2 positive"),
        ({"enable_lora": [True, True], "out_splits": [6, 0]}, "out_splits must be 2 positive"),
    ],
)
@pytest.mark.parametrize("r", [0, 2])
def test_b41_blocks_that_do_not_fit_are_refused(
    kwargs: dict[str, Any], message: str, r: int
) -> None:
    with pytest.raises(ValueError, match=message):
        lora.MergedLinear(4, 6, r=r, **kwargs)


def test_b41_the_list_is_the_layers_own() -> None:
    given = [True, False, True]
    layer = randomize_(lora.MergedLinear(4, 6, r=2, enable_lora=given))
    x = torch.randn(2, 4)
    expected = layer(x)
    given[1] = True
    assert layer.enable_lora == [True, False, True]
    assert torch.equal(layer(x), expected)
    lora.MergedLinear(4, 6).enable_lora.append(True)
    assert lora.MergedLinear(4, 6).enable_lora == [False]


def test_b41_grouped_query_attention_has_unequal_blocks() -> None:
    layer = randomize_(lora.MergedLinear(8, 12, r=2, enable_lora=[1, 1, 1], out_splits=[8, 2, 2]))
    x, row = torch.randn(3, 8), 0
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for group, width in enumerate([8, 2, 2]):
        block = layer.lora_B[row : row + width] @ layer.lora_A[2 * group : 2 * group + 2]
        expected[:, row : row + width] += x @ block.t() / 2
        row += width
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_b41_loralib_divides_by_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        loralib.MergedLinear(4, 6, r=2, enable_lora=[])
