"""Training under FSDP2 (`fully_shard`)."""

import pytest
import torch
from spmd import assert_same_parameters, batch, mine, network, shard, train, twin
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

LAYOUTS = pytest.mark.parametrize(
    "settings",
    [{}, {"fan_in_fan_out": True}, {"out_splits": [5, 4, 9]}],
    ids=["plain", "fan_in_fan_out", "out_splits"],
)


@LAYOUTS
@pytest.mark.parametrize("each_layer", [True, False])
def test_training_equals_that_of_one_process(settings: dict, each_layer: bool) -> None:
    model = network(**settings)
    single = twin(model)
    tokens, target = batch()
    shard(model) if each_layer else fully_shard(model)
    train(model, mine(tokens), mine(target))
    train(single, tokens, target)
    assert_same_parameters(model, single, rtol=1e-12, atol=1e-13)
