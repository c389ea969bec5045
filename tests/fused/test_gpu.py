"""What only a GPU can show: bf16, CUDA graphs, streams, sizes beyond 2^31, process groups."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_fast as lora
from lora_fast import functional
from lora_fast.testing import assert_within_budget, randomize_

pytestmark = pytest.mark.gpu
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GIB = 2**30


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process and its GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        *("nccl", (tmp_path / "store").as_uri()), rank=0, world_size=1, device_id=device
    )
    yield
    dist.destroy_process_group()


def scaled_mask(y: Tensor, p: float) -> Tensor:
    """The mask of the call that gave y, float64."""
    from lora_fast.kernels.dropout import keep_scale, unpack_mask

    _, _, lora_A, _, _, mask = y.grad_fn.saved_tensors
    return unpack_mask(mask, lora_A.shape[1]).double() * keep_scale(p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("rank", [4, 16, 40, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_tiles(dtype: torch.dtype, rank: int, p: float, make_problem: Any) -> None:
    """Several tiles in each direction, whole ones and parts, on and off the 16-byte grid."""
    for rows, n, k in ((1, 512, 512), (300, 520, 392), (257, 130, 1031), (2100, 640, 256)):
        make_problem((rows, k), n, rank, dtype).check(NAMES, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients_and_inputs(dtype: torch.dtype, make_problem: Any) -> None:
    """Rows that lie on one another: no descriptor may describe them."""
    problem = make_problem((256, 512), 384, 16, dtype)
    problem.check(NAMES, 0.1, torch.randn(1, 384, device="cuda").to(dtype).expand(256, 384))
    problem.x = problem.x[:1].expand(256, 512)
    problem.check(NAMES, 0.1)


def test_tf32_only_where_torch_allows_it(make_problem: Any) -> None:
    """In the gradient of A, whose products are all our own at a small rank."""
    problem = make_problem((300, 512), 256, 16)
    dy = torch.randn(300, 256, device="cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    found = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            leaves = problem.leaves(["lora_A"])
            (found[precision],) = torch.autograd.grad(problem.fused(leaves), [leaves["lora_A"]], dy)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    leaves = problem.leaves(["lora_A"], wide=True)
    y = problem.plain(leaves)
    (oracle,) = torch.autograd.grad(y, [leaves["lora_A"]], dy.double())
    errors = {name: (grad - oracle).abs().max() for name, grad in found.items()}
    assert errors["tf32"] > 10 * errors["ieee"]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(64, 32768), (32768, 64)], ids=["x", "y"])
def test_more_than_2_to_the_31_elements(n: int, k: int, make_problem: Any) -> None:
    """The last rows of y and dx, and sums over all rows, of a call with 70001 x 32768 elements."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * GIB:
        pytest.skip("needs 40 GiB")
    rows, tail, p = 70001, 5, 0.1
    problem = make_problem((8, k), n, 8, torch.float16)
    problem.x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    leaves = problem.leaves((*NAMES[2:], "x"))
    y = problem.fused(leaves, p)
    mask = y.grad_fn.saved_tensors[-1]
    assert max(y.numel(), problem.x.numel()) > 2**31
    dy = torch.zeros_like(y)
    dy[-tail:] = torch.randn(tail, n, device="cuda", dtype=torch.float16)
    wanted = [name for name in NAMES if leaves[name].requires_grad]
    found = torch.autograd.grad(y, [leaves[name] for name in wanted], dy)
    grads = dict(zip(wanted, found, strict=True))
    dy = dy[-tail:].clone()

    from lora_fast.kernels.dropout import keep_scale, unpack_mask

    keep = unpack_mask(mask[-tail:], k).double() * keep_scale(p)
    problem.x = problem.x[-tail:].clone()
    results = []
    for wide in (False, True):
        others = problem.leaves(wanted, wide=wide)
        out = problem.plain(others, keep)
        results.append([out, *torch.autograd.grad(out, [others[w] for w in wanted], dy.to(out))])
    ours = [y[-tail:], *(grads[w][-tail:] if w == "x" else grads[w] for w in wanted)]
    for what, got, eager, oracle in zip(("output", *wanted), ours, *results, strict=True):
        assert_within_budget(got, eager, oracle, what=what)
    assert not grads["x"][:-tail].any()


