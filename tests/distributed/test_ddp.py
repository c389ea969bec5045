"""DistributedDataParallel."""

import pytest
import torch
from spmd import (
    Trainer,
    assert_same_bits,
    assert_same_parameters,
    base_shards,
    batch,
    mine,
    network,
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
    Trainer(parallel).train(mine(tokens), mine(target), steps=3)
    Trainer(single).train(tokens, target, steps=3)
    assert_same_parameters(parallel.module, single, rtol=1e-12, atol=1e-13)


def test_eval_between_training_steps() -> None:
    model = network()
    single = twin(model)
    base = base_shards(model)
    tokens, target = batch()
    parallel = DistributedDataParallel(model)
    ours, theirs = Trainer(parallel), Trainer(single)
    for _ in range(3):
        ours.train(mine(tokens), mine(target))
        theirs.train(tokens, target)
        with torch.no_grad():
            torch.testing.assert_close(parallel.eval()(tokens), single(tokens))
        assert all(layer.merged for layer in model.children())
        parallel.train()
        assert_same_bits(base_shards(model), base)
    assert_same_parameters(model, single, rtol=1e-12, atol=1e-13)


def test_gradients_accumulate_without_sync() -> None:
    model = network()
    single = twin(model)
    tokens, target = batch(size=8)
    parallel = DistributedDataParallel(model)
    first, second = mine(tokens).chunk(2), mine(target).chunk(2)
    with parallel.no_sync():
        ((parallel(first[0]) - second[0]) ** 2).mean().backward()
    ((parallel(first[1]) - second[1]) ** 2).mean().backward()
    (2 * ((single(tokens) - target) ** 2).mean()).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), single.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-13, msg=name)


def test_made_in_eval_mode_it_gives_all_ranks_one_base() -> None:
    """Only rank 0 has read the adapter; DDP sends its merged weights to the others."""
    model = network()
    base = base_shards(model)
    if torch.distributed.get_rank() != 0:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    model.eval()
    parallel = DistributedDataParallel(model)
    parallel.train()
    for name, weight in base_shards(model).items():
        torch.testing.assert_close(weight, base[name], rtol=1e-12, atol=1e-13)
