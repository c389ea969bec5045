import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels import counters
from lora_fast.kernels.counters import FEWEST, RESERVE, Counters, zeroed_counters


def addresses(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel())


def test_a_stream_uses_the_same_counters_again() -> None:
    found = Counters(torch.device("cpu"))
    first = found.eager(5, 1)
    assert first.dtype is torch.int32
    assert first.numel() == FEWEST
    assert torch.count_nonzero(first) == 0
    assert found.eager(FEWEST, 1) is first
    assert found.eager(FEWEST + 1, 1).numel() == 2 * FEWEST


def test_counters_that_a_stream_has_outgrown_are_not_freed() -> None:
    """A launch on it may still count in them."""
    found = Counters(torch.device("cpu"))
    before = [weakref.ref(found.eager(count, 1)) for count in (5, FEWEST + 1, 4 * FEWEST)]
    gc.collect()
    assert all(counters() is not None for counters in before)


def test_two_threads_on_one_stream_make_room_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second uses the counters of the first: one launch runs after the other there."""
    made, zeros = [], Counters.zeros

    def slow(self: Counters, count: int) -> torch.Tensor:
        made.append(count)
        time.sleep(0.05)
        return zeros(self, count)

    found = Counters(torch.device("cpu"))
    found.eager(5, 1)
    monkeypatch.setattr(Counters, "zeros", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: found.eager(FEWEST + 1, 1), range(2))
    assert first is second
    assert made == [2 * FEWEST]


def test_two_streams_do_not_share_them() -> None:
    found = Counters(torch.device("cpu"))
    one, other = addresses(found.eager(5, 1)), addresses(found.eager(5, 2))
    assert one[-1] < other[0] or other[-1] < one[0]


def test_captured_launches_share_them_with_nobody() -> None:
    found = Counters(torch.device("cpu"))
    handed_out = [found.eager(5, 1), *(found.captured(count) for count in (5, 1, 130, 7))]
    handed_out += [found.eager(5, 1)[:0], found.captured(9)]
    spans = sorted((addresses(t) for t in handed_out if t.numel()), key=lambda span: span[0])
    assert all(a[-1] < b[0] for a, b in pairwise(spans))
    assert all(t.data_ptr() % 16 == 0 and torch.count_nonzero(t) == 0 for t in handed_out)


def test_the_reserve_is_refilled_outside_a_capture_only() -> None:
    found = Counters(torch.device("cpu"))
    assert found.captured(5).numel() == 5  # a capture before any other call
    assert found.chunks == []
    found.eager(5, 1)
    half, rest = found.captured(RESERVE // 2 + 4), found.captured(RESERVE // 2)
    assert [t.untyped_storage().nbytes() for t in (half, rest)] == [4 * RESERVE, 2 * RESERVE]
    found.eager(5, 1)
    assert len(found.chunks) == 2
    later = found.captured(8)
    assert later.untyped_storage().data_ptr() == found.chunks[1].data_ptr()
    assert half.untyped_storage().data_ptr() == found.chunks[0].data_ptr()  # not freed


def test_what_is_kept_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile warms a graph up, this thread allocates from the graphs' pool."""
    threads, zeros = [], Counters.zeros

    def noted(self: Counters, count: int) -> torch.Tensor:
        threads.append(threading.get_ident())
        return zeros(self, count)

    monkeypatch.setattr(Counters, "zeros", noted)
    found = Counters(torch.device("cpu"))
    found.eager(5, 1)  # its own, and the reserve
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    found.captured(RESERVE + 1)  # of the graph itself
    assert threads[2:] == [threading.get_ident()]


@pytest.mark.gpu
def test_a_few_rows_in_a_compiled_graph_that_is_replayed() -> None:
    import lora_fast as lora

    layer = lora.Linear(256, 256, r=8, merge_weights=False).cuda().bfloat16().eval()
    torch.nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), layer(x))


def test_each_device_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_counters", {})
    cpu, meta = (zeroed_counters(3, torch.device(name)) for name in ("cpu", "meta"))
    assert (cpu.device.type, meta.device.type) == ("cpu", "meta")
    assert zeroed_counters(3, torch.device("cpu")) is cpu


@pytest.mark.gpu
def test_captures_and_streams_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    eager = zeroed_counters(3, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert zeroed_counters(3, device).data_ptr() != eager.data_ptr()
    assert zeroed_counters(3, device) is eager
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = zeroed_counters(3, device)
    assert captured.data_ptr() != eager.data_ptr()
