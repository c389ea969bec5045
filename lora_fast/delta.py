"""What an adapter adds to a linear layer's output and gradients: torch's products, or csrc's ops.

With few rows on a CPU a product of torch's takes longer to begin than to sum, and there is one for
each block and each factor; the ops do all of a direction in one call.
"""

import torch
from torch import Tensor

from lora_fast import blocks, ops, products, torch_internals
from lora_fast.blocks import Spans

_OP_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
# Up to here the ops were the faster, but for one row at rank 64 in fp32: 768 to 4096 features, two
# threads of a Xeon of family 6 model 207, 2026-11-29. Of ranks up to 16 they are up to 64 rows: a
# step of a merged layer of 768 features took .73 to .95 of the time in bf16, .88 to .99 in fp16 and
# .93 to .99 in fp32, and of 96 rows as long; one and two threads of a Xeon of family 6 model 167,
# 2026-12-01.
_MOST_ROWS_OF_OP = 32
_MOST_ROWS_OF_LOW_RANK = 64
_LOW_RANK = 16
# Elements: a product in place of 2 to 8 million in fp32 took a quarter to half the time of one for
# all, in bf16 .85 to 1.04 of it; one thread of a Xeon of family 6 model 167, 2026-12-01.
_DROPPED_AT_A_TIME = 2**17


Saved = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]
"""What gradients are made of: dY (M, N); X (M, K), before dropout, or None where neither A nor B
needs one; A (R * adapters, K); B (sum of their widths, R); S (M, R * adapters) of the dropped X, or
None, to be made again or not needed; and what dropout kept, bool of the shape that X had, or None
without dropout."""


def op_pays(x: Tensor, rank: int | None = None) -> bool:
    """Tell whether csrc's ops are there and sooner done than torch with so many rows.

    Args:
        x: (..., K).
        rank: of each adapter; None for any.
    """
    is_low = rank is not None and rank <= _LOW_RANK
    most_rows = _MOST_ROWS_OF_LOW_RANK if is_low else _MOST_ROWS_OF_OP
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()  # compiled autograd traces a backward
        and x.numel() <= most_rows * x.shape[-1]
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
    rank = lora_B.shape[1]
    # A mode would not see what the op does.
    if op_pays(x, rank) and torch_internals.mode_count() == 0:
        s = x.new_empty((x.shape[0], lora_A.shape[0]))
        if ops.lora_delta_fwd_(x, lora_A, lora_B, scaling, blocks.edges(spans), y, s):
            return s
    s = products.linear(x, lora_A)
    s_blocks, b_blocks = blocks.columns(s, rank, spans), blocks.rows(lora_B, spans)
    for (lo, hi), s_block, b_block in zip(spans, s_blocks, b_blocks, strict=True):
        products.add_mm_(y[:, lo:hi], _apart(s_block), b_block.t(), scaling)
    return s


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
    rank = lora_B.shape[1]
    if (s is not None or not need_B) and op_pays(dy, rank) and ops.is_plain(dy):
        dA = torch.empty_like(lora_A) if need_A else None
        dB = torch.empty_like(lora_B) if need_B else None
        rest = (keep, scaling, keep_scale, blocks.edges(spans), dx, dA, dB)
        if ops.lora_delta_bwd_(dy, x, lora_A, lora_B, s, *rest):
            return dA, dB
    # Nothing is written with `out=`, and a slice may be all of dY: vmap over the gradients has no
    # rule for the one nor for torch's alias.
    dA = dB = keep2 = None
    dropped = x
    dy_blocks = [_apart(dy.narrow(1, lo, hi - lo)) for lo, hi in spans]
    if keep is not None and (dx is not None or need_A or s is None):
        # As bytes, which torch multiplies by in vectors; by bool it does one by one.
        keep2 = keep.view(torch.uint8).reshape(dy.shape[0], lora_A.shape[1])
        # One product in place, as torch makes a whole copy of bytes that it multiplies by.
        dropped = None if x is None else keep2.to(x.dtype).mul_(x)
    if need_B:
        if s is None:
            assert dropped is not None
            s = products.linear(dropped, lora_A).mul_(keep_scale)
        s_blocks = blocks.columns(s, rank, spans)
        pairs = zip(dy_blocks, s_blocks, strict=True)
        dB = _joined([products.mm_over_rows(part, _apart(s), scaling) for part, s in pairs], 0)
    if dx is None and not need_A:
        return dA, dB
    pairs = zip(dy_blocks, blocks.rows(lora_B, spans), strict=True)
    # Without the factor of what is kept: in fp16 what is dropped might be too large by it.
    ds = _joined([products.scaled_mm(part, b, scaling) for part, b in pairs], 1)
    if need_A:
        assert dropped is not None
        dA = products.mm_over_rows(ds, dropped, keep_scale)
    if dx is None:
        return dA, dB
    if keep2 is None:
        products.add_mm_(dx, ds, lora_A)
    else:
        del dropped  # its memory serves the next product
        dx.add_(_drop_(products.mm(ds, lora_A), keep2), alpha=keep_scale)
    return dA, dB


def _apart(block: Tensor) -> Tensor:
    """A block of columns, in memory of its own where oneDNN would multiply what lies beside it.

    By zero, as it fills up rows of bf16 to pairs and fours with AMX: an infinity there makes NaN.
    """
    is_whole = block.dtype is not torch.bfloat16 or block.shape[1] % 4 == 0
    return block if is_whole or not block.is_cpu else block.contiguous()


def _drop_(x: Tensor, keep: Tensor) -> Tensor:
    """`x *= keep`, some rows at a time: torch makes a copy of the bytes, in the dtype of x."""
    rows = max(1, _DROPPED_AT_A_TIME // max(1, x.shape[1]))
    for some, kept in zip(x.split(rows), keep.split(rows), strict=True):
        some.mul_(kept)
    return x


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
