"""Backward of the LoRA linear layer: one pass over dY, one over x, one large product.

    dS = factor * dY B, dB = dY^T S, dbias = sum of dY's rows      (pass over dY)
    dA = dS^T (x * keep)                                           (pass over x)
    dx = dY W + keep * (dS A)                                      (product)

S and dS carry the whole factor scaling / (1 - dropout_p), so `keep` is 0 or 1 everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.configs import (
    BackwardPlan,
    GradAConfig,
    GradSBConfig,
    architecture,
    backward_plan,
)
from lora_fast.kernels.dropout import apply_keep, keep_scale, load_keep
from lora_fast.kernels.launch import prepared
from lora_fast.kernels.lora_gemm import lora_gemm
from lora_fast.kernels.primitives import (
    block_offsets,
    chunk_length,
    dot_precision,
    mma,
    on_device_of,
    rank_blocks,
    tile_ptrs,
)
from lora_fast.kernels.reduce_partials import reduce_partials


@prepared
@triton.jit
def lora_grad_sb_kernel(
    dy_ptr,
    dy_strides,
    b_ptr,
    b_strides,
    s_ptr,
    ds_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    R,
    factor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program reads [BLOCK_M, CHUNK_N] of dy once and writes fp32 partial sums.

    Grid: (cdiv(M, BLOCK_M), cdiv(N, CHUNK_N), cdiv(R, BLOCK_R)).
    dy: [M, N], b: [N, R], any strides.  s: [M, R].
    Partials: ds [column chunks, M, R], db [row blocks, N, R], dbias [row blocks, N]; those whose
    pointer is None are not computed. A fixed order of sums: no atomics.
    """
    pid_m, chunk = tl.program_id(0), tl.program_id(1)
    offs_m = block_offsets(pid_m, BLOCK_M)
    offs_r = block_offsets(tl.program_id(2), BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r[None, :] < R
    acc_ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if db_ptr is not None:
        s_ptrs = tile_ptrs(s_ptr, (R, 1), offs_m, offs_r)
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r, other=0.0)

    for start_n in range(chunk * CHUNK_N, min(N, (chunk + 1) * CHUNK_N), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = offs_n < N
        dy_ptrs = tile_ptrs(dy_ptr, dy_strides, offs_m, offs_n)
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if ds_ptr is not None:
            b_ptrs = tile_ptrs(b_ptr, b_strides, offs_n, offs_r)
            b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r, other=0.0).to(dy.dtype)
            acc_ds = mma(dy, b, acc_ds, PRECISION)
        row = pid_m.to(tl.int64) * N + offs_n
        if db_ptr is not None:
            # The transposed product: dy stays in the layout that the other product reads.
            db = mma(tl.trans(s), dy, tl.zeros((BLOCK_R, BLOCK_N), tl.float32), PRECISION)
            db_ptrs = tile_ptrs(db_ptr, (1, R), offs_r, row)
            tl.store(db_ptrs, db, mask=mask_n[None, :] & (offs_r[:, None] < R))
        if dbias_ptr is not None:
            dbias = tl.sum(dy.to(tl.float32), axis=0)
            tl.store(dbias_ptr + row, dbias, mask=mask_n & (tl.program_id(2) == 0))

    if ds_ptr is not None:
        ds_ptrs = tile_ptrs(ds_ptr, (R, 1), chunk.to(tl.int64) * M + offs_m, offs_r)
        tl.store(ds_ptrs, acc_ds * factor, mask=mask_m[:, None] & mask_r)


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


