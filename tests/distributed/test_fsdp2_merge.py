"""`eval()` and `train()` under FSDP2."""

import pytest
import torch
import torch.nn.functional as F
from spmd import (
    Trainer,
    assert_merges,
    assert_same_bits,
    assert_same_gradients,
    base_shards,
    batch,
    local,
    mine,
    network,
    outputs,
    shard,
    twin,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import lora_fast as lora
from lora_fast import ops
from lora_fast.testing import assert_within_budget, randomize_


@pytest.mark.parametrize("each_layer", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"fan_in_fan_out": True}, {"out_splits": [5, 4, 9]}],
    ids=["plain", "fan_in_fan_out", "out_splits"],
)
def test_cycles(settings: dict, each_layer: bool) -> None:
    model = network(**settings)
    single = twin(model)
    tokens, target = batch()
    shard(model) if each_layer else fully_shard(model)
    base = base_shards(model)
    ours, theirs = Trainer(model), Trainer(single)
    for _ in range(3):
        ours.train(mine(tokens), mine(target))
        theirs.train(tokens, target)
        expected = outputs(single, tokens)
        assert_merges(model, tokens, expected, base)
        torch.testing.assert_close(outputs(model, tokens), expected)


@pytest.mark.parametrize("reshard_after_forward", [None, True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_eval_straight_after_a_forward_in_training(
    grad: bool, reshard_after_forward: bool | None
) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    shard(model, reshard_after_forward=reshard_after_forward)
    base = base_shards(model)
    with torch.set_grad_enabled(grad):
        model(tokens)
    for _ in range(2):
        model.eval()
        torch.testing.assert_close(outputs(model, tokens), expected)
        model.train()
        torch.testing.assert_close(outputs(model, tokens), expected)
    assert_same_bits(base_shards(model), base)


@pytest.mark.parametrize("unshard", [False, True])
def test_eval_before_the_first_forward(unshard: bool) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    shard(model)
    base = base_shards(model)
    if unshard:
        model.unshard()
    assert_merges(model, tokens, expected, base)


@pytest.mark.parametrize("by", ["mode", "model"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_in_inference_mode(fan_in_fan_out: bool, by: str) -> None:
    model = network(fan_in_fan_out=fan_in_fan_out)
    single = twin(model)
    tokens, target = batch()
    expected = outputs(model, tokens)
    shard(model)
    base = base_shards(model)
    for _ in range(2):
        with torch.inference_mode():
            model.eval() if by == "mode" else lora.merge(model)
        torch.testing.assert_close(outputs(model, tokens), expected)
        with torch.inference_mode():
            model.train() if by == "mode" else lora.unmerge(model)
    assert_same_bits(base_shards(model), base)
    Trainer(model).train(mine(tokens), mine(target))
    Trainer(single).train(tokens, target)
    assert_merges(model, tokens, outputs(single, tokens), base)


@pytest.mark.parametrize("reshard_after_forward", [None, True, False])
@pytest.mark.parametrize("layer", ["project", "qkv"])
@pytest.mark.parametrize("back", [False, True])
def test_backward_through_a_weight_merged_since_raises(
    layer: str, back: bool, reshard_after_forward: bool | None
) -> None:
    model = network()
    shard(model, reshard_after_forward=reshard_after_forward)
    tokens, target = batch()
    loss = F.mse_loss(model(tokens), target)
    model.get_submodule(layer).eval()
    if back:
        model.get_submodule(layer).train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layer", ["embedding", "conv"])
def test_backward_that_needs_no_base_weight_is_right_after_a_merge(layer: str) -> None:
    model = network()
    single = twin(model)
    tokens, target = batch()
    shard(model)
    loss = F.mse_loss(model(tokens), target)
    model.get_submodule(layer).eval()
    loss.backward()
    F.mse_loss(single(tokens), target).backward()
    assert_same_gradients(model, single)


def test_whole_models_merge_and_unmerge() -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    fully_shard(model)
    base = base_shards(model)
    outputs(model, tokens)
    assert lora.merge(model) == 4
    torch.testing.assert_close(outputs(model, tokens), expected)
    assert lora.unmerge(model) == 4
    assert_same_bits(base_shards(model), base)


def test_the_record_is_of_the_shard_alone() -> None:
    layer = randomize_(lora.MergedLinear(64, 96, r=4, enable_lora=[True, False, True]), std=0.01)
    fully_shard(layer)
    layer.eval()
    record = layer._merge_state.record
    assert record.shape == (48, 64)
    assert (record.lora_A.shape, record.lora_B.shape) == ((4, 64), (32, 4))
    if ops.load_native("cpu") is None:
        assert record.original is None and record.nbytes() < 1.1 * 48 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merged_shards_are_those_of_one_process(dtype: torch.dtype) -> None:
    model = network(dtype)
    single, wide = twin(model), twin(model).double()
    base = {name: p.clone() for name, p in model.named_parameters()}
    shard(model)
    model.eval(), single.eval(), wide.eval()
    oracle = dict(wide.named_parameters())
    eager = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        assert_within_budget(whole(parameter), eager[name], oracle[name], what=name)
    model.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), base[name]), name


def test_everything_changes_while_merged() -> None:
    model = network(torch.float32)
    shard(model)
    base = base_shards(model)
    model.eval()
    randomize_(model)
    for layer in model.children():
        layer.scaling *= 3.0
    model.train()
    assert_same_bits(base_shards(model), base)


@pytest.mark.parametrize("shard_alone", [False, True])
def test_a_weight_written_to_while_merged_keeps_what_was_written(shard_alone: bool) -> None:
    layer = randomize_(lora.Linear(5, 7, r=2, dtype=torch.float64))
    weight = layer.weight.detach().clone()
    fully_shard(layer)
    layer.eval()
    with torch.no_grad():
        (local(layer.weight) if shard_alone else layer.weight).add_(1.0)
    layer.train()
    torch.testing.assert_close(whole(layer.weight), weight + 1.0)


def test_conversion_while_merged() -> None:
    model = network(torch.float32)
    tokens, _ = batch()
    expected = outputs(model, tokens).double()
    shard(model)
    base = base_shards(model)
    model.eval()
    model.double()  # FSDP2 allows it until the first forward
    torch.testing.assert_close(outputs(model, tokens), expected, rtol=1e-5, atol=1e-5)
    model.train()
    assert_same_bits(base_shards(model), {name: t.double() for name, t in base.items()})


def test_mixed_precision() -> None:
    model = network(torch.float32)
    tokens, _ = batch(torch.float32)
    eager, oracle = outputs(twin(model).bfloat16(), tokens), outputs(twin(model).double(), tokens)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    base = base_shards(model)
    for _ in range(2):
        assert_within_budget(outputs(model.eval(), tokens), eager, oracle)
        assert_within_budget(outputs(model.train(), tokens), eager, oracle)
    assert_same_bits(base_shards(model), base)


def test_an_ignored_weight_merges_as_a_plain_one() -> None:
    layer = randomize_(lora.Linear(5, 7, r=2))
    x = torch.randn(3, 5)
    expected = outputs(layer, x)
    weight = layer.weight.detach().clone()
    fully_shard(layer, ignored_params={layer.weight})
    for _ in range(2):
        torch.testing.assert_close(outputs(layer.eval(), x), expected)
        assert layer.merged
        layer.train()
        assert torch.equal(layer.weight, weight)


def test_shards_of_columns() -> None:
    model = nn.Sequential(
        lora.Linear(4, 6, r=2),
        lora.MergedLinear(6, 8, r=2, enable_lora=[False, True], out_splits=[3, 5]),
    )
    randomize_(model)
    x = torch.randn(3, 4)
    expected = outputs(model, x)
    shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    base = base_shards(model)
    assert base["0.weight"].shape == (6, 2)
    torch.testing.assert_close(outputs(model.eval(), x), expected)
    model.train()
    assert_same_bits(base_shards(model), base)


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (lora.Conv1d(4, 5, 3, r=2), 0),
        (lora.Conv1d(4, 5, 3, r=2), 1),
        (lora.Conv2d(4, 6, 2, r=2, groups=2), 0),
        (lora.Conv2d(4, 6, 3, r=2, groups=2), 0),
        (lora.Conv2d(4, 6, 3, r=2, groups=2), 1),
        (lora.Conv2d(3, 3, 3, r=1, groups=3), 0),
        (lora.Conv3d(2, 1, 2, r=1), 0),
    ],
    ids=["1d", "1d-columns", "2-groups", "odd-groups", "groups-columns", "depthwise", "3d"],
)
def test_convolutions(layer: nn.Module, dim: int) -> None:
    randomize_(layer)
    single = twin(layer)
    base = layer.conv.weight.detach().clone()
    kernel = layer.conv.weight.shape
    fully_shard(layer, shard_placement_fn=lambda p: Shard(dim if p.shape == kernel else 0))
    layer.eval()
    assert layer.merged
    torch.testing.assert_close(whole(layer.conv.weight), single.eval().conv.weight.detach())
    layer.train()
    assert torch.equal(whole(layer.conv.weight), base)


