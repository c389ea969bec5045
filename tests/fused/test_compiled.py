"""torch.compile of the fused path: one graph with one operator each way, compiled once."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_fast as lora

# Dynamo makes an instance of the autograd.Function that it traces, against torch's own advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Function'> should not be instantiated:DeprecationWarning"
)
K = 40


def step(layer: nn.Module, x: Tensor, run: Any = None, seed: int = 1) -> list[Tensor]:
    """The output and the gradients of x and of all that is trained."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = (layer if run is None else run)(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    dy = torch.linspace(-1.0, 2.0, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def example(layer: nn.Module, rows: int = 20) -> Tensor:
    return torch.randn(rows, K, device=next(layer.parameters()).device)


@pytest.mark.parametrize(("dynamic", "p"), [(None, 0.5), (True, 0.0)])
def test_compiled_once(dynamic: bool | None, p: float, make_layer: Any) -> None:
    """New rows, values and seeds meet the code that is there; dropout draws as in eager mode."""
    layer = make_layer(p)
    lora.mark_only_lora_as_trainable(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    for rows in (20, 21):  # the second time dynamo takes the number of rows for a variable
        x = example(layer, rows)
        assert_same(step(layer, x, compiled), step(layer, x))
    counter.clear()
    for rows, seed in ((40, 2), (17, 3)):
        with torch.no_grad():
            layer.lora_A.mul_(1.5)
            layer.weight.add_(0.01)
        x = example(layer, rows)
        assert_same(step(layer, x, compiled, seed), step(layer, x, seed=seed))
    assert counter.frame_count == 0
    x = example(layer)
    assert torch.equal(compiled(x), compiled(x)) == (p == 0.0)


def test_a_new_scaling_is_seen(make_layer: Any) -> None:
    """Scaling and rate are constants of the compiled code: another one compiles again."""
    layer = make_layer(0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = example(layer)
    step(layer, x, compiled)
    counter.clear()
    layer.scaling *= 2
    layer.lora_dropout.p = 0.25
    assert_same(step(layer, x, compiled), step(layer, x))
    assert counter.frame_count > 0


def operators(graph: torch.fx.GraphModule) -> list[str]:
    names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [name for name in names if name.startswith("lora_fast.")]


# Torch's own recorder of graphs.
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning:UserWarning")
def test_one_operator_each_way(make_layer: Any) -> None:
    layer = make_layer(0.5)
    lora.mark_only_lora_as_trainable(layer)
    recorder = AotEagerAndRecordGraphs()
    step(layer, example(layer), torch.compile(layer, backend=recorder, fullgraph=True))
    (forward,), (backward,) = recorder.fw_graphs, recorder.bw_graphs
    assert operators(forward) == ["lora_fast.lora_linear_fwd.default"]
    assert operators(backward) == ["lora_fast.lora_linear_bwd.default"]


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "bias", "weight", "none"])
def test_some_gradients(trained: str, make_layer: Any) -> None:
    layer = make_layer()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = example(layer)
    assert_same(step(layer, x, compiled), step(layer, x))


def test_no_grad(make_layer: Any) -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = example(layer)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, make_layer: Any) -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = example(layer)
    found = []
    for run in (compiled, layer):
        with torch.autocast(x.device.type, dtype):
            found.append(step(layer, x, run))
    assert found[0][0].dtype == dtype
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.skipif(
    torch.__version__ < (2, 11),
    reason="torch 2.10's partitioner looks for draws that neither pass needs: KeyError",
)
def test_checkpointing_inside(make_layer: Any) -> None:
    layer = make_layer(0.5)

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = example(layer)
    assert_same(step(layer, x, compiled), step(layer, x))


def test_other_dimensions(make_layer: Any) -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((K,), (2, 3, K), (0, K)):
        x = torch.randn(shape, device=layer.weight.device)
        assert_same(step(layer, x, compiled), step(layer, x))


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="inductor needs g++"
)
def test_inductor(make_layer: Any) -> None:
    """The code generator leaves the operators as they are and fuses around them."""
    layer = make_layer()
    lora.mark_only_lora_as_trainable(layer)

    def run(x: Tensor) -> Tensor:
        return torch.relu(layer(x * 2.0)) + 1.0

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (20, 21):
        x = example(layer, rows)
        assert_same(step(layer, x, compiled), step(layer, x, run))
