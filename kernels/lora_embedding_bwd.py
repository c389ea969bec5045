"""Backward of the LoRA embedding: one pass over dY, and a scatter over the rows that were read.

S = scaling * A^T[index], dS = scaling * dY B, dB = dY^T S     (pass over dY)
dA[:, v] = sum of the rows of dS whose index is v              (`segment_sum`)
"""

from torch import Tensor

from lora_fast.kernels.configs import architecture
from lora_fast.kernels.lora_embedding_fwd import gather_columns
from lora_fast.kernels.lora_grad_sb import library_grad_sb, lora_grad_sb
from lora_fast.kernels.plans import EmbeddingBackwardPlan, embedding_backward_plan
from lora_fast.kernels.segment_sum import segment_sum
from lora_fast.kernels.torch_rules import on_device_of


def lora_embedding_bwd(
    dy: Tensor,
    input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    scatter: bool,
    needs: list[bool],
    *,
    plan: EmbeddingBackwardPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `lora_embedding_fwd` for dy (..., D); `needs` is for A and B.

    input (...) as the forward took it; `padding_idx`, from 0 on, gives A's column no gradient;
    `scale_grad_by_freq` divides a column by how often it was read.

    Returns dA (R, num) or, without `scatter`, its addends dS (M, R), neither padded nor divided;
    and dB (D, R); contiguous, in the dtypes of A and B. What is not needed has shape (0,).
    Note: fp32 accumulation in a fixed order: the same bits every run.
    """
    scaling = float(scaling)
    need_a, need_b = needs
    D, (R, num) = dy.shape[-1], lora_a.shape
    index = input.reshape(-1).contiguous()
    M = index.shape[0]
    if M == 0 or not any(needs):
        da = lora_a.new_zeros(((R, num) if scatter else (M, R)) if need_a else 0)
        return da, lora_b.new_zeros((D, R) if need_b else 0)
    rows = dy.reshape(M, D)
    if rows.stride(1) != 1:  # the gradient of a plain sum is one number with strides of zero
        rows = rows.contiguous()
    if plan is None:
        plan = embedding_backward_plan(
            *(architecture(dy.device), M, D, num, R, dy.dtype), lora_b.itemsize > dy.itemsize
        )
    wanted = {"need_ds": need_a, "need_db": need_b, "dbias_dtype": None}
    with on_device_of(dy):
        s = gather_columns(index, lora_a, scaling, dy.dtype) if need_b else None
        if plan.library_sb:
            ds, db, _ = library_grad_sb(rows, lora_b, s, scaling, None, **wanted)
        else:
            ds, db, _ = lora_grad_sb(rows, lora_b, s, scaling, None, config=plan.grad_sb, **wanted)
        da = None
        if need_a and scatter:
            da = segment_sum(
                *(ds, index, num, lora_a.dtype),
                skipped=padding_idx,
                mean=scale_grad_by_freq,
                block_m=plan.segment_m,
            )
        elif need_a:
            da = ds.to(lora_a.dtype)
    return lora_a.new_empty(0) if da is None else da, lora_b.new_empty(0) if db is None else db
