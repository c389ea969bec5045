"""`lora_embedding` against one-hot products in float64: outputs and gradients."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast
from lora_fast import functional
from lora_fast.testing import assert_within_budget, randomize_

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("weight", "lora_A", "lora_B")
SCALING, ROWS, WIDTH = 1.5, 11, 33
SHAPES = [(), (29,), (5, 7), (2, 3, 5), (0,), (3, 0)]
Tensors = dict[str, Tensor]


def drawn(r: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
    sizes = {"weight": (ROWS, WIDTH), "lora_A": (r, ROWS), "lora_B": (WIDTH, r)}
    return {name: torch.randn(size).to(device, dtype) for name, size in sizes.items()}


def oracle(t: Tensors, index: Tensor, padding_idx: int | None, by_freq: bool) -> Tensor:
    """One-hot rows times W and A^T; a gradient passes only where it should, and so divided."""
    hot = F.one_hot(index, ROWS).to(t["weight"].dtype)
    share = torch.ones(ROWS, dtype=hot.dtype, device=hot.device)
    if by_freq:
        share /= torch.bincount(index.flatten(), minlength=ROWS).clamp(min=1)
    if padding_idx is not None:
        share[padding_idx] = 0.0

    def shared(table: Tensor) -> Tensor:  # (ROWS, d): the values whole, of the gradient its share
        part = share.unsqueeze(1)
        return table * part + table.detach() * (1.0 - part)

    y = torch.einsum("...v,vd->...d", hot, shared(t["weight"]))
    update = torch.einsum("...v,vr,dr->...d", hot, shared(t["lora_A"].t()), t["lora_B"])
    return y + SCALING * update


def eager(t: Tensors, index: Tensor, padding_idx: int | None, by_freq: bool) -> Tensor:
    """What loralib computes."""
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq}
    y = F.embedding(index, t["weight"], **options)
    return y + F.embedding(index, t["lora_A"].t(), **options) @ t["lora_B"].t() * SCALING


def results(formula: Any, leaves: Tensors, dy: Tensor | None, needs: Iterable[str]) -> Tensors:
    copies = {name: t.clone().requires_grad_(name in needs) for name, t in leaves.items()}
    y = formula(copies)
    if needs:
        y.backward(dy.to(y.dtype))
    assert all(t.grad is None for name, t in copies.items() if name not in needs)
    return {"y": y.detach()} | {f"d{n}": t.grad for n, t in copies.items() if n in needs}


def assert_right(
    leaves: Tensors,
    index: Tensor,
    padding_idx: int | None = None,
    by_freq: bool = False,
    sparse: bool = False,
    needs: Iterable[str] = NAMES,
) -> None:
    """Fail unless output and gradients are as near to the oracle as eager torch's."""
    settings = (index, padding_idx, by_freq)

    def call(t: Tensors) -> Tensor:
        options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq, "sparse": sparse}
        args = (t["weight"], t["lora_A"], t["lora_B"], SCALING)
        return functional.lora_embedding(index, *args, **options)

    wide = {name: t.double() for name, t in leaves.items()}
    dy = torch.randn(*index.shape, WIDTH).to(leaves["weight"])
    want = results(lambda t: oracle(t, *settings), wide, dy.double(), needs)
    torchs = results(lambda t: eager(t, *settings), leaves, dy, needs)
    got = results(call, leaves, dy, needs)
    factor = 8.0 if dy.dtype == torch.float64 else 2.0  # the oracle is no wider than fp64
    for name in want:
        is_sparse = sparse and name in ("dweight", "dlora_A")
        assert got[name].is_sparse is is_sparse, name
        dense = got[name].to_dense() if is_sparse else got[name]
        assert_within_budget(dense, torchs[name], want[name], factor=factor, what=name)


