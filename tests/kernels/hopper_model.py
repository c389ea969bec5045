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
from types import SimpleNamespace
from typing import Any

import torch
from hopper_machine import (
    Accumulator,
    Barrier,
    Blocks,
    Descriptor,
    KernelError,
    Machine,
    Pointer,
    View,
)
from torch import Tensor


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
        shared_memory_descriptor=View,
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
    return {
        "mbarrier": barriers(machine),
        "tma": copies(machine),
        "fence_async_shared": lambda: machine.unfenced.pop(machine.current, None),
        **products(machine),
    }


def barriers(machine: Machine) -> SimpleNamespace:

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

    return SimpleNamespace(
        MBarrierLayout=lambda: None, init=init, wait=wait, expect=expect, arrive=arrive
    )


def copies(machine: Machine) -> SimpleNamespace:
    stores: dict[int, int] = {}

    def copy_in(desc: Descriptor, start: list[int], barrier: Barrier, tile: View) -> None:
        assert desc.block_shape == tile.shape
        tile.block.data = torch.full(tile.shape, float("nan"), dtype=desc.dtype)

        def complete() -> None:
            tile.block.data = desc.read(start)
            barrier.bytes_due -= desc.block_type.nbytes
            barrier.settle()

        machine.start(("copy in", object()), complete)  # in no order with other copies

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

    def store_wait(outstanding: int) -> None:
        me = machine.current
        machine.pause(lambda: stores.get(me, 0) <= outstanding)

    return SimpleNamespace(
        async_copy_global_to_shared=copy_in,
        async_copy_shared_to_global=copy_out,
        store_wait=store_wait,
    )


def products(machine: Machine) -> dict[str, Any]:
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

    return {"warpgroup_mma": mma, "warpgroup_mma_wait": mma_wait}
