"""`eval()` and `train()` under FSDP2's DDP, and whatever else hides who manages a weight."""

import gc

import pytest
import torch
import torch.distributed as dist
from spmd import (
    Trainer,
    assert_merges,
    assert_same_bits,
    assert_same_parameters,
    base_shards,
    batch,
    local,
    mine,
    network,
    outputs,
    reshard,
    shard,
    twin,
)
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_fast as lora
from lora_fast.testing import assert_within_budget, randomize_


def named_mesh() -> DeviceMesh:
    """All ranks; torch 2.10 replicates on no mesh whose dimension has no name."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("replicate",))


def replicated(model: nn.Module, *, each_layer: bool, **settings: object) -> nn.Module:
    mesh = named_mesh()
    for layer in list(model.children())[:-1] if each_layer else ():
        replicate(layer, mesh=mesh, **settings)
    return replicate(model, mesh=mesh, **settings)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("each_layer", [True, False])
def test_cycles(each_layer: bool, gathered: bool) -> None:
    model = network()
    single = twin(model)
    tokens, target = batch()
    replicated(model, each_layer=each_layer)
    base = base_shards(model)
    ours, theirs = Trainer(model), Trainer(single)
    for _ in range(2):
        ours.train(mine(tokens), mine(target))
        theirs.train(tokens, target)
        expected = outputs(single, tokens)
        if gathered:
            outputs(model, tokens)
        assert_merges(model, tokens, expected, base)
    assert_same_parameters(model, single)


def test_mixed_precision() -> None:
    model = network(torch.float32)
    tokens, _ = batch(torch.float32)
    eager, oracle = outputs(twin(model).bfloat16(), tokens), outputs(twin(model).double(), tokens)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    replicated(model, each_layer=True, mp_policy=policy)
    base = base_shards(model)
    for _ in range(2):
        assert_within_budget(outputs(model.eval(), tokens), eager, oracle)
        model.train()
        reshard(model)
        assert_same_bits(base_shards(model), base)


def test_a_replicated_layer_in_a_sharded_model() -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    mesh = named_mesh()
    replicate(model.project, mesh=mesh)
    fully_shard(model, mesh=mesh)
    base = base_shards(model)
    for _ in range(2):
        assert_merges(model, tokens, expected, base)


def test_modules_that_gc_does_not_show() -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    shard(model)
    base = base_shards(model)
    gc.freeze()
    try:
        model.eval()
        model.train()
    finally:
        gc.unfreeze()
    model(tokens)
    assert_merges(model, tokens, expected, base)


def test_sharded_after_it_was_asked_for() -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    for part in (model.project, model.qkv, model):
        model.eval()
        model.train()
        fully_shard(part)
    base = base_shards(model)
    model(tokens)
    assert_merges(model, tokens, expected, base)


def test_a_layer_that_outlives_its_root() -> None:
    layer = randomize_(lora.Linear(6, 6, r=2))
    root = fully_shard(nn.Sequential(layer, nn.Linear(6, 6)))
    base = local(layer.weight).clone()
    layer.eval()
    assert layer.merged
    del root
    gc.collect()
    layer.train()
    assert not layer.merged
    assert torch.equal(local(layer.weight), base)
