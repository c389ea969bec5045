"""Backward of the LoRA linear layer: one pass over dY, one over x, one large product.

    dS = factor * dY B, dB = s_scaling * dY^T S, dbias = sum of dY's rows      (pass over dY)
    dA = dS^T (x * keep)                                                       (pass over x)
    dx = dY W + keep * (dS A)                                                  (product)

dS and s_scaling * S carry the whole factor scaling / (1 - dropout_p): `keep` is 0 or 1 everywhere.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.column_blocks import Blocks, column_blocks
from lora_fast.kernels.configs import GradAConfig, architecture
from lora_fast.kernels.dropout import apply_keep, keep_scale, load_keep
from lora_fast.kernels.launch import Launch, launch, prepared
from lora_fast.kernels.lora_gemm import lora_gemm
from lora_fast.kernels.lora_grad_sb import library_grad_sb, lora_grad_sb
from lora_fast.kernels.plans import BackwardPlan, backward_plan, check_named
from lora_fast.kernels.primitives import block_offsets, mma, tile_ptrs
from lora_fast.kernels.reduce_partials import reduce_partials
from lora_fast.kernels.sizes import cdiv, chunk_length, rank_blocks
from lora_fast.kernels.torch_rules import dot_precision, on_device_of


@prepared
@triton.jit
def lora_grad_a_kernel(
    x_ptr,
    x_strides,
    ds_ptr,
    keep_ptr,
    a_ptr,
    a_strides,
    da_ptr,
    dx_ptr,
    M,
    K,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program covers [CHUNK_M, BLOCK_K] of x: partial sums of da, and dx0 = keep * (ds a).

    Grid: (cdiv(K, BLOCK_K), cdiv(M, CHUNK_M), cdiv(R, BLOCK_R)).
    x: [M, K], a: [R, K], any strides.  ds: [M, R], keep: [M, ceil(K / 8)] bytes, dx: [M, K],
    contiguous; da partials: [row chunks, R, K]. da or dx may be None; dx takes one block of rank.
    """
    chunk = tl.program_id(1)
    offs_k = block_offsets(tl.program_id(0), BLOCK_K)
    offs_r = block_offsets(tl.program_id(2), BLOCK_R)
    mask_k, mask_r = offs_k[None, :] < K, offs_r[:, None] < R
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if dx_ptr is not None:
        a_ptrs = tile_ptrs(a_ptr, a_strides, offs_r, offs_k)
        a = tl.load(a_ptrs, mask=mask_r & mask_k, other=0.0).to(ds_ptr.dtype.element_ty)

    for start_m in range(chunk * CHUNK_M, min(M, (chunk + 1) * CHUNK_M), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m[:, None] < M
        ds_ptrs = tile_ptrs(ds_ptr, (R, 1), offs_m, offs_r)
        ds = tl.load(ds_ptrs, mask=mask_m & (offs_r[None, :] < R), other=0.0)
        if keep_ptr is not None:
            start_k = tl.program_id(0) * BLOCK_K
            keep = load_keep(keep_ptr, offs_m, start_k, M, K, BLOCK_M, BLOCK_K)
        if da_ptr is not None:
            x_ptrs = tile_ptrs(x_ptr, x_strides, offs_m, offs_k)
            x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
            if keep_ptr is not None:
                x = apply_keep(x, keep)
            acc = mma(tl.trans(ds), x, acc, PRECISION)
        if dx_ptr is not None:
            dx = mma(ds, a, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION)
            if keep_ptr is not None:
                dx = apply_keep(dx, keep)
            dx_ptrs = tile_ptrs(dx_ptr, (K, 1), offs_m, offs_k)
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_m & mask_k)

    if da_ptr is not None:
        row = chunk.to(tl.int64) * R + offs_r
        tl.store(tile_ptrs(da_ptr, (K, 1), row, offs_k), acc, mask=mask_r & mask_k)


