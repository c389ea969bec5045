"""The helpers say what they need where something other than a model comes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lora_fast as lora

USES: dict[str, Callable[[Any], Any]] = {
    "mark_only_lora_as_trainable": lora.mark_only_lora_as_trainable,
    "lora_state_dict": lora.lora_state_dict,
    "merge": lora.merge,
    "unmerge": lora.unmerge,
    "save": lambda model: lora.save(model, "never-there/a.pt"),
    "load": lambda model: lora.load(model, "never-there/a.pt"),
}


@pytest.mark.parametrize("use", USES)
def test_what_is_no_model(use: str) -> None:
    state = lora.Linear(4, 4, r=2).state_dict()
    for model, what in (
        (3, "int"),
        (None, "NoneType"),
        (state, "OrderedDict"),
        (lora.Linear, "the class Linear"),
    ):
        expected = f"{use}: model must be a torch.nn.Module, got {what}; give the model itself"
        with pytest.raises(TypeError, match=re.escape(expected)):
            USES[use](model)


def test_what_wraps_a_model_is_one(tmp_path: Path) -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.wrapped = nn.Sequential(lora.Linear(4, 4, r=2))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.wrapped, name)

    model: Any = Wrapper()
    lora.mark_only_lora_as_trainable(model)
    assert len(lora.lora_state_dict(model)) == 2
    lora.save(model, tmp_path / "a.pt")
    lora.load(model, tmp_path / "a.pt")
    assert (lora.merge(model), lora.unmerge(model)) == (1, 1)
