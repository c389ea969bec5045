"""Layers under torch's compilers and tracers: what works for plain torch layers works for these.

All on a CPU and with the `aot_eager` backend, which takes every step of torch.compile but the code
generation.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fast as lora
from lora_fast.testing import randomize_

QKV = {"enable_lora": [True, False, True]}


@dataclass(frozen=True)
class Case:
    """A layer and the input that it takes."""

    make: Callable[..., Any]
    input: Callable[[int], Tensor]
    dropout: bool = False


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


CASES = {
    "linear": Case(lambda **kw: lora.Linear(8, 12, r=4, lora_alpha=6, **kw), _floats(8), True),
    "linear_transposed": Case(
        lambda **kw: lora.Linear(8, 12, r=4, fan_in_fan_out=True, **kw), _floats(5, 8), True
    ),
    "merged": Case(lambda **kw: lora.MergedLinear(8, 12, r=2, **QKV, **kw), _floats(8), True),
    "merged_ragged": Case(
        lambda **kw: lora.MergedLinear(8, 12, r=2, out_splits=[6, 2, 4], **QKV, **kw),
        _floats(5, 8),
        True,
    ),
    "embedding": Case(
        lambda **kw: lora.Embedding(10, 6, r=2, padding_idx=1, **kw),
        lambda batch: torch.randint(0, 10, (batch, 4)),
    ),
    "conv1d": Case(lambda **kw: lora.Conv1d(4, 6, 3, r=2, **kw), _floats(4, 9)),
    "conv2d": Case(lambda **kw: lora.Conv2d(4, 6, 3, r=2, padding=1, **kw), _floats(4, 7, 7)),
    "conv3d": Case(lambda **kw: lora.Conv3d(2, 4, 3, r=1, groups=2, **kw), _floats(2, 4, 5, 5)),
}
WITH_DROPOUT = [name for name, case in CASES.items() if case.dropout]


def build(name: str, **kwargs: Any) -> Any:
    """The named layer with random A and B."""
    torch.manual_seed(0)
    layer = CASES[name].make(**kwargs)
    randomize(layer)
    return layer


def randomize(model: nn.Module) -> None:
    """Give every A and B random values: a fresh layer's update is zero."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.5)


