"""Prepared launches, on a driver that only takes notes: kernels are compiled, none runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.kernels import launch
from lora_fast.kernels.launch import PreparedKernel, prepared

CONSTANTS = {"FLAG": True, "BLOCK": 16, "num_warps": 1}
# A device function that is interpreted leaves its stand-ins for the language in place. What was
# there before is seen here, as all modules of tests are imported before the first test runs.
LANGUAGE = dict(vars(tl.core))


def copy(x_ptr, x_strides, y_ptr, extra_ptr, N, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offs * x_strides[1], mask=offs < N, other=0.0) * scale
    if FLAG and extra_ptr is not None:
        value += tl.load(extra_ptr)
    tl.store(y_ptr + offs, value, mask=offs < N)


class NotingDriver:
    """Stands in for Triton's driver: every launch ends in `launches`."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.device, self.stream = 0, 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 * device + self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name: str, *rest: Any) -> tuple[Any, ...]:
        return name, object(), 16, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def note(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            args = list(rest[4:])  # behind the metadata and the hooks
            self.launches.append(((x, y, z), stream, function, args))

        return note


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where nothing lies that was compiled before these tests."""
    return str(tmp_path_factory.mktemp("triton"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[NotingDriver]:
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    for name, member in LANGUAGE.items():
        monkeypatch.setattr(tl.core, name, member)
    noting = NotingDriver()
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(noting)
    yield noting
    triton.runtime.driver.set_active(before)


@pytest.fixture
def jit_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches that went Triton's own way."""
    runs, run = [], JITFunction.run

    def counting(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counting)
    monkeypatch.setattr(launch, "_RUN", counting)
    return runs


KEPT: list[PreparedKernel] = []  # Triton 3.8 unloads a kernel that nobody holds, by any driver


def prepared_copy() -> PreparedKernel:
    KEPT.append(PreparedKernel(JITFunction(copy)))  # triton.jit would make an interpreted one here
    return KEPT[-1]


@pytest.fixture
def kernel() -> PreparedKernel:
    return prepared_copy()


def arguments(**changed: Any) -> tuple[Any, ...]:
    found = {"x": torch.zeros(64), "strides": (32, 2), "y": torch.zeros(64), "extra": None}
    found |= {"n": 16, "scale": 0.5} | changed
    return tuple(found.values())


def test_the_second_launch_is_prepared_and_the_same(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    args = arguments(extra=torch.ones(1))
    for _ in range(3):
        kernel[(4, 5)](*args, **CONSTANTS)
    assert len(jit_runs) == 1
    first, second, third = driver.launches
    assert first[3] == [*args, True, 16]
    addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert second == third == (*first[:3], [*addresses, True, 16])
    assert first[0] == (4, 5, 1)


def test_values_and_grid_are_not_baked_in(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    kernel[(4,)](*arguments(), **CONSTANTS)
    other = arguments(scale=-2.0, x=torch.ones(64))
    kernel[(7,)](*other, **CONSTANTS)
    assert len(jit_runs) == 1
    size, _, _, args = driver.launches[1]
    assert size == (7, 1, 1)
    assert args[0] == other[0].data_ptr()
    assert args[5] == -2.0


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(64)[1:]},
        {"y": torch.zeros(64)[2:]},
        {"extra": torch.zeros(1)},
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"strides": (32, 1)},
        {"strides": (32, 16)},
        {"n": 15},
        {"n": 1},
        {"n": 2**31},
        {"n": True},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_what_triton_specialises_on_gets_a_kernel_of_its_own(
    changed: dict[str, Any], driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    for args in (arguments(), arguments(**changed)):
        for _ in range(2):
            kernel[(1,)](*args, **CONSTANTS)
    assert len(jit_runs) == 2
    functions = [function for _, _, function, _ in driver.launches]
    kernel.kernel[(1,)](*arguments(**changed), **CONSTANTS)
    assert functions[2] is functions[3] is driver.launches[-1][2]


@pytest.mark.parametrize("constant", [{"BLOCK": 32}, {"FLAG": False}, {"num_warps": 2}], ids=str)
def test_constants_and_options_too(
    constant: dict[str, Any], driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    kernel[(1,)](*arguments(), **CONSTANTS)
    kernel[(1,)](*arguments(), **CONSTANTS | constant)
    assert len(jit_runs) == 2
    assert driver.launches[0][2] is not driver.launches[1][2]


def test_the_current_device_and_stream(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    for device, stream in ((0, 0), (0, 7), (1, 7), (0, 3)):
        driver.device, driver.stream = device, stream
        kernel[(1,)](*arguments(), **CONSTANTS)
    assert [stream for _, stream, _, _ in driver.launches] == [0, 7, 1007, 3]
    assert len(jit_runs) == 2
    functions = [function for _, _, function, _ in driver.launches]
    assert functions[0] is functions[1] is functions[3] is not functions[2]


def test_two_kernels_with_equal_arguments(driver: NotingDriver, jit_runs: list[str]) -> None:
    for kernel in (prepared_copy(), prepared_copy()):
        kernel[(1,)](*arguments(), **CONSTANTS)
    assert len(jit_runs) == 2


def test_launch_hooks_are_called(
    driver: NotingDriver, kernel: PreparedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = []
    make = driver.launcher_cls

    def launcher_cls(source: Any, metadata: Any) -> Any:
        note = make(source, metadata)

        def run(*args: Any) -> None:
            hooks.append(args[7:9])
            note(*args)

        return run

    driver.launcher_cls = launcher_cls  # type: ignore[method-assign]
    kernel[(1,)](*arguments(), **CONSTANTS)
    before, after = object(), object()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: before)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", lambda metadata: after)
    kernel[(1,)](*arguments(), **CONSTANTS)
    assert [hook(None) for hook in hooks[1]] == [before, after]


def test_who_takes_the_place_of_the_launch_sees_all(
    driver: NotingDriver, kernel: PreparedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = [], JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        seen.append(run(self, *args, warmup=True, **kwargs))
        return seen[-1]

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for _ in range(2):
        kernel[(1,)](*arguments(), **CONSTANTS)
    assert len(seen) == 2
    assert driver.launches == []
    assert kernel.prepared == {}


def test_pre_run_hooks_see_every_launch(driver: NotingDriver, kernel: PreparedKernel) -> None:
    grids = []
    kernel.kernel.add_pre_run_hook(lambda *args, **kwargs: grids.append(args))
    for _ in range(2):
        kernel[(1,)](*arguments(), **CONSTANTS)
    assert len(grids) == 2


def test_the_cache_is_bounded(
    driver: NotingDriver, kernel: PreparedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CACHE_SIZE", 4)
    for n in range(16, 176, 16):
        kernel[(1,)](*arguments(n=n), **CONSTANTS)
        assert len(kernel.prepared) <= 4


def test_descriptors_and_nested_tuples_are_told_apart() -> None:
    def specialised(args: tuple[Any, ...]) -> list[Any]:
        return launch.specialised(args)[0]

    x = torch.zeros(64, 64, dtype=torch.float16)
    wide, narrow = (TensorDescriptor.from_tensor(x, [16, block]) for block in (32, 64))
    keys = [
        specialised(args)
        for args in (
            (wide,),
            (narrow,),
            (x, 32),
            (((x, 32),),),
            (((x.float(), 32),),),
            (((x[:, 1:], 32),),),
        )
    ]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert specialised((((x, 32),),)) == keys[3]
    parameter = torch.nn.Parameter(x)
    assert specialised((parameter,)) == specialised((x,))


def test_which_kernels_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, interpreted = JITFunction(copy), triton.jit(copy)
    if type(interpreted) is not JITFunction:
        assert prepared(interpreted) is interpreted
    assert type(prepared(compiled)) is PreparedKernel
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert prepared(compiled) is compiled


def test_names_of_constants_are_told_apart(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    options = {"num_warps": 1, "num_stages": 2}, {"num_stages": 1, "num_warps": 2}
    for one in options:
        kernel[(1,)](*arguments(), FLAG=False, BLOCK=16, **one)
    assert len(jit_runs) == 2


def test_a_launch_made_before_is_the_same(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    args, planned = arguments(extra=torch.ones(1)), launch.Launch((4, 5), CONSTANTS)
    for _ in range(3):
        launch.launch(kernel, planned, *args)
    assert len(jit_runs) == 1
    first, second, third = driver.launches
    addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert second == third == (*first[:3], [*addresses, True, 16])
    other = arguments(scale=-2.0, x=torch.ones(64), extra=torch.ones(1))
    launch.launch(kernel, planned, *other)
    assert driver.launches[-1][3][:6:5] == [other[0].data_ptr(), -2.0]
    assert len(jit_runs) == 1


@pytest.mark.parametrize("off", ["first", "later"])
def test_addresses_off_the_grid_get_a_kernel_of_their_own(
    off: str, driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    planned, aligned = launch.Launch((1,), CONSTANTS), arguments()
    shifted = arguments(x=torch.zeros(65)[1:])
    for args in (shifted, aligned) if off == "first" else (aligned, shifted):
        for _ in range(2):
            launch.launch(kernel, planned, *args)
    assert len(jit_runs) == 2
    functions = [function for _, _, function, _ in driver.launches]
    assert functions[0] is functions[1] is not functions[2] is functions[3]


def test_a_launch_made_before_on_another_device(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    planned = launch.Launch((1,), CONSTANTS)
    for driver.device in (0, 1, 0, 1):
        launch.launch(kernel, planned, *arguments())
    assert len(jit_runs) == 2
    functions = [function for _, _, function, _ in driver.launches]
    assert functions[0] is functions[2] is not functions[1] is functions[3]


def test_tensors_in_tuples() -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    args = (((x, y[1:], 3), (x, 2.0)), (1, 2), ((1, 2), (3, 4)), None, y)
    planned = launch.Launch((1,), {})
    planned.note(0, (None, ()), args)
    assert (planned.tensors, planned.nested) == ((4,), (0,))
    values, bits = planned.addresses(args)
    here, there = x.data_ptr(), y.data_ptr()
    assert values == [((here, there + 4, 3), (here, 2.0)), *args[1:4], there]
    assert bits % 16 == 4


def test_a_flag_is_not_the_number_that_it_equals(
    driver: NotingDriver, jit_runs: list[str], kernel: PreparedKernel
) -> None:
    for n in (1, True, 1, True):
        kernel[(1,)](*arguments(n=n), **CONSTANTS)
    assert len(jit_runs) == 2
