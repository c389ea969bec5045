"""What the fused path keeps for backward, and that autograd notices when it is written to."""

import itertools
from typing import Any

import pytest
import torch

import lora_fast as lora
from lora_fast.testing import saved_bytes

M, N, K, R = 24, 20, 40, 4
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
SUBSETS = [c for size in range(1, 6) for c in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("needs", SUBSETS, ids="-".join)
def test_only_what_the_needed_gradients_read(
    needs: tuple[str, ...], p: float, make_problem: Any
) -> None:
    """x for W and A, the weight for x, S for B, the mask for x and A; themselves, no copies."""
    problem = make_problem((5, K), N, R)
    leaves = problem.leaves(needs)
    y = problem.fused(leaves, p)
    x, weight, lora_A, lora_B, s, mask = y.grad_fn.saved_tensors
    assert (x is not None) == bool({"weight", "lora_A"} & set(needs))
    assert (weight is not None) == ("x" in needs)
    assert (s is not None) == ("lora_B" in needs)
    assert (mask is not None) == (p > 0.0 and bool({"x", "lora_A"} & set(needs)))
    for name, kept in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        assert kept is None or kept.data_ptr() == leaves[name].data_ptr()
    assert s is None or (s.shape, s.dtype) == ((5, R), y.dtype)
    assert mask is None or (mask.shape, mask.dtype) == ((5, K // 8), torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bytes_beyond_x(dtype: torch.dtype, make_layer: Any) -> None:
    """At most M K / 8 + 4 M R, the promise for p = 0.1."""
    layer = make_layer(0.1, dtype=dtype)
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(M, K, dtype=dtype, device=layer.weight.device, requires_grad=True)
    saved = saved_bytes(lambda: layer(x), [x, *layer.parameters()])
    assert saved == M * K // 8 + dtype.itemsize * M * R
    assert saved <= M * K // 8 + 4 * M * R


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_a_strided_x_is_not_copied(layout: str, make_layer: Any) -> None:
    layer = make_layer()
    wide = torch.randn(K, M, device=layer.weight.device).t()
    if layout == "strided":
        wide = torch.randn(M, 2 * K, device=layer.weight.device)[:, ::2]
    assert saved_bytes(lambda: layer(wide), [wide, *layer.parameters()]) == 4 * M * R


def test_nothing_is_kept_where_no_gradient_is_needed(make_layer: Any) -> None:
    layer = make_layer(0.5)
    x = torch.randn(M, K, device=layer.weight.device, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad


def test_no_grad_gives_the_same_bits(make_layer: Any) -> None:
    layer = make_layer(0.5)
    x = torch.randn(M, K, device=layer.weight.device)
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with mode():
            found.append(layer(x).detach().clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("written", "needs", "raises"),
    [
        ("x", ("lora_A",), True),
        ("x", ("weight",), True),
        ("x", ("x", "lora_B"), False),  # B's gradient reads S
        ("weight", ("x",), True),
        ("weight", ("lora_A", "lora_B"), False),
        ("lora_A", ("x",), True),
        ("lora_B", ("lora_A",), True),
        ("bias", NAMES, False),
    ],
)
def test_a_tensor_written_between_forward_and_backward(
    written: str, needs: tuple[str, ...], raises: bool, make_problem: Any
) -> None:
    problem = make_problem((5, K), N, R)
    leaves = problem.leaves(needs)
    y = problem.fused(leaves, 0.5)
    with torch.no_grad():
        leaves[written].add_(1.0)
    if raises:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()


def test_backward_twice(make_problem: Any) -> None:
    problem = make_problem((5, K), N, R)
    leaves = problem.leaves(NAMES)
    y = problem.fused(leaves, 0.5)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, list(leaves.values()), dy)


def test_hooks(make_layer: Any) -> None:
    """Of the output, of the input, of parameters and of the module, forward and backward."""
    layer = make_layer()
    x = torch.randn(M, K, device=layer.weight.device, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, layer.lora_A, layer.lora_B])
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0], dy[0])))
    layer.lora_A.register_hook(lambda grad: 2 * grad)
    layer.lora_B.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 3 * p.grad))
    x.register_hook(lambda grad: 4 * grad)
    layer(x).sum().backward()
    found = (x.grad / 4, layer.lora_A.grad / 2, layer.lora_B.grad / 3)
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected)
    assert seen[0] == (M, 24)
    assert torch.equal(seen[1][0], plain[0])
    assert torch.equal(seen[1][1], torch.ones_like(seen[1][1]))


def test_saved_tensors_on_another_device(make_layer: Any) -> None:
    """Hooks that move what is saved, as those for offloading do, see it all."""
    layer = make_layer(0.5)
    x = torch.randn(M, K, device=layer.weight.device, requires_grad=True)
    torch.manual_seed(1)
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.lora_A, layer.lora_B])
    torch.manual_seed(1)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    found = torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B])
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
