"""Files of adapters and of whole models, ours and loralib's: what is in them, and what loads."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import loralib
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import checkpoint
from lora_fast.testing import randomize_

NAMES = ["model.safetensors", "model.pt", "model.bin"]


class Net(nn.Module):
    """A layer of every kind beside modules of torch, with `lib`'s layers."""

    def __init__(self, lib: Any = lora, **kwargs: Any) -> None:
        super().__init__()
        self.table = lib.Embedding(9, 4, r=2, **kwargs)
        self.qkv = lib.MergedLinear(4, 12, r=2, enable_lora=[True, False, True], **kwargs)
        self.norm = nn.BatchNorm1d(12)
        self.up = lib.Linear(12, 16, r=3, lora_alpha=6, fan_in_fan_out=True, **kwargs)
        self.conv = lib.Conv2d(1, 2, 3, r=1, padding=1, **kwargs)
        self.plain = lib.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(self.qkv(self.table(x))))
        return self.plain(self.conv(h.view(-1, 1, 4, 4)).flatten(1))


def net(seed: int, lib: Any = lora, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    model = randomize_(Net(lib, **kwargs))
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked.add_(seed)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


X = torch.arange(9)


@pytest.mark.parametrize("into_merged", [False, True], ids=["into_unmerged", "into_merged"])
@pytest.mark.parametrize("saved_merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model(name: str, saved_merged: bool, into_merged: bool, tmp_path: Path) -> None:
    source = net(1, merge_weights=saved_merged)
    target = net(2, merge_weights=into_merged)
    assert (source.up.merged, target.up.merged) == (saved_merged, into_merged)
    expected = source(X)
    lora.save(source, tmp_path / name, lora_only=False)
    lora.load(target, str(tmp_path / name))
    assert (source.up.merged, target.up.merged) == (saved_merged, into_merged)
    torch.testing.assert_close(target(X), expected, rtol=1e-5, atol=1e-5)
    assert int(target.norm.num_batches_tracked) == 1
    source.train()
    target.train()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    assert target.up.weight.stride() == (1, 12)


@pytest.mark.parametrize("into_merged", [False, True], ids=["into_unmerged", "into_merged"])
@pytest.mark.parametrize("saved_merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_alone(name: str, saved_merged: bool, into_merged: bool, tmp_path: Path) -> None:
    source, target = net(1, merge_weights=saved_merged), net(2, merge_weights=into_merged)
    base = snapshot(net(2, merge_weights=False))
    lora.save(source, tmp_path / name)
    lora.load(target, tmp_path / name)
    assert target.up.merged is into_merged
    adapters = lora.lora_state_dict(source)
    target.train()
    for key, value in target.state_dict().items():
        assert torch.equal(value, adapters.get(key, base[key])), key


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_the_file(name: str, bias: str, tmp_path: Path) -> None:
    source = net(1)
    lora.save(source, tmp_path / name, bias=bias)
    file = tmp_path / name
    if file.suffix == ".safetensors":
        found: dict[str, Tensor] = safetensors.torch.load_file(file)
    else:
        found = torch.load(file, weights_only=True)
    expected = lora.lora_state_dict(source, bias)
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert found[key].is_contiguous()
    target = net(2)
    lora.load(target, file)
    for key, value in expected.items():
        assert torch.equal(target.state_dict()[key], value), key


def test_a_file_without_a_stem(tmp_path: Path) -> None:
    layer, other = randomize_(lora.Linear(4, 5, r=2)), lora.Linear(4, 5, r=2)
    lora.save(layer, tmp_path / ".safetensors")
    lora.load(other, tmp_path / ".safetensors")
    assert torch.equal(other.lora_B, layer.lora_B)


def test_the_header_of_a_safetensors_file(tmp_path: Path) -> None:
    lora.save(net(1), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["lora_fast"])
    assert sorted(header) == ["conv", "qkv", "table", "up"]
    assert header["up"]["lora_r"] == 3
    assert header["up"]["lora_scaling"] == 2.0
    assert header["up"]["lora_merged"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_keep_their_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = net(1, merge_weights=False).to(dtype), net(2, merge_weights=False).to(dtype)
    lora.save(source, tmp_path / name, lora_only=False)
    lora.load(target, tmp_path / name)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_by_itself_and_tied_weights(name: str, tmp_path: Path) -> None:
    layer, other = randomize_(lora.Conv1d(4, 6, 3, r=2)), lora.Conv1d(4, 6, 3, r=2)
    lora.save(layer, tmp_path / name, lora_only=False)
    lora.load(other, tmp_path / name)
    x = torch.randn(2, 4, 9)
    assert torch.equal(other(x), layer(x))

    def tied() -> nn.Sequential:
        model = nn.Sequential(lora.Embedding(9, 4, r=2), nn.Linear(4, 9, bias=False))
        model[1].weight = model[0].weight
        return randomize_(model)

    source, target = tied(), tied()
    lora.save(source, tmp_path / name, lora_only=False)
    lora.load(target, tmp_path / name)
    assert torch.equal(target(X), source(X))
    assert target[1].weight is target[0].weight


class _Migrating(nn.Module):
    """Its state without a version is from long ago, when it had half the scale."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3))

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        if metadata.get("version") is None:
            state[prefix + "scale"] = state[prefix + "scale"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("name", NAMES)
def test_versions_of_other_modules_are_kept(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(lora.Linear(4, 3, r=1), _Migrating())
    lora.save(model, tmp_path / name, lora_only=False)
    lora.load(model, tmp_path / name)
    assert torch.equal(model[1].scale, torch.ones(3))


class _Extra(nn.Module):
    state = "as built"

    def get_extra_state(self) -> Any:
        return {"state": self.state}

    def set_extra_state(self, state: Any) -> None:
        self.state = state["state"]


def test_extra_state_of_other_modules(tmp_path: Path) -> None:
    source, target = (nn.Sequential(lora.Linear(4, 3, r=1), _Extra()) for _ in range(2))
    source[1].state = "trained"
    lora.save(source, tmp_path / "a.pt", lora_only=False)
    lora.load(target, tmp_path / "a.pt")
    assert target[1].state == "trained"
    with pytest.raises(ValueError, match=r"tensors alone, not 1\._extra_state; choose another"):
        lora.save(source, tmp_path / "a.safetensors", lora_only=False)
    lora.save(source, tmp_path / "a.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("into_merged", [False, True], ids=["into_unmerged", "into_merged"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_loralib_saved(
    name: str, into_merged: bool, bias: str, tmp_path: Path
) -> None:
    source = net(1, loralib)
    write = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    write(loralib.lora_state_dict(source, bias), tmp_path / name)
    target = net(2, merge_weights=into_merged)
    lora.load(target, tmp_path / name)
    for key, value in loralib.lora_state_dict(source, bias).items():
        assert torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("into_merged", [False, True], ids=["into_unmerged", "into_merged"])
def test_whole_models_that_loralib_saved(into_merged: bool, tmp_path: Path) -> None:
    source, target = net(1, loralib, merge_weights=False), net(2, merge_weights=into_merged)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    lora.load(target, tmp_path / "a.pt")
    torch.testing.assert_close(target(X), source(X), rtol=1e-5, atol=1e-5)


def test_loralib_loads_our_files(tmp_path: Path) -> None:
    source, target = net(1, merge_weights=False), net(2, loralib, merge_weights=False)
    lora.save(source, tmp_path / "a.pt", lora_only=False)
    target.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    torch.testing.assert_close(target(X), source(X), rtol=1e-5, atol=1e-5)


def generations(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The state of a model whose convolution is `conv`, as each version of loralib writes it."""
    plain = {f"conv.{k}": state[f"conv.conv.{k}"] for k in ("weight", "bias")}
    oldest = {k: v for k, v in state.items() if not k.startswith("conv.conv.")} | plain
    return {"0.1.1": oldest, "0.1.2": dict(state), "newest": {**state, **plain}}


@pytest.mark.parametrize("into_merged", [False, True], ids=["into_unmerged", "into_merged"])
@pytest.mark.parametrize("version", ["0.1.1", "0.1.2", "newest"])
@pytest.mark.parametrize("name", NAMES)
def test_every_generation_of_convolution_keys(
    name: str, version: str, into_merged: bool, tmp_path: Path
) -> None:
    source, target = net(1, merge_weights=False), net(2, merge_weights=into_merged)
    state = {k: v.contiguous() for k, v in generations(source.state_dict())[version].items()}
    if name.endswith("safetensors"):
        state = {k: v.clone() for k, v in state.items()}
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    lora.load(target, tmp_path / name)
    torch.testing.assert_close(target(X), source(X), rtol=1e-5, atol=1e-5)


def test_no_other_thread_merges_while_a_model_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(randomize_(lora.Linear(4, 4, r=2)))
    base = model[0].weight.detach().clone()
    model.eval()
    write, merged = checkpoint._write_torch, []

    def write_slowly(*arguments: Any) -> None:
        thread = threading.Thread(target=model.train)
        thread.start()
        thread.join(0.2)
        merged.append(model[0].merged)
        write(*arguments)
        threads.append(thread)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(checkpoint, "_write_torch", write_slowly)
    lora.save(model, tmp_path / "model.pt", lora_only=False)
    threads[0].join()
    assert merged == [True]
    fresh = nn.Sequential(lora.Linear(4, 4, r=2))
    lora.load(fresh, tmp_path / "model.pt")
    torch.testing.assert_close(fresh[0].weight.detach(), base)
