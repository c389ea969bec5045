"""`lora_gemm` for Hopper with its work divided among warps: y = keep * (t U^T) + x W^T + bias.

One warp only fetches tiles (TMA) into a ring of stages in shared memory; two groups of four warps
only multiply them (wgmma), each one half of a tile's rows. They meet at two barriers for each
stage: `full`, when its tiles have arrived, and `empty`, when both groups have read them.

The low-rank update is the first steps of the same loop: a tile of y multiplies first along the
rank (t with U), then along the depth (x with W). So the update needs no shared memory, no barrier
and no accumulator of its own, and the mask multiplies the accumulator in between.

Without a GPU it runs on a model of the hardware (tests/kernels/hopper_model.py). On an H200 it
takes as long as the vendor's product without the update (docs/targets.md).
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lora_fast.kernels import primitives
from lora_fast.kernels.configs import GemmConfig
from lora_fast.kernels.dropout import packed_width
from lora_fast.kernels.hopper_launch import hopper_launch
from lora_fast.kernels.hopper_operands import describe, describe_factor, rank_operand
from lora_fast.kernels.launch import launch, prepared

GROUPS = gl.constexpr(2)  # of four warps that multiply
BUFFERS = gl.constexpr(2)  # of each group, for parts of y on their way out

# Registers per thread of the second group and of the fetching warp; the first group keeps the
# rest of the 168 x 384 that a block of threads has, 240 as well.
REGISTERS = gl.constexpr((240, 24))

# Gluon changes its names from one Triton to the next: these are of 3.9, 3.8 has the latter two.
REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Gluon compiles only functions of its own kind; the arithmetic is the one of the other kernels.
grouped_tile = gluon.jit(primitives.grouped_tile.fn)


@gluon.constexpr_function
def accumulator_layout(cols):
    """How wgmma spreads a group's accumulator over its threads."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.constexpr_function