def indices(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    return torch.randint(0, ROWS, shape).to(device)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("r", [1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_embedding(
    dtype: torch.dtype, r: int, shape: tuple[int, ...], sparse: bool, device: torch.device
) -> None:
    assert_right(drawn(r, dtype, device), indices(shape, device), sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_rank(shape: tuple[int, ...], padding_idx: int | None, sparse: bool) -> None:
    assert_right(drawn(0, torch.float32), indices(shape), padding_idx, sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("by_freq", [False, True], ids=["", "by_freq"])
@pytest.mark.parametrize("padding_idx", [None, 0, 4, ROWS - 1, -1, -ROWS])
def test_padding_and_frequencies(padding_idx: int | None, by_freq: bool, sparse: bool) -> None:
    index = torch.cat([torch.arange(ROWS), torch.tensor([4, 4, 0, ROWS - 1])])
    # torch has no sparse gradient of the weight that is divided by frequencies.
    needs = ("lora_A", "lora_B") if sparse and by_freq else NAMES
    assert_right(drawn(3, torch.float64), index, padding_idx, by_freq, sparse, needs)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_indices_of_any_strides(layout: str, dtype: torch.dtype, sparse: bool) -> None:
    index = indices((4, 6)).to(dtype)
    index = {
        "transposed": index.t(),
        "sliced": index[:, ::2],
        "expanded": index[:1].expand(3, 6),
    }[layout]
    t = drawn(3, torch.float64)
    expected = oracle(t, index.long(), None, False)
    args = (t["weight"], t["lora_A"].requires_grad_(), t["lora_B"], SCALING)
    y = functional.lora_embedding(index, *args, sparse=sparse)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(
        t["lora_A"].grad.to_dense(),
        torch.autograd.grad(oracle(t, index.long(), None, False).sum(), t["lora_A"])[0],
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "needs", [s for n in range(3) for s in itertools.combinations(NAMES, n)], ids="+".join
)
def test_only_the_gradients_that_are_asked_for(needs: tuple[str, ...], sparse: bool) -> None:
    assert_right(drawn(3, torch.float64), indices((3, 4)), sparse=sparse, needs=needs)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_max_norm_limits_the_rows_of_the_weight_alone(norm_type: float, sparse: bool) -> None:
    t = drawn(3, torch.float64)
    index = torch.tensor([[1, 3], [3, 8]])
    norms = t["weight"].norm(norm_type, dim=1)
    limit = norms[index.flatten()].median().item()
    limited = t["weight"].clone()
    touched = torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, index.flatten(), True)
    over = touched & (norms > limit)
    assert over.any()
    assert not over[touched].all()
    limited[over] *= (limit / norms[over]).unsqueeze(1)
    before = t["lora_A"].clone()
    y = functional.lora_embedding(
        index,
        t["weight"],
        t["lora_A"].requires_grad_(),
        t["lora_B"],
        SCALING,
        max_norm=limit,
        norm_type=norm_type,
        sparse=sparse,
    )
    torch.testing.assert_close(t["weight"], limited, rtol=1e-6, atol=1e-6)
    assert torch.equal(t["lora_A"], before)
    torch.testing.assert_close(
        y, oracle(t | {"weight": limited}, index, None, False), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_on_a_base_of_16_bits(base: torch.dtype, sparse: bool) -> None:
    t = drawn(3, torch.float32)
    weight = t["weight"].to(base).requires_grad_()
    a, b = t["lora_A"].requires_grad_(), t["lora_B"].requires_grad_()
    index = indices((3, 4))
    y = functional.lora_embedding(index, weight, a, b, SCALING, sparse=sparse)
    assert y.dtype == base
    y.float().sum().backward()
    assert (weight.grad.dtype, a.grad.dtype, b.grad.dtype) == (base, torch.float32, torch.float32)
    wide = {"weight": weight.double(), "lora_A": a.double(), "lora_B": b.double()}
    expected = oracle(wide, index, None, False)
    tolerance = 8 * torch.finfo(base).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    (da,) = torch.autograd.grad(expected.sum(), a)
    torch.testing.assert_close(a.grad.to_dense(), da, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_strided_factors(sparse: bool) -> None:
    t = drawn(3, torch.float64)
    index = indices((3, 4))
    expected = oracle(t, index, None, False)
    weight = t["weight"].t().contiguous().t()
    a = t["lora_A"].repeat_interleave(2, 1)[:, ::2].requires_grad_()
    b = t["lora_B"].t().contiguous().t()
    y = functional.lora_embedding(index, weight, a, b, SCALING, sparse=sparse)
    torch.testing.assert_close(y, expected)


def test_the_sparse_gradient_holds_what_was_looked_up_alone() -> None:
    """For SparseAdam: columns of A whose index was not in the batch are not in the gradient."""
    t = drawn(3, torch.float32)
    a = t["lora_A"].requires_grad_()
    index = torch.tensor([2, 2, 5])
    y = functional.lora_embedding(index, t["weight"], a, t["lora_B"], SCALING, sparse=True)
    y.sum().backward()
    grad = a.grad.coalesce()
    assert grad.shape == (3, ROWS)
    assert sorted(set(grad.indices()[1].tolist())) == [2, 5]
    optimizer = torch.optim.SparseAdam([a], lr=0.1)
    before = a.detach().clone()
    optimizer.step()
    changed = (a.detach() != before).any(0)
    assert changed.nonzero().flatten().tolist() == [2, 5]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_indices(layout: torch.layout) -> None:
    rows = [torch.tensor([1, 0, 2]), torch.tensor([3])]
    layer = randomize_(lora_fast.Embedding(5, 6, r=2))
    found = layer(torch.nested.nested_tensor(rows, layout=layout))
    for y, index in zip(found.unbind(), rows, strict=True):
        torch.testing.assert_close(y, layer(index))
