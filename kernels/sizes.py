"""Sizes of blocks and grids: what is decided in plain integers before a launch."""

MAX_BLOCK_R = 64  # wider ranks are cut into blocks of this many columns
MAX_GRID_Y = 65535  # CUDA's limit for the second and third axis of a grid
MAX_SIZE = 2**31 - 2**16  # of one dimension: the end of a tile beyond it fits 32 bits


def cdiv(length: int, block: int) -> int:
    """How many blocks cover a length. `triton.cdiv` serves kernels as well and takes 3 us."""
    return -(-length // block)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller; as with `cdiv`, Triton's own takes its time."""
    return 1 << max(number - 1, 0).bit_length()


def rank_blocks(rank: int) -> tuple[int, int]:
    """Width of a block of the rank (16 is the least that `tl.dot` takes) and how many there are."""
    block_r = min(MAX_BLOCK_R, max(16, next_power_of_2(rank)))
    return block_r, cdiv(rank, block_r)


def chunk_length(length: int, chunk: int) -> int:
    """`chunk`, or the power of two from which `length` fits a grid's second axis in chunks."""
    return max(chunk, next_power_of_2(cdiv(length, MAX_GRID_Y)))
