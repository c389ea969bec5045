"""The large product with the low-rank update in its epilogue: y = x W^T + keep * (t U^T) + bias.

Forward: t = S, U = lora_B. One pass: t comes out of the same loop, t = multiplier * x D^T with
D = lora_A. Backward: x = dY, W = weight^T, t = dS, U = lora_A^T and `keep` is the dropout mask.
"""

import triton
import triton.language as tl
from torch import Tensor

from lora_fast.kernels.column_blocks import Blocks
from lora_fast.kernels.configs import GemmConfig
from lora_fast.kernels.descriptors import descriptor_fits, tiled
from lora_fast.kernels.dropout import apply_keep, load_keep
from lora_fast.kernels.gemm_launch import gemm_launch
from lora_fast.kernels.hopper_product import specialised_product
from lora_fast.kernels.launch import launch, prepared
from lora_fast.kernels.lora_update import add_update
from lora_fast.kernels.primitives import block_offsets, grouped_tile, mma, tile_ptrs
from lora_fast.kernels.sizes import rank_blocks
from lora_fast.kernels.torch_rules import dot_precision


@triton.jit
def round_rank_tile(acc_t, t_ptr, start_m, M, R, multiplier, is_writer):
    """Scale and round the rank tile of a one-pass forward; one column of tiles stores it."""
    offs_m = start_m.to(tl.int64) + tl.arange(0, acc_t.shape[0])
    offs_r = tl.arange(0, acc_t.shape[1]).to(tl.int64)
    # Beyond the rank Inf * 0 has left NaN, which would reach y through the zeros of U.
    t = tl.where(offs_r[None, :] < R, acc_t * multiplier, 0.0).to(t_ptr.dtype.element_ty)
    mask = (offs_m[:, None] < M) & (offs_r[None, :] < R) & is_writer
    tl.store(tile_ptrs(t_ptr, (R, 1), offs_m, offs_r), t, mask=mask)
    return t


@triton.jit
def split_columns(acc, PARTS: tl.constexpr):
    """The tile as a tuple of 1, 2, 4, ... parts, so that an epilogue needs fewer registers."""
    if PARTS == 1:
        return (acc,)
    else:
        halves = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)


@triton.jit
def finish_tile(
    acc,
    t,
    y,
    t_ptr,
    up_ptr,
    up_strides,
    bias_ptr,
    keep_ptr,
    start_m,
    start_n,
    sizes,
    blocks,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the update and the bias to one tile, round once, store. `y`: pointer or descriptor."""
    M, N, _ = sizes
    offs_m = start_m.to(tl.int64) + tl.arange(0, acc.shape[0])
    offs_n = start_n.to(tl.int64) + tl.arange(0, acc.shape[1])
    base = acc
    if keep_ptr is not None:
        base = tl.zeros_like(acc)
    out = add_update(
        *(base, t, t_ptr, up_ptr, up_strides, offs_m, offs_n, start_n, sizes, blocks),
        *(BLOCK_R, R_BLOCKS, ONE_PASS, PRECISION),
    )
    if keep_ptr is not None:
        keep = load_keep(keep_ptr, offs_m, start_n, M, N, acc.shape[0], acc.shape[1])
        out = acc + apply_keep(out, keep)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    out = out.to(t_ptr.dtype.element_ty)
    if TMA:
        y.store([start_m, start_n], out)
    else:
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(tile_ptrs(y, (N, 1), offs_m, offs_n), out, mask=mask)


@triton.jit
def tile_products(
    x_ptr,
    x_strides,
    w_ptr,
    w_strides,
    down_ptr,
    down_strides,
    offs_m,
    offs_n,
    sizes,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[rows `offs_m`, columns `offs_n`] of x w^T and, in one pass, these rows of x down^T: fp32."""
    M, N, K, R = sizes
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_n, mask_r = offs_m[:, None] < M, offs_n[None, :] < N, offs_r[None, :] < R
    x_ptrs = tile_ptrs(x_ptr, x_strides, offs_m, offs_k)
    w_ptrs = tile_ptrs(w_ptr, (w_strides[1], w_strides[0]), offs_k, offs_n)
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)
    acc_t = tl.zeros((offs_m.shape[0], BLOCK_R), tl.float32)
    if ONE_PASS:
        down_ptrs = tile_ptrs(down_ptr, (down_strides[1], down_strides[0]), offs_k, offs_r)
    for start_k in range(0, K, BLOCK_K):
        mask_k = (offs_k < K - start_k) | EVEN_K
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_n & mask_k[:, None], other=0.0)
        acc = mma(x, w, acc, PRECISION)
        if ONE_PASS:
            down = tl.load(down_ptrs, mask=mask_r & mask_k[:, None], other=0.0).to(x.dtype)
            acc_t = mma(x, down, acc_t, PRECISION)
            down_ptrs += step * down_strides[1]
        x_ptrs += step * x_strides[1]
        w_ptrs += step * w_strides[1]
    return acc, acc_t


