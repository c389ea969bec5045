"""States of layers that torch's wrappers rename: the mark of a merge goes with the keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_fast as lora
from lora_fast.testing import randomize_


def model(wrapped: str, **options: Any) -> nn.Module:
    """A block of layers; none, the block or its first layer is wrapped for checkpointing."""
    block = nn.Sequential(randomize_(lora.Linear(8, 8, r=2, **options)), nn.ReLU())
    if wrapped == "layer":
        block[0] = checkpoint_wrapper(block[0])
    return nn.Sequential(checkpoint_wrapper(block) if wrapped == "block" else block)


def layer_of(model: nn.Module) -> Any:
    (found,) = (module for module in model.modules() if isinstance(module, lora.Linear))
    return found


def weight_of(model: nn.Module) -> Tensor:
    weight: Tensor = layer_of(model).weight.detach().clone()
    return weight


WRAPPED = ["none", "block", "layer"]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_merged_state_loads_unwrapped(wrapped: str, tmp_path: Path) -> None:
    source, target = model(wrapped), model("none")
    base = weight_of(source)
    torch.save(source.eval().state_dict(), tmp_path / "state.pt")
    target.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(weight_of(target), base)


@pytest.mark.parametrize("saved", WRAPPED)
@pytest.mark.parametrize("loaded", WRAPPED)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_load_however_they_are_wrapped(
    saved: str, loaded: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model.{suffix}"
    source, target = model(saved), model(loaded)
    base = weight_of(source)
    lora.save(source.eval(), path, lora_only=False)
    lora.load(target, path)
    torch.testing.assert_close(weight_of(target), base)
    with pytest.raises(ValueError, match=r"saved with scaling=0\.5, the layer has 3\.5"):
        lora.load(model(loaded, lora_alpha=7), path)
