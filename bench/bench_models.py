"""One training step of a real architecture: forward, loss, backward and AdamW on the adapters.

GPT-2 medium, adapters on q and v, and a block of Llama 3 8B, adapters on all projections. PEFT's
GPT-2 has q, k and v in a layer each, the same function of the same number of trained parameters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.contest import Absent, Contestant, Lab, Row
from harness.names import LORALIB, LORALIB_COMPILED, OURS, PEFT, QKV
from harness.selection import Selection
from harness.shapes import dtype_name
from lora_fast.products import slow_dtypes
from peers.models import (
    GPT2_MEDIUM,
    LLAMA_3_8B_BLOCK,
    TOY_GPT2,
    TOY_LLAMA,
    Gpt2,
    LinearFactory,
    LlamaBlock,
    ModelSize,
    SeparateQkv,
)


@dataclass(frozen=True)
class ModelRow(Row):
    """One line."""

    table: ClassVar[str] = "models"

    size: ModelSize
    batch: int
    tokens: int
    r: int
    p: float
    dtype: torch.dtype

    @property
    def id(self) -> str:
        """The name of the row."""
        return (
            f"{self.size.name}-{self.batch}x{self.tokens}-r{self.r}-p{self.p:g}-"
            f"{dtype_name(self.dtype)}-step"
        )

    def columns(self) -> dict[str, Any]:
        """Return the first columns of the table."""
        return {
            "layer": self.size.name,
            "shape": f"{self.batch} x {self.tokens} tokens",
            "M": self.batch * self.tokens,
            "r": self.r,
            "dropout": self.p,
            "dtype": dtype_name(self.dtype),
            "pass": "training step",
        }

    @property
    def _is_gpt2(self) -> bool:
        return self.size.vocabulary > 0

    def model(self, peer: str, lab: Lab) -> nn.Module:
        """Return the model with a library's layers, its adapters alone to be trained."""
        if peer == PEFT:
            return self._peft(lab)
        name = OURS if peer == OURS else "loralib"
        library = import_module(name)

        def linear(n_in: int, n_out: int, bias: bool, blocks: int) -> nn.Module:
            options: dict[str, Any] = {"r": self.r, "lora_alpha": 2 * self.r, "bias": bias}
            options["lora_dropout"] = self.p
            if blocks == 3:
                made: nn.Module = library.MergedLinear(n_in, n_out, enable_lora=QKV, **options)
                return made
            plain: nn.Module = library.Linear(n_in, n_out, **options)
            return plain

        model = self._assembled(lab, linear)
        library.mark_only_lora_as_trainable(model)
        return model

    def _peft(self, lab: Lab) -> nn.Module:
        library = import_module("peft")

        def linear(n_in: int, n_out: int, bias: bool, blocks: int) -> nn.Module:
            if blocks == 3:  # PEFT adapts whole layers
                return SeparateQkv(n_in, bias)
            return nn.Linear(n_in, n_out, bias=bias)

        targets = ["q", "v"] if self._is_gpt2 else ["q", "k", "v", "o", "gate", "up", "down"]
        model = self._assembled(lab, linear)
        config = library.LoraConfig(
            r=self.r, lora_alpha=2 * self.r, lora_dropout=self.p, target_modules=targets
        )
        wrapped: nn.Module = library.get_peft_model(model, config, autocast_adapter_dtype=False)
        return wrapped.to(self.dtype)

    def _assembled(self, lab: Lab, linear: LinearFactory) -> nn.Module:
        made = Gpt2 if self._is_gpt2 else LlamaBlock
        torch.manual_seed(0)
        with torch.device(lab.device):
            model = made(self.size, linear, self.tokens).to(self.dtype)
        return model.train()

    def input(self, lab: Lab) -> Tensor:
        """Return a batch: indices for GPT-2, hidden states for the block."""
        torch.manual_seed(1)
        shape = (self.batch, self.tokens)
        if self._is_gpt2:
            return torch.randint(self.size.vocabulary, shape, device=lab.device)
        x = torch.randn(*shape, self.size.width, device=lab.device, dtype=self.dtype)
        return x.requires_grad_()  # a block inside a model passes a gradient on

    def build(self, peer: str, lab: Lab) -> Contestant:
        """Return a peer's training step."""
        model, x = self.model(peer, lab), self.input(lab)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=lab.clock.is_cuda)
        forward = model
        if peer.endswith("-compiled"):
            if not (lab.is_toy or lab.clock.is_cuda):
                raise Absent("on a CPU no whole model is compiled, compiling takes long")
            backend = "eager" if lab.is_toy else "inductor"
            forward = torch.compile(model, dynamic=False, backend=backend)
        step = partial(_step, forward, x, optimizer)
        before = [p.detach().clone() for p in trained]
        losses = [float(step()) for _ in range(2)]
        if not all(map(math.isfinite, losses)) or all(map(torch.equal, before, trained)):
            raise AssertionError(f"nothing was learnt in two steps, the losses were {losses}")
        parameters = sum(p.numel() for p in trained)
        return Contestant(
            [step],
            forward=partial(model, x),
            known=[*model.parameters(), *model.buffers(), x],
            told={"trained parameters": parameters},
        )

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the tokens a second."""
        return {"tokens/s": self.batch * self.tokens / seconds}


def _step(model: Any, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss: Tensor = model(x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    x.grad = None
    return loss.detach()


def peers(row: Row) -> list[str]:
    """Return who can take part in a row."""
    return [LORALIB, LORALIB_COMPILED, PEFT, OURS]


def rows(selection: Selection) -> Iterator[ModelRow]:
    """Yield the rows of a selection."""
    if selection.shapes or selection.tokens:
        return
    if selection.level == "toy":
        sizes = ((TOY_GPT2, 2, 5), (TOY_LLAMA, 1, 6))
    elif selection.on_gpu:
        sizes = ((LLAMA_3_8B_BLOCK, 4, 2048), (GPT2_MEDIUM, 8, 1024))
    elif selection.level == "quick":
        return  # a step takes seconds
    else:
        # A step reads all weights several times; more tokens make it minutes.
        sizes = ((LLAMA_3_8B_BLOCK, 1, 16), (GPT2_MEDIUM, 1, 32))
    # Where a step in 16 bits takes a minute, nobody trains in them.
    is_slow = not selection.on_gpu and torch.bfloat16 in slow_dtypes()
    dtype = torch.float32 if is_slow or selection.level == "toy" else torch.bfloat16
    for size, batch, tokens in sizes:
        for p in (0.0, 0.1) if selection.on_gpu else (0.0,):
            yield ModelRow(size, batch, tokens, 16, p, dtype)


def test_models(measured: Any) -> None:
    """One library in one model."""
    measured.check()
