"""state_dict, torch.distributed.checkpoint and lora_state_dict of sharded models."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spmd import (
    Trainer,
    assert_same_bits,
    assert_same_parameters,
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lora_fast as lora
from lora_fast.testing import randomize_

FULL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def another(model: nn.Module) -> nn.Module:
    """A sharded model of the same structure with other values."""
    other = twin(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    return shard(other)


def test_round_trip_through_files(tmp_path: Path) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    target = another(model)
    shard(model)
    base = base_shards(model)
    outputs(model, tokens)  # leaves the root's parameters gathered
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    outputs(target, tokens)
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(target, state)
    torch.testing.assert_close(outputs(target, tokens), expected)
    torch.testing.assert_close(outputs(target.eval(), tokens), expected)
    assert_same_bits(base_shards(target.train()), base)


@pytest.mark.parametrize("broadcast", [False, True])
def test_adapters_of_a_full_state_dict_into_a_merged_model(broadcast: bool) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    target = twin(model)
    with torch.no_grad():
        for parameter in lora.lora_state_dict(target).values():
            parameter.add_(1.0)
    shard(target)
    base = base_shards(target)
    target.eval()
    state = lora.lora_state_dict(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, strict=False)
    set_model_state_dict(
        target, state if not broadcast or dist.get_rank() == 0 else {}, options=options
    )
    assert all(layer.merged for layer in target.children())
    torch.testing.assert_close(outputs(target, tokens), expected)
    assert_same_bits(base_shards(target.train()), base)


def test_what_one_rank_wrote_into_a_merged_shard_is_refused_by_all() -> None:
    layer = randomize_(lora.Linear(4, 6, r=2))
    fully_shard(layer)
    layer.eval()
    state = layer.state_dict()
    if dist.get_rank() == 1:
        local(state["weight"]).add_(1.0)
    with pytest.raises(RuntimeError, match=r"weight: the values .* call train\(\) before"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("again", [False, True])
def test_the_own_state_of_a_merged_model(again: bool) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    shard(model)
    base = base_shards(model)
    model.eval()
    state = model.state_dict()
    if again:
        outputs(model, tokens)
        model.train()
        model.eval()
    for _ in range(2):
        model.load_state_dict(state)
        torch.testing.assert_close(outputs(model, tokens), expected)
    assert_same_bits(base_shards(model.train()), base)


@pytest.mark.parametrize("into_another", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_a_state_whose_model_has_changed_its_mode_since(merged: bool, into_another: bool) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    target = another(model) if into_another else model
    shard(model).train(not merged)
    state = model.state_dict()  # whose values go on changing with the model's
    model.train(merged)
    outputs(model, tokens)
    target.load_state_dict(state)
    torch.testing.assert_close(outputs(target, tokens), expected)
    torch.testing.assert_close(outputs(target.train(), tokens), expected)


def test_the_state_of_a_merged_model_filled_after_train(tmp_path: Path) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    target = another(model).eval()
    shard(model)
    base = base_shards(model)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    state = target.state_dict()
    target.train()
    dcp.load(state, checkpoint_id=tmp_path)
    target.load_state_dict(state)
    torch.testing.assert_close(outputs(target, tokens), expected)
    assert_same_bits(base_shards(target), base)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_merged_model_cannot_be_loaded_in_place(tmp_path: Path, gathered: bool) -> None:
    model = network()
    tokens, _ = batch()
    target = another(model).eval()
    shard(model)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=tmp_path)
    if gathered:
        outputs(target, tokens)
    with pytest.raises(RuntimeError, match=r"conv.weight: the values .* call train\(\) before"):
        set_model_state_dict(target, state)


def test_full_state_dict() -> None:
    model = network()
    single = twin(model)
    tokens, _ = batch()
    target = another(model)
    shard(model)
    outputs(model, tokens)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, tensor in single.state_dict().items():
        assert torch.equal(state[name], tensor), name
    set_model_state_dict(target, state if dist.get_rank() == 0 else {}, options=FULL)
    torch.testing.assert_close(outputs(target.eval(), tokens), outputs(single, tokens))
    assert_same_parameters(target.train(), single)


def test_the_full_state_dict_of_a_merged_model_is_that_of_one_process() -> None:
    model = network()
    single = twin(model).eval()
    shard(model).eval()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, tensor in single.state_dict().items():
        torch.testing.assert_close(state[name], tensor)


@pytest.mark.parametrize("target_merged", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_sharded_state_dict(merged: bool, target_merged: bool) -> None:
    model = network()
    tokens, _ = batch()
    expected = outputs(model, tokens)
    target = another(model).train(not target_merged)
    shard(model)
    base = base_shards(model)
    model.train(not merged)
    outputs(model, tokens)
    target.load_state_dict(model.state_dict())
    assert all(layer.merged == target_merged for layer in target.children())
    torch.testing.assert_close(outputs(target, tokens), expected)
    target.train(), model.train()
    if not merged:
        assert_same_bits(base_shards(target), base)
    torch.testing.assert_close(outputs(target, tokens), expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_lora_state_dict(bias: str, merged: bool) -> None:
    model = network()
    expected = lora.lora_state_dict(twin(model), bias)
    tokens, _ = batch()
    target = another(model)
    shard(model).train(not merged)
    outputs(model, tokens)
    state = lora.lora_state_dict(model, bias)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert isinstance(tensor, DTensor), name
        assert torch.equal(whole(tensor), expected[name]), name
    target.load_state_dict(state, strict=False)
    for name, tensor in lora.lora_state_dict(target, bias).items():
        assert torch.equal(whole(tensor), expected[name]), name


def test_adapters_alone_loaded_into_a_merged_model() -> None:
    model = network()
    tokens, _ = batch()
    target = twin(model)
    with torch.no_grad():
        for parameter in lora.lora_state_dict(target).values():
            parameter.add_(1.0)
    shard(target)
    base = base_shards(target)
    target.eval()
    expected = outputs(model, tokens)
    shard(model)
    target.load_state_dict(lora.lora_state_dict(model), strict=False)
    torch.testing.assert_close(outputs(target, tokens), expected)
    assert_same_bits(base_shards(target.train()), base)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model = network()
    single = twin(model)
    tokens, target = batch()
    fresh = another(model)
    shard(model)
    trainer, reference = Trainer(model), Trainer(single)
    trainer.train(mine(tokens), mine(target))
    model.eval()
    outputs(model, tokens)
    model.train()
    both = get_state_dict(model, trainer.optimizer)
    dcp.save({"model": both[0], "optimizer": both[1]}, checkpoint_id=tmp_path)
    resumed = Trainer(fresh)
    model_state, optimizer_state = get_state_dict(fresh, resumed.optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        fresh,
        resumed.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    resumed.train(mine(tokens), mine(target))
    reference.train(tokens, target, steps=4)
    assert_same_parameters(fresh, single, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target_merged", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_one_file_for_all_ranks(
    tmp_path: Path, name: str, merged: bool, target_merged: bool
) -> None:
    model = network()
    single = twin(model)
    tokens, _ = batch()
    target = another(model).train(not target_merged)
    shard(model).train(not merged)
    outputs(model, tokens)
    lora.save(model, tmp_path / name, lora_only=False)
    dist.barrier()
    lora.load(target, tmp_path / name)
    torch.testing.assert_close(outputs(target, tokens), outputs(single, tokens))
    assert_same_parameters(target.train(), single)


def test_adapters_in_a_file_of_one_process(tmp_path: Path) -> None:
    source = network()
    path = tmp_path / f"rank{dist.get_rank()}.safetensors"
    lora.save(source, path)
    tokens, _ = batch()
    expected = outputs(source, tokens)
    model = twin(source)
    with torch.no_grad():
        for parameter in lora.lora_state_dict(model).values():
            parameter.zero_()
    shard(model)
    lora.load(model, path)
    torch.testing.assert_close(outputs(model, tokens), expected)
    fresh = twin(source)
    lora.save(model, path)
    lora.load(fresh, path)
    assert_same_parameters(fresh, source, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("damage", ["missing", "damaged", "another rank of adapter"])
def test_a_file_that_one_rank_cannot_load_is_loaded_by_none(
    tmp_path: Path, damage: str, merged: bool
) -> None:
    model = shard(network()).train(not merged)
    outputs(model, batch()[0])  # leaves the root's parameters gathered
    before = {name: local(p).clone() for name, p in model.state_dict().items()}
    path = tmp_path / "a.pt"
    lora.save(another(network()), path)
    if dist.get_rank() == 1:
        if damage == "missing":
            path = tmp_path / "b.pt"
        elif damage == "damaged":
            path = tmp_path / "damaged.pt"
            path.write_bytes(b"nothing")
        else:
            lora.save(lora.Linear(2, 2, r=1), path := tmp_path / "other.pt")
    error = (OSError, ValueError) if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(error, match=r"No such file|damaged|does not fit|on another rank"):
        lora.load(model, path)
    assert_same_bits({name: local(p) for name, p in model.state_dict().items()}, before)