def lora_grad_sb(
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    factor: float,
    *,
    config: GradSBConfig,
    need_ds: bool,
    need_db: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS (M, R) = factor * dY B, dB (N, R) = dY^T S and dbias (N,); None where not asked."""
    (M, N), R = dy.shape, lora_b.shape[1]
    block_r, r_blocks = rank_blocks(R)
    row_blocks = triton.cdiv(M, config.block_m)
    chunk_n = chunk_length(N, config.chunk_n)
    chunks = triton.cdiv(N, chunk_n)

    def pair(wanted: bool, dtype: torch.dtype | None, splits: int, *shape: int):
        if not wanted:
            return None, None
        partial = torch.empty((splits, *shape), device=dy.device, dtype=torch.float32)
        return partial, torch.empty(shape, device=dy.device, dtype=dtype)

    ds = pair(need_ds, dy.dtype, chunks, M, R)
    db = pair(need_db, lora_b.dtype, row_blocks, N, R)
    dbias = pair(dbias_dtype is not None, dbias_dtype, row_blocks, N)
    lora_grad_sb_kernel[(row_blocks, chunks, r_blocks)](
        *(dy, dy.stride(), lora_b, lora_b.stride(), s, ds[0], db[0], dbias[0]),
        *(M, N, R, factor),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CHUNK_N=chunk_n,
        BLOCK_R=block_r,
        PRECISION=dot_precision(dy.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    reduce_partials(*(both for both in (ds, db, dbias) if both[0] is not None))
    return ds[1], db[1], dbias[1]


def library_grad_sb(
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    factor: float,
    *,
    need_ds: bool,
    need_db: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The results of `lora_grad_sb` from vendor GEMMs, which are better at large ranks."""
    ds = db = None
    if need_ds:  # the factor before the rounding: the product alone may pass fp16's range
        ds = torch.addmm(dy.new_empty(()), dy, lora_b.to(dy.dtype), beta=0, alpha=factor)
    if need_db:
        db = (dy.t() @ s).to(lora_b.dtype)
    dbias = None if dbias_dtype is None else dy.sum(0, dtype=torch.float32).to(dbias_dtype)
    return ds, db, dbias


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
    block_r, r_blocks = rank_blocks(R)
    chunk_m = chunk_length(M, config.chunk_m)
    chunks = triton.cdiv(M, chunk_m)
    partial = da = dx = None
    if x is not None:
        partial = torch.empty((chunks, R, K), device=ds.device, dtype=torch.float32)
        da = torch.empty((R, K), device=ds.device, dtype=lora_a.dtype)
    if need_dx:
        dx = torch.empty((M, K), device=ds.device, dtype=ds.dtype)
    lora_grad_a_kernel[(triton.cdiv(K, config.block_k), chunks, r_blocks)](
        *(x, (0, 0) if x is None else x.stride(), ds, keep, lora_a, lora_a.stride(), partial, dx),
        *(M, K, R),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        CHUNK_M=chunk_m,
        BLOCK_R=block_r,
        PRECISION=dot_precision(ds.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if x is not None:
        reduce_partials((partial, da))
    return da, dx


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
    *,
    plan: BackwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear_fwd` for dy (..., N); `needs` is for x, weight, bias, A and B.

    x (..., K) is read for the gradients of A and the weight, weight (N, K) for x's, s (M, R) for
    B's; mask as the forward returned it, None without dropout.

    Returns dx (..., K), dW (N, K), dbias (N,), dA (R, K), dB (N, R), contiguous, in the dtype of
    what they belong to; a gradient that is not needed is empty, of shape (0,).
    Note: fp32 accumulation in a fixed order: the same bits every run.
    """
    need_dx, need_dw, need_dbias, need_da, need_db = needs
    N, (R, K) = dy.shape[-1], lora_a.shape
    dy_rows = dy.reshape(-1, N)
    M = dy_rows.shape[0]
    if M == 0:
        return empty_batch_grads(dy, lora_a, lora_b, needs, bias_dtype)
    if dy_rows.stride(1) != 1:  # the gradient of a plain sum is one number with strides of zero
        dy_rows = dy_rows.contiguous()
    if plan is None:
        plan = backward_plan(architecture(dy.device), M, N, K, R, dy.dtype, mask is not None)
    rows = x.reshape(-1, K) if x is not None else None
    with on_device_of(dy):
        ds, db, dbias = rank_grads(
            *(dy_rows, lora_b, s, scaling * keep_scale(dropout_p), plan),
            need_ds=need_dx or need_da,
            need_db=need_db,
            dbias_dtype=bias_dtype if need_dbias else None,
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
    N, (R, K) = dy.shape[-1], lora_a.shape
    shapes = ((*dy.shape[:-1], K), (N, K), (N,), (R, K), (N, R))
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
    plan: BackwardPlan,
    *,
    need_ds: bool,
    need_db: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS, dB and dbias by the plan's way; nothing runs where none is needed."""
    if not (need_ds or need_db or dbias_dtype is not None):
        return None, None, None
    needs = {"need_ds": need_ds, "need_db": need_db, "dbias_dtype": dbias_dtype}
    if plan.library_sb:
        return library_grad_sb(dy, lora_b, s, factor, **needs)
    return lora_grad_sb(dy, lora_b, s, factor, config=plan.grad_sb, **needs)


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
    one_block = rank_blocks(lora_a.shape[0])[1] == 1
    # Beyond one block of rank only the GEMM's epilogue can apply the mask to dS A.
    allowed = weight is not None and (one_block or keep is None)
    lora_first = allowed and plan.input_grad == "lora_first"
    da = dx = None
    if one_block or keep is not None:
        if x is not None or lora_first:
            da, dx = lora_grad_a(
                *(x, ds, lora_a, keep), config=plan.grad_a, need_dx=lora_first and one_block
            )
    elif x is not None:
        da = (ds.t() @ x).to(lora_a.dtype)
    if lora_first:
        if dx is None:
            dx = ds @ lora_a.to(ds.dtype)
        return da, dx.addmm_(dy, weight)
    if weight is not None:
        dx, _ = lora_gemm(dy, weight.t(), lora_a.t(), t=ds, keep=keep, config=plan.gemm)
    return da, dx
