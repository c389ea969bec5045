"""Training under FSDP2 (`fully_shard`), also where it fails; initialisation; FSDP1."""

import pytest
import torch
import torch.nn.functional as F
from spmd import (
    Trainer,
    assert_same_bits,
    assert_same_gradients,
    assert_same_parameters,
    base_shards,
    batch,
    local,
    mine,
    network,
    shard,
    twin,
    whole,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import lora_fast as lora
from lora_fast.testing import assert_within_budget, randomize_


@pytest.mark.parametrize("each_layer", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"fan_in_fan_out": True}, {"out_splits": [5, 4, 9]}],
    ids=["plain", "fan_in_fan_out", "out_splits"],
)
def test_training_equals_that_of_one_process(settings: dict, each_layer: bool) -> None:
    model = network(**settings)
    single = twin(model)
    tokens, target = batch()
    shard(model) if each_layer else fully_shard(model)
    Trainer(model).train(mine(tokens), mine(target), steps=3)
    Trainer(single).train(tokens, target, steps=3)
    assert_same_parameters(model, single, rtol=1e-12, atol=1e-13)


def test_the_transposed_weight_of_loralib_is_refused_by_fsdp2() -> None:
    layer = lora.Linear(4, 6, r=2, fan_in_fan_out=True)
    with pytest.raises(NotImplementedError, match="non-contiguous parameters"):
        fully_shard(layer)


def test_gradients_in_mixed_precision() -> None:
    model = network(torch.float32)
    tokens, target = batch(torch.float32)
    eager, oracle = twin(model).bfloat16(), twin(model).double()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=policy)
    F.mse_loss(model(tokens), target.bfloat16()).backward()
    F.mse_loss(eager(tokens), target.bfloat16()).backward()
    F.mse_loss(oracle(tokens), target.double()).backward()
    theirs, right = dict(eager.named_parameters()), dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            ours = whole(parameter.grad).bfloat16()
            # Summed over the ranks in another order: twice as far as eager may be off by chance.
            assert_within_budget(ours, theirs[name].grad, right[name].grad, factor=4.0, what=name)


def test_gradients_accumulate() -> None:
    model = network()
    single = twin(model)
    tokens, target = batch(size=8)
    shard(model)
    halves = list(zip(mine(tokens).chunk(2), mine(target).chunk(2), strict=True))
    model.set_requires_gradient_sync(False)
    F.mse_loss(model(halves[0][0]), halves[0][1]).backward()
    model.set_requires_gradient_sync(True)
    F.mse_loss(model(halves[1][0]), halves[1][1]).backward()
    (2.0 * F.mse_loss(single(tokens), target)).backward()
    assert_same_gradients(model, single)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing(training: bool) -> None:
    model = network(dropout=0.5).train(training)
    plain = twin(model)
    tokens, target = batch()
    for name, layer in list(model.named_children()):
        setattr(model, name, Checkpointed(layer))
    for one in (model, plain):
        shard(one)
        torch.manual_seed(1)
        loss = F.mse_loss(one(tokens), target)
        torch.rand(1)  # the second forward must not draw where the first has left off
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(local(ours.grad), local(theirs.grad)), name


def test_from_the_meta_device() -> None:
    source = network(torch.float32)
    tokens, target = batch(torch.float32)  # before the shards draw, each its own numbers
    with torch.device("meta"):
        model = network(torch.float32)
    shard(model)
    model.eval()
    model.train()
    model.to_empty(device="cpu")
    for layer in model.children():
        layer.reset_parameters()
    no_update = {"embedding.lora_A", "project.lora_B", "qkv.lora_B", "conv.lora_B"}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.device.type == "cpu", name
        assert whole(parameter).any() == (name not in no_update), name
    empty = model.state_dict()
    model.load_state_dict({name: like(t, empty[name]) for name, t in source.state_dict().items()})
    Trainer(model).train(mine(tokens), mine(target))
    Trainer(source).train(tokens, target)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens), source(tokens))
    model.train()
    assert_same_parameters(model, source)


def like(tensor: Tensor, sharded: DTensor) -> DTensor:
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)


@pytest.mark.parametrize("each_layer", [True, False])
def test_fsdp1(each_layer: bool) -> None:
    model = network()
    single = twin(model)
    tokens, target = batch()
    if each_layer:
        for name, layer in list(model.named_children())[:-1]:
            setattr(model, name, _fsdp1(layer))
    parallel = _fsdp1(model)
    ours, theirs = Trainer(parallel), Trainer(single)
    for _ in range(3):
        ours.train(mine(tokens), mine(target))
        theirs.train(tokens, target)
        with torch.no_grad():
            expected = single(tokens)
            torch.testing.assert_close(parallel(tokens), expected)
            torch.testing.assert_close(parallel.eval()(tokens), expected)
            torch.testing.assert_close(parallel.train()(tokens), expected)
        parallel(tokens)  # without a backward the root's parameters stay gathered
        with torch.no_grad():
            torch.testing.assert_close(parallel.eval()(tokens), expected)
            torch.testing.assert_close(parallel.train()(tokens), expected)
    assert not any(getattr(layer, "merged", False) for layer in parallel.modules())


def _fsdp1(module: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory")


@pytest.mark.skipif(
    torch.__version__ < "2.11", reason="of nn.Linear, too, torch 2.10 then leaves sharded weights"
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_after_a_backward_that_failed(mode: str) -> None:
    """Which had begun to gather the weights of the layer before, as they were then."""
    model = nn.Sequential(lora.Linear(7, 9, r=2), lora.Linear(9, 3, r=2))
    randomize_(model)
    x = torch.randn(4, 7)
    expected = model(x).detach()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    base = base_shards(model)
    if mode == "train":
        model.eval()
    failing = model[0].register_forward_hook(lambda layer, args, y: _Failing.apply(y))
    loss = model(x.requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    failing.remove()
    model.train(mode == "train")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)
    assert_same_bits(base_shards(model.train()), base)
