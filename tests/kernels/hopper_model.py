"""A model of one multiprocessor on which a Gluon kernel's own source runs as plain Python.

Gluon has no interpreter. What makes a warp-specialised kernel hard to get right is no arithmetic
but the order of events, so that is what is modelled: partitions run as threads of which one has
the turn, chosen at random between any two operations; copies and products are under way until
they are completed at random, and read their operands only then; memory that a copy is about to
fill holds NaN; barriers count arrivals and bytes and have phases. A kernel that waits too little
reads NaN or what came too early, one that waits for what never comes is stopped. Who is quick and
who is slow differs from seed to seed, by a factor of up to a thousand.

Layouts mean nothing here: the compiler checks them, and they don't change values.
"""

import ast
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

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> "View":
        assert torch.Size(shape).numel() <= self.block.capacity, "beyond the memory of its stage"
        return View(self.block, list(shape), dtype)

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


class Kernel:
    """The functions of a Gluon module, made to run on the model.

    Args:
        source: of the module; only functions under `gluon.jit` and `gluon.constexpr_function` and
            the assignments of constants are taken.
        given: other names that they use.
    """

    def __init__(self, source: str, **given: Any) -> None:
        body = []
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                if any(ast.unparse(d).startswith("gluon.") for d in node.decorator_list):
                    node.decorator_list = []
                    body.append(node)
            elif isinstance(node, ast.Assign):
                body.append(node)
        self.code = compile(ast.Module(body, type_ignores=[]), "<kernel>", "exec")
        self.given = given

    def run(self, name: str, *arguments: Any, programs: int, seed: int, **constants: Any) -> None:
        """Run every program of a grid, one after the other."""
        for program in range(programs):
            machine = Machine(seed + program)
            names = namespace(machine, program, programs) | self.given
            exec(self.code, names)
            names[name](*arguments, **constants)


def namespace(machine: Machine, program: int, programs: int) -> dict[str, Any]:
    """Stand-ins for all that a kernel calls."""
    allocated: list[Blocks] = []

    def allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Blocks:
        allocated.append(Blocks(machine, shape, dtype))
        return allocated[-1]

    def load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        offsets = torch.where(mask, pointer.offsets, 0)
        return torch.where(mask, pointer.data.flatten()[offsets], other).to(pointer.data.dtype)

    def warp_specialize(partitions: Any, warps: list[int], registers: Any) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1
        machine.run([lambda f=f, args=args: f(*args) for f, args in partitions])
        barriers = [part for blocks in allocated for part in blocks.parts]
        if any(isinstance(part, Barrier) and part.missing != part.count for part in barriers):
            raise KernelError("a barrier is left in the middle of a phase")

    gl = SimpleNamespace(
        allocate_shared_memory=allocate,
        arange=lambda start, end, layout: torch.arange(start, end),
        cdiv=lambda a, b: -(-a // b),
        constexpr=lambda value: value,
        convert_layout=lambda tile, layout, assert_trivial: tile,
        DistributedLinearLayout=lambda **bases: None,
        float32=torch.float32,
        int64=torch.int64,
        load=load,
        NVMMADistributedLayout=lambda version, warps, shape: None,
        num_programs=lambda axis: programs,
        permute=torch.permute,
        program_id=lambda axis: program,
        reshape=torch.reshape,
        SliceLayout=lambda dim, parent: None,
        split=lambda tile: tile.unbind(-1),
        static_assert=lambda condition: None,
        static_range=range,
        uint8=torch.uint8,
        warp_specialize=warp_specialize,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    )
    return {"gl": gl, "gluon": SimpleNamespace(jit=lambda f: f), **asynchronous(machine)}


def asynchronous(machine: Machine) -> dict[str, Any]:
    """Barriers, copies and products."""

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def wait(barrier: Barrier, phase: int) -> None:
        machine.pause(lambda: barrier.phase != phase)

    def expect(barrier: Barrier, nbytes: int) -> None:
        barrier.bytes_due += nbytes
        barrier.arrive()
        machine.pause()

    def arrive(barrier: Barrier, pred: bool = True) -> None:
        if pred:
            barrier.arrive()
        machine.pause()

    def copy_in(desc: Descriptor, start: list[int], barrier: Barrier, tile: View) -> None:
        assert desc.block_shape == tile.shape
        tile.block.data = torch.full(tile.shape, float("nan"), dtype=desc.dtype)

        def complete() -> None:
            tile.block.data = desc.read(start)
            barrier.bytes_due -= desc.block_type.nbytes
            barrier.settle()

        machine.start(("copy in", object()), complete)  # in no order with other copies

    stores: dict[int, int] = {}

    def copy_out(desc: Descriptor, start: list[int], tile: View) -> None:
        if any(tile.block is block for blocks in machine.unfenced.values() for block in blocks):
            raise KernelError("copied to global memory without a fence after the writes")
        me = machine.current
        stores[me] = stores.get(me, 0) + 1
        tile.block.being_stored += 1

        def complete() -> None:
            desc.write(start, tile.read())
            tile.block.being_stored -= 1
            stores[me] -= 1

        machine.start(("copy out", me), complete)

    def mma(a: View, b: View, acc: Any, is_async: bool) -> Accumulator:
        assert is_async
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc.clone())
        acc.under_way += 1

        def complete() -> None:
            acc.value += a.read().float() @ b.read().float()
            acc.under_way -= 1

        machine.start(("product", machine.current), complete)
        return acc

    def mma_wait(outstanding: int, deps: tuple[Any]) -> Any:
        (acc,) = deps
        if not isinstance(acc, Accumulator):
            return acc
        machine.pause(lambda: acc.under_way <= outstanding)
        return acc.value if outstanding == 0 else acc

    def store_wait(outstanding: int) -> None:
        me = machine.current
        machine.pause(lambda: stores.get(me, 0) <= outstanding)

    return {
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None, init=init, wait=wait, expect=expect, arrive=arrive
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=copy_in,
            async_copy_shared_to_global=copy_out,
            store_wait=store_wait,
        ),
        "fence_async_shared": lambda: machine.unfenced.pop(machine.current, None),
        "warpgroup_mma": mma,
        "warpgroup_mma_wait": mma_wait,
    }
