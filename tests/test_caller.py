"""Warnings point to the user's line, however deep in torch the cause is."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lora_fast as lora
from lora_fast.testing import randomize_


def too_large() -> nn.Module:
    layer = lora.Linear(3, 3, r=1, dtype=torch.float16)
    nn.init.constant_(layer.lora_A, 300.0)
    nn.init.constant_(layer.lora_B, 300.0)
    return nn.Sequential(nn.Sequential(layer))


def other_scaling() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    saved = nn.Sequential(lora.Linear(3, 3, r=1, lora_alpha=5))
    return nn.Sequential(lora.Linear(3, 3, r=1)), saved.state_dict()


def merged_without_factors() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    state = nn.Sequential(randomize_(lora.Linear(3, 3, r=1))).eval().state_dict()
    for name in ("0.lora_A", "0.lora_B"):
        del state[name]
    return nn.Sequential(lora.Linear(3, 3, r=1)), state


def merge(model: nn.Module) -> None:
    model.eval()


def load(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(state, strict=False)


def convolve() -> None:
    lora.Conv2d(3, 3, 3, r=1, lora_dropout=0.1)


def convolve_by_class() -> None:
    lora.ConvLoRA(nn.Conv2d, 3, 3, 3, r=1, lora_dropout=0.1)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: (too_large(),), merge),
        (other_scaling, load),
        (merged_without_factors, load),
        (tuple, convolve),
        (tuple, convolve_by_class),
    ],
)
def test_the_line_is_the_callers(make: Callable[[], tuple], call: Callable[..., None]) -> None:
    arguments = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    (warning,) = caught
    lines, first = inspect.getsourcelines(call)
    assert warning.filename == __file__
    assert first < warning.lineno < first + len(lines)
