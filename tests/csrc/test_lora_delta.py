"""The ops that add an adapter to a few rows on a CPU, and their gradients, against float64."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast import blocks, delta, eager, ops
from lora_fast.blocks import Spans
from lora_fast.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE: Spans = ((0, 37),)
OUTER: Spans = ((0, 37), (74, 111))
UNEQUAL: Spans = ((5, 6), (6, 71), (100, 111))
# Around the cells of 8 x 32, the vectors of 16, 8 and 4, and single numbers.
SHAPES = [
    # rows, in, rank, spans
    (1, 1, 1, ONE),
    (1, 64, 16, OUTER),
    (2, 33, 3, UNEQUAL),
    (3, 100, 4, OUTER),
    (4, 31, 8, ONE),
    (7, 129, 33, UNEQUAL),
    (8, 96, 16, OUTER),
    (13, 77, 5, UNEQUAL),
    (32, 200, 64, OUTER),
    (64, 200, 16, OUTER),
]
N = 111


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


class Call:
    """The tensors of one call."""

    def __init__(
        self, rows: int, k: int, rank: int, spans: Spans, dtype: torch.dtype, p: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(rows * 1000 + k)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.spans, self.scaling = spans, 0.75
        self.x, self.lora_A = draw(rows, k), draw(rank * len(spans), k) / 4
        self.lora_B = draw(sum(hi - lo for lo, hi in spans), rank) / 4
        self.y, self.dy, self.dx = draw(rows, N), draw(rows, N), draw(rows, k)
        self.keep = torch.rand(rows, k, generator=generator) >= p if p else None
        self.keep_scale = 1.0 / (1.0 - p)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Y and S, by the formula."""
        x, a, b, y = (t.to(dtype) for t in (self.x, self.lora_A, self.lora_B, self.y))
        s, y = x @ a.t(), y.clone()
        for block, s_b, b_b in self.parts(s, b):
            y[:, slice(*block)] += self.scaling * (s_b @ b_b.t())
        return y, s

    def backward(self, dtype: torch.dtype, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of X, A and B, by the formula."""
        tensors = (self.x, self.lora_A, self.lora_B, self.dy, self.dx, s)
        x, a, b, dy, dx, s = (t.to(dtype) for t in tensors)
        mask = 1.0 if self.keep is None else self.keep.to(dtype)
        scale = self.scaling * self.keep_scale
        parts = list(self.parts(s, b))
        ds = scale * torch.cat([dy[:, slice(*block)] @ b_b for block, _, b_b in parts], 1)
        db = self.scaling * torch.cat([dy[:, slice(*block)].t() @ s_b for block, s_b, _ in parts])
        return dx + (ds @ a) * mask, ds.t() @ (x * mask), db

    def parts(self, s: Tensor, b: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        columns = blocks.columns(s, b.shape[1], self.spans)
        return zip(self.spans, columns, blocks.rows(b, self.spans), strict=True)

    def by_the_op(self) -> tuple[Tensor, Tensor]:
        y, s = self.y.clone(), self.empty_s()
        edges = blocks.edges(self.spans)
        assert ops.lora_delta_fwd_(self.x, self.lora_A, self.lora_B, self.scaling, edges, y, s)
        return y, s

    def empty_s(self) -> Tensor:
        return self.x.new_full((self.x.shape[0], self.lora_A.shape[0]), torch.nan)

    def gradients_by_the_op(self, s: Tensor, needs: str = "xAB") -> tuple[Tensor | None, ...]:
        made = {
            "x": self.dx.clone(),
            "A": torch.full_like(self.lora_A, torch.nan),
            "B": torch.full_like(self.lora_B, torch.nan),
        }
        grads = [made[name] if name in needs else None for name in made]
        edges = blocks.edges(self.spans)
        rest = (self.keep, self.scaling, self.keep_scale, edges, *grads)
        x, s = self.x if "A" in needs else None, s if "B" in needs else None
        assert ops.lora_delta_bwd_(self.dy, x, self.lora_A, self.lora_B, s, *rest)
        return tuple(grads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: Any, dtype: torch.dtype, isa: str) -> None:
    call = Call(*shape, dtype)
    found, plain, wide = call.by_the_op(), call.forward(dtype), call.forward(torch.float64)
    for name, actual, usual, oracle in zip("ys", found, plain, wide, strict=True):
        assert_within_budget(actual, usual, oracle, what=name)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape: Any, p: float, dtype: torch.dtype, isa: str) -> None:
    call = Call(*shape, dtype, p)
    s = call.forward(dtype)[1]
    found = call.gradients_by_the_op(s)
    plain, wide = call.backward(dtype, s), call.backward(torch.float64, s)
    for name, actual, usual, oracle in zip(["dx", "dA", "dB"], found, plain, wide, strict=True):
        assert actual is not None
        assert_within_budget(actual, usual, oracle, what=name)


@pytest.mark.parametrize("needs", ["", "x", "A", "B", "xA", "xB", "AB"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_what_is_not_needed_changes_nothing_else(needs: str, p: float, dtype: torch.dtype) -> None:
    call = Call(13, 77, 5, UNEQUAL, dtype, p)
    s = call.forward(dtype)[1]
    whole = dict(zip("xAB", call.gradients_by_the_op(s), strict=True))
    found = dict(zip("xAB", call.gradients_by_the_op(s, needs), strict=True))
    for name in "xAB":
        if name in needs:
            assert torch.equal(found[name], whole[name])
        else:
            assert found[name] is None


def test_columns_of_no_block_keep_their_bits(dtype: torch.dtype) -> None:
    call = Call(8, 96, 16, OUTER, dtype)
    y, _ = call.by_the_op()
    assert torch.equal(y[:, 37:74], call.y[:, 37:74])
    assert not torch.equal(y[:, :37], call.y[:, :37])


def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    call = Call(32, 1024, 16, ((0, 37), (37, 111)), dtype, 0.3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, s = call.by_the_op()
            found.append((y, s, *call.gradients_by_the_op(s)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(itertools.starmap(torch.equal, zip(found[0], other, strict=True)))


@pytest.mark.parametrize("empty", ["rows", "features", "rank"])
def test_nothing_to_sum(empty: str, dtype: torch.dtype) -> None:
    rows, k, rank = (0 if empty == name else size for name, size in zip(
        ["rows", "features", "rank"], (5, 40, 4), strict=True
    ))  # fmt: skip
    call = Call(rows, k, rank, OUTER, dtype)
    y, s = call.by_the_op()
    assert torch.equal(y, call.y)
    assert s.shape == (rows, 2 * rank)
    dx, da, db = call.gradients_by_the_op(s)
    assert dx is not None and da is not None and db is not None
    assert torch.equal(dx, call.dx)
    assert not da.any()
    assert not db.any()


def test_nan_and_infinity_stay_in_their_rows(dtype: torch.dtype) -> None:
    call = Call(9, 40, 4, OUTER, dtype)
    call.x[3, 7], call.x[5, 0] = torch.nan, torch.inf
    y, _ = call.by_the_op()
    finite = y.isfinite().all(1)
    assert finite.tolist() == [i not in (3, 5) for i in range(9)]
    assert y[3, 37:74].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_exactly(dtype: torch.dtype, isa: str) -> None:
    s = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(0)
    one, rank = torch.ones(1, 1, dtype=dtype), s.shape[1]
    lora_A, lora_B = torch.zeros(rank, 1, dtype=dtype), torch.zeros(1, rank, dtype=dtype)
    db = torch.zeros_like(lora_B)
    rest = (None, 1.0, 1.0, [0, 1], None, None, db)
    assert ops.lora_delta_bwd_(one, one, lora_A, lora_B, s, *rest)
    torch.testing.assert_close(db, s, rtol=0, atol=0, equal_nan=True)
    # As every other factor is read: rows of A, for dX.
    dx = torch.zeros(1, rank, dtype=dtype)
    rest = (None, 1.0, 1.0, [0, 1], dx, None, None)
    assert ops.lora_delta_bwd_(one, torch.zeros_like(dx), s, one, one, *rest)
    torch.testing.assert_close(dx, s, rtol=0, atol=0, equal_nan=True)


def in_wide_rows(tensor: Tensor) -> Tensor:
    """The same numbers, with others between the rows."""
    padded = torch.full((tensor.shape[0], tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype)
    padded[:, : tensor.shape[1]] = tensor
    return padded[:, : tensor.shape[1]]


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy", "dx", "y"])
def test_rows_that_lie_apart(name: str, dtype: torch.dtype) -> None:
    call = Call(8, 96, 16, OUTER, dtype)
    y, s = call.by_the_op()
    expected = (y, s, *call.gradients_by_the_op(s))
    setattr(call, name, in_wide_rows(getattr(call, name)))
    y, s = call.by_the_op()
    found = (y, s, *call.gradients_by_the_op(s))
    assert all(itertools.starmap(torch.equal, zip(found, expected, strict=True)))


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_columns_that_lie_apart_are_left_to_torch(name: str) -> None:
    call = Call(8, 96, 16, OUTER, torch.float32)
    expected = delta.add_(call.y.clone(), call.x, call.lora_A, call.lora_B, 0.75, OUTER)
    setattr(call, name, getattr(call, name).t().contiguous().t())
    y = call.y.clone()
    edges = blocks.edges(OUTER)
    assert not ops.lora_delta_fwd_(call.x, call.lora_A, call.lora_B, 0.75, edges, y, call.empty_s())
    assert torch.equal(y, call.y)
    s = delta.add_(y, call.x, call.lora_A, call.lora_B, 0.75, OUTER)
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(y, call.forward(torch.float32)[0])


def test_many_numbers_are_left_to_torch() -> None:
    call = Call(32, 4096, 64, ((0, N),), torch.float32)
    assert not ops.lora_delta_fwd_(
        call.x, call.lora_A, call.lora_B, 0.75, [0, N], call.y, call.empty_s()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [0, 37, 74]}, "pairs"),
        ({"edges": [0, 37, 30, 67]}, "ascend"),
        ({"edges": [0, 37, 90, 127]}, "ascend"),
        ({"edges": [-1, 36, 74, 111]}, "ascend"),
        ({"edges": [0, 37]}, "lora_[AB] must be"),
        ({"edges": [0, 37, 74, 110]}, "lora_B"),
        ({"x": torch.zeros(8, 95)}, "must be"),
        ({"x": torch.zeros(7, 96)}, "must be"),
        ({"lora_A": torch.zeros(32, 96, dtype=torch.float64)}, "dtype"),
        ({"lora_B": torch.zeros(74, 15)}, "lora_A"),
        ({"s": torch.zeros(8, 31)}, "s must be"),
        ({"s": torch.zeros(8, 32, dtype=torch.bfloat16)}, "dtype"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call = Call(8, 96, 16, OUTER, torch.float32)
    arguments = {
        "x": call.x,
        "lora_A": call.lora_A,
        "lora_B": call.lora_B,
        "scaling": 0.75,
        "edges": blocks.edges(OUTER),
        "y": call.y.clone(),
        "s": call.empty_s(),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.lora_delta_fwd_(*{**arguments, **change}.values())
    assert torch.equal(arguments["y"], call.y)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "s", "keep", "dx", "dA", "dB"])
def test_gradients_of_other_sizes_are_refused(name: str) -> None:
    call = Call(8, 96, 16, OUTER, torch.float32, 0.5)
    s = call.forward(torch.float32)[1]
    tensors = {"x": call.x, "lora_A": call.lora_A, "lora_B": call.lora_B, "s": s}
    tensors["keep"] = call.keep
    grads = {"dx": call.dx, "dA": call.lora_A.clone(), "dB": call.lora_B.clone()}
    before = {key: value.clone() for key, value in grads.items()}
    edges = [e for block in OUTER for e in block]
    for group in (tensors, grads):
        if name in group:
            group[name] = torch.zeros(group[name].shape[0] + 1, 5, dtype=group[name].dtype)
            before[name] = group[name].clone()
    with pytest.raises(RuntimeError, match="must be"):
        ops.lora_delta_bwd_(call.dy, *tensors.values(), 0.75, 2.0, edges, *grads.values())
    for key, value in grads.items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("missing", ["x", "s"])
def test_gradients_are_refused_without_what_they_are_made_of(missing: str) -> None:
    call = Call(8, 96, 16, OUTER, torch.float32)
    s = call.forward(torch.float32)[1]
    x, s = (None, s) if missing == "x" else (call.x, None)
    grads = (call.dx, call.lora_A.clone(), call.lora_B.clone())
    rest = (None, 0.75, 1.0, blocks.edges(OUTER), *grads)
    with pytest.raises(RuntimeError, match="dA is made of x, and dB of s"):
        ops.lora_delta_bwd_(call.dy, x, call.lora_A, call.lora_B, s, *rest)
    assert torch.equal(grads[1], call.lora_A)


def test_float64_is_torchs() -> None:
    call = Call(8, 96, 16, OUTER, torch.float64)
    assert not delta.op_pays(call.x)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        call.by_the_op()


@pytest.mark.parametrize(
    ("rows", "rank", "is_served"),
    [(1, 4, True), (32, 17, True), (33, 17, False), (64, 16, True), (65, 16, False)],
)
def test_few_rows_are_the_ops(
    rows: int, rank: int, is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def counted(name: str, op: Any) -> Any:
        def count(*args: Any) -> Any:
            called.append(name)
            return op(*args)

        return count

    for name in ("lora_delta_fwd_", "lora_delta_bwd_"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    call = Call(rows, 40, rank, OUTER, torch.float32)
    leaves = [t.requires_grad_() for t in (call.x, call.lora_A, call.lora_B)]
    weight = torch.randn(N, 40)
    y = eager.low_rank_linear(call.x, weight, *leaves[1:], 0.75, None, 0.0, OUTER)
    torch.autograd.grad(y, leaves, call.dy)
    assert called == (["lora_delta_fwd_", "lora_delta_bwd_"] if is_served else [])


def test_small_numbers_of_fp16_are_not_flushed() -> None:
    """They are normal in fp32; torch's own products keep them whatever the processor does."""
    from lora_fast.functional import lora_linear

    x, weight = torch.randn(4, 64).half(), torch.zeros(32, 64).half()
    lora_A, lora_B = torch.randn(8, 64).half(), (torch.rand(32, 8) * 5e-5).half()
    lora_A.requires_grad_()
    expected = (torch.ones(4, 32).double() @ lora_B.double()).t() @ x.double()
    torch.set_flush_denormal(True)
    try:
        y = lora_linear(x, weight, lora_A, lora_B, 1.0)
        y.backward(torch.ones_like(y))
    finally:
        torch.set_flush_denormal(False)
    grad = lora_A.grad
    assert grad is not None
    torch.testing.assert_close(grad.double(), expected, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_dropped_is_multiplied_by_zero(dtype: torch.dtype, value: float, isa: str) -> None:
    """As by torch: a NaN or an infinity that is dropped leaves a NaN."""
    x, lora_A, lora_B, dy = (torch.randn(s).to(dtype) for s in ((9, 40), (4, 40), (11, 4), (9, 11)))
    keep = torch.rand(9, 40) >= 0.4
    keep[3, 7] = keep[5, 39] = keep[2, 12] = False
    x[3, 7] = x[5, 39] = lora_A[1, 12] = value
    dx, da = torch.zeros_like(x), torch.empty_like(lora_A)
    assert ops.lora_delta_bwd_(dy, x, lora_A, lora_B, None, keep, 0.75, 2.0, [0, 11], dx, da, None)
    assert da.isfinite().all(0).tolist() == [k not in (7, 39) for k in range(40)]
    assert da[:, [7, 39]].isnan().all()
    assert not dx[:, 12].isfinite().any()
    assert dx[2, 12].isnan()
    assert dx[:, :12].isfinite().all() and dx[:, 13:].isfinite().all()
