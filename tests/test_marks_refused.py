"""What a file says of a layer and cannot be so: refused before any layer has changed."""

import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

NAMES = ["a.safetensors", "a.pt"]


def net() -> nn.Sequential:
    return randomize_(nn.Sequential(*(lora.Linear(4, 4, r=2, lora_alpha=4) for _ in range(3))))


def write(path: Path, state: dict[str, Tensor], marks: dict[str, Any]) -> None:
    state = {key: value.detach().clone() for key, value in state.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, metadata={"lora_fast": json.dumps(marks)})
    else:
        kept: Any = nn.Module().state_dict()
        kept.update(state)
        kept._metadata.update(marks)
        torch.save(kept, path)


def refused(path: Path, target: nn.Module) -> str:
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(f"load: {path} does not fit the model:")) as got:
        lora.load(target, path)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key]), key
    return str(got.value).partition("\n")[2].strip()


def merged(**marks: Any) -> dict[str, Any]:
    return {"lora_merged": True, "lora_scaling": 2.0} | marks


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"lora_r": "2"}, "1: the file's lora_r must be an integer, got '2'"),
        ({"lora_r": 2.5}, "1: the file's lora_r must be an integer, got 2.5"),
        ({"lora_scaling": "x"}, "1: the file's lora_scaling must be a number, got 'x'"),
        ({"lora_scaling": None}, "1: the file's lora_scaling must be a number, got None"),
        (merged(lora_scaling={}), "1: the file's lora_scaling must be a number, got {}"),
        (merged(lora_merged="yes"), "1: the file's lora_merged must be True or False, got 'yes'"),
        (merged(lora_sample=[1, 2]), "1: the file's lora_sample must be a list of elements, four"),
        (merged(lora_sample=[["a"] * 4]), "1: the file's lora_sample must be a list of elements"),
        (merged(lora_sample=[[0, float("nan"), 0, 0]]), "1: the file's lora_sample must be a list"),
        (
            merged(lora_sample=[], lora_norms=[1.0]),
            "1: the file's lora_norms must be a list of two",
        ),
        (merged(lora_sample=[[0, 0, 10**400, 1]]), "1: the file's lora_sample must be a list"),
        (merged(lora_norms=[2**64, 1.0]), "1: the file's lora_norms must be a list of two"),
        ({"version": "x"}, "1: the file's version must be an integer, got 'x'"),
        ({"version": [1]}, "1: the file's version must be an integer, got [1]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_marks_that_say_nothing(
    name: str, marks: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name, net().state_dict(), {"1": marks})
    for target in (net(), net().eval()):
        assert refused(tmp_path / name, target).startswith(message)


@pytest.mark.parametrize("mark", ["lora_r", "lora_scaling", "lora_merged"])
def test_tensors_as_marks(mark: str, tmp_path: Path) -> None:
    write(tmp_path / "a.pt", net().state_dict(), {"1": {mark: torch.ones(2)}})
    assert refused(tmp_path / "a.pt", net()).startswith(f"1: the file's {mark} must be ")


@pytest.mark.parametrize("version", ["x", [], {}])
@pytest.mark.parametrize("name", NAMES)
def test_a_version_that_another_module_would_compare(
    name: str, version: Any, tmp_path: Path
) -> None:
    """Its own loading raises after the layers before it were loaded."""
    model = nn.Sequential(lora.Linear(4, 4, r=2), nn.BatchNorm1d(4))
    other = randomize_(nn.Sequential(lora.Linear(4, 4, r=2), nn.BatchNorm1d(4)))
    write(tmp_path / name, other.state_dict(), {"1": {"version": version}})
    expected = f"1: the file's version must be an integer, got {version!r}"
    for target in (model, model.eval()):
        assert refused(tmp_path / name, target) == expected


@pytest.mark.parametrize("version", ["1.2", 2.0], ids=str)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_version_of_a_modules_own_kind(name: str, version: Any, tmp_path: Path) -> None:
    head = type("Head", (nn.Linear,), {"_version": version})
    model = nn.Sequential(lora.Linear(4, 4, r=2), head(4, 4))
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    write(tmp_path / name, state, {"1": {"version": version}})
    lora.load(model, tmp_path / name)
    assert model[1].weight.eq(1).all()


