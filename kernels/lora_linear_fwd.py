"""Forward of the LoRA linear layer: y = x W^T + scaling * ((x * D) A^T) B^T + bias."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.column_blocks import Blocks, column_blocks, gaps, whole_or
from lora_fast.kernels.configs import ShrinkConfig, architecture
from lora_fast.kernels.dropout import (
    apply_keep,
    draw_keep_bits,
    keep_scale,
    keep_threshold,
    packed_width,
    unpack_keep_bits,
)
from lora_fast.kernels.launch import Launch, launch, prepared
from lora_fast.kernels.lora_decode import lora_decode
from lora_fast.kernels.lora_gemm import lora_gemm
from lora_fast.kernels.lora_update import add_update
from lora_fast.kernels.plans import ForwardPlan, check_named, forward_plan
from lora_fast.kernels.primitives import block_offsets, mma, tile_ptrs
from lora_fast.kernels.sizes import MAX_SIZE, cdiv, rank_blocks
from lora_fast.kernels.torch_rules import as_own, dot_precision, on_device_of


@triton.jit
def dropped(x, seed, threshold, keep_ptr, offs_m, start_k, sizes, is_writer):
    """A tile of x from column `start_k` on, dropped; the writer stores the bits of what is kept."""
    M, K = sizes
    width = tl.cdiv(K, 8)
    octets = start_k // 8 + tl.arange(0, x.shape[1] // 8).to(tl.int64)
    bits = draw_keep_bits(seed, offs_m, octets, threshold)
    mask = (offs_m[:, None] < M) & (octets[None, :] < width) & is_writer
    tl.store(tile_ptrs(keep_ptr, (width, 1), offs_m, octets), bits, mask=mask)
    return apply_keep(x, unpack_keep_bits(bits, x.shape[0], x.shape[1]))


@triton.jit
def write_update(
    s,
    s_ptr,
    b_ptr,
    b_strides,
    bias_ptr,
    y_ptr,
    offs_m,
    sizes,
    blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the rows `offs_m` of y = s b^T + bias, where s is at hand."""
    M, N, _ = sizes
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = offs_n < N
        y = add_update(
            *(tl.zeros((offs_m.shape[0], BLOCK_N), tl.float32), s, s_ptr, b_ptr, b_strides),
            *(offs_m, offs_n, start_n, sizes, blocks, BLOCK_R, 1, True, PRECISION),
        )
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y_ptrs = tile_ptrs(y_ptr, (N, 1), offs_m, offs_n)
        mask = (offs_m[:, None] < M) & mask_n[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@prepared
@triton.jit(do_not_specialize=["threshold"])
def lora_shrink_kernel(
    x_ptr,
    x_strides,
    a_ptr,
    a_strides,
    s_ptr,
    keep_ptr,
    seed_ptr,
    b_ptr,
    b_strides,
    bias_ptr,
    y_ptr,
    blocks,
    M,
    N,
    K,
    R,
    multiplier,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program writes [BLOCK_M, BLOCK_R] of s = multiplier * (x * keep) a^T.

    Grid: (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)).
    With a seed, keep bits are drawn here, once per element, and the first block of the rank
    stores them: keep [M, ceil(K / 8)] bytes. With y, the program goes on to write its rows of
    y = s b^T + bias, which takes a rank of one block.
    x: [M, K], a: [R, K], b: [N, R], any strides.  s: [M, R], y: [M, N], bias: [N], contiguous.
    With blocks, b: [columns of all blocks, R // number of blocks].
    Accumulates in fp32; s is rounded once, and y is built from the rounded s.
    """
    pid_m, pid_r = tl.program_id(0), tl.program_id(1)
    offs_m, offs_r = block_offsets(pid_m, BLOCK_M), block_offsets(pid_r, BLOCK_R)
    mask_m, mask_r = offs_m[:, None] < M, offs_r < R
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k[None, :] < K
        x = tl.load(tile_ptrs(x_ptr, x_strides, offs_m, offs_k), mask=mask_m & mask_k, other=0.0)
        a_ptrs = tile_ptrs(a_ptr, a_strides, offs_r, offs_k)
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k, other=0.0).to(x.dtype)
        if seed_ptr is not None:
            x = dropped(x, seed, threshold, keep_ptr, offs_m, start_k, (M, K), pid_r == 0)
        acc = mma(x, tl.trans(a), acc, PRECISION)

    # Beyond the rank Inf * 0 has left NaN, which would reach y through the zeros of b.
    s = tl.where(mask_r[None, :], acc * multiplier, 0.0).to(s_ptr.dtype.element_ty)
    tl.store(tile_ptrs(s_ptr, (R, 1), offs_m, offs_r), s, mask=mask_m & mask_r[None, :])

    if y_ptr is not None:
        write_update(
            *(s, s_ptr, b_ptr, b_strides, bias_ptr, y_ptr, offs_m, (M, N, R), blocks),
            *(BLOCK_N, BLOCK_R, PRECISION),
        )


@lru_cache(maxsize=4096)
def shrink_launch(M: int, R: int, config: ShrinkConfig, precision: str, *details: object) -> Launch:
    """The launch for M rows and a rank; `details` are what else decides how it is compiled."""
    block_r, r_blocks = rank_blocks(R)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_N": config.block_n,
        "BLOCK_R": block_r,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch((cdiv(M, config.block_m), r_blocks), constants)


def lora_shrink(
    x: Tensor,
    lora_a: Tensor,
    scaling: float,
    *,
    config: ShrinkConfig,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    expand: tuple[Tensor, Tensor | None, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One pass over x (M, K): s (M, R) and the packed keep mask, which is None without a seed.

    s carries the whole factor scaling / (1 - dropout_p). With `expand`, which is (b, bias, y), the
    pass writes s b^T + bias into y (M, N).
    """
    (M, K), R = x.shape, lora_a.shape[0]
    b, bias, y = (None, None, None) if expand is None else expand
    N = 0 if y is None else y.shape[1]
    blocks = None if y is None else blocks
    s = x.new_empty((M, R))
    keep = None
    if seed is not None:
        keep = x.new_empty((M, packed_width(K)), dtype=torch.uint8)
        scaling *= keep_scale(dropout_p)
    x_strides, a_strides = x.stride(), lora_a.stride()
    b_strides = (0, 0) if b is None else b.stride()
    planned = shrink_launch(
        *(M, R, config, dot_precision(x.dtype)),
        *(N, K, x.dtype, x_strides, lora_a.dtype, a_strides, blocks, seed is None),
        *(None if b is None else b.dtype, b_strides, None if bias is None else bias.dtype),
    )
    launch(
        lora_shrink_kernel,
        planned,
        *(x, x_strides, lora_a, a_strides, s, keep, seed, b, b_strides, bias, y, blocks),
        *(M, N, K, R, scaling, keep_threshold(dropout_p)),
    )
    return s, keep


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    edges: Sequence[int] | None = None,
    *,
    plan: ForwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x W^T + scaling * ((x * D) A^T) B^T + bias.

    x (..., K), weight (N, K) and x share a dtype, any strides; lora_a (R, K), lora_b (N, R) and
    bias (N,) of any floating dtype. With a seed (one int64 on the device) D is a dropout mask.
    With edges, the first and last + 1 column of each of G blocks in ascending order, block g alone
    gets the update of rows g R / G to (g + 1) R / G of lora_a and of its rows of lora_b, which is
    (columns of all blocks, R / G).

    Returns y (..., N), S (M, R) with every factor applied, and the packed mask
    (M, ceil(K / 8)) uint8 or, without dropout, (0,); all contiguous.
    Raises: ValueError for a dimension that 32 bits can't index; products of two can be larger;
    and for a plan of the caller's own that cannot serve.
    Note: fp32 accumulation; the same bits for the same inputs and seed.
    """
    scaling = float(scaling)  # a kernel for an integer is another one
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    (M, K), N, R = rows.shape, weight.shape[0], lora_a.shape[0]
    if max(M, N, K) > MAX_SIZE:
        raise ValueError(
            f"lora_linear: x must have at most {MAX_SIZE} rows, and weight as many rows and "
            f"columns, got {tuple(x.shape)} and {tuple(weight.shape)}; split x, or run it under "
            "lora_fast.use_backend('reference')"
        )
    no_mask = x.new_empty(0, dtype=torch.uint8)
    shape = (*x.shape[:-1], N)
    if M == 0:
        mask = no_mask if seed is None else x.new_empty((0, packed_width(K)), dtype=torch.uint8)
        return x.new_empty(shape), x.new_empty((0, R)), mask
    if bias is not None:
        bias = bias.contiguous()
    if plan is None:
        plan = forward_plan(
            *(architecture(x.device), M, N, K, R, x.dtype, seed is not None),
            lora_a.itemsize > x.itemsize,
        )
    else:
        check_named(plan, M, R, seed is not None)
    with on_device_of(x):
        y, s, keep = run_plan(
            *(rows, weight, bias, lora_a, lora_b, scaling, dropout_p, seed),
            *(column_blocks(edges, N), plan),
        )
    return as_own(y, shape), s, no_mask if keep is None else keep


def run_plan(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    blocks: Blocks | None,
    plan: ForwardPlan,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (M, N), S (M, R) and the packed mask, None without a seed, by the plan's launches."""
    if plan.impl == "decode":
        factors = (lora_a, lora_b, scaling)
        y, s = lora_decode(rows, weight, bias, *factors, config=plan.decode, blocks=blocks)
        return y, s, None
    options = {"bias": bias, "blocks": blocks, "config": plan.gemm}
    if plan.impl == "one_pass":
        y, s = lora_gemm(rows, weight, lora_b, down=lora_a, multiplier=scaling, **options)
        return y, s, None
    N, y = weight.shape[0], None
    if plan.impl == "library":
        s = library_shrink(rows, lora_a, scaling)
        return library_expand(s, lora_b, bias, N, blocks).addmm_(rows, weight.t()), s, None
    if plan.impl == "lora_first":
        y = torch.empty((rows.shape[0], N), device=rows.device, dtype=rows.dtype)
    s, keep = lora_shrink(
        *(rows, lora_a, scaling),
        config=plan.shrink,
        dropout_p=dropout_p,
        seed=seed,
        expand=None if y is None else (lora_b, bias, y),
        blocks=blocks,
    )
    if plan.impl == "split":
        return lora_gemm(rows, weight, lora_b, t=s, **options)[0], s, keep
    if y is None:
        y = library_expand(s, lora_b, bias, N, blocks)
    return y.addmm_(rows, weight.t()), s, keep


def library_shrink(x: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """s = scaling * x a^T (M, R) by a vendor GEMM, the factor before the rounding."""
    return torch.addmm(x.new_empty(()), x, lora_a.to(x.dtype).t(), beta=0, alpha=scaling)


def library_expand(
    s: Tensor, lora_b: Tensor, bias: Tensor | None, features: int, blocks: Blocks | None
) -> Tensor:
    """y0 = s b^T + bias (M, features) by vendor GEMMs, for ranks that no program holds at once."""
    y = torch.empty((s.shape[0], features), device=s.device, dtype=s.dtype)
    blocks = whole_or(blocks, features)
    for (first, end, row), s_block in zip(blocks, s.split(lora_b.shape[1], 1), strict=True):
        up, out = lora_b[row : row + end - first].to(s.dtype).t(), y[:, first:end]
        if bias is None:
            torch.mm(s_block, up, out=out)
        else:
            torch.addmm(bias[first:end].to(s.dtype), s_block, up, out=out)
    for first, end, _ in gaps(blocks, features):
        y[:, first:end] = 0.0 if bias is None else bias[first:end]
    return y