@prepared
@triton.jit
def lora_gemm_kernel(
    x_ptr,
    x_strides,
    w_ptr,
    w_strides,
    y_ptr,
    t_ptr,
    up_ptr,
    up_strides,
    down_ptr,
    down_strides,
    bias_ptr,
    keep_ptr,
    blocks,
    M,
    N,
    K,
    R,
    multiplier,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program writes one [BLOCK_M, BLOCK_N] tile of y; in one pass column 0 writes t too.

    Grid: (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),).
    x: [M, K], w: [N, K], up: [N, R], down: [R, K], any strides.  y: [M, N], t: [M, R],
    bias: [N], keep: [M, ceil(N / 8)] bytes, contiguous.  With blocks, up: [columns of all
    blocks, R // number of blocks].
    Accumulates in fp32 and rounds y once, at the store.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m, offs_n = block_offsets(pid_m, BLOCK_M), block_offsets(pid_n, BLOCK_N)
    acc, acc_t = tile_products(
        *(x_ptr, x_strides, w_ptr, w_strides, down_ptr, down_strides, offs_m, offs_n, (M, N, K, R)),
        *(BLOCK_K, BLOCK_R, EVEN_K, ONE_PASS, PRECISION),
    )
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    t = acc_t
    if ONE_PASS:
        t = round_rank_tile(acc_t, t_ptr, start_m, M, R, multiplier, pid_n == 0)
    parts = split_columns(acc, PARTS)
    for part in tl.static_range(PARTS):
        finish_tile(
            *(parts[part], t, y_ptr, t_ptr, up_ptr, up_strides, bias_ptr, keep_ptr, start_m),
            *(start_n + part * (BLOCK_N // PARTS), (M, N, R), blocks),
            *(BLOCK_R, R_BLOCKS, ONE_PASS, PRECISION, False),
        )


@prepared
@triton.jit
def lora_gemm_tma_kernel(
    x_desc,
    w_desc,
    y_desc,
    t_ptr,
    up_ptr,
    up_strides,
    down_desc,
    bias_ptr,
    keep_ptr,
    blocks,
    M,
    N,
    K,
    R,
    multiplier,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    W_IS_KN: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same tiles as `lora_gemm_kernel` through the tensor memory accelerator.

    Grid: one program per multiprocessor, each walking over tiles.
    Descriptors: x [M, K], w [N, K] or, with W_IS_KN, [K, N], down [R, K], y [M, N] in blocks of
    BLOCK_N // PARTS columns. The accelerator fills with zeros and clips at the edges.
    """
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start_k in range(0, K, BLOCK_K):
            x = x_desc.load([start_m, start_k])
            if W_IS_KN:
                acc = mma(x, w_desc.load([start_k, start_n]), acc, PRECISION)
            else:
                acc = mma(x, tl.trans(w_desc.load([start_n, start_k])), acc, PRECISION)
            if ONE_PASS:
                down = down_desc.load([0, start_k]).to(x.dtype)
                acc_t = mma(x, tl.trans(down), acc_t, PRECISION)
        t = acc_t
        if ONE_PASS:
            t = round_rank_tile(acc_t, t_ptr, start_m, M, R, multiplier, pid_n == 0)
        parts = split_columns(acc, PARTS)
        for part in tl.static_range(PARTS):
            finish_tile(
                *(parts[part], t, y_desc, t_ptr, up_ptr, up_strides, bias_ptr, keep_ptr, start_m),
                *(start_n + part * (BLOCK_N // PARTS), (M, N, R), blocks),
                *(BLOCK_R, R_BLOCKS, ONE_PASS, PRECISION, True),
            )


def lora_gemm(
    x: Tensor,
    w: Tensor,
    up: Tensor,
    *,
    config: GemmConfig,
    t: Tensor | None = None,
    down: Tensor | None = None,
    multiplier: float = 1.0,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the product for x (M, K), w (N, K), up (N, R), and either t (M, R) or down (R, K).

    With blocks, up has a row for each of their columns and R is the sum of their ranks.
    Returns y (M, N) and t (M, R), contiguous, in x's dtype. With `down`, t is computed in the
    same pass, which takes an R of at most one block of the rank.
    """
    (M, K), N = x.shape, w.shape[0]
    y = x.new_empty((M, N))
    one_pass = t is None
    tma_fits = config.tma and tma_operands_fit(x, w, down)
    can_be_specialised = config.specialised and tma_fits and blocks is None and not one_pass
    if can_be_specialised and specialised_product(
        *(x, w, up, t, y), config=config, bias=bias, keep=keep
    ):
        return y, t
    R = down.shape[0] if one_pass else t.shape[1]
    if one_pass:
        t = x.new_empty((M, R))
    x_strides, w_strides, up_strides = x.stride(), w.stride(), up.stride()
    down_strides = (0, 0) if down is None else down.stride()
    config, planned = gemm_launch(
        *(config, tma_fits, one_pass, (M, N, K, R), up.shape[1], x.dtype, x.device),
        *(blocks, keep is not None, w_strides[1] != 1, dot_precision(x.dtype)),
        *(x_strides, w_strides, up_strides, up.dtype, down_strides),
        *(None if down is None else down.dtype, None if bias is None else bias.dtype),
    )
    rest = (bias, keep, blocks, M, N, K, R, multiplier)
    if config.tma:
        w_is_kn = w_strides[1] != 1
        rows, cols, depth = config.block_m, config.block_n, config.block_k
        launch(
            lora_gemm_tma_kernel,
            planned,
            tiled(x, rows, depth),
            tiled(w.t(), depth, cols) if w_is_kn else tiled(w, cols, depth),
            *(tiled(y, rows, cols // config.parts), t, up, up_strides),
            None if down is None else tiled(down, rank_blocks(R)[0], depth),
            *rest,
        )
    else:
        launch(
            lora_gemm_kernel,
            planned,
            *(x, x_strides, w, w_strides, y, t, up, up_strides, down, down_strides),
            *rest,
        )
    return y, t


def tma_operands_fit(x: Tensor, w: Tensor, down: Tensor | None) -> bool:
    """Do all operands meet the accelerator's alignment? w may be (N, K) or (K, N) in memory.

    y is new and contiguous: the length of its rows alone decides.
    """
    return (
        w.shape[0] * w.itemsize % 16 == 0
        and descriptor_fits(x)
        and (descriptor_fits(w) or descriptor_fits(w.t()))
        and (down is None or descriptor_fits(down))
    )
