"""The fused path under data parallelism: the kernels run on each rank, as they do on one."""

import os

import pytest
import torch
import torch.nn.functional as F
from spmd import assert_same_parameters, mine, parallelize, twin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lora_fast as lora
from lora_fast.testing import randomize_

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="gloo's ranks have CPU tensors"
)
K = 12


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = lora.Linear(K, 20, r=3, lora_alpha=2, lora_dropout=dropout)
        self.down = lora.Linear(20, 7, r=2, lora_dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def network(dropout: float = 0.0) -> Net:
    model = randomize_(Net(dropout))
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    return model


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 3) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, K), torch.randn(8, 7)


@lora.use_backend("triton")
def test_ddp() -> None:
    model = network()
    single = twin(model)
    x, target = batch()
    train(DistributedDataParallel(model), mine(x), mine(target))
    with lora.use_backend("reference"):
        train(single, x, target)
    assert_same_parameters(model, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("each_layer", [True, False])
@lora.use_backend("triton")
def test_fsdp2(each_layer: bool) -> None:
    """The layers see whole, plain parameters: FSDP2 gathers before the forward."""
    model = network()
    single = twin(model)
    x, target = batch()
    if each_layer:
        fully_shard(model.up)
    fully_shard(model)
    assert isinstance(model.up.lora_A, DTensor)
    train(model, mine(x), mine(target))
    with lora.use_backend("reference"):
        train(single, x, target)
    assert_same_parameters(model, single, rtol=1e-5, atol=1e-6)


@lora.use_backend("triton")
def test_fsdp2_in_mixed_precision() -> None:
    model = network()
    x, target = batch()
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    y = model(mine(x))
    assert y.dtype == torch.float16
    F.mse_loss(y.float(), mine(target)).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.to_local().isfinite().all()


@lora.use_backend("triton")
def test_checkpointing_under_fsdp2_replays_the_mask() -> None:
    model = network(dropout=0.5)
    plain = twin(model)
    x, target = batch()
    fully_shard(model)
    fully_shard(plain)
    torch.manual_seed(1)
    F.mse_loss(plain(mine(x)), mine(target)).backward()
    torch.manual_seed(1)
    loss = F.mse_loss(checkpoint(model, mine(x), use_reentrant=False), mine(target))
    torch.rand(1)  # the second forward must not draw where the first has left off
    loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad.to_local(), theirs.grad.to_local())


def test_shards_are_no_plain_tensors() -> None:
    """Tensor parallelism keeps DTensors in the forward: refused if forced, else torch's."""
    model = network()
    single = twin(model)
    parallelize(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel()})
    x, _ = batch()
    with (
        lora.use_backend("triton"),
        pytest.raises(RuntimeError, match="a DTensor is not a plain tensor"),
    ):
        model.up(x)
    with torch.no_grad():
        y = model.up(x)
        expected = single.up(x)
    half = expected.chunk(2, -1)[torch.distributed.get_rank()]
    torch.testing.assert_close(y, half)