@pytest.mark.parametrize("mark", [{"lora_scaling": "x"}, {"lora_sample": 3}], ids=str)
def test_the_other_name_of_a_layer(mark: dict[str, Any], tmp_path: Path) -> None:
    layer = lora.Linear(4, 4, r=2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    write(tmp_path / "a.pt", model.state_dict(), {"b": mark})
    assert refused(tmp_path / "a.pt", model).startswith(f"b: the file's {next(iter(mark))} must")


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf)])
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_weight_whose_adapter_cannot_be_taken_out(
    name: str, factor: str, value: Tensor, tmp_path: Path
) -> None:
    state = dict(net().state_dict())
    state[f"1.{factor}"] = value.view(state[f"1.{factor}"].shape)
    write(tmp_path / name, state, {"1": merged()})
    message = refused(tmp_path / name, net())
    assert message.startswith("1: its adapter can't be taken out of the saved weight: ")
    assert factor in message


@pytest.mark.parametrize("name", NAMES)
def test_a_base_weight_that_does_not_fit_its_dtype(name: str, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in net().state_dict().items()}
    state["1.weight"] = torch.full((4, 4), -65504.0, dtype=torch.float16)
    state["1.lora_A"] = torch.full((2, 4), 100.0, dtype=torch.float16)
    state["1.lora_B"] = torch.full((4, 2), 100.0, dtype=torch.float16)
    write(tmp_path / name, state, {"1": merged()})
    assert "does not fit torch.float16" in refused(tmp_path / name, net().half())


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mark_a_base_weight_that_does_not_fit_its_dtype(
    name: str, tmp_path: Path
) -> None:
    """But for one element it is what the weight here and the adapter add up to."""
    target = net().half()
    state = {key: value.clone() for key, value in target.state_dict().items()}
    state["1.lora_A"] = torch.full((2, 4), 100.0, dtype=torch.float16)
    state["1.lora_B"] = torch.full((4, 2), 100.0, dtype=torch.float16)
    with torch.no_grad():
        target[1].weight[0, 0] = -65504.0
    weight = target[1].weight.detach() + 40000.0
    weight[0, 0] = -30000.0
    write(tmp_path / name, state | {"1.weight": weight}, {})
    assert "does not fit torch.float16" in refused(tmp_path / name, target)


def test_a_convolution_saved_merged_by_the_release(tmp_path: Path) -> None:
    """Its weight has another name in the file than in the layer."""
    model = nn.Sequential(lora.Conv2d(2, 4, 3, r=1), lora.Conv2d(4, 4, 3, r=1))
    state = {k.replace("conv.", ""): v for k, v in randomize_(model).state_dict().items()}
    state["1.lora_A"] = torch.full_like(state["1.lora_A"], torch.nan)
    write(tmp_path / "a.pt", state, {"1": {"lora_merged": True, "lora_scaling": 1.0}})
    assert refused(tmp_path / "a.pt", model).startswith("1: its adapter can't be taken out of")


def test_a_diverged_adapter_beside_its_base_weight_still_loads(tmp_path: Path) -> None:
    """Not the merged weight: nothing is to be taken out of it."""
    source = net().eval()
    state = source.state_dict()  # says that it is merged
    source.train()  # and holds the base weight
    with torch.no_grad():
        source[1].lora_A.fill_(torch.nan)
    torch.save(state, tmp_path / "a.pt")
    target = net()
    lora.load(target, tmp_path / "a.pt")
    assert torch.equal(target[1].weight, source[1].weight)
    assert target[1].lora_A.isnan().all()


def test_ctrl_c_comes_after_the_whole_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = net(), net()
    lora.save(source, tmp_path / "a.pt", lora_only=False)
    load = lora.Linear._load_from_state_dict

    def interrupted(layer: Any, *args: Any) -> None:
        load(layer, *args)
        if layer is target[1]:
            signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(lora.Linear, "_load_from_state_dict", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            lora.load(target, tmp_path / "a.pt")
    finally:
        signal.signal(signal.SIGINT, before)
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("what", ["a whole module", "its optimizer", "an object"])
def test_a_file_of_another_kind_says_what_it_holds(what: str, tmp_path: Path) -> None:
    held = {
        "a whole module": nn.Sequential(nn.Linear(2, 2)),
        "its optimizer": torch.optim.SGD(net().parameters(), lr=1.0),
        "an object": {"a": threading.Thread},
    }
    torch.save(held[what], tmp_path / "a.pt")
    with pytest.raises(ValueError) as caught:
        lora.load(net(), tmp_path / "a.pt")
    expected = {
        "a whole module": "torch.nn.modules.container.Sequential",
        "its optimizer": "torch.optim.sgd.SGD",
        "an object": "threading.Thread",
    }
    assert str(caught.value) == (
        f"load: {tmp_path / 'a.pt'} must hold a state dict of tensors, as save or "
        f"torch.save(model.state_dict(), path) writes it, but holds a {expected[what]}; nothing "
        "was loaded"
    )


def test_the_reason_is_no_advice_to_trust_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"nothing was loaded \(UnpicklingError: Unsupported op"):
        lora.load(net(), tmp_path / "a.pt")
