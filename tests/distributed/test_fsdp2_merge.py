"""`eval()` and `train()` under FSDP2."""

import pytest
import torch
from spmd import (
    assert_same_bits,
    assert_same_parameters,
    base_shards,
    batch,
    mine,
    network,
    shard,
    train,
    twin,
)
from torch.distributed.fsdp import fully_shard

LAYOUTS = pytest.mark.parametrize(
    "settings",
    [{}, {"fan_in_fan_out": True}, {"out_splits": [5, 4, 9]}],
    ids=["plain", "fan_in_fan_out", "out_splits"],
)


def unmerged(model, tokens):
    with torch.no_grad():
        return model.train()(tokens)


@LAYOUTS
@pytest.mark.parametrize("each_layer", [True, False])
def test_cycles(settings: dict, each_layer: bool) -> None:
    model = network(**settings)
    single = twin(model)
    tokens, target = batch()
    shard(model) if each_layer else fully_shard(model)
    base = base_shards(model)
    for cycle in range(3):
        train(model, mine(tokens), mine(target), steps=2)
        train(single, tokens, target, steps=2)
        expected = unmerged(single, tokens)
        model.eval()
        assert all(m.merged for m in model.children())
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(tokens), expected)
        model.train()
        assert_same_bits(base_shards(model), base)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), expected)
