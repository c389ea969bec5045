"""Layers under torch's tracers and exporters: what works for plain torch layers works for these."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import CASES, WITH_DROPOUT, assert_same, build, grads, randomize
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_export(name: str, training: bool) -> None:
    layer = build(name).train(training)
    x = CASES[name].input(3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    more = CASES[name].input(6)
    assert_same(program.module()(more), layer(more))
    assert set(program.state_dict) == set(layer.state_dict())


class Branches(nn.Module):
    """Two layers, of which the data choose one."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.yes, self.no = randomize_(make()), randomize_(make())

    def forward(self, chosen: Tensor, x: Tensor) -> Tensor:
        branches = (lambda x: self.yes(x), lambda x: self.no(x))
        return torch.cond(chosen, *branches, (x,))


@pytest.mark.parametrize("options", [{}, {"out_splits": [2, 3, 4]}], ids=["equal", "unequal"])
def test_export_of_a_branch(options: dict[str, Any]) -> None:
    """Whose sizes are symbols, those of its weights too."""
    model = Branches(
        lambda: lora.MergedLinear(6, 9, r=2, enable_lora=[True, False, True], **options)
    )
    x = torch.randn(4, 5, 6)
    program = torch.export.export(model, (torch.tensor(True), x)).module()
    for chosen, layer in ((True, model.yes), (False, model.no)):
        torch.testing.assert_close(program(torch.tensor(chosen), x), layer(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["linear", "merged", "embedding", "conv2d"])
# The exporter's own packages call what newer torch, onnx and Python versions deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_dynamo_export(name: str, training: bool) -> None:
    """The exported graph, run by ONNX's own evaluator, gives the layer's output."""
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference")
    layer = build(name).train(training)
    x = CASES[name].input(3)
    with warnings.catch_warnings():
        # torch says that a model exported in training mode keeps its dropout: that is the case here
        warnings.filterwarnings("ignore", message=".*training mode.*")
        program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    assert program is not None
    graph = program.model_proto
    (got,) = evaluator.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    assert_same(torch.from_numpy(got), layer(x).detach())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_make_fx(name: str, training: bool) -> None:
    """The traced graph of forward and backward holds aten ops only and gives the same numbers."""
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = build(name).train(training)
    parameters = {k: p.detach() for k, p in layer.named_parameters() if "lora_" in k}

    def loss_and_grads(adapters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        leaves = {k: v.requires_grad_() for k, v in adapters.items()}
        y = torch.func.functional_call(layer, leaves, (x,))
        if not training:
            return (y,)
        return (y, *torch.autograd.grad(y.square().sum(), list(leaves.values())))

    x = CASES[name].input(3)
    graph = make_fx(loss_and_grads)({k: v.clone() for k, v in parameters.items()}, x)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert all(getattr(target, "namespace", "aten") == "aten" for target in targets)
    x = CASES[name].input(3)
    got = graph({k: v.clone() for k, v in parameters.items()}, x)
    assert_same(got, loss_and_grads({k: v.clone() for k, v in parameters.items()}, x))


# torch.jit is deprecated as a whole; it is still how some serve their models.
JIT_WARNINGS = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@JIT_WARNINGS
# torch's own F.embedding compares sizes while it is traced.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_jit_trace(name: str, training: bool) -> None:
    layer = build(name).train(training)
    traced = torch.jit.trace(layer, (CASES[name].input(3),))
    more = CASES[name].input(5)
    assert_same(traced(more), layer(more))


@JIT_WARNINGS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced_as", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["linear", "merged", "merged_ragged", "embedding"])
def test_a_trace_serves_any_number_of_dimensions(name: str, traced_as: tuple[int, ...]) -> None:
    layer = build(name)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, 10, shape) if name == "embedding" else torch.randn(*shape, 8)

    traced = torch.jit.trace(layer, (drawn(traced_as),))
    for shape in ((), (4,), (3, 2), (2, 1, 3), (0,)):
        x = drawn(shape)
        assert_same(traced(x), layer(x))


@JIT_WARNINGS
@pytest.mark.parametrize("name", CASES)
def test_b47_jit_script(name: str) -> None:
    """B47: loralib's nested functions cannot be scripted."""
    layer = build(name)
    scripted = torch.jit.script(layer)
    x = CASES[name].input(4)
    expected = layer(x)
    assert_same(scripted(x), expected)
    assert_same(grads(scripted, scripted(x)), grads(layer, expected))
    layer.eval()
    assert_same(torch.jit.script(layer)(x), expected)


@JIT_WARNINGS
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_b47_jit_script_with_dropout(name: str) -> None:
    layer, x = build(name, lora_dropout=0.5), CASES[name].input(4)
    scripted = torch.jit.script(layer)
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    assert_same(scripted(x), expected)


@JIT_WARNINGS
def test_jit_script_of_a_model_shares_the_adapters() -> None:
    """Also layers without an adapter; training the script trains the layers."""
    model = nn.Sequential(build("merged"), nn.ReLU(), lora.Linear(12, 8), build("linear"))
    layers = list(model)
    scripted = torch.jit.script(model)
    assert all(a is b for a, b in zip(layers, model, strict=True))
    assert set(scripted.state_dict()) == set(model.state_dict())
    x = torch.randn(3, 8)
    assert_same(scripted(x), model(x))
    randomize(model)
    assert_same(scripted(x), model(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_b47_fx_symbolic_trace(name: str, training: bool) -> None:
    """B47: loralib's MergedLinear cannot be traced symbolically."""
    layer = build(name).train(training)
    graph = torch.fx.symbolic_trace(layer)
    x = CASES[name].input(4)
    expected = layer(x)
    assert_same(graph(x), expected)
    if training:
        assert_same(grads(graph, graph(x)), grads(layer, expected))


@pytest.mark.parametrize("name", CASES)
def test_fx_symbolic_trace_of_a_model_that_holds_the_layer(name: str) -> None:
    """The layer is no leaf module of torch: fx traces through it."""
    model = nn.Sequential(build(name), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    x = CASES[name].input(4)
    assert_same(graph(x), model(x))


@pytest.mark.parametrize("which", ["lora_", "lora_A", ""])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fx_symbolic_trace_of_a_kernel_in_16_bits(
    dtype: torch.dtype, name: str, which: str
) -> None:
    """Beside factors that are wide, one of them or both, too: a graph knows no dtype."""
    layer, x = build(name).to(dtype), CASES[name].input(4).to(dtype)
    for key, parameter in layer.named_parameters():
        if which and key.startswith(which):
            parameter.data = parameter.data.float()
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
