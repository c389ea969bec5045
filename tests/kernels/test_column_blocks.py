"""The kernels of the linear layers where only blocks of the output's columns have an adapter."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from lora_fast.kernels.column_blocks import column_blocks, gaps, whole_or
from lora_fast.kernels.configs import GemmConfig, GradAConfig, GradSBConfig, ShrinkConfig
from lora_fast.kernels.dropout import keep_scale, unpack_mask
from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd
from lora_fast.kernels.plans import ONE_BLOCK, BackwardPlan, ForwardPlan

# Tiles small enough to interpret, and smaller than most inputs here.
GEMMS = {
    "pointers": GemmConfig(32, 32, 32, num_warps=4, num_stages=2),
    "tma": GemmConfig(32, 64, 32, num_warps=4, num_stages=2, tma=True, parts=4),
}
FORWARD = {
    f"{impl}-{gemm}": ForwardPlan(
        impl, GEMMS[gemm], ShrinkConfig(16, 32, 32, num_warps=4, num_stages=2)
    )
    for impl, gemm in product(
        ("one_pass", "split", "lora_first", "library_expand", "library"), GEMMS
    )
}
BACKWARD = {
    f"{input_grad}-{'library' if library else 'kernel'}": BackwardPlan(
        input_grad,
        library,
        GEMMS["pointers"],
        GradSBConfig(32, 16, 32, num_warps=4, num_stages=2),
        GradAConfig(32, 32, 64, num_warps=4, num_stages=2),
    )
    for input_grad, library in product(("fused", "lora_first", "library"), (False, True))
}
# Of 72 columns, in tiles of 32 and 64; 72 so that the accelerator takes y in 16 bits too.
N = 72
EDGES = {
    "no_middle": [0, 33, 41, 72],
    "no_first": [5, 38, 38, 72],
    "no_last": [0, 7, 7, 40],
    "alone_inside_a_tile": [34, 37],
    "one_column_wide": [0, 1, 1, 65, 71, 72],
    "on_the_tiles": [0, 32, 64, 72],
    "all": [0, 24, 24, 48, 48, 72],
}
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")
# One way of running each implementation, where the other adds nothing but time.
ONE_OF_EACH = [*FORWARD][::2]


def forward(inputs: Any, plan: str | None, p: float = 0.0) -> Any:
    seed = torch.tensor([17], device=inputs.x.device) if p > 0.0 else None
    return lora_linear_fwd(
        *(inputs.x, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b, inputs.scaling),
        *(p, seed, inputs.edges),
        plan=None if plan is None else FORWARD[plan],
    )


def backward(inputs: Any, plan: str | None, p: float = 0.0, needs: Any = (True,) * 5) -> Any:
    """The gradients by name, and the scaled mask of the forward."""
    _, s, mask = forward(inputs, "split-pointers", p)
    need_x, need_w, _, need_a, need_b = needs
    found = lora_linear_bwd(
        inputs.dy,
        inputs.x if need_w or need_a else None,
        inputs.weight if need_x else None,
        *(inputs.lora_a, inputs.lora_b, s if need_b else None, mask if p > 0.0 else None),
        *(inputs.scaling, p, list(needs), inputs.dy.dtype, inputs.edges),
        plan=None if plan is None else BACKWARD[plan],
    )
    return dict(zip(NAMES, found, strict=True)), scaled(mask, inputs, p)


def scaled(mask: Tensor, inputs: Any, p: float) -> Tensor | None:
    if p == 0.0:
        return None
    return unpack_mask(mask, inputs.x.shape[-1]).double() * keep_scale(p)


def check_output(inputs: Any, y: Tensor, keep: Tensor | None = None) -> None:
    assert_within_budget(y, inputs.forward(keep), inputs.wide().forward(keep))


def check_gradients(inputs: Any, found: Any, keep: Any = None, names: Any = NAMES) -> None:
    eager, oracle = inputs.gradients(keep), inputs.wide().gradients(keep)
    for name in names:
        assert_within_budget(found[name], eager[name], oracle[name], what=f"gradient of {name}")


def test_column_blocks_count_the_rows_of_b() -> None:
    blocks = column_blocks([2, 5, 5, 6, 9, 12], 12)
    assert blocks == ((2, 5, 0), (5, 6, 3), (9, 12, 4))
    assert gaps(blocks, 12) == ((0, 2, -1), (6, 9, -1))
    assert gaps(blocks, 13) == ((0, 2, -1), (6, 9, -1), (12, 13, -1))
    assert whole_or(blocks, 12) == blocks


@pytest.mark.parametrize("edges", [None, [0, 12], (0, 12)])
def test_the_whole_output_is_no_block(edges: Any) -> None:
    assert column_blocks(edges, 12) is None
    assert whole_or(None, 12) == ((0, 12, 0),)
    assert gaps(whole_or(None, 12), 12) == ()


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("plan", FORWARD)
def test_forward(plan: str, edges: str, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 3, edges=EDGES[edges])
    y, s, mask = forward(inputs, plan)
    check_output(inputs, y)
    assert mask.numel() == 0
    expected = inputs.wide().x @ inputs.wide().lora_a.t() * inputs.scaling
    torch.testing.assert_close(s.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("edges", EDGES)
def test_forward_of_few_rows(edges: str, make_inputs: Any) -> None:
    """What serves small batches, by the plan of the call itself."""
    inputs = make_inputs(3, N, 40, 3, torch.float16, edges=EDGES[edges])
    check_output(inputs, forward(inputs, None)[0])


@pytest.mark.parametrize("rank", [16, 24, 70])  # all blocks together: 48, 72 and 210
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("plan", ONE_OF_EACH)
def test_forward_at_large_ranks(plan: str, bias: bool, rank: int, make_inputs: Any) -> None:
    if FORWARD[plan].impl in ONE_BLOCK and rank > 16:
        pytest.skip("it keeps S in registers: a single block of the rank")
    inputs = make_inputs(18, N, 40, rank, bias=bias, edges=EDGES["one_column_wide"])
    check_output(inputs, forward(inputs, plan)[0])


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", ONE_OF_EACH)
def test_forward_in_every_dtype(
    plan: str, dtype: torch.dtype, adapter: torch.dtype, make_inputs: Any
) -> None:
    inputs = make_inputs(20, N, 40, 4, dtype, adapter_dtype=adapter, edges=EDGES["one_column_wide"])
    y, _, _ = forward(inputs, plan)
    assert y.dtype == dtype
    check_output(inputs, y)


@pytest.mark.parametrize("plan", FORWARD)
def test_forward_of_any_strides(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(24, N, 36, 4, edges=EDGES["no_middle"])
    for name in ("weight", "lora_a", "lora_b"):
        setattr(inputs, name, getattr(inputs, name).t().contiguous().t())
    inputs.x = torch.randn(2, 3, 8, 36, device=inputs.x.device)[:, :, ::2]
    y, _, _ = forward(inputs, plan)
    assert y.shape == (2, 3, 4, N)
    check_output(inputs, y)


@pytest.mark.parametrize("shape", [(1, 1, 1, [0, 1]), (130, 7, 5, [6, 7]), (1, 257, 7, [1, 257])])
@pytest.mark.parametrize("plan", ONE_OF_EACH)
def test_forward_of_odd_sizes(plan: str, shape: Any, make_inputs: Any) -> None:
    m, n, k, edges = shape
    inputs = make_inputs(m, n, k, 1, edges=edges)
    check_output(inputs, forward(inputs, plan)[0])


@pytest.mark.parametrize("plan", FORWARD)
def test_one_whole_block_is_the_plain_layer(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 4, edges=[0, N])
    y, s, _ = forward(inputs, plan)
    inputs.edges = None
    expected, expected_s, _ = forward(inputs, plan)
    assert torch.equal(y, expected)
    assert torch.equal(s, expected_s)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("plan", FORWARD)
def test_forward_keeps_a_broken_block_to_itself(plan: str, value: float, make_inputs: Any) -> None:
    """What one block's A breaks is no column of another block, nor of none."""
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_middle"])
    inputs.lora_a[1, 3] = value
    y, _, _ = forward(inputs, plan)
    assert not y[:, :33].isfinite().any()
    assert torch.equal(y.isfinite(), inputs.forward().isfinite())


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("plan", BACKWARD)
def test_backward(plan: str, edges: str, make_inputs: Any) -> None:
    inputs = make_inputs(45, N, 40, 3, edges=EDGES[edges])
    check_gradients(inputs, backward(inputs, plan)[0])


