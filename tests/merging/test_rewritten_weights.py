"""Layers whose weight is pruned, parametrized, fused or quantized while they are merged."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from each_layer import base_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fast as lora
from lora_fast import readers
from lora_fast.testing import randomize_


class Halved(nn.Module):
    """A parametrization that cannot be undone."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda owner: prune.custom_from_mask(owner, "weight", owner.weight.abs() > 0.1),
    "spectral_norm_of_old": nn.utils.spectral_norm,
    "parametrized": lambda owner: parametrize.register_parametrization(owner, "weight", Halved()),
}
MOVES: dict[str, Callable[[Any], Any]] = {
    "to": lambda layer: layer.to("cpu"),
    "double": lambda layer: layer.double(),
    "half": lambda layer: layer.half().float(),
    "share_memory": lambda layer: layer.share_memory(),
}


def input_of(layer: Any) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(12)
    return torch.randn((2, 4, 5, 5) if hasattr(layer, "conv") else (3, 8))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_stays_merged_when_it_is_moved(layer: Any, how: str, move: str) -> None:
    base, x = base_of(layer), input_of(layer)
    layer.eval()
    COMPUTED[how](layer._weight_owner())
    expected = layer(x).detach()
    MOVES[move](layer)
    assert layer.merged
    x = x.double() if move == "double" and x.is_floating_point() else x
    near = {"rtol": 2e-2, "atol": 2e-2} if move == "half" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(layer(x).to(expected), expected, **near)
    layer.train()
    stored = readers.stored_weight(layer._weight_owner())
    assert torch.equal(stored.to(base), base.half().float() if move == "half" else base)


def parametrized(parametrization: Any) -> Any:
    layer = randomize_(lora.Linear(4, 4, r=2)).eval()
    parametrization(layer)
    return layer, torch.randn(2, 4)


def fused() -> Any:
    layers = nn.Sequential(randomize_(lora.Conv2d(3, 4, 3, r=2)), nn.BatchNorm2d(4), nn.ReLU())
    model = torch.ao.quantization.fuse_modules(layers.eval(), [["0.conv", "1", "2"]])
    return model, torch.randn(2, 3, 5, 5)


def quantized() -> Any:
    from torch.ao import quantization as tq

    model = nn.Sequential(
        tq.QuantStub(), randomize_(lora.Conv2d(3, 4, 3, r=2)), nn.ReLU(), tq.DeQuantStub()
    ).eval()
    model.qconfig = tq.get_default_qconfig("fbgemm")
    x = torch.randn(2, 3, 5, 5)
    prepared = tq.prepare(model)
    prepared(x)
    return tq.convert(prepared), x


def of_mkldnn() -> Any:
    from torch.utils.mkldnn import to_mkldnn

    model = to_mkldnn(nn.Sequential(randomize_(lora.Conv2d(3, 4, 3, r=2))).eval())
    return model, torch.randn(2, 3, 5, 5)


PARAMETRIZATIONS = ("weight_norm", "orthogonal", "spectral_norm")
GONE = {
    name: functools.partial(parametrized, getattr(parametrizations, name))
    for name in PARAMETRIZATIONS
}
GONE["fused"] = fused
if "fbgemm" in torch.backends.quantized.supported_engines:
    GONE["quantized"] = quantized
if torch.backends.mkldnn.is_available():
    GONE["mkldnn"] = of_mkldnn
# torch pickles no modules with parametrizations or quantized ones, and copies no mkldnn tensors.
NOT_BY_TORCH = {
    *itertools.product(("quantized", *PARAMETRIZATIONS), ("pickle",)),
    *itertools.product(("mkldnn",), ("pickle", "state", "share_memory")),
}


def output(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = model(x.to_mkldnn() if "Mkldnn" in repr(model) else x)
    return y.to_dense() if y.is_mkldnn else y


IGNORED = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@IGNORED
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pair
        for pair in itertools.product(GONE, ["to", "share_memory", "state", "deepcopy", "pickle"])
        if pair not in NOT_BY_TORCH
    ],
)
def test_a_weight_that_is_gone_stays_merged(name: str, how: str) -> None:
    model, x = GONE[name]()
    expected = output(model, x)
    if how in MOVES:
        MOVES[how](model)
    elif how == "state":
        state = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
    elif how == "deepcopy":
        model = copy.deepcopy(model)
    else:
        model = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(output(model, x), expected)
    with pytest.raises(RuntimeError, match="cannot be restored"):
        model.train()


@IGNORED
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", GONE)
def test_unmerging_a_weight_that_is_gone_is_refused(name: str) -> None:
    model, _ = GONE[name]()
    with pytest.raises(RuntimeError, match="cannot be restored"):
        lora.unmerge(model)


def test_a_model_with_a_weight_that_is_gone_is_converted_whole(backend: str) -> None:
    layer, _ = parametrized(parametrizations.weight_norm)
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4)).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "backends", [("auto", "auto"), ("reference", "auto"), ("auto", "reference")]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merged_weight_in_other_memory(transposed: bool, backends: tuple[str, str]) -> None:
    """Its values are what the merge has left, though torch counts another state."""
    for seed in range(5):
        torch.manual_seed(seed)
        with lora.use_backend(backends[0]):
            layer = randomize_(lora.Linear(24, 40, r=2, fan_in_fan_out=transposed))
            base = layer.weight.detach().clone()
            layer.eval()
        merged = layer.weight.detach().clone(memory_format=torch.contiguous_format)
        with lora.use_backend(backends[1]):
            layer.weight.data = merged
            layer.load_state_dict(layer.state_dict())
            assert torch.equal(layer.train().weight, base)
