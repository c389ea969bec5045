"""States of which a value was converted, to fp8 or integers say: they load as with loralib."""

from typing import Any

import loralib
import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast.testing import randomize_

MAKERS = {
    "linear": lambda lib: lib.Linear(6, 8, r=2, lora_alpha=3),
    "merged_linear": lambda lib: lib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]),
    "embedding": lambda lib: lib.Embedding(7, 6, r=2),
    "conv2d": lambda lib: lib.Conv2d(4, 6, 3, r=2),
}
DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool]


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which carry no mark; what a file of safetensors holds."""
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("is_here", [True, False], ids=["base_is_here", "another_base"])
def test_a_state_of_train_mode(name: str, is_here: bool, which: str, dtype: torch.dtype) -> None:
    layer, oracle = randomize_(MAKERS[name](lora)), MAKERS[name](loralib)
    state = plain((layer if is_here else randomize_(MAKERS[name](lora))).state_dict())
    key = next(key for key in state if key.endswith(which))
    state[key] = (3 * state[key]).clamp(-9, 9).to(dtype)
    layer.load_state_dict(plain(state))
    oracle.load_state_dict(state, strict=False)  # its mask is a buffer
    for key in state:
        assert torch.equal(layer.state_dict()[key], oracle.state_dict()[key]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
def test_one_into_eval_mode(name: str, which: str, dtype: torch.dtype) -> None:
    layer = randomize_(MAKERS[name](lora))
    state = plain(layer.state_dict())
    key = next(key for key in state if key.endswith(which))
    state[key] = (3 * state[key]).clamp(-9, 9).to(dtype)
    layer.eval().load_state_dict(plain(state))
    assert layer.merged
    layer.train()
    for key, value in state.items():
        assert torch.equal(layer.state_dict()[key], value.float()), key


@pytest.mark.parametrize("training", [True, False], ids=["into_train", "into_eval"])
def test_a_copy_in_fp8_of_a_state_of_eval_mode(name: str, training: bool) -> None:
    """Its delta is larger than its rounding, and shows that it is merged."""
    layer = randomize_(MAKERS[name](lora))
    source: Any = MAKERS[name](lora)
    source.load_state_dict(plain(layer.state_dict()))
    with torch.no_grad():
        source.lora_A.mul_(4.0)
        source.lora_B.mul_(4.0)
    merged = source.effective_weight().detach().clone()
    state = {key: value.to(torch.float8_e5m2) for key, value in source.eval().state_dict().items()}
    layer.train(training).load_state_dict(state)
    distance = torch.linalg.vector_norm(layer.effective_weight() - merged)
    assert distance < 0.3 * torch.linalg.vector_norm(merged)
