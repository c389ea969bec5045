"""Derivatives of any order and functorch's transforms go through every layer.

In fp64, and against something that is computed another way: finite differences, a loop, the other
mode of differentiation.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import lora_fast as lora

QKV = {"enable_lora": [True, False, True]}
DOUBLE = {"dtype": torch.float64}

LAYERS: dict[str, Callable[..., Any]] = {
    "linear": lambda **kw: lora.Linear(5, 6, r=2, lora_alpha=3, **DOUBLE, **kw),
    "linear_transposed": lambda **kw: lora.Linear(5, 6, r=2, fan_in_fan_out=True, **DOUBLE, **kw),
    "merged": lambda **kw: lora.MergedLinear(5, 6, r=2, **QKV, **DOUBLE, **kw),
    "merged_ragged": lambda **kw: lora.MergedLinear(
        5, 6, r=2, out_splits=[3, 1, 2], **QKV, **DOUBLE, **kw
    ),
    "embedding": lambda **kw: lora.Embedding(7, 4, r=2, **DOUBLE, **kw),
    "conv1d": lambda **kw: lora.Conv1d(2, 4, 3, r=1, **DOUBLE, **kw),
    "conv2d": lambda **kw: lora.Conv2d(2, 4, 3, r=1, groups=2, **DOUBLE, **kw),
    "conv3d": lambda **kw: lora.Conv3d(1, 2, 2, r=1, **DOUBLE, **kw),
}
SHAPES = {"conv1d": (2, 5), "conv2d": (2, 4, 4), "conv3d": (1, 3, 3, 3)}
DENSE = [name for name in LAYERS if name != "embedding"]
LINEAR = [name for name in LAYERS if name.startswith(("linear", "merged"))]


def build(name: str, seed: int = 0, **kwargs: Any) -> Any:
    """The named layer in fp64 with random A and B."""
    torch.manual_seed(seed)
    layer = LAYERS[name](**kwargs)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def make_input(name: str, batch: int = 3) -> Tensor:
    if name == "embedding":
        return torch.randint(0, 7, (batch, 2))
    return torch.randn(batch, *SHAPES.get(name, (5,)), dtype=torch.float64)


def adapters(layer: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in layer.named_parameters() if "lora_" in k}


def of_parameters(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The layer as a function of every floating-point tensor that it reads, and those tensors."""
    layer, x = build(name), make_input(name)
    named = {k: p.detach().clone() for k, p in layer.named_parameters()}
    tensors = tuple(named.values()) + ((x,) if x.is_floating_point() else ())

    def run(*args: Tensor) -> Tensor:
        state = dict(zip(named, args, strict=False))
        return functional_call(layer, state, (args[-1] if x.is_floating_point() else x,))

    return run, tensors


def loss(layer: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """A loss of the adapters that is not linear in the output."""
    return lambda p: functional_call(layer, p, (x,)).sin().square().sum()


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name: str) -> None:
    run, tensors = of_parameters(name)
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)


