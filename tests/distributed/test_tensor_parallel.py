"""Tensor parallel layers (`parallelize_module`), alone and together with FSDP2."""

import copy

import pytest
import torch
import torch.nn.functional as F
from spmd import (
    assert_merges,
    assert_same_bits,
    assert_same_gradients,
    assert_same_parameters,
    base_shards,
    outputs,
    parallelize,
    shard,
    twin,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import lora_fast as lora
from lora_fast.testing import assert_within_budget, randomize_


class MLP(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = lora.Linear(5, 12, r=4, lora_alpha=2, lora_dropout=dropout)
        self.down = lora.Linear(12, 7, r=3, lora_alpha=5, lora_dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def mlp(dtype: torch.dtype = torch.float64) -> MLP:
    model = randomize_(MLP()).to(dtype)
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    return model


def test_training_equals_that_of_one_process() -> None:
    model = mlp()
    single = twin(model)
    x = torch.randn(6, 5, dtype=torch.float64)
    parallelize(model, init_device_mesh("cpu", (2,)), PLAN)
    for trained in (model, single):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            trained(x).square().mean().backward()
            optimizer.step()
    assert_same_gradients(model, single)
    assert_same_parameters(model, single, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cycles(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    single, wide = twin(model), twin(model).double()
    x = torch.randn(6, 5, dtype=dtype)
    parallelize(model, init_device_mesh("cpu", (2,)), PLAN)
    assert model.up.weight.placements == (Shard(0),)
    assert model.down.weight.placements == (Shard(1),)
    base = base_shards(model)
    for _ in range(3):
        eager, oracle = outputs(single, x), outputs(wide, x.double())
        assert_within_budget(outputs(model.eval(), x), eager, oracle, factor=4.0)
        assert model.up.merged and model.down.merged
        assert_within_budget(outputs(model.train(), x), eager, oracle, factor=4.0)
        assert_same_bits(base_shards(model), base)
        with torch.no_grad():
            for trained in (model, single, wide):
                for parameter in lora.lora_state_dict(trained).values():
                    parameter.mul_(0.5)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("layer", ["up", "down"])
def test_backward_through_a_weight_changed_since_raises(layer: str, merged: bool) -> None:
    model = mlp()
    parallelize(model, init_device_mesh("cpu", (2,)), PLAN)
    model.train(not merged)
    loss = model(torch.randn(6, 5, dtype=torch.float64, requires_grad=True)).square().mean()
    model.get_submodule(layer).train(merged)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LAYERS = {
    "transposed": (lora.Linear(4, 6, r=3, fan_in_fan_out=True), torch.ones(3, 4)),
    "merged": (lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True]), torch.ones(3, 4)),
    "out_splits": (
        lora.MergedLinear(4, 6, r=2, enable_lora=[False, True], out_splits=[1, 5]),
        torch.ones(3, 4),
    ),
    "embedding": (lora.Embedding(7, 5, r=2), torch.tensor([1, 6, 3, 1])),
}


# The backward of its lookup in a sharded table asks for a mask that it has dropped.
HAS_LOST_MASK = torch.__version__ < (2, 12)
SHARDED = [
    (name, style)
    for name in LAYERS
    for style in (ColwiseParallel, RowwiseParallel)
    if not (HAS_LOST_MASK and (name, style) == ("embedding", ColwiseParallel))
]


@pytest.mark.parametrize(("name", "style"), SHARDED)
def test_other_layers(name: str, style: type) -> None:
    layer, x = copy.deepcopy(LAYERS[name])
    randomize_(layer.double())
    x = x.double() if x.is_floating_point() else x
    single = twin(layer)
    base = layer.weight.detach().clone()
    whole_activations = style(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize(layer, init_device_mesh("cpu", (2,)), whole_activations)
    y, expected = layer(x), single(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(layer, single)
    layer.eval()
    assert layer.merged
    torch.testing.assert_close(outputs(layer, x), expected.detach())
    layer.train()
    assert torch.equal(whole(layer.weight), base)


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
@pytest.mark.parametrize("early", [False, True])
def test_a_copy_of_a_merged_layer(early: bool, style: type) -> None:
    layer = randomize_(lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True]))
    base = layer.weight.detach().clone()
    layer.train(not early)
    parallelize(layer, init_device_mesh("cpu", (2,)), style())
    layer.eval()
    copies = copy.deepcopy(layer), layer
    for one in copies:
        one.train()
        assert torch.equal(whole(one.weight), base)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_together_with_fsdp2(shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(lora.Embedding(8, 5, r=2), *mlp().children()).double()
    randomize_(model)
    single = twin(model)
    tokens = torch.tensor([[1, 6, 3], [1, 7, 0]])
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate()),
        "1": ColwiseParallel(),
        "2": RowwiseParallel(),
    }
    parallelize(model, mesh["tensor"], plan)
    shard(model, mesh=mesh["data"])
    base = base_shards(model)
    assert_same_parameters(model, single, rtol=0.0, atol=0.0)
    for trained in (model, single):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            trained(tokens).square().mean().backward()
            optimizer.step()
    expected = outputs(single, tokens)
    torch.testing.assert_close(outputs(model, tokens), expected)
    for _ in range(2):
        assert_merges(model, tokens, expected, base)
        torch.testing.assert_close(outputs(model, tokens), expected)
    assert_same_parameters(model, single)


def test_the_own_state_of_before_train() -> None:
    model = mlp()
    parallelize(model, init_device_mesh("cpu", (2,)), PLAN)
    base = base_shards(model)
    state = model.eval().state_dict()  # whose values show the base weights from here on
    model.train()
    model.load_state_dict(state)
    assert_same_bits(base_shards(model), base)