def test_each_replay_of_a_graph_draws_anew(make_problem: Any) -> None:
    """And its backward sees the forward's mask: the whole step is captured."""
    p = 0.5
    problem = make_problem((64, 256), 128, 8, torch.bfloat16)
    leaves = problem.leaves(NAMES)
    dy = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = problem.fused(leaves, p)
        return y, torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = step()
    masks, outputs = [], []
    for _ in range(3):
        graph.replay()
        keep = scaled_mask(y, p)
        masks.append(keep)
        outputs.append(y.detach().clone())
        results = []
        for wide in (False, True):
            others = problem.leaves(NAMES, wide=wide)
            out = problem.plain(others, keep)
            results.append([out, *torch.autograd.grad(out, list(others.values()), dy.to(out))])
        for what, *three in zip(("output", *NAMES), (y, *grads), *results, strict=True):
            assert_within_budget(*three, what=what)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    replayed = []
    for _ in range(2):
        torch.cuda.manual_seed(7)
        graph.replay()
        replayed.append(y.detach().clone())
    assert torch.equal(*replayed)


def test_graphed_callables(make_problem: Any) -> None:
    layer = randomize_(lora.Linear(256, 128, r=8, device="cuda"))
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    graphed = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x).requires_grad_(),))
    found = torch.autograd.grad(graphed(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_streams(make_problem: Any) -> None:
    """Work goes to the current stream: the same bits on any of them, also side by side."""
    problem = make_problem((300, 512), 256, 16, torch.float16)
    dy = torch.randn(300, 256, device="cuda", dtype=torch.float16)

    def step() -> list[Tensor]:
        leaves = problem.leaves(NAMES)
        y = problem.fused(leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]

    expected = step()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what ran elsewhere would be done before
            found.append(step())
    torch.cuda.synchronize()
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


def test_the_host_never_waits(make_problem: Any) -> None:
    problem = make_problem((300, 512), 256, 16, torch.bfloat16)
    dy = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    for debug in ("default", "error"):  # the first call compiles
        leaves = problem.leaves(NAMES)
        torch.cuda.set_sync_debug_mode(debug)
        try:
            torch.autograd.grad(problem.fused(leaves, 0.1), list(leaves.values()), dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current(make_problem: Any) -> None:
    problem = make_problem((300, 512), 256, 16, torch.float16)
    for name in NAMES:
        setattr(problem, name, getattr(problem, name).to("cuda:1"))
    problem.check(NAMES, 0.1)
    assert torch.cuda.current_device() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_dropout(mode: str) -> None:
    """Inductor's own generator, and its CUDA graphs: a new mask every call, replayed by a seed."""
    layer = randomize_(lora.Linear(256, 128, r=8, lora_dropout=0.5, device="cuda"))
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    x = torch.randn(64, 256, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        torch.manual_seed(1)
        one, two = compiled(x).clone(), compiled(x).clone()
        torch.manual_seed(1)
        assert torch.equal(compiled(x), one)
    assert not torch.equal(one, two)


@pytest.mark.filterwarnings("ignore::UserWarning")  # a group of one is not what torch expects
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2_bf16"])
def test_data_parallel_training(kind: str, process_group: None) -> None:
    """On one GPU: what wraps the layer leaves it plain tensors, and training is the same."""

    half = "bf16" in kind

    def train(wrap: bool) -> list[float]:
        torch.manual_seed(0)
        layer = randomize_(lora.Linear(256, 128, r=8, device="cuda"))
        lora.mark_only_lora_as_trainable(layer)
        model: Any = layer
        if wrap and kind == "ddp":
            model = DistributedDataParallel(layer, device_ids=[layer.weight.device.index])
        elif wrap:
            policy = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if half else ())
            model = fully_shard(layer, mp_policy=policy)
        elif half:

            def model(x: Tensor) -> Tensor:
                cast = {name: p.bfloat16() for name, p in layer.named_parameters()}
                return torch.func.functional_call(layer, cast, (x.bfloat16(),))

        trained = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, foreach=False)
        x = torch.randn(64, 256, device="cuda")
        losses = []
        for _ in range(5):
            loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(True)
    assert losses == train(False)
    assert losses[-1] < losses[0]


def test_auto_takes_the_kernels(make_problem: Any, caplog: pytest.LogCaptureFixture) -> None:
    problem = make_problem((20, 64), 48, 4, torch.bfloat16)
    x, weight, _, a, b = problem.leaves([]).values()
    with lora.use_backend("auto"), caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        functional.lora_linear(x, weight, a, b, 1.0)
        functional.lora_linear(*(t.double() for t in (x, weight, a, b)), 1.0)
    decisions = [r.getMessage() for r in caplog.records if r.name == "lora_fast.dispatch"]
    assert decisions == [
        "lora_linear -> triton: plain CUDA tensors",
        "lora_linear -> reference: dtype torch.float64 is not fp32, fp16 or bf16",
    ]
