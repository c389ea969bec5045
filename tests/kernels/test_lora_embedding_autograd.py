"""`lora_embedding` and `lora.Embedding` on the fused kernels: every option, every gradient."""

import itertools
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fast as lora
from lora_fast import functional, ops
from lora_fast.testing import assert_within_budget, randomize_, saved_bytes

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_backend")

ROWS, WIDTH, RANK, SCALING = 7, 9, 2, 1.5
NAMES = ("weight", "lora_A", "lora_B")
Tensors = dict[str, Tensor]


@pytest.fixture
def index(kernel_device: torch.device) -> Tensor:
    return torch.tensor([[3, 0, 3], [6, 3, 1]], device=kernel_device)


def drawn(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensors:
    sizes = {"weight": (ROWS, WIDTH), "lora_A": (RANK, ROWS), "lora_B": (WIDTH, RANK)}
    return {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}


def results(
    index: Tensor, t: Tensors, dy: Tensor, backend: str, needs: Any = NAMES, **options: Any
) -> Tensors:
    """Output and gradients by a backend."""
    leaves = {name: v.clone().requires_grad_(name in needs) for name, v in t.items()}
    with lora.use_backend(backend):
        y = functional.lora_embedding(index, *leaves.values(), SCALING, **options)
        if needs:
            y.backward(dy)
    dense = {n: v.grad.to_dense() for n, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "table": leaves["weight"].detach()} | dense


def check(index: Tensor, t: Tensors, needs: Any = NAMES, **options: Any) -> None:
    """Fail unless the kernels are as near to float64 as plain torch."""
    dy = torch.randn(*index.shape, WIDTH, device=index.device).to(t["weight"])
    wide = {name: v.double() for name, v in t.items()}
    oracle = results(index, wide, dy.double(), "reference", needs, **options)
    eager = results(index, t, dy, "reference", needs, **options)
    found = results(index, t, dy, "triton", needs, **options)
    assert set(found) == set(eager) == {"y", "table", *needs}
    for name in found:
        assert_within_budget(found[name], eager[name], oracle[name], what=name)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("by_freq", [False, True], ids=["", "by_freq"])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_options(index: Tensor, padding_idx: int | None, by_freq: bool, sparse: bool) -> None:
    # torch has no sparse gradient of the weight that is divided by frequencies.
    needs = ("lora_A", "lora_B") if sparse and by_freq else NAMES
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq, "sparse": sparse}
    check(index, drawn(index.device), needs, **options)


@pytest.mark.parametrize("needs", list(itertools.combinations(NAMES, 1)), ids="+".join)
def test_only_the_gradients_that_are_asked_for(index: Tensor, needs: tuple[str, ...]) -> None:
    check(index, drawn(index.device), needs)


def test_half_precision_with_fp32_adapters(index: Tensor) -> None:
    t = drawn(index.device)
    t["weight"] = t["weight"].half()
    check(index, t)


def test_sparse_gradients_are_sparse(index: Tensor) -> None:
    t = {name: v.requires_grad_() for name, v in drawn(index.device).items()}
    functional.lora_embedding(index, *t.values(), SCALING, sparse=True).sum().backward()
    assert t["weight"].grad.is_sparse
    grad = t["lora_A"].grad.coalesce()
    assert sorted(set(grad.indices()[1].tolist())) == [0, 1, 3, 6]


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_limits_the_rows_of_the_weight_alone(index: Tensor, norm_type: float) -> None:
    t = drawn(index.device)
    before = {name: v.clone() for name, v in t.items()}
    limit = t["weight"].norm(norm_type, dim=1).median().item()
    check(index, t, max_norm=limit, norm_type=norm_type)
    y = functional.lora_embedding(index, *t.values(), SCALING, max_norm=limit, norm_type=norm_type)
    assert torch.equal(t["lora_A"], before["lora_A"])
    assert not torch.equal(t["weight"], before["weight"])
    assert torch.equal(y, functional.lora_embedding(index, *t.values(), SCALING))


def unpacked_once() -> Any:
    """What is saved meanwhile can be had one time only, as under activation checkpointing."""
    kept: list[Tensor | None] = []

    def pack(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    def unpack(place: int) -> Tensor:
        tensor, kept[place] = kept[place], None
        assert tensor is not None, "unpacked before"
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("padding_idx", "by_freq"), [(None, False), (3, True)])
def test_double_backward(
    index: Tensor, padding_idx: int | None, by_freq: bool, sparse: bool
) -> None:
    t = drawn(index.device)
    dy, v = torch.randn(2, *index.shape, WIDTH, device=index.device)

    def second(dtype: torch.dtype, backend: str, saved: Any = nullcontext) -> tuple[Tensor, ...]:
        # torch has no sparse gradient of the weight that is divided by frequencies.
        leaves = [x.to(dtype) for x in t.values()]
        for leaf in leaves[1:] if sparse else leaves:
            leaf.requires_grad_()
        gradient = (dy + v).to(dtype).requires_grad_()
        with lora.use_backend(backend):
            with saved():
                y = functional.lora_embedding(
                    index, *leaves, SCALING, padding_idx, scale_grad_by_freq=by_freq, sparse=sparse
                )
            da, db = torch.autograd.grad(y, leaves[1:], gradient, create_graph=True)
        penalty = da.to_dense().square().sum() + db.square().sum()
        found = torch.autograd.grad(penalty, (*leaves[1:], gradient))
        return tuple(grad.to_dense() for grad in found)

    found, eager = second(torch.float32, "triton"), second(torch.float32, "reference")
    assert all(map(torch.equal, found, second(torch.float32, "triton", unpacked_once)))
    for name, *triple in zip(
        ("lora_A", "lora_B", "dy"), found, eager, second(torch.float64, "reference"), strict=True
    ):
        assert_within_budget(*triple, what=name)


