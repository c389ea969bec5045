"""What FSDP1, which keeps the weights of several layers in one flat parameter, lets be done."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spmd import assert_same_bits, assert_same_parameters, batch, network, outputs, twin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

import lora_fast as lora

NAMES = ["a.safetensors", "a.pt"]


def wrapped(module: nn.Module, **settings: object) -> FullyShardedDataParallel:
    settings = {"use_orig_params": True, "device_id": torch.device("cpu")} | settings
    return FullyShardedDataParallel(module, **settings)


def saved(model: nn.Module, kind: StateDictType, path: Path, **settings: object) -> None:
    """Save inside FSDP1's context for a kind of state; `settings` are those of `lora.save`."""
    config = {"state_dict_config": FullStateDictConfig(rank0_only=True)} if kind is FULL else {}
    with FullyShardedDataParallel.state_dict_type(model, kind, **config):
        lora.save(model, path, **settings)


FULL = StateDictType.FULL_STATE_DICT


@pytest.mark.parametrize("lora_only", [True, False])
@pytest.mark.parametrize("each_layer", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_values_writes_nothing(
    name: str, each_layer: bool, lora_only: bool, tmp_path: Path
) -> None:
    single = network()
    model = twin(single)
    if each_layer:  # the other layers' values are on both ranks
        model.qkv = wrapped(model.qkv)
    else:
        model = wrapped(model)
    file = tmp_path / f"{dist.get_rank()}-{name}"
    saved(model, FULL, file, lora_only=lora_only)
    assert file.exists() == (dist.get_rank() == 0)
    if file.exists():
        fresh = twin(single)
        for parameter in lora.lora_state_dict(fresh).values():
            parameter.add_(1.0)
        lora.load(fresh, file)
        assert_same_parameters(fresh, single)


@pytest.mark.parametrize("kind", [k for k in StateDictType if k is not FULL])
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("lora_only", [True, False])
def test_parts_are_not_saved(
    lora_only: bool, use_orig_params: bool, kind: StateDictType, tmp_path: Path
) -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # else FSDP1 wants use_orig_params
    model = wrapped(model, use_orig_params=use_orig_params)
    for name in NAMES:
        with pytest.raises(ValueError, match=r"^save: .*FSDP1's parts.*FULL_STATE_DICT"):
            saved(model, kind, tmp_path / name, lora_only=lora_only)
    assert not list(tmp_path.iterdir())


def test_dtensors_are_saved_whole(tmp_path: Path) -> None:
    single = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = wrapped(twin(single), device_mesh=mesh)
    for name in NAMES:
        name = f"{dist.get_rank()}-{name}"
        saved(model, StateDictType.SHARDED_STATE_DICT, tmp_path / name)
        fresh = twin(single)
        for parameter in lora.lora_state_dict(fresh).values():
            parameter.zero_()
        lora.load(fresh, tmp_path / name)
        assert_same_parameters(fresh, single)


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_the_log_says_why_nothing_is_merged(use_orig_params: bool) -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model = wrapped(model, use_orig_params=use_orig_params)
    said, logger = Said(), logging.getLogger("lora_fast.merge")
    logger.addHandler(said)
    try:
        for _ in range(2):
            model.eval()
            model(batch()[0])
            model.train()
    finally:
        logger.removeHandler(said)
    assert len(said.messages) == 4  # once a layer
    assert all("FSDP1 keeps the weight" in message for message in said.messages)


@pytest.mark.parametrize("shown_by", ["load", "summon", "summon to read"])
def test_weights_that_are_shown_for_a_while_stay_unmerged(shown_by: str) -> None:
    single = network().requires_grad_(False)
    tokens, _ = batch()
    expected = outputs(single, tokens)
    model = wrapped(twin(single), use_orig_params=False)
    if shown_by == "load":
        model.eval()
        with FullyShardedDataParallel.state_dict_type(model, FULL):
            model.load_state_dict(single.state_dict())
    else:
        writeback = shown_by == "summon"
        with FullyShardedDataParallel.summon_full_params(model, writeback=writeback):
            model.eval()
    assert not any(layer.merged for layer in model.module.children())
    torch.testing.assert_close(outputs(model, tokens), expected)
    torch.testing.assert_close(outputs(model.train(), tokens), expected)


def test_the_buckets_of_zero_are_merged_into() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    base = {name: p.clone() for name, p in model.named_parameters()}
    tokens, _ = batch()
    expected = outputs(model, tokens)
    ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, parameters_as_bucket_view=True, lr=0.1
    )
    model.eval()
    assert all(layer.merged for layer in model.children())
    torch.testing.assert_close(outputs(model, tokens), expected)
    model.train()
    assert_same_bits(dict(model.named_parameters()), base)