@pytest.mark.parametrize(("rank", "p"), [(4, 0.1), (24, 0.5)])
def test_dropout(rank: int, p: float, make_inputs: Any) -> None:
    inputs = make_inputs(18, N, 37, rank, edges=EDGES["one_column_wide"])
    one_block = 3 * rank <= 64  # of all blocks together
    for plan in ("split-pointers", f"{'lora_first' if one_block else 'library_expand'}-pointers"):
        y, _, mask = forward(inputs, plan, p)
        check_output(inputs, y, scaled(mask, inputs, p))
    for plan in ("fused-kernel", "lora_first-library" if one_block else "fused-library"):
        found, keep = backward(inputs, plan, p)
        check_gradients(inputs, found, keep)


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, None)],
    ids=str,
)
@pytest.mark.parametrize("plan", BACKWARD)
def test_backward_in_every_dtype(
    plan: str, dtype: torch.dtype, adapter: torch.dtype | None, make_inputs: Any
) -> None:
    adapter = adapter or torch.float32
    inputs = make_inputs(20, N, 40, 4, dtype, adapter_dtype=adapter, edges=EDGES["no_middle"])
    found, _ = backward(inputs, plan)
    assert found["lora_a"].dtype == found["lora_b"].dtype == adapter
    check_gradients(inputs, found)