def lora_grad_a(
    x: Tensor | None,
    ds: Tensor,
    lora_a: Tensor,
    keep: Tensor | None,
    *,
    config: GradAConfig,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dA (R, K) = dS^T (x * keep), None without x, and where needed dx0 (M, K) = keep * (dS A)."""
    M, (R, K) = ds.shape[0], lora_a.shape
    x_strides, a_strides = (0, 0) if x is None else x.stride(), lora_a.stride()
    chunks, planned = grad_a_launch(
        *(M, R, K, config, dot_precision(ds.dtype)),
        *(ds.dtype, x_strides, a_strides, lora_a.dtype, x is None, keep is None, need_dx),
    )
    partial = da = dx = None
    if x is not None:
        partial = ds.new_empty((chunks, R, K), dtype=torch.float32)
        da = ds.new_empty((R, K), dtype=lora_a.dtype)
    if need_dx:
        dx = ds.new_empty((M, K))
    launch(
        lora_grad_a_kernel,
        planned,
        *(x, x_strides, ds, keep, lora_a, a_strides, partial, dx),
        *(M, K, R),
    )
    if x is not None:
        reduce_partials((partial, da))
    return da, dx


@lru_cache(maxsize=4096)
def grad_a_launch(
    M: int, R: int, K: int, config: GradAConfig, precision: str, *details: object
) -> tuple[int, Launch]:
    """Partial sums of dA, and the launch; `details` are what else decides how it is compiled."""
    block_r, r_blocks = rank_blocks(R)
    chunk_m = chunk_length(M, config.chunk_m)
    chunks = cdiv(M, chunk_m)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "CHUNK_M": chunk_m,
        "BLOCK_R": block_r,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return chunks, Launch((cdiv(K, config.block_k), chunks, r_blocks), constants)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    bias_dtype: torch.dtype,
    edges: Sequence[int] | None = None,
    s_scaling: float = 1.0,
    *,
    plan: BackwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear_fwd` for dy (..., N); `needs` is for x, weight, bias, A and B.

    edges as there.
    x (..., K) is read for the gradients of A and the weight, weight (N, K) for x's, s (M, R) for
    B's; mask as the forward returned it, None without dropout. s_scaling is what s lacks of
    `scaling`: 1, or all of it where the forward took B * scaling and the factor 1.

    Returns dx (..., K), dW (N, K), dbias (N,), and dA and dB like A and B, contiguous, in the dtype
    of what they belong to; a gradient that is not needed is empty, of shape (0,).
    Note: fp32 accumulation in a fixed order: the same bits every run.
    """
    need_dx, need_dw, need_dbias, need_da, need_db = needs
    N, K = dy.shape[-1], lora_a.shape[1]
    dy_rows = dy.reshape(-1, N)
    M = dy_rows.shape[0]
    if M == 0:
        return empty_batch_grads(dy, lora_a, lora_b, needs, bias_dtype)
    if dy_rows.stride(1) != 1:  # the gradient of a plain sum is one number with strides of zero
        dy_rows = dy_rows.contiguous()
    if plan is None:
        sizes = (M, N, K, lora_b.shape[1])
        plan = backward_plan(
            *(architecture(dy.device), *sizes, dy.dtype, mask is not None),
            *(lora_b.itemsize > dy.itemsize, lora_a.shape[0]),
        )
    else:
        check_named(plan, M, lora_a.shape[0], mask is not None)
    rows = x.reshape(-1, K) if x is not None else None
    with on_device_of(dy):
        ds, db, dbias = rank_grads(
            *(dy_rows, lora_b, s, float(scaling) * keep_scale(dropout_p)),
            *(column_blocks(edges, N), plan),
            need_ds=need_dx or need_da,
            need_db=need_db,
            dbias_dtype=bias_dtype if need_dbias else None,
            s_scaling=float(s_scaling),
        )
        da, dx = input_grads(
            *(dy_rows, rows if need_da else None, weight if need_dx else None),
            *(lora_a, ds, mask, plan),
        )
        dw = dy_rows.t() @ rows if need_dw else None
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], K)
    # The operator's contract: outputs that do not alias, so each absent gradient is its own.
    return tuple(dy.new_empty(0) if grad is None else grad for grad in (dx, dw, dbias, da, db))


def empty_batch_grads(
    dy: Tensor, lora_a: Tensor, lora_b: Tensor, needs: list[bool], bias_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The gradients of a call with no rows: zeros, and an empty dx."""
    N, K = dy.shape[-1], lora_a.shape[1]
    shapes = ((*dy.shape[:-1], K), (N, K), (N,), lora_a.shape, lora_b.shape)
    dtypes = (dy.dtype, dy.dtype, bias_dtype, lora_a.dtype, lora_b.dtype)
    return tuple(
        torch.zeros(shape if need else 0, device=dy.device, dtype=dtype if need else dy.dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def rank_grads(
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    factor: float,
    blocks: Blocks | None,
    plan: BackwardPlan,
    *,
    need_ds: bool,
    need_db: bool,
    dbias_dtype: torch.dtype | None,
    s_scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS, dB and dbias by the plan's way; nothing runs where none is needed."""
    if not (need_ds or need_db or dbias_dtype is not None):
        return None, None, None
    wanted = {"need_ds": need_ds, "need_db": need_db, "dbias_dtype": dbias_dtype}
    operands = (dy, lora_b, s, factor, blocks)
    if plan.library_sb:
        return library_grad_sb(*operands, **wanted, s_scaling=s_scaling)
    return lora_grad_sb(*operands, config=plan.grad_sb, **wanted, s_scaling=s_scaling)


def input_grads(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    ds: Tensor | None,
    keep: Tensor | None,
    plan: BackwardPlan,
) -> tuple[Tensor | None, Tensor | None]:
    """dA, None without x, and dx, None without weight, by the plan's way."""
    if ds is None:
        return None, None
    # Beyond one block of the rank a vendor GEMM reads x once, the kernel once for each block.
    one_block = rank_blocks(lora_a.shape[0])[1] == 1
    lora_first = weight is not None and plan.input_grad == "lora_first"
    da = dx = None
    if plan.input_grad == "library" or (keep is None and not one_block):
        if x is not None:
            da = (ds.t() @ x).to(lora_a.dtype)
    elif x is not None or lora_first:
        da, dx = lora_grad_a(x, ds, lora_a, keep, config=plan.grad_a, need_dx=lora_first)
    if weight is None:
        return da, None
    if plan.input_grad == "fused":
        dx, _ = lora_gemm(dy, weight.t(), lora_a.t(), t=ds, keep=keep, config=plan.gemm)
        return da, dx
    if plan.input_grad == "library":
        dx = ds @ lora_a.to(ds.dtype)
    return da, dx.addmm_(dy, weight)
