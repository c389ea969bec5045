import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from triton.runtime import interpreter

from lora_fast.kernels import counters
from lora_fast.kernels.configs import ARCHITECTURES
from lora_fast.kernels.decode_configs import (
    TILES,
    DecodeConfig,
    DecodeSplits,
    decode_config,
    decode_splits,
)
from lora_fast.kernels.lora_decode import lora_decode
from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd
from lora_fast.kernels.plans import forward_plan

# The interpreter has no bf16 arithmetic, so it upcasts; a GPU runs the real thing.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_K = 32
# Slices that overlap the end of K = 77 and, with 4 programs for 3 blocks of A, its middle.
SPLITS = {"whole": DecodeSplits(1, 1, 96, 96), "cut": DecodeSplits(2, 3, 64, 32)}


def run(inputs: Any, splits: DecodeSplits | None = SPLITS["cut"]) -> Any:
    # A tile small enough to interpret, and smaller than most inputs here.
    config = DecodeConfig(32, BLOCK_K * inputs.x.element_size(), num_warps=4, num_stages=2)
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling)
    return lora_decode(*args, config=config, splits=splits)


def check(inputs: Any, found: Any) -> None:
    wide, (y, s) = inputs.wide(), found
    assert_within_budget(y, inputs.forward(), wide.forward(), what="y")
    eager = inputs.x @ inputs.lora_a.to(inputs.x.dtype).t() * inputs.scaling
    oracle = wide.x @ wide.lora_a.t() * inputs.scaling
    assert_within_budget(s, eager, oracle, what="s")
    for used in counters_in_use(inputs.x.device):
        assert torch.count_nonzero(used) == 0


def counters_in_use(device: torch.device) -> list[torch.Tensor]:
    return list(counters._counters[device].of_stream.values())


@contextmanager
def shuffled_programs(order: random.Random) -> Iterator[None]:
    """Interpret the programs of a launch in a random order."""
    builder = interpreter.interpreter_builder
    set_index, orders = builder.set_grid_idx, {}

    def set_other(x: int, y: int, z: int) -> None:
        size = builder.grid_dim[0]
        if x == 0:
            orders[size] = order.sample(range(size), size)
        set_index(orders[size][x], y, z)

    builder.set_grid_idx = set_other
    try:
        yield
    finally:
        builder.set_grid_idx = set_index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("rows", [1, 2, 16, 64])
def test_dtypes(rows: int, splits: str, dtype: torch.dtype, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 65, 77, 5, dtype)
    check(inputs, run(inputs, SPLITS[splits]))


@pytest.mark.parametrize("rows", range(1, 64, 2))
def test_every_odd_number_of_rows(rows: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 33, 77, 3, bias=rows % 4 == 1)
    check(inputs, run(inputs))


@pytest.mark.parametrize("rank", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("rows", [1, 7])
def test_ranks(rows: int, rank: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 40, 77, rank, torch.float16)
    check(inputs, run(inputs))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 5, 1), (1, 257, 130, 4), (2, 130, 7, 4)])
def test_odd_features_cut_by_the_model(shape: Any, make_inputs: Any) -> None:
    inputs = make_inputs(*shape)
    check(inputs, run(inputs, None))


@pytest.mark.parametrize("rows", [1, 9])
def test_strides(rows: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 40, 77, 4, torch.float16)
    for name in ("weight", "lora_a", "lora_b"):
        setattr(inputs, name, getattr(inputs, name).t().contiguous().t())
    inputs.x = torch.randn(3 * rows, 2 * 77, device=inputs.x.device).half()[::3, ::2]
    check(inputs, run(inputs))
    inputs.x = inputs.x[:1].expand(rows, 77)
    check(inputs, run(inputs))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_adapters_of_another_dtype(rows: int, adapter: torch.dtype, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 24, 77, 4, torch.float16, adapter_dtype=adapter)
    check(inputs, run(inputs))


