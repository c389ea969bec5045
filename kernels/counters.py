"""Integer counters in GPU memory that are zero between launches, at no launch of their own.

A kernel that counts its programs leaves the counters at zero, so the next launch can use them
where one certainly runs after the other: on the same stream. What a CUDA graph captures may be
replayed on any stream beside anything, so each captured launch has counters of its own for good.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from lora_fast.kernels.sizes import cdiv, next_power_of_2

RESERVE = 1 << 18  # counters for captured launches, 1 MiB at a time
FEWEST = 1 << 10


class Counters:
    """The counters of one device.

    Captured launches share chunks that were cleared before the capture began: inside it, clearing
    would be one more node that runs at every replay. Graphs know the addresses, so chunks stay.
    So do counters that a stream has outgrown, in which a launch that is under way may still count:
    the allocator, which knows them of another stream, would hand them out at once. As sizes double,
    they are no more than those in use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.chunks: list[Tensor] = []
        self.outgrown: list[Tensor] = []
        self.used = RESERVE
        self.lock = threading.Lock()

    def eager(self, count: int, stream: int) -> Tensor:
        """Counters that all launches on a stream use, one after the other."""
        if 2 * self.used > RESERVE:
            self.refill()
        counters = self.of_stream.get(stream)
        if counters is None or counters.numel() < count:
            counters = self.more(count, stream)
        return counters

    def more(self, count: int, stream: int) -> Tensor:
        """Counters for a launch that needs more than its stream has so far."""
        with self.lock:
            counters = self.of_stream.get(stream)
            if counters is None or counters.numel() < count:
                if counters is not None:
                    self.outgrown.append(counters)
                counters = self.kept(max(FEWEST, next_power_of_2(count)))
                self.of_stream[stream] = counters
            return counters

    def captured(self, count: int) -> Tensor:
        """Counters that no other launch has had or will have."""
        with self.lock:
            start, end = self.used, self.used + cdiv(count, 4) * 4  # 16-byte alignment
            if end <= RESERVE:
                self.used = end
                return self.chunks[-1][start:end]
        return self.zeros(count)  # right as well, but cleared again at every replay

    def refill(self) -> None:
        """Have a chunk at hand for the next capture."""
        with self.lock:
            self.chunks.append(self.kept(RESERVE))
            self.used = 0

    def kept(self, count: int) -> Tensor:
        """New counters for good, cleared when this returns: graphs run on any stream.

        Made by a thread of its own. torch.compile runs a function once before it captures it, with
        all that the thread allocates from the graphs' pool, in which nothing may stay.
        """
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._cleared, count).result()

    def _cleared(self, count: int) -> Tensor:
        found = self.zeros(count)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return found

    def zeros(self, count: int) -> Tensor:
        """New counters."""
        return torch.zeros(count, device=self.device, dtype=torch.int32)


_counters: dict[torch.device, Counters] = {}


def zeroed_counters(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros, for a launch on the current stream that leaves zeros there."""
    counters = _counters.get(device)
    if counters is None:
        counters = _counters.setdefault(device, Counters(device))
    if device.type != "cuda":
        return counters.eager(count, 0)
    if torch.cuda.is_current_stream_capturing():
        return counters.captured(count)
    return counters.eager(count, triton.runtime.driver.active.get_current_stream(device.index))
