"""Files that do not fit or are damaged are refused whole."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved_models import NAMES, net
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_


def write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(params=[True, False], ids=["into_train", "into_eval"])
def target(request: pytest.FixtureRequest) -> nn.ModuleDict:
    return net().train(request.param)


@pytest.fixture
def refused(target: nn.ModuleDict, tmp_path: Path) -> Any:
    """Load a file; return what the error says, after checking that nothing was loaded."""

    def load(file: Path, **kwargs: Any) -> list[str]:
        before = {k: v.clone() for k, v in target.state_dict().items()}
        modes = {name: layer.merged for name, layer in target.items()}
        with pytest.raises(ValueError) as caught:
            lora.load(target, file, **kwargs)
        for key, value in target.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert modes == {name: layer.merged for name, layer in target.items()}
        first, *lines = str(caught.value).split("\n")
        assert first.startswith(f"load: {file} ")
        return [first, *(line.strip() for line in lines)]

    return load


def assert_untouched_by(file: Path, target: nn.Module, error: type[Exception]) -> None:
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(error, match=file.name):
        lora.load(target, file)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("lora_only", [True, False], ids=["adapters", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_every_misfit_is_named(name: str, lora_only: bool, refused: Any, tmp_path: Path) -> None:
    other = net(
        q=lora.Linear(5, 6, r=2),
        qkv=lora.MergedLinear(4, 12, r=2, lora_alpha=8, enable_lora=[True, False, True]),
        conv=None,
        extra=lora.Linear(4, 4, r=1),
    )
    lora.save(other, tmp_path / name, lora_only=lora_only)
    first, *lines = refused(tmp_path / name)
    assert first.endswith("does not fit the model:")
    unknown = ["extra.lora_A: not in the model", "extra.lora_B: not in the model"]
    shapes = ["q.lora_A: the file has shape (2, 5), the model (2, 4)"]
    if not lora_only:
        unknown += [f"extra.{key}: not in the model" for key in ("weight", "bias")]
        shapes += ["q.weight: the file has shape (6, 5), the model (6, 4)"]
    missing = ["conv.lora_A: not in the file", "conv.lora_B: not in the file"]
    scaling = ["qkv: saved with scaling=4.0, the layer has 0.5"]
    assert sorted(lines) == sorted(unknown + shapes + missing + scaling)


@pytest.mark.parametrize("name", NAMES)
def test_another_rank_is_named_with_both(name: str, refused: Any, tmp_path: Path) -> None:
    lora.save(net(q=lora.Linear(4, 6, r=4, lora_alpha=2)), tmp_path / name)
    _, *lines = refused(tmp_path / name)
    assert sorted(lines) == [
        "q.lora_A: the file has shape (4, 4), the model (2, 4)",
        "q.lora_B: the file has shape (6, 4), the model (6, 2)",
        "q: saved with r=4, the layer has 2",
    ]


@pytest.mark.parametrize("last", ["conv.weight", "conv.conv.weight"])
@pytest.mark.parametrize("name", NAMES)
def test_either_copy_of_a_kernel_that_does_not_fit(
    name: str, last: str, refused: Any, tmp_path: Path
) -> None:
    """loralib's newest version writes a convolution's weight under two keys."""
    state = {k: v.contiguous() for k, v in net().state_dict().items()}
    kernel = state.pop("conv.conv.weight")
    wrong = torch.zeros(4, 2, 5, 5)
    both = {"conv.weight": kernel, "conv.conv.weight": wrong}
    state |= both if last == "conv.conv.weight" else dict(reversed(both.items()))
    _, *lines = refused(write(state, tmp_path / name))
    assert lines == ["conv.conv.weight: the file has shape (4, 2, 5, 5), the model (4, 2, 3, 3)"]


@pytest.mark.parametrize("name", NAMES)
def test_strict_asks_for_every_adapter(name: str, refused: Any, tmp_path: Path) -> None:
    source = net()
    some = {k: v for k, v in lora.lora_state_dict(source).items() if not k.startswith("q.")}
    _, *lines = refused(write(some, tmp_path / name))
    assert lines == ["q.lora_A: not in the file", "q.lora_B: not in the file"]


@pytest.mark.parametrize("name", NAMES)
def test_without_strict_the_others_are_loaded(
    name: str, target: nn.ModuleDict, refused: Any, tmp_path: Path
) -> None:
    source = net()
    some = {k: v for k, v in lora.lora_state_dict(source).items() if not k.startswith("q.")}
    before = target["q"].lora_A.clone()
    lora.load(target, write(some, tmp_path / name), strict=False)
    assert torch.equal(target["q"].lora_A, before)
    assert torch.equal(target["conv"].lora_A, source["conv"].lora_A)
    typo = some | {"q.lora_C": torch.zeros(2, 4)}
    _, *lines = refused(write(typo, tmp_path / name), strict=False)
    assert lines == ["q.lora_C: not in the model"]


@pytest.mark.parametrize("lora_only", [True, False], ids=["adapters", "whole"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("name", NAMES)
def test_factors_without_fractions_and_imaginary_parts(
    name: str, factor: str, dtype: torch.dtype, lora_only: bool, refused: Any, tmp_path: Path
) -> None:
    source = net()
    state = dict(lora.lora_state_dict(source) if lora_only else source.state_dict())
    key = f"conv.{factor}"
    state |= {key: state[key].to(dtype)}
    state = {k: v.contiguous() for k, v in state.items()}
    _, *lines = refused(write(state, tmp_path / name))
    assert lines == [
        f"{key}: the file has dtype {dtype}, which can't become the model's torch.float32"
    ]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("lora_only", [True, False], ids=["adapters", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_factors_in_other_fractions_are_loaded(
    name: str, lora_only: bool, dtype: str, target: nn.ModuleDict, tmp_path: Path
) -> None:
    source = net()
    state = dict(lora.lora_state_dict(source) if lora_only else source.state_dict())
    factors = {k: v.to(getattr(torch, dtype)) for k, v in state.items() if "lora_" in k}
    state = {k: v.contiguous() for k, v in (state | factors).items()}
    lora.load(target, write(state, tmp_path / name))
    target.train()
    for key, value in state.items():
        assert torch.equal(target.state_dict()[key], value.float()), key


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_no_plain_value(refused: Any, tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    _, *lines = refused(write({**net().state_dict(), "q.lora_A": nested}, tmp_path / "a.pt"))
    assert lines == ["q.lora_A: the file has no plain values for it, but nested ones"]


def test_the_checkpoint_of_a_trainer_is_refused(refused: Any, tmp_path: Path) -> None:
    torch.save({"model": net().state_dict(), "step": 3}, tmp_path / "a.pt")
    (line,) = refused(tmp_path / "a.pt")
    assert line.endswith("does not hold a state dict of tensors")
    torch.save([torch.ones(3)], tmp_path / "a.pt")
    (line,) = refused(tmp_path / "a.pt")
    assert line.endswith("does not hold a state dict of tensors")


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def test_a_file_that_runs_code_is_refused(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"q.lora_A": _Evil()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(_Evil()))
    refused(tmp_path / "b.bin")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("left", [0, 5, 8, 0.2, 0.5, 0.9, -1])
@pytest.mark.parametrize("name", NAMES)
def test_truncated_files(name: str, left: float, refused: Any, tmp_path: Path) -> None:
    file = tmp_path / name
    lora.save(net(), file, lora_only=False)
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data)) if 0 < left < 1 else int(left)])
    (line,) = refused(file)
    kind = "safetensors" if name.endswith("safetensors") else "torch.save"
    assert f"is damaged or no {kind} file; nothing was loaded (" in line


@pytest.mark.parametrize("content", [b"\x00" * 4096, b"hello, this is text\n" * 99])
@pytest.mark.parametrize("name", NAMES)
def test_other_files(name: str, content: bytes, refused: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (line,) = refused(tmp_path / name)
    assert "is damaged or no" in line


@pytest.mark.parametrize("name", NAMES)
def test_a_file_under_the_name_of_the_other_kind(name: str, refused: Any, tmp_path: Path) -> None:
    (other,) = set(NAMES) - {name}
    lora.save(net(), tmp_path / name)
    (tmp_path / name).rename(tmp_path / other)
    (line,) = refused(tmp_path / other)
    assert "is damaged or no" in line


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_and_folders(name: str, tmp_path: Path) -> None:
    assert_untouched_by(tmp_path / name, net(), FileNotFoundError)
    (tmp_path / name).mkdir()
    with pytest.raises((IsADirectoryError, ValueError)):
        lora.load(net(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"save: there is no folder .*absent"):
        lora.save(net(), tmp_path / "absent" / name)
    assert os.listdir(tmp_path) == [name]


def test_the_state_of_a_merged_subclass() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    layer = randomize_(lora.Linear(8, 12, r=2))
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(two_tensor(weight.clone(), weight.clone()), requires_grad=False)
    assert layer.eval().merged
    assert "weight" in layer.state_dict()


def test_a_refused_state_lacks_no_key_that_it_has() -> None:
    layer = lora.Conv2d(4, 6, 3, r=2)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for lora_A") as error:
        layer.load_state_dict(lora.Conv2d(4, 6, 3, r=1).state_dict())
    assert "Missing" not in str(error.value)
    assert "Unexpected" not in str(error.value)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("alloc_cpu.cpp:127: DefaultCPUAllocator: can't allocate memory: you tried 64"),
    ],
    ids=["python", "torch"],
)
def test_a_file_for_which_there_is_no_memory_is_not_called_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, layer = tmp_path / "adapter.pt", lora.Linear(4, 6, r=2)
    lora.save(layer, file)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        lora.load(layer, file)


class InBytes:
    def __fspath__(self) -> bytes:
        return b"a.pt"


@pytest.mark.parametrize(
    "path", [None, 5, b"a.pt", io.BytesIO(), InBytes()], ids=lambda path: type(path).__name__
)
@pytest.mark.parametrize("function", [lora.save, lora.load])
def test_what_is_no_path_is_named(function: Any, path: Any) -> None:
    message = rf"^{function.__name__}: path must be a str or an os\.PathLike, got .* of type "
    with pytest.raises(TypeError, match=message + type(path).__name__):
        function(lora.Linear(4, 6, r=2), path)