@pytest.mark.parametrize("missing", range(5), ids=NAMES)
@pytest.mark.parametrize("plan", ["fused-kernel", "lora_first-library"])
def test_what_is_not_needed_is_not_computed(plan: str, missing: int, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_first"])
    needs = tuple(i != missing for i in range(5))
    found, _ = backward(inputs, plan, needs=needs)
    assert found[NAMES[missing]].numel() == 0
    check_gradients(inputs, found, names=[n for n in NAMES if n != NAMES[missing]])


@pytest.mark.parametrize("only", range(5), ids=NAMES)
def test_one_gradient_alone(only: int, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_last"])
    found, _ = backward(inputs, None, needs=tuple(i == only for i in range(5)))
    check_gradients(inputs, found, names=[NAMES[only]])


@pytest.mark.parametrize("plan", BACKWARD)
def test_backward_of_any_strides(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_middle"])
    for name in ("x", "dy", "weight", "lora_a", "lora_b"):
        setattr(inputs, name, getattr(inputs, name).t().contiguous().t())
    check_gradients(inputs, backward(inputs, plan)[0])
    inputs.dy = torch.ones((), device=inputs.dy.device).expand(20, N)
    check_gradients(inputs, backward(inputs, plan)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("plan", BACKWARD)
def test_backward_keeps_a_broken_block_to_itself(plan: str, make_inputs: Any) -> None:
    """A NaN in the gradient of one block's columns is in its A and B, and in no other's."""
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_middle"])
    inputs.dy[4, 32] = float("nan")
    found, _ = backward(inputs, plan)
    assert not found["lora_a"][:3].isfinite().any()
    expected = inputs.gradients()
    for name in ("lora_a", "lora_b", "bias"):
        assert torch.equal(found[name].isfinite(), expected[name].isfinite())


def test_no_rows(make_inputs: Any) -> None:
    inputs = make_inputs(0, N, 20, 3, edges=EDGES["no_middle"])
    y, s, mask = forward(inputs, None, 0.5)
    assert (y.shape, s.shape, mask.shape) == ((0, N), (0, 6), (0, 3))
    found, _ = backward(inputs, None)
    assert found["x"].shape == (0, 20)
    for name in NAMES[1:]:
        assert torch.count_nonzero(found[name]) == 0
        assert found[name].shape == vars(inputs)[name].shape


@pytest.mark.parametrize("plan", ["fused-kernel", "lora_first-library"])
def test_the_same_bits_every_time(plan: str, make_inputs: Any) -> None:
    inputs = make_inputs(33, N, 24, 8, torch.float16, edges=EDGES["one_column_wide"])
    first, second = backward(inputs, plan)[0], backward(inputs, plan)[0]
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    for name in ONE_OF_EACH:
        assert torch.equal(forward(inputs, name)[0], forward(inputs, name)[0])


def _scaled(inputs: Any) -> None:
    inputs.scaling *= 1.02


def _swapped(inputs: Any) -> None:
    inputs.lora_b = inputs.lora_b.flip(0).contiguous()


def _edge_off_by_one(inputs: Any) -> None:
    inputs.edges = [0, 32, 40, 72]


def _another_groups_a(inputs: Any) -> None:
    inputs.lora_a = inputs.lora_a.roll(3, 0)


MUTANTS = [_scaled, _swapped, _edge_off_by_one, _another_groups_a]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("plan", ONE_OF_EACH)
def test_a_wrong_forward_is_seen(plan: str, mutant: Any, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_middle"])
    right = type(inputs)(**vars(inputs))
    mutant(inputs)
    with pytest.raises(AssertionError, match="budget"):
        check_output(right, forward(inputs, plan)[0])


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("plan", BACKWARD)
def test_a_wrong_backward_is_seen(plan: str, mutant: Any, make_inputs: Any) -> None:
    inputs = make_inputs(20, N, 40, 3, edges=EDGES["no_middle"])
    right = type(inputs)(**vars(inputs))
    mutant(inputs)
    found, _ = backward(inputs, plan)
    for name in ("x", "lora_a") if mutant is not _another_groups_a else ("x", "lora_b"):
        with pytest.raises(AssertionError, match=f"gradient of {name}"):
            check_gradients(right, found, names=[name])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_keep_a_broken_block_to_themselves(
    rows: int, value: float, make_inputs: Any
) -> None:
    inputs = make_inputs(rows, 72, 40, 3, edges=[0, 33, 41, 72])
    inputs.lora_a[1, 3] = value
    i = inputs
    y = lora_linear_fwd(i.x, i.weight, i.bias, i.lora_a, i.lora_b, i.scaling, 0.0, None, i.edges)[0]
    assert not y[:, :33].isfinite().any()
    assert torch.equal(y.isfinite(), inputs.forward().isfinite())
