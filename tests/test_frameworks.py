"""What frameworks do to layers: modes set past train(), quantization, sparse and fake data."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

QV = {"enable_lora": [True, False, True]}
MAKERS = {
    "linear": lambda: lora.Linear(6, 9, r=2),
    "merged": lambda: lora.MergedLinear(6, 9, r=2, **QV),
    "embedding": lambda: lora.Embedding(6, 9, r=2),
    "conv1d": lambda: lora.Conv1d(6, 9, 3, r=2),
}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = layer.conv.weight if hasattr(layer, "conv") else layer.weight
    return weight


def test_lightning_restores_the_mode_past_train(name: str) -> None:
    layer = randomize_(MAKERS[name]())
    model = nn.Sequential(nn.Identity(), layer)
    base = weight_of(layer).detach().clone()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    assert layer.merged
    for module, mode in modes.items():  # lightning.pytorch.loops.utilities, after a validation
        module.training = mode
    assert not layer.merged
    assert torch.equal(weight_of(layer), base)
    for module in model.modules():
        module.training = False
    assert not layer.merged
    layer.merge_weights = False
    layer.eval()
    layer.merge_weights = True
    assert not layer.merged


def test_setting_the_mode_by_hand_leaves_a_merge_by_hand() -> None:
    layer = randomize_(lora.Linear(6, 9, r=2, merge_weights=False))
    lora.merge(layer)
    layer.training = True
    assert layer.merged
    lora.unmerge(layer)


def quantized_by_fx(model: nn.Module, x: Tensor, aware: bool) -> nn.Module:
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    quantization = pytest.importorskip("torch.ao.quantization")
    if aware:
        mapping = quantization.get_default_qat_qconfig_mapping("x86")
        prepared = fx.prepare_qat_fx(model, mapping, (x,))
    else:
        prepared = fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    return fx.convert_fx(prepared.eval())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["linear", "merged"])
@pytest.mark.parametrize("aware", [True, False])
def test_fx_quantization_of_unmerged_layers(kind: str, aware: bool) -> None:
    layer = randomize_(MAKERS[kind](), 0.3)
    layer.merge_weights = False
    model = nn.Sequential(layer, nn.ReLU()).train(aware)
    x = torch.randn(20, 6)
    expected = copy.deepcopy(model)(x)
    found = quantized_by_fx(model, x, aware)(x)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("aware", [True, False])
def test_fx_quantization_of_an_unmerged_convolution(aware: bool, d: int, bias: bool) -> None:
    """Between plain ones: what computes its kernel is observed, and follows the weights."""
    plain, ours = getattr(nn, f"Conv{d}d"), getattr(lora, f"Conv{d}d")
    layer = randomize_(ours(3, 8, 3, r=2, bias=bias, merge_weights=False), 0.3)
    model = nn.Sequential(plain(3, 3, 1), layer, plain(8, 4, 1)).train(aware)
    x = torch.randn(4, 3, *[6] * d)
    expected = copy.deepcopy(model)(x)
    found = quantized_by_fx(model, x, aware)(x)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("where", ["linear1", "linear2"])
def test_scripts_of_an_encoder_layer(where: str) -> None:
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    old = getattr(encoder, where)
    setattr(encoder, where, randomize_(lora.Linear(old.in_features, old.out_features, r=2)))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(torch.jit.script(encoder)(x), encoder(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("kind", ["linear", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_inputs(kind: str, rows: int, layout: str, dtype: torch.dtype) -> None:
    layer = randomize_(MAKERS[kind]())
    x = torch.randn(rows, 6).relu()
    expected = layer(x)
    expected.sum().backward()
    gradient = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer.to(dtype)
    sparse = x.to(dtype).to_sparse() if layout == "coo" else x.to(dtype).to_sparse_csr()
    try:
        torch.nn.functional.linear(sparse, layer.weight)
    except RuntimeError as error:  # torch has no such product
        with pytest.raises(type(error)):
            layer(sparse)
        return
    found = layer(sparse)
    found.sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(found.float(), expected, **close)
    torch.testing.assert_close(layer.lora_A.grad.float(), gradient, **close)


def test_fake_layers_are_not_merged(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        layer = MAKERS[name]().eval()
    assert not layer.merged
    assert not caught


def test_a_scaling_that_is_trained(name: str) -> None:
    layer = randomize_(MAKERS[name]())
    layer.scaling = torch.tensor(0.5, requires_grad=True)
    base = weight_of(layer).detach().clone()
    layer.eval()  # a warning would be an error here
    assert layer.merged
    assert not torch.equal(weight_of(layer), base)
    layer.state_dict()
    layer.train()
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_is_not_finite_is_named(name: str, factor: str, value: float) -> None:
    layer = randomize_(MAKERS[name]())
    with torch.no_grad():
        getattr(layer, factor)[0, 0] = value
    with pytest.warns(RuntimeWarning, match=f"{factor} holds infinities or NaN"):
        layer.eval()
    assert not layer.merged
    with pytest.raises(RuntimeError, match=f"{factor} holds infinities or NaN"):
        lora.merge(layer)