def test_replicas_of_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = network()
    single = twin(model)
    tokens, target = batch()
    shard(model, mesh=mesh)
    base = base_shards(model)
    ours, theirs = Trainer(model), Trainer(single)
    for _ in range(2):
        ours.train(mine(tokens), mine(target))
        theirs.train(tokens, target)
        assert_merges(model, tokens, outputs(single, tokens), base)


@pytest.mark.parametrize("changed", [False, True])
def test_sharded_while_merged(changed: bool) -> None:
    model = network(torch.float32)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens, _ = batch()
    expected = outputs(model, tokens)
    shard(model.eval())
    torch.testing.assert_close(outputs(model, tokens), expected)
    if changed:
        randomize_(model)
    model.train()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(whole(parameter), base[name]), name
    model.eval()
    model.train()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(whole(parameter), base[name]), name


def test_a_layer_that_stays_unmerged_has_its_backward_after_eval() -> None:
    """A tied weight of the root, which FSDP2 keeps gathered from forward to backward."""
    model = nn.Sequential(randomize_(lora.Linear(8, 8, r=2)), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    fully_shard(model)
    loss = model(torch.randn(3, 8)).sum()
    model[0].eval()
    model[0].train()
    assert not model[0].merged
    loss.backward()
    assert model[0].lora_A.grad is not None


@pytest.mark.parametrize("even", [False, True])
def test_effective_weight(even: bool) -> None:
    model = (
        network() if not even else nn.Sequential(lora.Conv2d(2, 4, 3, r=1), lora.Linear(4, 6, r=2))
    )
    randomize_(model)
    single = twin(model)
    shard(model)
    for layer, expected in zip(model.children(), single.children(), strict=True):
        found = layer.effective_weight()
        assert found.shape == expected.effective_weight().shape
        torch.testing.assert_close(whole(found), expected.effective_weight().detach())
        found.square().sum().backward()
        expected.effective_weight().square().sum().backward()
    for (name, parameter), theirs in zip(
        model.named_parameters(), single.parameters(), strict=True
    ):
        if "lora_" in name:
            torch.testing.assert_close(whole(parameter.grad), theirs.grad, msg=name)


def test_sharded_layers_whose_adapters_changed_are_merged_anew_after_unmerge() -> None:
    layer = randomize_(lora.Linear(4, 6, r=2))
    fully_shard(layer)
    lora.merge(layer)
    randomize_(layer)
    with pytest.raises(ValueError, match=r"unmerge\(model\) .* adapters of sharded layers"):
        lora.merge(layer)
    lora.unmerge(layer)
    expected = whole(layer.effective_weight())
    assert lora.merge(layer) == 1
    torch.testing.assert_close(whole(layer.weight), expected)
