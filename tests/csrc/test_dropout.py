"""On a CPU dropout draws what torch's draws, to the bit, and leaves the generator as torch does."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_fast.dropout
from lora_fast import ops
from lora_fast.dropout import dropout

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Around the 312 elements of one state of the generator, and the 512 of one pass.
SIZES = [1, 311, 312, 313, 511, 512, 513, 2048, 4999, 70001]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def drawn_by_torch(x: Tensor, p: float, seed: int, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """What F.dropout returns, what it keeps, and the state that it leaves."""
    start(seed, used)
    dropped = F.dropout(x, p)
    state = torch.get_rng_state()
    start(seed, used)
    return dropped, F.dropout(torch.ones_like(x), p) != 0, state


def start(seed: int, used: int) -> None:
    """Begin in the middle of a state, as after `used` other numbers."""
    torch.manual_seed(seed)
    torch.randint(0, 2, (used,), dtype=torch.int32)


@pytest.fixture
def known() -> None:
    """Where torch has MKL make the draws, on Intel's processors, the op can't make them."""
    if not lora_fast.dropout._draws_are_known(torch.float32):
        pytest.skip("torch draws in another way on this processor")


@pytest.fixture
def by_the_op(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the op serve a few elements too."""
    monkeypatch.setattr(lora_fast.dropout, "_FEW", 0)


def test_the_op_serves_processors_that_are_not_intels() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "GenuineIntel" in cpuinfo.read_text():
        pytest.skip("torch may have MKL draw")
    assert all(lora_fast.dropout._draws_are_known(dtype) for dtype in DTYPES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_and_the_state_are_torchs(
    isa: str, by_the_op: None, dtype: torch.dtype, size: int
) -> None:
    torch.manual_seed(size)
    x = torch.randn(size).to(dtype)
    for p, used in ((0.1, 0), (0.5, 1), (0.25, 622), (0.9, 623), (0.3, 624), (0.999, 1000)):
        expected, kept, state = drawn_by_torch(x, p, 7, used)
        start(7, used)
        dropped, keep = dropout(x, p)
        assert torch.equal(bits(dropped), bits(expected)), (p, used)
        assert torch.equal(keep, kept), (p, used)
        assert torch.equal(torch.get_rng_state(), state), (p, used)


@pytest.mark.parametrize("p", [1e-9, 2.0**-53, 1 - 2.0**-53, 0.5 - 1e-12])
def test_rates_at_the_ends_and_between_the_numbers(isa: str, by_the_op: None, p: float) -> None:
    x = torch.randn(5000, dtype=torch.float64)
    expected, kept, _ = drawn_by_torch(x, p, 3, 5)
    start(3, 5)
    dropped, keep = dropout(x, p)
    assert torch.equal(bits(dropped), bits(expected))
    assert torch.equal(keep, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_and_the_sign_of_zero(
    isa: str, by_the_op: None, dtype: torch.dtype
) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, -1.0, 0.0] * 100, dtype=dtype)
    expected, _, _ = drawn_by_torch(x, 0.5, 11, 0)
    torch.manual_seed(11)
    dropped, _ = dropout(x, 0.5)
    assert torch.equal(dropped.isnan(), expected.isnan())
    clean = ~expected.isnan()
    assert torch.equal(bits(dropped)[clean], bits(expected)[clean])


def test_the_spare_normal_number_survives(by_the_op: None) -> None:
    """normal_() makes two numbers at a time and keeps the second in the state."""
    x = torch.ones(1000)
    after = []
    for draw in (F.dropout, lambda x, p: dropout(x, p)[0]):
        torch.manual_seed(2)
        torch.empty(1).normal_()
        draw(x, 0.5)
        after.append(torch.empty(3).normal_())
    assert torch.equal(*after)


