"""DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd import (
    assert_same_bits,
    assert_same_parameters,
    base_shards,
    batch,
    mine,
    network,
    train,
    twin,
)
from torch.nn.parallel import DistributedDataParallel


@pytest.mark.parametrize("static_graph", [False, True])
def test_training_equals_that_of_one_process(static_graph: bool) -> None:
    model = network()
    single = twin(model)
    tokens, target = batch()
    parallel = DistributedDataParallel(
        model, find_unused_parameters=False, static_graph=static_graph
    )
    train(parallel, mine(tokens), mine(target))
    train(single, tokens, target)
    assert_same_parameters(parallel, single, rtol=1e-12, atol=1e-13)
