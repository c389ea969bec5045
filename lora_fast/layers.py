"""The layers of loralib: state and behaviour; the arithmetic is in `lora_fast.functional`.

Where loralib is wrong the layers are right; docs/differences.md lists every difference.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, List, Optional  # noqa: UP035, loralib has them

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import backend, checks, functional, notices, reference, scripting, shapes
from lora_fast.blocks import Block, block_widths, output_blocks
from lora_fast.conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from lora_fast.embedding import Embedding
from lora_fast.lora_layer import LoRALayer, MergingLayer, identity, redrawing

# With what `from loralib.layers import *` brings along.
__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "F",
    "Linear",
    "List",
    "LoRALayer",
    "MergedLinear",
    "Optional",
    "math",
    "nn",
    "torch",
]


_OPERANDS = ("weight", "lora_A", "lora_B", "bias")


class _LinearBase(MergingLayer, nn.Linear, LoRALayer):
    """What `Linear` and `MergedLinear` share: a weight that may be stored transposed."""

    fan_in_fan_out: bool

    def _make_factors(self, rows_A: int, rows_B: int) -> None:
        self.lora_A = nn.Parameter(self.weight.new_zeros((rows_A, self.in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((rows_B, self.r)))
        self.scaling = checks.scaling_of(self.lora_alpha, self.r)
        self.weight.requires_grad = False

    def _finish_init(self) -> None:
        self.reset_parameters()
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)
        self._register_hooks()

    def reset_parameters(self) -> None:
        """Draw weight, bias and A anew; B is zero, so the adapter's update is too."""
        with redrawing(self):
            if self.weight.shape[0] == self.out_features:
                nn.Linear.reset_parameters(self)
            else:  # stored (in, out): the fan is that of the transpose
                # The parameter itself: transformers marks those that are loaded, and keeps them.
                nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), mode="fan_out")
                if self.bias is not None:
                    bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
                    nn.init.uniform_(self.bias, -bound, bound)
            if self._has_adapter():
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
                nn.init.zeros_(self.lora_B)

    def _as_delta(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1) if self.fan_in_fan_out else weight

    def _frozen_output(self, x: Tensor) -> Tensor:
        try:
            return F.linear(x, self._as_delta(self.weight), self.bias)
        except RuntimeError:
            name = type(self).__name__
            checks.one_dtype(name, "weight", self.weight, x=x, bias=self.bias)
            shapes.features(name, x, self._as_delta(self.weight))
            raise

    def _applied_dropout(self) -> float | None:
        """Return the rate that applies now, or None where the module must be called."""
        dropout = self.lora_dropout
        if dropout is identity:
            return 0.0
        if type(dropout) is not nn.Dropout or dropout.inplace:
            return None
        if dropout._forward_hooks or dropout._forward_pre_hooks:
            return None
        if dropout._backward_hooks or dropout._backward_pre_hooks:
            return None
        return dropout.p if dropout.training else 0.0

    def _through_dropout(
        self, op: str, x: Tensor, weight: Tensor, lora_A: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the frozen output and S = dropout(X) A^T, where the module must be called."""
        backend.served_by_torch(op, "the dropout has hooks, works in place or is of another class")
        if type(self.scaling) is not float and isinstance(x, Tensor):
            checks.scaling(op, self.scaling, weight.shape[0], x)
        y = F.linear(x, weight, bias)  # before a dropout that works in place
        dropped = self.lora_dropout(x)
        return y, F.linear(dropped, reference.like(lora_A, dropped))


class Linear(_LinearBase):
    """`nn.Linear` with an adapter: Y = X W^T + lora_alpha / r * (dropout(X) A^T) B^T + bias.

    Args:
        in_features: K.
        out_features: N.
        r: rank of the adapter; 0 for none. With r > 0 the weight is frozen, the bias is not.
        lora_alpha: scale of the update.
        lora_dropout: rate of the dropout on the adapter's input, in [0, 1].
        fan_in_fan_out: whether the weight is stored (K, N), as GPT-2's Conv1D stores it.
        merge_weights: whether `eval()` folds the adapter into the weight.
        kwargs: `bias`, `device`, `dtype` as for `nn.Linear`.

    Raises:
        TypeError: `r` or a size is no integer, or `lora_alpha` or `lora_dropout` no number.
        ValueError: a size is negative, `lora_alpha` not finite or `lora_dropout` outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        checks.size("Linear", in_features=in_features, out_features=out_features)
        checks.adapter(r, lora_alpha, lora_dropout)  # before anything is drawn
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if self.r > 0:
            self._make_factors(self.r, out_features)
        self._finish_init()

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features)."""
        if self.r <= 0 or self.merged:
            notices.no_gradient(self)
            return self._frozen_output(x)
        weight, lora_A, lora_B, bias = self._look_up(x, *_OPERANDS)
        if self.fan_in_fan_out:
            weight = weight.t()
        p = self._applied_dropout()
        if p is None:
            y, s = self._through_dropout("lora_linear", x, weight, lora_A, bias)
            return reference.lora_expand(y, s, lora_B, self.scaling)
        return functional.lora_linear(x, weight, lora_A, lora_B, self.scaling, bias, p, p > 0.0)

    def _forward_in_script(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        if hasattr(self, "lora_A") and not self.merged:
            x = self.lora_dropout(x)
            y = scripting.linear_update(y, x, self.lora_A, self.lora_B, self.scaling)
        return y


class MergedLinear(_LinearBase):
    """Several `nn.Linear` on one input in one weight (q, k, v), an adapter for some of them.

    Args:
        in_features: K.
        out_features: N, all blocks together.
        r: rank of each enabled block's adapter; 0 for none.
        lora_alpha: scale of the update.
        lora_dropout: rate of the dropout on the adapters' input, in [0, 1].
        enable_lora: for each block of the output, whether it has an adapter; any truthy values.
        fan_in_fan_out: whether the weight is stored (K, N).
        merge_weights: whether `eval()` folds the adapter into the weight.
        out_splits: width of each block, for grouped-query attention, say; None for equal blocks.
        kwargs: `bias`, `device`, `dtype` as for `nn.Linear`.

    Raises:
        TypeError: `enable_lora` is no list, `r` or a size no integer, or another argument no
            number.
        ValueError: the blocks do not make up `out_features`; a size is negative, `lora_alpha` not
            finite or `lora_dropout` outside [0, 1].

    Note:
        A is (r * enabled blocks, K), B (sum of the enabled blocks' widths, r).
    """

    # Of one that another constructor has built, or loralib has pickled.
    out_splits: list[int] | None = None
    __jit_unused_properties__ = ("merge_weights", "lora_ind")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Iterable[object] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        out_splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        checks.size("MergedLinear", in_features=in_features, out_features=out_features)
        enabled = checks.enabled("MergedLinear", enable_lora)
        given = None if out_splits is None else checks.widths("MergedLinear", out_splits)
        widths = shapes.splits("MergedLinear", out_features, enabled, given)
        checks.adapter(r, lora_alpha, lora_dropout)  # before anything is drawn
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = enabled
        self.out_splits = None if out_splits is None else widths
        self.fan_in_fan_out = fan_in_fan_out
        if self.r > 0 and any(enabled):
            rows = sum(w for w, on in zip(widths, enabled, strict=True) if on)
            self._make_factors(self.r * sum(enabled), rows)
        self._finish_init()

    @property
    def lora_ind(self) -> Tensor:
        """Mask of the output features that have an adapter: bool, (out_features,)."""
        if not self._has_adapter():
            raise AttributeError("a MergedLinear without an adapter has no lora_ind")
        drafted: Tensor | None = self.__dict__.get("_drafted_ind")
        if drafted is not None:
            return drafted
        blocks = self._output_blocks()
        mask = [block.enabled for block in blocks for _ in range(block.width)]
        return torch.tensor(mask, device=self.weight.device)

    @lora_ind.setter
    def lora_ind(self, mask: Tensor) -> None:
        """Accept the mask that it is, on any device; it follows from the blocks."""
        checks.tensors("MergedLinear", lora_ind=mask)
        if mask.shape == (len(self.enable_lora), -(-self.out_features // len(self.enable_lora))):
            # A row for each block, as constructors after loralib's begin to fill it.
            self.__dict__["_drafted_ind"] = mask
            return
        self.__dict__.pop("_drafted_ind", None)
        if not torch.equal(mask.to(self.lora_ind.device), self.lora_ind):
            raise ValueError(
                "lora_ind follows from enable_lora and out_splits and cannot be another mask; "
                "build the layer with other blocks"
            )

    def zero_pad(self, x: Tensor) -> Tensor:
        """Spread the enabled blocks' rows of `x` over all output features, zeros elsewhere."""
        checks.tensors("zero_pad", x=x)
        blocks = self._output_blocks()
        rows = sum(block.width for block in blocks if block.enabled)
        if x.dim() == 0 or x.shape[0] != rows:
            raise ValueError(
                f"zero_pad: x must have {rows} rows, those of the enabled blocks, got shape "
                f"{tuple(x.shape)}"
            )
        parts = [
            x.narrow(0, block.row, block.width)
            if block.enabled
            else x.new_zeros((block.width, *x.shape[1:]))
            for block in blocks
        ]
        return torch.cat(parts)

    def merge_AB(self) -> Tensor:  # noqa: N802 - loralib's name
        """Return the dense delta without its scaling, in the layout of the weight."""
        delta = functional.merged_delta(self.lora_A, self.lora_B, 1.0, **self._blocks())
        return self._as_delta(delta)

    def _blocks(self) -> dict[str, Any]:
        return {"enable_lora": self.enable_lora, "out_splits": self.out_splits}

    def _output_blocks(self) -> list[Block]:
        return output_blocks(self.out_features, self.enable_lora, self.out_splits)

    def extra_repr(self) -> str:
        """Return the layer's settings and which blocks have an adapter."""
        base = super().extra_repr()
        splits = "" if self.out_splits is None else f", out_splits={self.out_splits}"
        return f"{base}, enable_lora={self.enable_lora}{splits}" if self._has_adapter() else base

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features)."""
        if self.merged or not self._has_adapter():
            notices.no_gradient(self)
            return self._frozen_output(x)
        weight, lora_A, lora_B, bias = self._look_up(x, *_OPERANDS)
        if self.fan_in_fan_out:
            weight = weight.t()
        p = self._applied_dropout()
        if p is None:
            y, s = self._through_dropout("lora_merged_linear", x, weight, lora_A, bias)
            return reference.grouped_expand(y, s, lora_B, self.scaling, self._output_blocks())
        blocks = self._blocks()
        if torch.compiler.is_compiling():  # the weight's sizes may be symbols
            widths = block_widths(self.out_features, self.enable_lora, self.out_splits)
            blocks["out_splits"] = widths
        return functional.lora_merged_linear(
            x, weight, lora_A, lora_B, self.scaling, bias, p, p > 0.0, **blocks
        )

    def _forward_in_script(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        if hasattr(self, "lora_A") and not self.merged:
            x = self.lora_dropout(x)
            widths = block_widths(self.out_features, self.enable_lora, self.out_splits)
            y = scripting.grouped_update(
                y, x, self.lora_A, self.lora_B, self.scaling, self.enable_lora, widths
            )
        return y
