"""The same seed gives the same layer as in loralib, bit for bit."""

from typing import Any

import loralib
import pytest
import torch
from torch import nn

import lora_fast


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Hold names, order, bits, strides and `requires_grad` of all parameters against loralib's."""
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    for (name, mine), (_, its) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine.dtype == its.dtype, name
        assert mine.stride() == its.stride(), name
        assert mine.requires_grad == its.requires_grad, name
        assert torch.equal(mine, its), name


def test_initial_state_and_generator(drawn: Any) -> None:
    ours = drawn.build(lora_fast)
    generator = torch.get_rng_state()
    theirs = drawn.build(loralib)
    assert_same_state(ours, theirs)
    assert torch.equal(generator, torch.get_rng_state())


def test_state_after_reset_parameters(drawn: Any) -> None:
    drawn = drawn.but(fan_in_fan_out=False) if "fan_in_fan_out" in drawn.settings else drawn
    ours, theirs = drawn.pair()
    torch.manual_seed(drawn.number)
    ours.reset_parameters()
    generator = torch.get_rng_state()
    torch.manual_seed(drawn.number)
    theirs.reset_parameters()
    assert_same_state(ours, theirs)
    assert torch.equal(generator, torch.get_rng_state())


def test_only_the_later_factor_is_random(drawn: Any) -> None:
    layer = drawn.but(r=3).build(lora_fast)
    random, zero = layer.lora_A, layer.lora_B
    if drawn.cls == "Embedding":
        random, zero = zero, random
    assert not zero.any()
    # A generator of 16-bit numbers draws a zero now and then.
    assert random.count_nonzero() > random.numel() / 2


def test_the_padding_row_is_zero(drawn_embedding: Any) -> None:
    padding = drawn_embedding.settings["padding_idx"]
    layer = drawn_embedding.build(lora_fast)
    zero_rows = (layer.weight == 0).all(1).nonzero().flatten().tolist()
    assert zero_rows == ([] if padding is None else [padding % layer.num_embeddings])


@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
@pytest.mark.parametrize("r", [0, 4])
def test_values_are_drawn_before_the_transposition(cls: str, r: int) -> None:
    kwargs = {"enable_lora": [True, False]} if cls == "MergedLinear" else {}
    layers = []
    for fan_in_fan_out in (False, True):
        torch.manual_seed(0)
        make = getattr(lora_fast, cls)
        layers.append(make(6, 10, r=r, fan_in_fan_out=fan_in_fan_out, **kwargs))
    straight, transposed = layers
    assert transposed.weight.shape == (6, 10)
    assert transposed.weight.stride() == (1, 6)
    assert torch.equal(transposed.weight.t(), straight.weight)


@pytest.mark.parametrize("r", [0, 2])
def test_no_enabled_block_leaves_a_plain_trainable_layer(r: int) -> None:
    layers = []
    for library in (lora_fast, loralib):
        torch.manual_seed(1)
        layers.append(library.MergedLinear(4, 6, r, enable_lora=[False, False]))
        layers.append(library.MergedLinear(4, 6, r))
    ours, ours_default, theirs, theirs_default = layers
    assert_same_state(ours, theirs)
    assert_same_state(ours_default, theirs_default)
    assert ours.weight.requires_grad


def test_models_of_many_layers_start_equal() -> None:
    models = []
    for library in (lora_fast, loralib):
        torch.manual_seed(7)
        models.append(
            nn.Sequential(
                library.Embedding(11, 8, r=2),
                library.Linear(8, 12, r=3, lora_dropout=0.1),
                nn.LayerNorm(12),
                library.MergedLinear(12, 12, r=2, enable_lora=[True, False, True]),
                library.Conv2d(1, 2, 3, r=1),
                nn.Linear(12, 3),
            )
        )
        models.append(torch.get_rng_state())
    assert_same_state(models[0], models[2])
    assert torch.equal(models[1], models[3])


def test_the_default_dtype_is_followed() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = (
            [lib.Linear(3, 4, r=2), lib.Embedding(3, 4, r=2), lib.Conv2d(3, 4, 3, r=2)]
            for lib in (lora_fast, loralib)
        )
    finally:
        torch.set_default_dtype(before)
    for mine, its in zip(ours, theirs, strict=True):
        dtypes = {p.dtype for p in mine.parameters()}
        assert dtypes == {p.dtype for p in its.parameters()} == {torch.float64}