def bits_layout(rows, cols):
    """The same with a column as (octet, bit), and a thread's octets next to one another."""
    return gl.DistributedLinearLayout(
        reg_bases=[
            *([0, 1 << i, 0] for i in range((cols // 8).bit_length() - 1)),
            *([64 << i, 0, 0] for i in range((rows // 64).bit_length() - 1)),
            *([8, 0, 0], [0, 0, 1]),
        ],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[rows, cols // 8, 8],
    )


@gluon.constexpr_function
def stacked(count, block_shape):
    """The shape of several blocks."""
    return [count, *block_shape]


@gluon.jit
def slot(step, STAGES: gl.constexpr):
    """Stage of a step, and its phase: 0 and 1 in turns, as the ring is walked again and again."""
    return step % STAGES, (step // STAGES) & 1


@gluon.constexpr_function
def tiles_in(tile_shape, block_shape):
    """The shape of as many blocks as a tile has room for."""
    return stacked(tile_shape[0] * tile_shape[1] // (block_shape[0] * block_shape[1]), block_shape)


@gluon.jit
def stage_tile(tiles, stage, desc):
    """A stage's memory as a tile of `desc`; those along the rank are narrower than the stage."""
    memory = tiles.index(stage)
    # All of the memory, as Triton demands from 3.8 on, and of it the first tile.
    shape: gl.constexpr = tiles_in(memory.shape, desc.block_shape)
    if REINTERPRET_IS_PUBLIC:
        return memory.reinterpret(desc.dtype, shape, desc.layout).index(0)
    else:
        return memory._reinterpret(desc.dtype, shape, desc.layout).index(0)


@gluon.jit
def tile_start(tile, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and column of a tile of y."""
    num_m, num_n = gl.cdiv(sizes[0], BLOCK_M), gl.cdiv(sizes[1], BLOCK_N)
    pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
    return pid_m * BLOCK_M, pid_n * BLOCK_N


@gluon.jit
def fetch(pair, ring, step, start_m, start_n, depth, B_IS_KN: gl.constexpr):
    """Fetch the tiles of both factors along `depth`, a stage for each step; the next step."""
    a_desc, b_desc = pair
    a_tiles, b_tiles, full, empty = ring
    for start_k in range(0, depth, a_desc.block_shape[1]):
        stage, phase = slot(step, full.shape[0])
        mbarrier.wait(empty.index(stage), phase ^ 1)  # of the round before; at once in the first
        arrived = full.index(stage)
        mbarrier.expect(arrived, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        a_tile, b_tile = stage_tile(a_tiles, stage, a_desc), stage_tile(b_tiles, stage, b_desc)
        async_load(a_desc, [start_m, start_k], arrived, a_tile)
        if B_IS_KN:
            async_load(b_desc, [start_k, start_n], arrived, b_tile)
        else:
            async_load(b_desc, [start_n, start_k], arrived, b_tile)
        step += 1
    return step


@gluon.jit
def multiply(acc, pair, ring, step, depth, GROUP: gl.constexpr, B_IS_KN: gl.constexpr):
    """`acc + a b` along `depth` for the group's rows of a tile, and the next step."""
    a_desc, b_desc = pair
    a_tiles, b_tiles, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    ROWS: gl.constexpr = acc.shape[0]
    steps = gl.cdiv(depth, a_desc.block_shape[1])
    for i in range(steps):
        stage, phase = slot(step + i, STAGES)
        mbarrier.wait(full.index(stage), phase)
        a = stage_tile(a_tiles, stage, a_desc).slice(GROUP * ROWS, ROWS, dim=0)
        b = stage_tile(b_tiles, stage, b_desc)
        if not B_IS_KN:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        # One product stays under way; the one before it has read its stage.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(slot(step + i + STAGES - 1, STAGES)[0]), pred=i > 0)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot(step + steps - 1, STAGES)[0]))
    return acc, step + steps


@gluon.jit
def load_keep(keep_ptr, keep_width, start_m, start_n, M, ROWS: gl.constexpr, COLS: gl.constexpr):
    """The [ROWS, COLS] tile of the packed mask as 0 and 1, spread like the accumulator."""
    layout: gl.constexpr = bits_layout(ROWS, COLS)
    packed_layout: gl.constexpr = gl.SliceLayout(2, layout)
    offs_m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, packed_layout))
    octets = start_n // 8 + gl.arange(0, COLS // 8, gl.SliceLayout(0, packed_layout))
    mask = (offs_m[:, None] < M) & (octets[None, :] < keep_width)
    ptrs = keep_ptr + offs_m.to(gl.int64)[:, None] * keep_width + octets[None, :]
    packed = gl.load(ptrs, mask=mask, other=0)
    shifts = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout))).to(gl.uint8)
    bits = gl.reshape((packed[:, :, None] >> shifts[None, None, :]) & 1, (ROWS, COLS))
    return gl.convert_layout(bits, accumulator_layout(COLS), assert_trivial=True)


@gluon.jit
def split_columns(tile, PARTS: gl.constexpr):
    """The tile as a tuple of 1, 2, 4, ... parts."""
    if PARTS == 1:
        return (tile,)
    else:
        halves = gl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = gl.split(gl.permute(halves, (0, 2, 1)))
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)


@gluon.jit
def store(tile, y, start_m, start_n, GROUP: gl.constexpr):
    """Write a group's rows of a tile by TMA, a part of the columns at a time."""
    y_desc, y_tiles = y
    COLS: gl.constexpr = y_desc.block_shape[1]
    PARTS: gl.constexpr = tile.shape[1] // COLS
    parts = split_columns(tile.to(y_desc.dtype), PARTS)
    for part in gl.static_range(PARTS):
        y_tile = y_tiles.index(GROUP * BUFFERS + part % BUFFERS)
        tma.store_wait(BUFFERS - 1)  # the part before the last has left this buffer
        y_tile.store(parts[part])
        fence_async_shared()
        async_store(y_desc, [start_m, start_n + part * COLS], y_tile)


@gluon.jit
def produce(
    products,
    ring,
    sizes,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    UP_IS_RN: gl.constexpr,
    W_IS_KN: gl.constexpr,
):
    """The warp that fetches, for each tile of y along the rank and then along the depth."""
    update, product = products
    M, N, K, R = sizes
    BLOCK_M: gl.constexpr = product[0].block_shape[0]
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = tile_start(tile, sizes, BLOCK_M, BLOCK_N, GROUP_M)
        step = fetch(update, ring, step, start_m, start_n, R, UP_IS_RN)
        step = fetch(product, ring, step, start_m, start_n, K, W_IS_KN)


@gluon.jit
def consume(
    GROUP: gl.constexpr,
    products,
    ring,
    sizes,
    y,
    extras,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    UP_IS_RN: gl.constexpr,
    W_IS_KN: gl.constexpr,
):
    """A group of warps that multiplies, walking over the same tiles and steps as `produce`."""
    update, product = products
    M, N, K, R = sizes
    bias_ptr, keep_ptr, keep_width = extras
    BLOCK_M: gl.constexpr = product[0].block_shape[0]
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    layout: gl.constexpr = accumulator_layout(BLOCK_N)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start_m, start_n = tile_start(tile, sizes, BLOCK_M, BLOCK_N, GROUP_M)
        start_m += GROUP * ROWS
        # Both are on their way while the products run.
        if bias_ptr is not None:
            offs_n = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        if keep_ptr is not None:
            keep = load_keep(keep_ptr, keep_width, start_m, start_n, M, ROWS, BLOCK_N)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
        acc, step = multiply(acc, update, ring, step, R, GROUP, UP_IS_RN)
        if keep_ptr is not None:
            acc *= keep.to(gl.float32)  # a product, so that a dropped NaN or Inf gives NaN
        acc, step = multiply(acc, product, ring, step, K, GROUP, W_IS_KN)
        if bias_ptr is not None:
            acc += bias.to(gl.float32)[None, :]
        store(acc, y, start_m, start_n, GROUP)
    tma.store_wait(0)


@prepared
@gluon.jit
def lora_gemm_hopper_kernel(
    x_desc,
    w_desc,
    t_desc,
    up_desc,
    y_desc,
    bias_ptr,
    keep_ptr,
    keep_width,
    M,
    N,
    K,
    R,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    UP_IS_RN: gl.constexpr,
    W_IS_KN: gl.constexpr,
):
    """Each program walks over [BLOCK_M, BLOCK_N] tiles of y.

    Grid: one program per multiprocessor. Launched with the four warps of the first group.
    Descriptors: x [M, K], t [M, R], w [N, K] or, with W_IS_KN, [K, N], up [N, R] or, with
    UP_IS_RN, [R, N], y [M, N] in blocks of a group's rows and a part of the columns; all of one
    16-bit dtype. bias: [N], keep: [M, keep_width] bytes, keep_width = ceil(N / 8); or None.
    The accelerator fills with zeros and clips at the edges.
    Accumulates in fp32, the update first, and rounds y once, at the store.
    """
    gl.static_assert(BLOCK_R <= BLOCK_K)  # the tiles along the rank lie in the stages
    dtype: gl.constexpr = x_desc.dtype
    x_shape: gl.constexpr = stacked(STAGES, x_desc.block_shape)
    w_shape: gl.constexpr = stacked(STAGES, w_desc.block_shape)
    y_shape: gl.constexpr = stacked(GROUPS * BUFFERS, y_desc.block_shape)
    x_tiles = gl.allocate_shared_memory(dtype, x_shape, x_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    y_tiles = gl.allocate_shared_memory(dtype, y_shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()  # the copy engine is to see the barriers, too

    ring = (x_tiles, w_tiles, full, empty)
    products = ((t_desc, up_desc), (x_desc, w_desc))
    sizes = (M, N, K, R)
    y = (y_desc, y_tiles)
    extras = (bias_ptr, keep_ptr, keep_width)
    gl.warp_specialize(
        [
            (consume, (0, products, ring, sizes, y, extras, BLOCK_N, GROUP_M, UP_IS_RN, W_IS_KN)),
            (consume, (1, products, ring, sizes, y, extras, BLOCK_N, GROUP_M, UP_IS_RN, W_IS_KN)),
            (produce, (products, ring, sizes, BLOCK_N, GROUP_M, UP_IS_RN, W_IS_KN)),
        ],
        [4, 1],
        REGISTERS,
    )


def lora_gemm_hopper(
    x: Tensor,
    w: Tensor,
    up: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    config: GemmConfig,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> None:
    """Launch the product for x (M, K), w (N, K), up (N, R) and t (M, R); it writes y (M, N).

    x, w, t and y share a 16-bit dtype, and x, w and y lie as `lora_gemm.tma_operands_fit` demands.
    An `up` of another dtype, and a rank whose rows are no multiple of 16 bytes, are copied first.

    Raises:
        ValueError: the GPU is no Hopper, the dtype has not 16 bits, or the tile is for other warps.
    """
    (M, K), (N, R) = x.shape, up.shape
    t, up = rank_operand(t, x.dtype), rank_operand(up, x.dtype)
    w_is_kn, up_is_rn = w.stride(1) != 1, up.stride(1) != 1
    block_r, planned = hopper_launch(
        *(config, GROUPS.value, M, N, R, w_is_kn, up_is_rn, x.device, x.dtype),
        *(K, None if bias is None else bias.dtype, keep is not None),
    )
    rows, cols, depth = config.block_m, config.block_n, config.block_k
    launch(
        lora_gemm_hopper_kernel,
        planned,
        *(describe(x, rows, depth), describe_factor(w, cols, depth, w_is_kn)),
        *(describe(t, rows, block_r), describe_factor(up, cols, block_r, up_is_rn)),
        describe(y, rows // GROUPS.value, cols // config.parts),
        *(bias, keep, packed_width(N), M, N, K, R),
    )
