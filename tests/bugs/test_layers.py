"""How layers compute: cost, masks, devices, sparse gradients, norms, mixed dtypes."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lora
from lora_fast.testing import randomize_


def flops(layer: nn.Module, rows: int, width: int) -> int:
    """Of a forward and a backward."""
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(rows, width, requires_grad=True)).sum().backward()
    return counter.get_total_flops()


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps for backward beside the input and the parameters."""
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with lora.use_backend("auto"), hooks:  # whatever the environment chose
        y = layer(x)
    y.sum().backward()
    return sum(kept.values())


def frozen_linear(width: int) -> nn.Linear:
    base = nn.Linear(width, 3 * width)
    base.weight.requires_grad_(False)
    return base


def qkv(lib: ModuleType, width: int, r: int, **kwargs: Any) -> Any:
    layer = lib.MergedLinear(width, 3 * width, r=r, enable_lora=[True, False, True], **kwargs)
    return randomize_(layer)


@pytest.mark.parametrize("transposed", [False, True])
def test_b10_merged_linear_costs_little_more_than_the_frozen_layer(transposed: bool) -> None:
    frozen = flops(frozen_linear(256), 512, 256)
    assert flops(qkv(lora, 256, 4, fan_in_fan_out=transposed), 512, 256) < 1.1 * frozen
    assert flops(qkv(loralib, 256, 4, fan_in_fan_out=transposed), 512, 256) > 1.9 * frozen


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_b10_every_product_of_a_step_is_counted(dtype: torch.dtype, rows: int) -> None:
    layer = qkv(lora, 32, 4).to(dtype)
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(rows, 32, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()
    # The frozen layer's two; for each of the two blocks S, its update, dS, and dX, dA, dB.
    assert counter.get_total_flops() == 2 * rows * (2 * 96 * 32 + 6 * 2 * 32 * 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_b10_merged_linear_saves_no_dense_delta(transposed: bool) -> None:
    x = torch.randn(128, 256, requires_grad=True)
    dense = 3 * 256 * 256 * 4
    assert saved_bytes(qkv(lora, 256, 4, fan_in_fan_out=transposed), x) < dense / 50
    assert saved_bytes(qkv(loralib, 256, 4, fan_in_fan_out=transposed), x) >= dense


def test_b10_dropout_saves_a_byte_an_element() -> None:
    x = torch.randn(128, 256, requires_grad=True)
    mask, s = 128 * 256, 128 * 8 * 4  # one byte a mask element, two blocks of rank 4 in fp32
    assert mask <= saved_bytes(qkv(lora, 256, 4, lora_dropout=0.5), x) <= mask + s


@pytest.mark.parametrize("splits", [None, [6, 2, 4]], ids=["equal", "ragged"])
def test_b31_the_mask_of_enabled_rows_follows_the_weight(splits: list[int] | None) -> None:
    extra = {} if splits is None else {"out_splits": splits}
    layer = lora.MergedLinear(4, 12, r=2, enable_lora=[True, False, True], **extra)
    first, second, third = splits or [4, 4, 4]
    assert layer.lora_ind.tolist() == [True] * first + [False] * second + [True] * third
    assert layer.lora_ind.dtype == torch.bool
    assert "lora_ind" not in layer.state_dict()
    assert not list(layer.buffers())
    padded = layer.zero_pad(torch.ones(first + third, 4))
    assert torch.equal(padded[:, 0].bool(), layer.lora_ind)
    on_meta = layer.to("meta")
    assert on_meta.lora_ind.device.type == "meta"
    assert on_meta.merge_AB().device.type == "meta"
    assert on_meta(torch.randn(3, 4, device="meta")).shape == (3, 12)


@pytest.mark.gpu
def test_b31_the_mask_moves_to_the_gpu_and_costs_no_synchronisation() -> None:
    layer = qkv(lora, 8, 2).cuda()
    x = torch.randn(5, 8, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    assert layer.lora_ind.is_cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_b31_loralib_leaves_the_mask_behind() -> None:
    assert qkv(loralib, 4, 2).to("meta").lora_ind.device.type == "cpu"


def test_b32_a_layer_built_on_meta_works_once_it_has_memory(case: Any) -> None:
    layer, twin = case.make(lora, device="meta"), case.build()
    assert layer.to_empty(device="cpu") is layer
    layer.reset_parameters()
    assert layer(case.input()).isfinite().all()
    layer.load_state_dict(twin.state_dict())
    x = case.input()
    for mode in (True, False, True):
        assert torch.equal(layer.train(mode)(x), twin.train(mode)(x))
    if case.name.startswith("merged"):
        assert layer.lora_ind.device.type == "cpu"


def test_b32_a_merged_layer_on_meta_comes_back_unharmed(case: Any) -> None:
    layer, twin = case.make(lora, device="meta").eval(), case.build()
    layer.to_empty(device="cpu")
    with torch.no_grad():  # which that memory may hold
        case.weight(layer).zero_()
        layer.lora_A.fill_(float("nan"))
        layer.lora_B.fill_(1.0)
    layer.load_state_dict(twin.state_dict())
    case.assert_right(layer, case.input(), base=case.weight(twin))
    assert torch.equal(case.weight(layer.train()), case.weight(twin))


def test_b32_loralib_leaves_the_mask_on_meta() -> None:
    layer = qkv(loralib, 4, 2, device="meta").to_empty(device="cpu")
    assert layer.lora_ind.device.type == "meta"


@pytest.mark.parametrize("by_freq", [False, True], ids=["", "by_freq"])
@pytest.mark.parametrize("padding_idx", [None, 1, -2])
def test_b33_sparse_gradients_equal_dense_ones(padding_idx: int | None, by_freq: bool) -> None:
    kwargs = {"r": 2, "lora_alpha": 3, "padding_idx": padding_idx, "scale_grad_by_freq": by_freq}
    layers = [lora.Embedding(9, 4, sparse=sparse, **kwargs) for sparse in (True, False)]
    randomize_(layers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.tensor([[1, 7, 5], [0, 5, 1]])
    seed = torch.randn(2, 3, 4)
    outputs = [layer(x) for layer in layers]
    assert torch.equal(*outputs)
    for y in outputs:
        y.backward(seed)
    assert layers[0].lora_A.grad.is_sparse
    torch.testing.assert_close(layers[0].lora_A.grad.to_dense(), layers[1].lora_A.grad)
    torch.testing.assert_close(layers[0].lora_B.grad, layers[1].lora_B.grad)
    assert layers[1].lora_A.grad[:, 5].abs().max() > 0
    if padding_idx is not None:
        assert layers[1].lora_A.grad[:, padding_idx].abs().max() == 0


def test_b33_sparse_adam_trains_the_columns_that_were_looked_up() -> None:
    layer = randomize_(lora.Embedding(9, 4, r=2, sparse=True))
    before, x = layer.lora_A.detach().clone(), torch.tensor([2, 5, 2])
    target = torch.randn(3, 4)
    adam = torch.optim.SparseAdam([layer.lora_A], lr=0.05)
    losses = []
    for _ in range(30):
        adam.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    touched = (layer.lora_A != before).any(0)
    assert touched.nonzero().flatten().tolist() == [2, 5]


def test_b33_loralib_raises_in_backward() -> None:
    layer = loralib.Embedding(9, 4, r=2, sparse=True)
    with pytest.raises(RuntimeError, match="sparse"):
        layer(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_b34_max_norm_limits_the_base_and_never_the_adapter(norm_type: float) -> None:
    kwargs = {"max_norm": 0.1, "norm_type": norm_type}
    layer, plain = lora.Embedding(9, 4, r=2, **kwargs), nn.Embedding(9, 4, **kwargs)
    randomize_(layer)
    plain.load_state_dict({"weight": layer.weight.clone()})
    before_a, x = layer.lora_A.detach().clone(), torch.tensor([1, 3, 3])
    update = F.linear(F.embedding(x, layer.lora_A.t()), layer.lora_B) * layer.scaling
    expected = plain(x) + update
    for mode in (True, False, True):
        torch.testing.assert_close(layer.train(mode)(x), expected)
        assert not layer.merged
    torch.testing.assert_close(layer.weight.detach(), plain.weight.detach())
    assert torch.equal(layer.lora_A, before_a)


def test_b34_loralib_shrinks_the_adapter() -> None:
    layer = randomize_(loralib.Embedding(9, 4, r=2, max_norm=0.1))
    before = layer.lora_A.detach().clone()
    layer(torch.tensor([1]))
    assert not torch.equal(layer.lora_A, before)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
]


def mixed(case: Any, base: torch.dtype, adapter: torch.dtype) -> Any:
    """A layer whose A and B have another dtype than its weight, as after `layer.to(base)`."""
    layer = case.build().to(base)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(adapter), layer.lora_B.to(adapter)
    return layer


@pytest.mark.parametrize(("base", "adapter"), MIXED, ids=str)
def test_b44_adapters_in_another_dtype_are_cast(
    case: Any, base: torch.dtype, adapter: torch.dtype
) -> None:
    layer, x = mixed(case, base, adapter), case.input(base)
    y = layer(x)
    assert y.dtype == base
    y.float().square().sum().backward()
    for parameter in (layer.lora_A, layer.lora_B):
        assert parameter.grad.dtype == adapter
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    before = case.weight(layer).detach().clone()
    assert layer.eval().merged
    case.assert_right(layer, x, base=before)
    assert torch.equal(case.weight(layer.train()), before)


def test_b44_gradients_of_cast_adapters_are_right(case: Any) -> None:
    layer, wide = mixed(case, torch.float32, torch.float64), case.make(lora, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    x = case.input()
    for module in (layer, wide):
        y = module(x if module is layer or not x.is_floating_point() else x.double())
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    for name in ("lora_A", "lora_B"):
        got, expected = getattr(layer, name).grad, getattr(wide, name).grad
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_b44_a_grad_scaler_takes_fp32_adapters_on_an_fp16_base(case: Any) -> None:
    layer = mixed(case, torch.float16, torch.float32)
    lora.mark_only_lora_as_trainable(layer)
    sgd = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = layer.lora_B.detach().clone()
    scaler.scale(layer(case.input(torch.float16)).float().square().mean()).backward()
    scaler.unscale_(sgd)
    scaler.step(sgd)
    assert not torch.equal(layer.lora_B, before)


def test_b44_loralib_raises() -> None:
    layer = loralib.Linear(4, 6, r=2).to(torch.bfloat16)
    layer.lora_A.data = layer.lora_A.data.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(2, 4, dtype=torch.bfloat16))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "to_empty": lambda layer: layer.to_empty(device="cpu"),
    "double": lambda layer: layer.double(),
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "conv_weight": lambda layer: setattr(layer.conv, "weight", nn.Parameter(layer.weight + 1)),
    "bias": lambda layer: setattr(layer, "bias", None),
    "assign": lambda layer: layer.load_state_dict(
        {k: v.clone() for k, v in layer.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_b54_a_convolution_has_one_weight_under_one_name(conv_case: Any, change: str) -> None:
    layer = conv_case.build()
    CHANGES[change](layer)
    assert layer.weight is layer.conv.weight
    assert layer.bias is layer.conv.bias
    assert isinstance(layer.weight, nn.Parameter)
    names = ["lora_A", "lora_B", "conv.weight"] + ["conv.bias"] * (change != "bias")
    assert [name for name, _ in layer.named_parameters(remove_duplicate=False)] == names
    assert list(layer.state_dict()) == names
    if change != "to_empty":
        conv_case.plain(layer, conv_case.input(layer.weight.dtype), layer.weight, bias=False)


def test_b54_a_convolution_built_on_meta(conv_case: Any) -> None:
    layer = conv_case.make(lora, device="meta").to_empty(device="cpu")
    assert layer.weight is layer.conv.weight
    assert layer.weight.device.type == "cpu"


def test_b54_a_reassigned_weight_is_what_the_layer_computes_with(conv_case: Any) -> None:
    layer, x = conv_case.build(), conv_case.input()
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    layer.bias = nn.Parameter(torch.randn_like(layer.bias))
    conv_case.assert_right(layer, x)
    base = layer.weight.detach().clone()
    conv_case.assert_right(layer.eval(), x, base=base)
