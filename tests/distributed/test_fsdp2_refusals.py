"""What FSDP2's ranks do together where one of them can't merge."""

import pytest
import torch
import torch.distributed as dist
from spmd import assert_same_bits, base_shards, local, outputs
from torch import nn
from torch.distributed.fsdp import fully_shard

import lora_fast as lora
from lora_fast.testing import randomize_


def test_an_overflow_on_one_rank_is_refused_by_all() -> None:
    layer = lora.Linear(4, 6, r=1, bias=False, dtype=torch.float16)
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B[-1] = 60000.0  # a row of the last rank
        layer.weight.fill_(30000.0)
    fully_shard(layer)
    before = local(layer.weight).clone()
    with pytest.warns(RuntimeWarning, match="was not merged: the merged weight does not fit"):
        layer.eval()
    assert not layer.merged
    assert torch.equal(local(layer.weight), before)
    with pytest.raises(RuntimeError, match="nothing was merged"):
        lora.merge(layer)
    assert torch.equal(local(layer.weight), before)


def test_a_rank_that_cannot_merge_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomize_(lora.Linear(4, 6, r=1))
    fully_shard(layer)
    before = local(layer.weight).clone()
    if dist.get_rank() == 1:
        layer.scaling = "half"
    with pytest.warns(RuntimeWarning, match="was not merged"):
        layer.eval()
    assert not layer.merged
    assert torch.equal(local(layer.weight), before)


def test_factors_that_do_not_fit_on_one_rank_stop_the_others() -> None:
    model = nn.Sequential(*(randomize_(lora.Linear(8, 8, r=2)) for _ in range(2)))
    fully_shard(model)
    base = base_shards(model)
    if dist.get_rank() == 1:
        model[0].lora_B = nn.Parameter(torch.zeros(8, 3))
    with pytest.warns(RuntimeWarning, match="0: .* was not merged"):
        model.eval()
    assert [layer.merged for layer in model] == [False, True]
    model.train()
    error = ValueError if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(error, match=r"does not give a delta|on another rank"):
        lora.merge(model)
    assert not any(layer.merged for layer in model)
    assert_same_bits(base_shards(model), base)


def test_an_obstacle_on_one_rank_is_one_on_all() -> None:
    """Another module holds a weight, a different one on each rank."""
    model = nn.Sequential(*(randomize_(lora.Linear(8, 8, r=2)) for _ in range(2)))
    x = torch.randn(3, 8)
    expected = model(x).detach()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    other = nn.Module()
    other.weight = model[dist.get_rank()].weight
    model.eval()
    assert not any(layer.merged for layer in model)
    torch.testing.assert_close(outputs(model, x), expected)
    with pytest.raises(RuntimeError, match="nothing was merged"):
        lora.merge(model)
    del other


def test_an_obstacle_on_one_rank_while_the_weights_are_gathered() -> None:
    """As those of the root are after a forward: the ranks agree all the same."""
    model = nn.Sequential(*(randomize_(lora.Linear(8, 8, r=2)) for _ in range(3)))
    x = torch.randn(3, 8)
    expected = model(x).detach()
    fully_shard(model)
    base = base_shards(model)
    outputs(model, x)
    other = nn.Module()
    if dist.get_rank() == 0:
        other.weight = model[0].weight
    model.eval()
    assert [layer.merged for layer in model] == [False, True, True]
    torch.testing.assert_close(outputs(model, x), expected)
    model.train()
    assert_same_bits(base_shards(model), base)
    del other
