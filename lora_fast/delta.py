"""What an adapter adds to a linear layer's output and gradients: torch's products, or csrc's ops.

With few rows on a CPU a product of torch's takes longer to begin than to sum, and there is one for
each block and each factor; the ops do all of a direction in one call.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast import blocks, ops, torch_internals
from lora_fast.blocks import Spans

_OP_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
# Up to here the ops were the faster, but for one row at rank 64 in fp32: 768 to 4096 features, two
# threads of a Xeon of family 6 model 207, 2026-11-29.
_MOST_ROWS_OF_OP = 32


Saved = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]
"""What gradients are made of: dY (M, N); X (M, K), before dropout, or None where neither A nor B
needs one; A (R * adapters, K); B (sum of their widths, R); S (M, R * adapters) of the dropped X, or
None, to be made again or not needed; and what dropout kept, bool of the shape that X had, or None
without dropout."""


def op_pays(x: Tensor) -> bool:
    """Tell whether csrc's ops are there and sooner done than torch with so many rows.

    Args:
        x: (..., K).
    """
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()  # compiled autograd traces a backward
        and x.numel() <= _MOST_ROWS_OF_OP * x.shape[-1]
        and x.dtype in _OP_DTYPES
        and ops.load_native("cpu") is None
    )


def add_(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, spans: Spans
) -> Tensor:
    """Y[:, lo:hi] += scaling (X A_g^T) B_g^T for each span g = (lo, hi).

    Args:
        y: (M, N), contiguous, written to. All tensors have one dtype and device.
        x: (M, K), after dropout.
        lora_A: (R * len(spans), K).
        lora_B: (sum of their widths, R).
        scaling: lora_alpha / r.
        spans: the output columns of each adapter.

    Returns:
        S = X A^T, (M, R * len(spans)).
    """
    if op_pays(x) and torch_internals.mode_count() == 0:  # which would not see what the op does
        s = x.new_empty((x.shape[0], lora_A.shape[0]))
        if ops.lora_delta_fwd_(x, lora_A, lora_B, scaling, blocks.edges(spans), y, s):
            return s
    s = F.linear(x, lora_A)
    for (lo, hi), s_block, b_block in zip(
        spans, blocks.columns(s, lora_B.shape[1], spans), blocks.rows(lora_B, spans), strict=True
    ):
        add_product_(y[:, lo:hi], s_block, b_block.t(), scaling)
    return s


def add_product_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Y += alpha A B, and a FlopCounterMode counts it, which takes `addmm_` for no product."""
    if torch_internals.mode_count() > 0 and torch_internals.functorch_level() is None:
        return torch.addmm(y, a, b, alpha=alpha, out=y)
    return y.addmm_(a, b, alpha=alpha)


def gradients_(
    dx: Tensor | None,
    needs: tuple[bool, bool],
    saved: Saved,
    scaling: float,
    keep_scale: float,
    spans: Spans,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A and B; what the adapter adds to that of X is added to `dx`.

    Args:
        dx: dY W, (M, K), written to; None if it is not needed.
        needs: whether the gradients of A and of B are needed.
        saved: see `Saved`.
        scaling: lora_alpha / r.
        keep_scale: what dropout multiplied by what it kept.
        spans: the output columns of each adapter.
    """
    dy, x, lora_A, lora_B, s, keep = saved
    need_A, need_B = needs
    if (s is not None or not need_B) and op_pays(dy) and ops.is_plain(dy):
        dA = torch.empty_like(lora_A) if need_A else None
        dB = torch.empty_like(lora_B) if need_B else None
        rest = (keep, scaling, keep_scale, blocks.edges(spans), dx, dA, dB)
        if ops.lora_delta_bwd_(dy, x, lora_A, lora_B, s, *rest):
            return dA, dB
    # Nothing is written with `out=`, and a slice may be all of dY: vmap over the gradients has no
    # rule for the one nor for torch's alias.
    dA = dB = keep2 = None
    dropped, rank = x, lora_B.shape[1]
    dy_blocks = [dy.narrow(1, lo, hi - lo) for lo, hi in spans]
    if keep is not None and (dx is not None or need_A or s is None):
        # As bytes, which torch converts in vectors; bool it converts one by one.
        keep2 = keep.view(torch.uint8).reshape(dy.shape[0], lora_A.shape[1]).to(dy.dtype)
        dropped = None if x is None else x * keep2
    if need_B:
        if s is None:
            assert dropped is not None
            s = F.linear(dropped, lora_A).mul_(keep_scale)
        s_blocks = blocks.columns(s, rank, spans)
        dB = _scaled_products([part.t() for part in dy_blocks], s_blocks, scaling, 0)
    if dx is None and not need_A:
        return dA, dB
    ds = _scaled_products(dy_blocks, blocks.rows(lora_B, spans), scaling * keep_scale, 1)
    if need_A:
        assert dropped is not None
        dA = ds.t() @ dropped
    if dx is None:
        return dA, dB
    if keep2 is None:
        add_product_(dx, ds, lora_A)
    else:
        del dropped  # its memory serves the next product
        dx.addcmul_(ds @ lora_A, keep2)
    return dA, dB


def _scaled_products(
    left: Sequence[Tensor], right: Sequence[Tensor], scaling: float, dim: int
) -> Tensor:
    """The products `scaling * (a @ b)`, joined along `dim`.

    In fp16 what is yet to be scaled may be too large or too small, so there the factor comes before
    the rounding. In bf16 oneDNN takes longer to scale a product than another operation does.
    """
    pairs = zip(left, right, strict=True)
    if left[0].dtype is not torch.float16 or torch_internals.functorch_level() is not None:
        return _joined([a @ b for a, b in pairs], dim).mul_(scaling)
    nothing = left[0].new_empty(())  # which beta=0 keeps from being read, but not under vmap
    products = [torch.addmm(nothing, a, b, beta=0, alpha=scaling) for a, b in pairs]
    return _joined(products, dim)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