@pytest.mark.parametrize("case", ["small", "strided", "transposed", "empty", "all", "unknown"])
def test_what_the_op_does_not_serve_is_torchs(
    case: str, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "unknown":
        monkeypatch.setattr(lora_fast.dropout, "_draws_are_known", lambda dtype: False)
    x = {
        "small": torch.randn(10),
        "strided": torch.randn(100, 100)[:, ::2],
        "transposed": torch.randn(100, 100).t(),
        "empty": torch.randn(0, 5),
    }.get(case, torch.randn(100, 100))
    p = 1.0 if case == "all" else 0.3
    monkeypatch.setattr(ops, "dropout_", None)  # a call would fail
    expected, kept, state = drawn_by_torch(x, p, 5, 0)
    torch.manual_seed(5)
    dropped, keep = dropout(x, p)
    assert torch.equal(dropped, expected)
    assert torch.equal(keep, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_device_is_left_to_torch(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "dropout_", None)
    dropped, keep = dropout(torch.empty(100, 100, device="meta"), 0.3)
    assert dropped.is_meta and keep.is_meta
    assert keep.dtype == torch.bool


def test_draws_of_another_thread_are_not_undone(
    by_the_op: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = ops.dropout_

    def while_another_draws(*args: Any) -> None:
        op(*args)
        thread = threading.Thread(target=torch.rand, args=(3,))
        thread.start()
        thread.join()

    x = torch.randn(4000)
    torch.manual_seed(8)
    torch.rand(3)
    expected, state = F.dropout(x, 0.4), torch.get_rng_state()
    monkeypatch.setattr(ops, "dropout_", while_another_draws)
    torch.manual_seed(8)
    dropped, _ = dropout(x, 0.4)
    assert torch.equal(dropped, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_device_may_be_another(by_the_op: None) -> None:
    x = torch.randn(1000)
    expected, _, _ = drawn_by_torch(x, 0.2, 6, 0)
    lora_fast.dropout._scale.cache_clear()
    lora_fast.dropout._draws_are_known.cache_clear()
    torch.manual_seed(6)
    with torch.device("meta"):
        dropped, _ = dropout(x, 0.2)
    assert torch.equal(dropped, expected)


def arguments(**changed: Tensor) -> dict[str, Any]:
    x = torch.ones(8)
    tensors = {
        "x": x,
        "dropped": torch.full_like(x, 5.0),
        "keep": torch.ones(8, dtype=torch.bool),
        "state": torch.get_rng_state(),
    }
    return {**tensors, "keep_rate": 0.5, "scale": 2.0, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropped": torch.ones(8, dtype=torch.float16)}, "dropped must have x's dtype"),
        ({"keep": torch.ones(8, dtype=torch.uint8)}, "keep must be bool"),
        ({"dropped": torch.ones(9)}, "the size of x"),
        ({"keep": torch.ones(7, dtype=torch.bool)}, "the size of x"),
        ({"x": torch.ones(16)[::2]}, "contiguous"),
        ({"state": torch.zeros(100, dtype=torch.uint8)}, "no generator's"),
        ({"state": torch.zeros(5056, dtype=torch.uint8)}, "no mt19937 generator's"),
        ({"state": torch.zeros(5056, dtype=torch.int8)}, "state uint8"),
        ({"x": torch.ones(8, dtype=torch.int32)}, "dtype"),
    ],
    ids=str,
)
def test_the_op_refuses_what_does_not_fit(changed: dict[str, Tensor], message: str) -> None:
    given = arguments(**changed)
    before = given["state"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.dropout_(**given)
    assert torch.equal(given["state"], before)


def test_threads_draw_masks_of_their_own(known: None) -> None:
    threads, repeats = 4, 200
    seen: list[list[bytes]] = [[] for _ in range(threads)]
    together = threading.Barrier(threads)
    x = torch.ones(4096)

    def draw(i: int) -> None:
        together.wait()
        for _ in range(repeats):
            seen[i].append(dropout(x, 0.5)[1].numpy().tobytes())

    workers = [threading.Thread(target=draw, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    every = [mask for masks in seen for mask in masks]
    assert len(set(every)) == threads * repeats


@pytest.mark.parametrize("rate", [float("nan"), -0.1, 1.1])
def test_the_op_refuses_a_rate_that_is_none(known: None, rate: float) -> None:
    x = torch.ones(8)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"keep_rate must be in \[0, 1\]"):
        ops.dropout_(x, torch.empty(8), torch.empty(8, dtype=torch.bool), state, rate, 1.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_signals_handler_may_fork_while_the_op_draws(known: None) -> None:
    """Of the thread that draws; a fork waits for the draws of others."""
    script = (
        "import os, torch, lora_fast.dropout as d\n"
        "assert d._draws_are_known(torch.float32)\n"
        "draw = d._draw\n"
        "def forking(*arguments):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    return draw(*arguments)\n"
        "d._draw = forking\n"
        "d.dropout(torch.ones(64, 64), 0.1)\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_a_rate_between_two_draws_keeps_the_lower(isa: str) -> None:
    """A keep rate of half the distance of two draws keeps the draw of 0, as `0.0 < rate` does."""
    state = torch.get_rng_state()
    state[8:12] = torch.tensor([625], dtype=torch.int32).view(torch.uint8)  # no word is used yet
    state[24 : 24 + 8 * 624] = 0  # of these words every draw is 0
    x = torch.ones(100)
    dropped, keep = torch.empty(100), torch.zeros(100, dtype=torch.bool)
    ops.dropout_(x, dropped, keep, state.clone(), 2.0**-54, 1.0)
    assert keep.all()
    ops.dropout_(x, dropped, keep, state.clone(), 0.0, 1.0)
    assert not keep.any()