def test_nothing_is_kept_but_the_indices(index: Tensor) -> None:
    t = [v.requires_grad_() for v in drawn(index.device).values()]
    kept = saved_bytes(lambda: functional.lora_embedding(index, *t, SCALING), [index, *t])
    assert kept == 0


def test_autocast_keeps_the_tables_dtype(index: Tensor) -> None:
    t = drawn(index.device)
    plain = functional.lora_embedding(index, *t.values(), SCALING)
    with torch.autocast(index.device.type, dtype=torch.bfloat16):
        y = functional.lora_embedding(index, *t.values(), SCALING)
    assert y.dtype is torch.float32
    assert torch.equal(y, plain)


def test_the_layer(index: Tensor, kernel_device: torch.device) -> None:
    layer = randomize_(lora.Embedding(ROWS, WIDTH, r=RANK, padding_idx=3)).to(kernel_device)
    y = layer(index)
    y.square().sum().backward()
    found = {n: p.grad for n, p in layer.named_parameters()} | {"y": y.detach()}
    assert found.pop("weight") is None
    layer.zero_grad()
    with lora.use_backend("reference"):
        eager_y = layer(index)
        eager_y.square().sum().backward()
        eager = {n: p.grad for n, p in layer.named_parameters()} | {"y": eager_y.detach()}
        wide = lora.Embedding(ROWS, WIDTH, r=RANK, padding_idx=3).double().to(kernel_device)
        wide.load_state_dict(layer.state_dict())
        wide_y = wide(index)
        wide_y.square().sum().backward()
        oracle = {n: p.grad for n, p in wide.named_parameters()} | {"y": wide_y.detach()}
    for name in found:
        assert_within_budget(found[name], eager[name], oracle[name], what=name)
    merged = layer.eval()(index)
    torch.testing.assert_close(merged, y)


# torch.compile itself makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(index: Tensor, kernel_device: torch.device, dynamic: bool) -> None:
    layer = randomize_(lora.Embedding(ROWS, WIDTH, r=RANK, padding_idx=3)).to(kernel_device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for indices in (index, index[:, :2]):
        expected = layer(indices)
        wanted = torch.autograd.grad(expected.sum(), (layer.lora_A, layer.lora_B))
        y = compiled(indices)
        assert torch.equal(y, expected)
        found = torch.autograd.grad(y.sum(), (layer.lora_A, layer.lora_B))
        assert all(map(torch.equal, found, wanted))


def test_an_index_out_of_range_is_refused(index: Tensor) -> None:
    if index.is_cuda:
        pytest.skip("a failed assertion on a GPU ends the process's use of it")
    with pytest.raises(IndexError, match=f"indices from 0 to {ROWS - 1}"):
        functional.lora_embedding(index + 4, *drawn(index.device).values(), SCALING)


@pytest.mark.gpu
def test_a_gpu_asserts_that_indices_are_in_range() -> None:
    """In a process of its own, which the failed assertion ends."""
    script = """
import torch
from lora_fast import functional
t = [torch.ones(size, device="cuda") for size in ((7, 9), (2, 7), (9, 2))]
functional.lora_embedding(torch.tensor([1, 7], device="cuda"), *t, 1.0)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "index out of range" in done.stderr + done.stdout


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("padding_idx", [ROWS, -ROWS - 1])
def test_a_padding_index_out_of_range_is_refused(
    index: Tensor, padding_idx: int, backend: str
) -> None:
    with lora.use_backend(backend), pytest.raises(ValueError, match="padding_idx must be"):
        functional.lora_embedding(index, *drawn(index.device).values(), SCALING, padding_idx)


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_the_operators_keep_their_contract(index: Tensor) -> None:
    weight, a, b = drawn(index.device).values()
    torch.library.opcheck(
        ops.KERNEL_OPS["lora_embedding_fwd"], (index, weight, a, b, 1.5), test_utils=CHECKS
    )
    dy = torch.randn(*index.shape, WIDTH, device=index.device)
    for scatter, needs in ((True, [True, True]), (False, [True, False])):
        args = (dy, index, a, b, 1.5, 3, True, scatter, needs)
        torch.library.opcheck(ops.KERNEL_OPS["lora_embedding_bwd"], args, test_utils=CHECKS)


def test_sparse_gradients_of_no_tokens(kernel_device: torch.device) -> None:
    index = torch.empty(2, 0, dtype=torch.int64, device=kernel_device)
    sizes = ((7, 9), (2, 7), (9, 2))
    t = [torch.randn(s, device=kernel_device, requires_grad=True) for s in sizes]
    with lora.use_backend("triton"):
        functional.lora_embedding(index, *t, 1.5, sparse=True).sum().backward()
    for leaf in t:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
        assert torch.count_nonzero(leaf.grad.to_dense()) == 0