@pytest.mark.parametrize("rows", [1, 9])
def test_blocks_of_columns_with_updates_of_their_own(rows: int, make_inputs: Any) -> None:
    """Edges inside tiles, a tile of three blocks, columns without an update."""
    blocks = ((3, 40, 0), (41, 43, 37), (50, 90, 39))
    inputs = make_inputs(rows, 100, 77, 6, torch.float16)
    inputs.lora_b = torch.randn(79, 2, device=inputs.x.device).half()
    config = DecodeConfig(32, 2 * BLOCK_K, num_warps=4, num_stages=2)
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling)
    found = lora_decode(*args, config=config, blocks=blocks, splits=SPLITS["cut"])
    spread = torch.zeros(100, 6, device=inputs.x.device).half()
    for index, (first, end, row) in enumerate(blocks):
        rows_of_b = inputs.lora_b[row : row + end - first]
        spread[first:end, 2 * index : 2 * index + 2] = rows_of_b
    inputs.lora_b = spread
    check(inputs, found)
    inputs.lora_b = spread.roll(1, dims=0)
    with pytest.raises(AssertionError, match="budget"):
        check(inputs, found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_spread_as_in_torch(value: float, rows: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 40, 77, 8)
    inputs.x[rows - 1, 70] = value
    y, s = run(inputs)
    assert torch.equal(y.isfinite(), inputs.forward().isfinite())
    assert torch.equal(s.isfinite().all(1), inputs.x.isfinite().all(1))


@pytest.mark.parametrize("rows", [1, 9])
def test_the_same_bits_in_every_order_of_the_programs(rows: int, make_inputs: Any) -> None:
    """Also those in which the update's S is there last, so that its program finishes y."""
    inputs = make_inputs(rows, 65, 150, 5, torch.float16)
    splits = DecodeSplits(3, 5, 64, 32)
    first = run(inputs, splits)
    check(inputs, first)
    order = random.Random(0)
    for _ in range(5):
        if inputs.x.is_cuda:  # the GPU has an order of its own each time
            again = run(inputs, splits)
        else:
            with shuffled_programs(order):
                again = run(inputs, splits)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    check(inputs, again)


def test_more_tiles_than_are_looked_at_together(make_inputs: Any) -> None:
    inputs = make_inputs(2, 32 * 65, 16, 3)
    config = DecodeConfig(32, 128, num_warps=1, num_stages=2)
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling)
    if inputs.x.is_cuda:
        check(inputs, lora_decode(*args, config=config))
    else:
        with shuffled_programs(random.Random(1)):
            check(inputs, lora_decode(*args, config=config))


def test_calls_of_different_sizes_share_the_counters(make_inputs: Any) -> None:
    for n in (40, counters.FEWEST + 1, 40):
        inputs = make_inputs(1, n, 16, 2)
        check(inputs, run(inputs, None))
    assert max(used.numel() for used in counters_in_use(inputs.x.device)) >= counters.FEWEST


def test_a_counter_that_was_left_over_is_seen(make_inputs: Any) -> None:
    """The tests can fail: a tile that is finished too early lacks a partial sum."""
    inputs = make_inputs(2, 40, 77, 3)
    run(inputs)
    for used in counters_in_use(inputs.x.device):
        used[1] = 1
    found = run(inputs)
    for used in counters_in_use(inputs.x.device):
        used.zero_()
    with pytest.raises(AssertionError, match="y"):
        check(inputs, found)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    "skipping",
    [DecodeSplits(1, 3, 64, 32), DecodeSplits(2, 2, 64, 32)],
    ids=["of the weight", "of A"],
)
def test_a_skipped_slice_is_seen(skipping: DecodeSplits, rows: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 40, 77, 4)
    with pytest.raises(AssertionError, match="budget"):
        check(inputs, run(inputs, skipping))


