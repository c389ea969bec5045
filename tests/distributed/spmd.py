"""What the tests here share. Each rank builds the same model and the same batch from one seed."""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import lora_fast as lora
from lora_fast.testing import randomize_


class Net(nn.Module):
    """Every kind of layer; no dimension but one divides evenly between two ranks."""

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        out_splits: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.embedding = lora.Embedding(11, 5, r=3, lora_alpha=2)
        self.project = lora.Linear(5, 7, r=1, lora_dropout=dropout, fan_in_fan_out=fan_in_fan_out)
        self.qkv = lora.MergedLinear(
            7,
            18,
            r=2,
            lora_alpha=3,
            lora_dropout=dropout,
            enable_lora=[True, False, True],
            fan_in_fan_out=fan_in_fan_out,
            out_splits=out_splits,
        )
        self.conv = lora.Conv2d(2, 3, 3, r=1)
        for layer in (self.project, self.qkv):
            if fan_in_fan_out:  # FSDP2 refuses any parameter that is not contiguous
                layer.weight.data = layer.weight.data.contiguous()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.project(self.embedding(tokens)))
        return self.conv(self.qkv(hidden).view(-1, 2, 6, 6)).flatten(1)


def network(dtype: torch.dtype = torch.float64, **settings: object) -> Net:
    model = Net(**settings)
    randomize_(model, std=0.5)
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float64, size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (size, 4)), torch.randn(size, 48, dtype=dtype)


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


class Trainer:
    """SGD; to be made while the parameters are shards, as FSDP2 asks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)

    def train(self, tokens: Tensor, target: Tensor, steps: int = 2) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.mse_loss(self.model(tokens), target).backward()
            self.optimizer.step()


def shard(model: nn.Module, **settings: object) -> nn.Module:
    """Shard each layer of `model`, but for the last, which stays with the root."""
    for layer in list(model.children())[:-1]:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def parallelize(module: nn.Module, mesh: DeviceMesh, plan: Any) -> nn.Module:
    """`parallelize_module`, which in torch 2.10 unfreezes every parameter that it shards."""
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    parallelize_module(module, mesh, plan)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])
    return module


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same_parameters(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    theirs = dict(expected.named_parameters())
    assert dict(model.named_parameters()).keys() == theirs.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter), whole(theirs[name]), msg=name, **tolerance)


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), theirs[name].grad, msg=name)


def base_shards(model: nn.Module) -> dict[str, Tensor]:
    """Copies of this rank's parts of the frozen parameters."""
    state = model.state_dict()
    return {
        name: local(state[name]).clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def reshard(model: nn.Module) -> None:
    """Show the shards again in the place of what a forward has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def assert_merges(
    model: nn.Module, tokens: Tensor, expected: Tensor, base: dict[str, Tensor]
) -> None:
    """All of a model's layers merge, compute the same, and get the bits of `base` back."""
    model.eval()
    assert all(layer.merged for layer in model.children())
    torch.testing.assert_close(outputs(model, tokens), expected)
    reshard(model)
    torch.testing.assert_close(outputs(model, tokens), expected)
    model.train()  # perhaps while a gathered copy is shown
    reshard(model)
    assert_same_bits(base_shards(model), base)


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
