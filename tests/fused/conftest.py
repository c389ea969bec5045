"""`lora_linear` by the kernels, and what plain torch makes of the same arguments and mask."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import assert_within_budget, randomize_

Leaves = dict[str, Tensor]


@dataclass
class Problem:
    """The arguments of one call. A and B may have another dtype than x and the weight."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float = 0.75

    def leaves(self, needs: Iterable[str], *, wide: bool = False) -> Leaves:
        """New leaves, of which `needs` require a gradient; in float64 if wide."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return {
            k: (v.double() if wide else v).detach().requires_grad_(k in needs)
            for k, v in tensors.items()
        }

    def fused(self, leaves: Leaves, p: float = 0.0) -> Tensor:
        """By the kernels."""
        x, weight, bias, a, b = leaves.values()
        return functional.lora_linear(x, weight, a, b, self.scaling, bias, p, p > 0.0)

    def plain(self, leaves: Leaves, keep: Tensor | None = None) -> Tensor:
        """By torch's own functions; `keep` is the scaled dropout mask, float64."""
        x, weight, bias, a, b = leaves.values()
        dropped = x if keep is None else x * keep.view(x.shape).to(x.dtype)
        s = F.linear(dropped, a.to(x.dtype)) * self.scaling
        return F.linear(x, weight, bias) + F.linear(s, b.to(x.dtype))

    def check(self, needs: Iterable[str], p: float = 0.0, dy: Tensor | None = None) -> Tensor:
        """Fail unless output and needed gradients are within the budget; return the output."""
        leaves = self.leaves(needs)
        y = self.fused(leaves, p)
        keep = mask_of(y, p)
        results = [(y, leaves)]
        for wide in (False, True):
            others = self.leaves(needs, wide=wide)
            results.append((self.plain(others, keep), others))
        dy = torch.randn(y.shape).to(y) if dy is None else dy
        found = [
            [out, *torch.autograd.grad(out, [of[k] for k in needs], dy.to(out.dtype))]
            for out, of in results
        ]
        for what, got, eager, oracle in zip(["output", *needs], *found, strict=True):
            assert_within_budget(got, eager, oracle, what=what)
        return y


def mask_of(y: Tensor, p: float) -> Tensor | None:
    """The scaled mask of the call that gave y, float64: the autograd node has kept its bits."""
    if p == 0.0:
        return None
    from lora_fast.kernels.dropout import keep_scale, unpack_mask

    _, _, lora_A, _, _, mask = y.grad_fn.saved_tensors
    if mask is None:
        return None
    return unpack_mask(mask, lora_A.shape[1]).double() * keep_scale(p)


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels need a GPU or Triton's interpreter")
    request.getfixturevalue("triton_backend")


@pytest.fixture
def make_problem(kernel_device: torch.device) -> Callable[..., Problem]:
    """Make the arguments for an input of some shape, N features and rank R."""

    def make(
        shape: tuple[int, ...], n: int, r: int, dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
    ) -> Problem:  # fmt: skip
        def drawn(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size) * scale).to(kernel_device, dtype)

        k, adapter = shape[-1], adapter_dtype or dtype
        a = drawn(r, k, scale=k**-0.5, dtype=adapter)
        b = drawn(n, r, scale=r**-0.5, dtype=adapter)
        return Problem(drawn(*shape), drawn(n, k, scale=k**-0.5), drawn(n), a, b)

    return make


@pytest.fixture
def make_layer(kernel_device: torch.device) -> Callable[..., lora.Linear]:
    """Make a layer of 40 to 24 features with random A and B."""

    def make(dropout: float = 0.0, **options: Any) -> lora.Linear:
        settings = {"r": 4, "lora_alpha": 6, "device": kernel_device, **options}
        return randomize_(lora.Linear(40, 24, lora_dropout=dropout, **settings))

    return make


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far, in order."""
    from triton.runtime import interpreter

    if torch.cuda.is_available():
        pytest.skip("launches are counted in the interpreter")
    names: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(executor.fn.__name__)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names