@pytest.mark.parametrize("rows", [1, 9])
def test_a_scale_off_by_two_percent_is_seen(rows: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 40, 77, 4)
    inputs.scaling *= 1.02
    found = run(inputs)
    inputs.scaling /= 1.02
    with pytest.raises(AssertionError, match="budget"):
        check(inputs, found)


def test_the_layer_takes_it_and_its_s_serves_the_backward(make_inputs: Any) -> None:
    inputs = make_inputs(6, 40, 72, 4, torch.float16)
    inputs.x, inputs.dy = inputs.x.view(2, 3, 72), inputs.dy.view(2, 3, 40)
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling)
    y, s, mask = lora_linear_fwd(*args)
    assert (y.shape, s.shape, mask.shape) == ((2, 3, 40), (6, 4), (0,))
    assert_within_budget(y, inputs.forward(), inputs.wide().forward())
    needs = [False, False, False, False, True]
    grads = lora_linear_bwd(
        *(inputs.dy, None, None, inputs.lora_a, inputs.lora_b, s, None),
        *(inputs.scaling, 0.0, needs, torch.float16),
    )
    eager, oracle = inputs.gradients(), inputs.wide().gradients()
    assert_within_budget(grads[4], eager["lora_b"], oracle["lora_b"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_it_serves(arch: str, dtype: torch.dtype) -> None:
    def impl(rows: int, rank: int = 16, dropout: bool = False) -> str:
        sizes = (rows, 4096, 4096, rank, dtype, dropout)
        return forward_plan(ARCHITECTURES[arch], *sizes).impl

    assert impl(1) == impl(64) == impl(64, rank=64) == "decode"
    assert "decode" not in (impl(65), impl(1, rank=65), impl(1, dropout=True))


@pytest.mark.parametrize(("rows", "rank"), [(65, 4), (1, 65), (0, 4)])
def test_what_it_refuses(rows: int, rank: int, make_inputs: Any) -> None:
    with pytest.raises(ValueError, match="64"):
        run(make_inputs(rows, 8, 8, rank), None)


@pytest.mark.parametrize("features", [1, 17, 512, 4096, 14336])
@pytest.mark.parametrize("tiles", [1, 16, 256, 9496])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_the_slices_cover_the_features_once(rows: int, tiles: int, features: int) -> None:
    config = decode_config("sm_90", rows, torch.float16)
    block_k = config.row_bytes // 2
    splits = decode_splits(config, block_k, tiles, features, 132 * TILES["sm_90"].bytes_in_flight)
    for count, width in ((splits.w, splits.slice_w), (splits.a, splits.slice_a)):
        assert width % block_k == 0
        assert (count - 1) * width < features <= count * width
        assert 1 <= count <= 16


def test_every_architecture_has_tiles() -> None:
    assert set(TILES) == set(ARCHITECTURES)


@pytest.mark.parametrize("rows", [2, 17, 32, 33, 64])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tiles_of_fp32_with_many_rows(arch: str, rows: int, make_inputs: Any) -> None:
    inputs = make_inputs(rows, 40, 77, 5, torch.float32)
    args = (inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling)
    config = decode_config(arch, rows, torch.float32)
    check(inputs, lora_decode(*args, config=config))
    # More bytes than these do not fit sm_89.
    block_m, stages = max(16, 1 << (rows - 1).bit_length()), max(1, config.num_stages - 1)
    assert stages * (block_m + config.block_n) * config.row_bytes <= 99 * 1024


@pytest.mark.gpu
def test_a_graph_replays_beside_other_calls(make_inputs: Any) -> None:
    inputs = make_inputs(4, 512, 1024, 8, torch.float16)
    expected = run(inputs, None)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    found = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            found.append(run(inputs, None))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(50):
        for stream, replay in zip(
            streams, [*(g.replay for g in graphs), lambda: run(inputs, None)], strict=True
        ):
            with torch.cuda.stream(stream):
                replay()
    torch.cuda.synchronize()
    for pair in found:
        assert all(torch.equal(*both) for both in zip(expected, pair, strict=True))