def grads(layer: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients of a non-uniform sum of `output` for the trainable parameters."""
    trainable = {k: p for k, p in layer.named_parameters() if p.requires_grad}
    seed = torch.linspace(-1.0, 2.0, output.numel()).view(output.shape)
    found = torch.autograd.grad(output, list(trainable.values()), seed)
    return dict(zip(trainable, found, strict=True))


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_compile_fullgraph_trains(name: str) -> None:
    """One graph; output and gradients of the eager layer."""
    layer, x = build(name), CASES[name].input(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, got = layer(x), compiled(x)
    assert_same(got, expected)
    assert_same(grads(layer, got), grads(layer, expected))


@pytest.mark.parametrize("name", ["linear", "merged", "conv2d"])
def test_compile_gives_the_gradient_of_the_input(name: str) -> None:
    layer = build(name)
    x = CASES[name].input(3).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    seed = torch.randn_like(layer(x))
    (expected,) = torch.autograd.grad(layer(x), x, seed)
    (got,) = torch.autograd.grad(compiled(x), x, seed)
    assert_same(got, expected)


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_compile_with_dropout_draws_as_eager(name: str) -> None:
    layer, x = build(name, lora_dropout=0.4), CASES[name].input(16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    expected = layer(x)
    torch.manual_seed(7)
    got = compiled(x)
    assert_same(got, expected)
    assert_same(grads(layer, got), grads(layer, expected))
    assert not torch.equal(compiled(x), got)  # a new mask for every call


@pytest.mark.parametrize("name", CASES)
def test_compile_merged(name: str) -> None:
    """A layer merged before it is compiled computes with the merged weight alone."""
    layer, x = build(name), CASES[name].input(3)
    unmerged = layer(x)
    layer.eval()
    assert layer.merged
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert_same(compiled(x), unmerged)


@pytest.mark.parametrize("name", ["linear", "merged", "embedding", "conv2d"])
def test_three_flips_of_train_and_eval_make_two_graphs(name: str) -> None:
    layer, x = build(name), CASES[name].input(3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    expected = layer(x)
    for _ in range(3):
        layer.train()
        got = compiled(x)
        got.sum().backward()
        assert_same(got, expected)
        layer.eval()
        assert_same(compiled(x), expected)
    assert counter.frame_count == 2


def test_four_layers_that_differ_in_alpha_make_two_frames() -> None:
    """The second scaling makes the graph general in it; no graph for every value."""
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(3, 8)
    for alpha in (1, 2, 3, 5):
        layer = lora.Linear(8, 8, r=4, lora_alpha=alpha)
        randomize(layer)
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        assert_same(compiled(x), layer(x))
    assert counter.frame_count == 2


def test_layers_compiled_one_by_one_do_not_use_up_each_others_recompilations() -> None:
    """torch.compile allows 8 for a piece of code, and each class has its own."""
    torch.compiler.reset()
    x, index, image = torch.randn(2, 8), torch.tensor([1]), torch.randn(1, 8, 5, 5)
    layers = [
        (lora.Linear(8, 8, r=2), x),
        (lora.Linear(8, 8, r=2, lora_dropout=0.1), x),
        (lora.Linear(8, 8, r=2, fan_in_fan_out=True), x),
        (lora.Linear(8, 8), x),
        (lora.MergedLinear(8, 8, r=2, enable_lora=[True, False]), x),
        (lora.Embedding(8, 8, r=2), index),
        (lora.Conv2d(8, 8, 3, r=2), image),
    ]
    for training in (True, False):
        for layer, example in layers:
            layer.train(training)
            torch.compile(layer, backend="eager", fullgraph=True)(example)
    assert len({id(type(layer).forward.__code__) for layer, _ in layers}) == 4


@pytest.mark.parametrize("kind", [lora.Linear, lora.MergedLinear])
def test_compile_with_a_dropout_rate_that_changes(kind: Any) -> None:
    """Dynamo makes a symbol of it, in time or, with dynamic=True, at once."""
    blocks = {"enable_lora": [True, False, True]} if kind is lora.MergedLinear else {}
    layer = randomize_(kind(6, 9, r=2, lora_dropout=0.1, **blocks))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(4, 6)
    for rate in (0.1, 0.2, 0.3):
        layer.lora_dropout.p = rate
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
    torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)(x)


def test_compile_with_dynamic_shapes_makes_one_graph() -> None:
    layer = build("linear")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 8)
        assert_same(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_compile_a_model_of_all_layers_trains_as_eager() -> None:
    def train(compile_it: bool) -> list[float]:
        torch.manual_seed(3)
        model = nn.Sequential(
            lora.Embedding(10, 8, r=2),
            lora.MergedLinear(8, 12, r=2, lora_dropout=0.2, **QKV),
            nn.GELU(),
            lora.Conv1d(5, 4, 3, r=1),
            lora.Linear(10, 6, r=2, lora_dropout=0.1),
        )
        lora.mark_only_lora_as_trainable(model)
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        tokens, losses = torch.randint(0, 10, (7, 5)), []
        for _ in range(4):
            loss = step(tokens).square().mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        return losses

    assert train(True) == pytest.approx(train(False), rel=1e-4)


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


def test_a_program_with_compiled_autograd_that_has_no_adapter() -> None:
    """torch.compile makes modules within a backward, of which the hooks for all modules hear."""
    layer = nn.Linear(12, 18)

    @torch.compile(backend="eager")
    def train(x: Tensor) -> None:
        layer(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        train(torch.randn(40, 12, requires_grad=True))
    assert layer.weight.grad is not None
