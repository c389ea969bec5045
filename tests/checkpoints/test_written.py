"""A file is written whole or not at all, and what cannot be saved is named."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved_models import NAMES, net
from torch import nn

import lora_fast as lora


@pytest.mark.parametrize("lora_only", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_values_is_not_saved(name: str, lora_only: bool, tmp_path: Path) -> None:
    model = net(conv=lora.Conv2d(2, 4, 3, r=1, device="meta"))
    with pytest.raises(ValueError, match=r"save: .*conv.lora_A.* on the meta device"):
        lora.save(model, tmp_path / name, lora_only=lora_only)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_model_whose_values_are_elsewhere_is_not_saved(name: str, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO 3 leaves empty tensors in their place."""
    model = net()
    layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
    layer.lora_A.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"save: \S*lora_A must have two dim.*GatheredParameters"):
        lora.save(model, tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / f"pipe-{name}")
    for path in (tmp_path / name, tmp_path / f"pipe-{name}", Path(os.devnull)):
        with pytest.raises(ValueError, match=rf"save: .*{path.name} is no file"):
            lora.save(net(), path)
    assert (tmp_path / f"pipe-{name}").is_fifo()
    assert sorted(os.listdir(tmp_path)) == [name, f"pipe-{name}"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_stays_one(name: str, exists: bool, tmp_path: Path) -> None:
    link, file = tmp_path / name, tmp_path / "blobs" / "file"
    file.parent.mkdir()
    link.symlink_to(file)
    if exists:
        file.write_bytes(b"old")
    model = net()
    lora.save(model, link)
    assert link.is_symlink() and os.listdir(file.parent) == ["file"]
    lora.load(net(), link)  # in the form that the link's name tells


@pytest.mark.parametrize("name", NAMES)
def test_a_link_to_itself(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(OSError, match=rf"symbolic links: '.*{name}'"):
        lora.save(net(), tmp_path / name)
    assert (tmp_path / name).is_symlink() and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("exists", [True, False], ids=["over_a_file", "new"])
@pytest.mark.parametrize("name", NAMES)
def test_a_save_that_fails_leaves_what_was_there(
    name: str,
    exists: bool,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, model = tmp_path / name, net()
    if exists:
        lora.save(model, file)
        before = file.read_bytes()

    def fail(state: Any, path: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half a fi")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        patched.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(type(error)):
            lora.save(net(), file)
    assert os.listdir(tmp_path) == ([name] if exists else [])
    if exists:
        assert file.read_bytes() == before
        lora.load(model, file)


_KILLED = """
import os, sys, pathlib, torch, safetensors.torch
import lora_fast as lora

def die(state, path, **kwargs):
    pathlib.Path(path).write_bytes(b"half a fi")
    os._exit(9)

torch.save = safetensors.torch.save_file = die
lora.save(lora.Linear(4, 6, r=2), sys.argv[1])
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_save_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    file, layer = tmp_path / name, lora.Linear(4, 6, r=2)
    lora.save(layer, file)
    before = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(file)], timeout=120, check=False)
    assert done.returncode == 9
    assert file.read_bytes() == before
    lora.load(layer, file)


@pytest.mark.parametrize("name", NAMES)
def test_savers_of_one_path_do_not_meet(name: str, tmp_path: Path) -> None:
    """As when every rank of a training run saves."""
    file, models = tmp_path / name, [net() for _ in range(4)]

    def save(model: nn.Module) -> None:
        for _ in range(15):
            lora.save(model, file)
            lora.load(net(), file)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, models))  # raises what a thread has raised
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("lora_only", [True, False], ids=["adapters", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_save(name: str, lora_only: bool, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), lora.Linear(4, 4), lora.MergedLinear(4, 6, r=2))
    with pytest.raises(ValueError, match="no LoRA layer with r > 0; nothing was written"):
        lora.save(plain, tmp_path / name, lora_only=lora_only)
    with pytest.raises(ValueError, match="bias must be one of none, all, lora_only, got 'some'"):
        lora.save(net(), tmp_path / name, bias="some")
    assert os.listdir(tmp_path) == []