@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck(name: str) -> None:
    run, tensors = of_parameters(name)
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", LINEAR)
def test_gradgradcheck_with_dropout(name: str) -> None:
    """The mask of the forward pass is that of both backward passes."""
    layer, x = build(name, lora_dropout=0.4), make_input(name)

    def run(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    inputs = tuple(t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_jvp_agrees_with_the_gradient(name: str) -> None:
    """<dY(v), u> from forward mode equals <dY^T(u), v> from reverse mode."""
    run, tensors = of_parameters(name)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    y, dy = jvp(run, tensors, tangents)
    torch.testing.assert_close(y, run(*tensors))
    u = torch.randn_like(y)
    inputs = tuple(t.clone().requires_grad_() for t in tensors)
    pulled = torch.autograd.grad(run(*inputs), inputs, u)
    expected = sum((g * v).sum() for g, v in zip(pulled, tangents, strict=True))
    torch.testing.assert_close((dy * u).sum(), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_ad_dual_numbers(name: str) -> None:
    """The layer itself, not its functional form, carries the tangents of A and B."""
    layer, x = build(name), make_input(name)
    primal = adapters(layer)
    tangent = {k: torch.randn_like(v) for k, v in primal.items()}
    del layer.lora_A, layer.lora_B
    with forward_ad.dual_level():
        for key in primal:
            setattr(layer, key, forward_ad.make_dual(primal[key], tangent[key]))
        dy = forward_ad.unpack_dual(layer(x)).tangent
    _, expected = jvp(lambda p: functional_call(layer, p, (x,)), (primal,), (tangent,))
    assert dy is not None
    torch.testing.assert_close(dy, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_hessian_agrees_with_double_backward(name: str) -> None:
    """torch.func's Hessian for the adapters against autograd's own double backward."""
    layer, x = build(name), make_input(name, batch=2)
    a = layer.lora_A.detach().clone()

    def of_a(a: Tensor) -> Tensor:
        return loss(layer, x)({"lora_A": a, "lora_B": layer.lora_B.detach()})

    got = hessian(of_a)(a)
    expected = torch.autograd.functional.hessian(of_a, a)
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_jacobians_of_both_modes_agree(name: str) -> None:
    layer, x = build(name), make_input(name, batch=2)
    p = adapters(layer)
    forward = jacfwd(lambda p: functional_call(layer, p, (x,)))(p)
    reverse = jacrev(lambda p: functional_call(layer, p, (x,)))(p)
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("name", LAYERS)
def test_create_graph_penalty_trains_through_the_layer(name: str) -> None:
    """A gradient penalty, the usual double backward: its gradient is that of finite differences."""
    layer, x = build(name), make_input(name)

    def penalty() -> Tensor:
        y = layer(x).sin().sum()
        return sum(
            g.square().sum()
            for g in torch.autograd.grad(y, [layer.lora_A, layer.lora_B], create_graph=True)
        )

    (got,) = torch.autograd.grad(penalty(), layer.lora_B)
    step = torch.randn_like(got)
    with torch.no_grad():
        layer.lora_B.add_(1e-6 * step)
    above = penalty().item()
    with torch.no_grad():
        layer.lora_B.sub_(2e-6 * step)
    slope = (above - penalty().item()) / 2e-6
    assert (got * step).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_over_samples_gives_per_sample_gradients(name: str) -> None:
    layer, x = build(name), make_input(name, batch=4)
    p = adapters(layer)

    def of_sample(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss(layer, sample.unsqueeze(0))(p)

    got = vmap(grad(of_sample), in_dims=(None, 0))(p, x)
    rows = [grad(of_sample)(p, sample) for sample in x]
    for key in p:
        torch.testing.assert_close(got[key], torch.stack([row[key] for row in rows]))


@pytest.mark.parametrize("name", LAYERS)
def test_b45_vmap_over_adapters(name: str) -> None:
    """B45: one batched call serves several adapters; loralib's `+=` refuses."""
    layers = [build(name, seed=seed) for seed in (1, 2, 3)]
    base, x = layers[0], make_input(name)
    stacked = {k: torch.stack([getattr(m, k).detach() for m in layers]) for k in adapters(base)}
    got = vmap(lambda p: functional_call(base, p, (x,)))(stacked)
    rows = [functional_call(base, adapters(m), (x,)) for m in layers]
    torch.testing.assert_close(got, torch.stack(rows))


@pytest.mark.parametrize("name", LAYERS)
def test_ensemble_of_whole_layers(name: str) -> None:
    """The recipe of torch's ensembling tutorial: every parameter and gradient is batched."""
    layers = [build(name, seed=seed) for seed in (1, 2)]
    x = make_input(name)
    state, buffers = stack_module_state(layers)
    assert not buffers
    state = {k: v.detach() for k, v in state.items()}

    def of_state(p: dict[str, Tensor]) -> Tensor:
        return loss(layers[0], x)(p)

    got = vmap(grad(of_state))(state)
    for i, layer in enumerate(layers):
        expected = grad(of_state)({k: p.detach() for k, p in layer.named_parameters()})
        for key in expected:
            torch.testing.assert_close(got[key][i], expected[key])


@pytest.mark.parametrize("name", LINEAR)
def test_vmap_with_dropout_draws_for_every_sample(name: str) -> None:
    layer = build(name, lora_dropout=0.5)
    x = make_input(name, batch=1).expand(8, -1)
    rows = vmap(layer, randomness="different")(x)
    assert (rows - rows[0]).abs().max() > 1e-3  # more than the last bits of a product's other rows
    same = vmap(layer, randomness="same")(x)
    torch.testing.assert_close(same, same[:1].expand_as(same))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_leaves_the_layer_alone(name: str) -> None:
    layer, other, x = build(name, seed=1), build(name, seed=2), make_input(name)
    before = {k: p.detach().clone() for k, p in layer.named_parameters()}
    got = functional_call(layer, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(got, other(x))
    for key, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[key])


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_on_a_merged_layer_uses_the_merged_weight(name: str) -> None:
    layer, x = build(name), make_input(name)
    unmerged = layer(x)
    layer.eval()
    torch.testing.assert_close(
        functional_call(layer, dict(layer.named_parameters()), (x,)), unmerged
    )


@pytest.mark.parametrize("name", DENSE)
def test_vmap_of_jvp_over_tangents(name: str) -> None:
    """Transforms nest: a batch of directional derivatives equals the Jacobian's products."""
    layer, x = build(name), make_input(name)
    tangents = torch.randn(3, *x.shape, dtype=torch.float64)
    got = vmap(lambda t: jvp(layer, (x,), (t,))[1])(tangents)
    rows = [jvp(layer, (x,), (t,))[1] for t in tangents]
    torch.testing.assert_close(got, torch.stack(rows))


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_transforms_of_a_lookup_with_sparse_gradients(name: str) -> None:
    """As of one with dense ones: torch has no rules for the function that makes them sparse."""
    index = make_input("embedding")
    dense, sparse = build("embedding"), build("embedding", sparse=True)
    found: list[Any] = []
    for layer in (dense, sparse):

        def total(factor: Tensor, index: Tensor, layer: Any = layer) -> Tensor:
            return (functional_call(layer, {name: factor}, (index,)) ** 2).sum()

        factor = getattr(layer, name).detach()
        each = vmap(grad(total), in_dims=(None, 0))(factor, index)
        tangent = jvp(lambda factor: total(factor, index), (factor,), (factor,))[1]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(factor, factor)
            pushed = forward_ad.unpack_dual(total(dual, index)).tangent
        traced = torch.jit.trace(layer, (index,))
        found.append((each, tangent, pushed, vmap(layer)(index), traced(index + 0)))
    torch.testing.assert_close(found[1], found[0])
