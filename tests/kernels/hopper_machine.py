"""Parts of the model of a Hopper multiprocessor: who has the turn, barriers and memory."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class KernelError(AssertionError):
    """The kernel did what the hardware punishes: a deadlock, a race, an arrival too many."""


class Stopped(BaseException):
    """Ends the other partitions once one has failed."""


class Machine:
    """Gives the turn to partitions and to operations that are under way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.haste: dict[str, float] = {}  # how soon each kind of event comes
        self.ready: dict[int, Callable[[], bool]] = {}
        self.turns: dict[int, threading.Semaphore] = {}
        self.back = threading.Semaphore(0)
        self.under_way: dict[Any, list[Callable[[], None]]] = {}  # queues, whose heads complete
        self.unfenced: dict[int, list[Block]] = {}  # written by a partition since its last fence
        self.failure: BaseException | None = None
        self.current = -1

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others run, and go on at some time when `until()` holds."""
        me = self.current
        self.ready[me] = until
        self.back.release()
        self.turns[me].acquire()
        if self.failure is not None:
            raise Stopped

    def start(self, queue: Any, complete: Callable[[], None]) -> None:
        """Begin an operation that completes after those in the same queue, at a random time."""
        self.under_way.setdefault(queue, []).append(complete)
        self.pause()

    def run(self, partitions: list[Callable[[], None]]) -> None:
        """Run all partitions to their ends."""
        threads = []
        for index, partition in enumerate(partitions):
            self.ready[index], self.turns[index] = (lambda: True), threading.Semaphore(0)
            threads.append(threading.Thread(target=self._partition, args=(index, partition)))
            threads[-1].start()
        while (self.ready or self.under_way) and self.failure is None:
            runnable = [index for index, ready in self.ready.items() if ready()]
            choices = [*runnable, *self.under_way]
            if choices:
                haste = [self._haste(choice) for choice in choices]
                self._step(self.random.choices(choices, haste)[0])
            else:
                self.failure = KernelError(f"deadlock: partitions {list(self.ready)} wait for ever")
        for index in list(self.ready):
            self.turns[index].release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _haste(self, choice: Any) -> float:
        kind = str(choice) if isinstance(choice, int) else choice[0]
        return self.haste.setdefault(kind, 10 ** self.random.uniform(-3, 0))

    def _step(self, chosen: Any) -> None:
        if isinstance(chosen, int):
            self.current = chosen
            self.turns[chosen].release()
            self.back.acquire()
        else:
            queue = self.under_way[chosen]
            try:
                queue.pop(0)()
            except AssertionError as error:
                self.failure = error
            if not queue:
                del self.under_way[chosen]

    def _partition(self, index: int, partition: Callable[[], None]) -> None:
        self.turns[index].acquire()
        try:
            if self.failure is None:
                partition()
        except Stopped:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        del self.ready[index]
        self.back.release()


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    count: int = 0
    missing: int = 0
    bytes_due: int = 0
    phase: int = 0

    def arrive(self) -> None:
        """Count one arrival."""
        if self.missing == 0:
            raise KernelError("an arrival too many at a barrier")
        self.missing -= 1
        self.settle()

    def settle(self) -> None:
        """Begin the next phase if this one is complete."""
        if self.missing == 0 and self.bytes_due == 0:
            self.phase ^= 1
            self.missing = self.count


@dataclass
class Block:
    """A piece of shared memory."""

    machine: Machine
    capacity: int
    data: Tensor | None = None
    being_stored: int = 0  # copies to global memory that have yet to read it


@dataclass
class View:
    """A block of shared memory seen as a tile."""

    block: Block
    shape: list[int]
    dtype: torch.dtype
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> "Tiles":
        assert torch.Size(shape).numel() == self.block.capacity, "not all memory of its stage"
        return Tiles(self.block, list(shape), dtype)

    def slice(self, start: int, length: int, dim: int) -> "View":
        return View(self.block, self.shape, self.dtype,
                    [*self.steps, lambda tile: tile.narrow(dim, start, length)])  # fmt: skip

    def permute(self, order: tuple[int, int]) -> "View":
        return View(self.block, self.shape, self.dtype,
                    [*self.steps, lambda tile: tile.permute(order)])  # fmt: skip

    def read(self) -> Tensor:
        """What is there now."""
        if self.block.data is None:
            raise KernelError("read before anything was written")
        if list(self.block.data.shape) != self.shape:
            raise KernelError(f"read as {self.shape}, written as {list(self.block.data.shape)}")
        tile = self.block.data
        for step in self.steps:
            tile = step(tile)
        return tile

    def store(self, tile: Tensor) -> None:
        """Write by the threads of a partition."""
        if self.block.being_stored:
            raise KernelError("overwritten before it was copied to global memory")
        assert list(tile.shape) == self.shape and tile.dtype is self.dtype
        self.block.data = tile.clone()
        machine = self.block.machine
        machine.unfenced.setdefault(machine.current, []).append(self.block)


@dataclass
class Tiles:
    """A block of shared memory seen as several tiles, of which a kernel takes the first."""

    block: Block
    shape: list[int]
    dtype: torch.dtype

    def index(self, at: int) -> View:
        """One of them."""
        assert at == 0
        return View(self.block, self.shape[1:], self.dtype)


@dataclass
class Blocks:
    """An allocation: as many blocks or barriers as its first size says."""

    machine: Machine
    shape: list[int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        size = torch.Size(self.shape[1:]).numel()
        is_barrier = self.dtype is torch.int64
        self.parts = [
            Barrier() if is_barrier else Block(self.machine, size) for _ in range(self.shape[0])
        ]

    def index(self, at: int) -> Any:
        """One of them."""
        part = self.parts[at]
        return part if isinstance(part, Barrier) else View(part, self.shape[1:], self.dtype)


class Descriptor:
    """A matrix in global memory; reads beyond it give zeros, writes beyond it nothing."""

    def __init__(self, matrix: Tensor, block_shape: list[int]) -> None:
        self.matrix, self.block_shape, self.layout = matrix, block_shape, None
        self.dtype = matrix.dtype
        nbytes = torch.Size(block_shape).numel() * matrix.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes)
        self.writes = torch.zeros(matrix.shape, dtype=torch.int64)

    def at(self, matrix: Tensor, start: list[int]) -> Tensor:
        """The part of a block at `start` that lies within."""
        (row, col), (rows, cols) = start, self.block_shape
        return matrix[row : row + rows, col : col + cols]

    def read(self, start: list[int]) -> Tensor:
        """A block."""
        tile = torch.zeros(self.block_shape, dtype=self.dtype)
        part = self.at(self.matrix, start)
        tile[: part.shape[0], : part.shape[1]] = part
        return tile

    def write(self, start: list[int], tile: Tensor) -> None:
        """Write a block."""
        part = self.at(self.matrix, start)
        part.copy_(tile[: part.shape[0], : part.shape[1]])
        self.at(self.writes, start).add_(1)


@dataclass
class Pointer:
    """An address in global memory, or a tensor of them."""

    data: Tensor
    offsets: Any = 0

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.data, self.offsets + offsets)


@dataclass
class Accumulator:
    """What products under way add to."""

    value: Tensor
    under_way: int = 0
