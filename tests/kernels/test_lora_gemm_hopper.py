"""The Hopper kernel: its source on a model of the hardware, and itself on a Hopper GPU."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

import triton
from hopper_machine import Descriptor, Pointer
from hopper_model import Kernel
from triton.compiler.errors import CompilationError

from lora_fast.kernels import hopper_launch, hopper_product, lora_gemm_hopper, primitives
from lora_fast.kernels.configs import ARCHITECTURES, architecture
from lora_fast.kernels.descriptors import descriptor_fits
from lora_fast.kernels.dropout import packed_width, unpack_mask
from lora_fast.kernels.lora_gemm import lora_gemm
from lora_fast.kernels.lora_gemm_hopper import rank_operand
from lora_fast.kernels.plans import backward_plan, forward_plan

SPECIALISED = ARCHITECTURES["sm_90"].gemm_specialised
SOURCE = Path(lora_gemm_hopper.__file__).read_text()
BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, PARTS = 8, 16, 4, 2, 4


@dataclass
class Product:
    """The arguments of one product, and what plain torch makes of them."""

    x: Tensor
    w: Tensor
    t: Tensor
    up: Tensor
    bias: Tensor | None
    keep: Tensor | None

    def result(self, dtype: torch.dtype | None = None) -> Tensor:
        """keep * (t U^T) + x W^T + bias, in the dtype of the arguments or another one."""
        x, w, t, up = (part.to(dtype or self.x.dtype) for part in (self.x, self.w, self.t, self.up))
        update = t @ up.t()
        if self.keep is not None:
            update = update * unpack_mask(self.keep, w.shape[0])
        y = x @ w.t() + update
        return y if self.bias is None else y + self.bias.to(y.dtype)


def make(
    m: int, n: int, k: int, r: int, *, device: Any = "cpu", dtype: torch.dtype = torch.float16,
    bias: bool = True, keep: bool = False,
) -> Product:  # fmt: skip
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    bits = torch.randint(0, 256, (m, packed_width(n)), device=device, dtype=torch.uint8)
    return Product(
        x=random(m, k),
        w=random(n, k, scale=k**-0.5),
        t=random(m, r),
        up=random(n, r, scale=r**-0.5),
        bias=random(n) if bias else None,
        keep=bits if keep else None,
    )


def check(product: Product, y: Tensor) -> None:
    assert_within_budget(y, product.result(), product.result(torch.float64))


def run_on_model(
    product: Product, *, source: str = SOURCE, seed: int = 0, programs: int = 2, stages: int = 3,
    w_is_kn: bool = False, up_is_rn: bool = False,
) -> Tensor:  # fmt: skip
    (m, k), (n, r) = product.x.shape, product.up.shape
    y = Descriptor(torch.full((m, n), float("nan"), dtype=product.x.dtype),
                   [BLOCK_M // 2, BLOCK_N // PARTS])  # fmt: skip

    def factor(b: Tensor, depth: int, is_kn: bool) -> Descriptor:
        shape = [depth, BLOCK_N] if is_kn else [BLOCK_N, depth]
        return Descriptor(b.t() if is_kn else b, shape)

    Kernel(source, primitives=primitives).run(
        "lora_gemm_hopper_kernel",
        Descriptor(product.x, [BLOCK_M, BLOCK_K]),
        factor(product.w, BLOCK_K, w_is_kn),
        Descriptor(product.t, [BLOCK_M, BLOCK_R]),
        factor(product.up, BLOCK_R, up_is_rn),
        y,
        None if product.bias is None else Pointer(product.bias),
        None if product.keep is None else Pointer(product.keep),
        *(packed_width(n), m, n, k, r),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        BLOCK_R=BLOCK_R,
        GROUP_M=2,
        STAGES=stages,
        UP_IS_RN=up_is_rn,
        W_IS_KN=w_is_kn,
        programs=programs,
        seed=seed,
    )
    assert (y.writes == 1).all(), "an element was not written once"
    return y.matrix


# One step and several, fewer and more than the stages; edges in every direction; one tile and many.
SHAPES = [(1, 7, 3, 1), (8, 16, 4, 2), (17, 33, 9, 3), (30, 50, 26, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_the_source_on_the_model(shape: Any, stages: int, keep: bool) -> None:
    product = make(*shape, keep=keep)
    for seed in range(3):
        check(product, run_on_model(product, stages=stages, seed=10 * seed))


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_any_number_of_programs(programs: int) -> None:
    product = make(30, 50, 9, 3, keep=True, bias=False)
    check(product, run_on_model(product, programs=programs))


@pytest.mark.parametrize("w_is_kn", [False, True])
@pytest.mark.parametrize("up_is_rn", [False, True])
def test_factors_in_either_order_of_memory(w_is_kn: bool, up_is_rn: bool) -> None:
    product = make(19, 34, 11, 5)
    check(product, run_on_model(product, w_is_kn=w_is_kn, up_is_rn=up_is_rn))


def test_a_dropped_infinity_is_nan_as_in_torch() -> None:
    product = make(9, 20, 8, 4, keep=True)
    product.t[3, 1] = float("inf")
    y, expected = run_on_model(product), product.result()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isfinite(), expected.isfinite())


# What the kernel says, and what a slip would have made of it.
MUTANTS = {
    "producer waits for the wrong phase": ("phase ^ 1)", "phase)"),
    "producer does not wait": ("mbarrier.wait(empty.index(stage), phase ^ 1)", "pass"),
    "consumer does not wait": ("mbarrier.wait(full.index(stage), phase)", "pass"),
    "consumer waits for the wrong phase": ("full.index(stage), phase)", "full.index(stage), 0)"),
    "phase never flips": ("(step // STAGES) & 1", "0"),
    "one group frees a stage for both": ("count=GROUPS", "count=1"),
    "a stage is freed before it is read": ("step + i + STAGES - 1, STAGES", "step + i, STAGES"),
    "a stage is freed while the product runs": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "the first step frees a stage too": ("pred=i > 0", "pred=True"),
    "the last step frees no stage": (
        "mbarrier.arrive(empty.index(slot(step + steps - 1, STAGES)[0]))", "pass"),
    "the last product is not awaited": (
        "acc = warpgroup_mma_wait(0, deps=(acc,))", "acc = acc.value"),
    "too few bytes are expected": (" + b_desc.block_type.nbytes", ""),
    "the rank is skipped": (
        "acc, step = multiply(acc, update, ring, step, R, GROUP, UP_IS_RN)", "pass"),
    "the groups share their rows": ("start_m += GROUP * ROWS", "pass"),
    "both groups multiply the upper rows": (".slice(GROUP * ROWS,", ".slice(0,"),
    "the mask is a column late": ("octets = start_n // 8 +", "octets = start_n // 8 + 1 +"),
    "the mask covers all": ("acc *= keep.to(gl.float32)", "pass"),
    "the bias is doubled": ("bias.to(gl.float32)[None, :]", "2 * bias.to(gl.float32)[None, :]"),
    "the update is off by two percent": ("acc *= keep.to(gl.float32)", "acc *= 1.02 * keep"),
    "a part is overwritten on its way": ("tma.store_wait(BUFFERS - 1)", "tma.store_wait(BUFFERS)"),
    "no fence before the store": (
        "fence_async_shared()\n        async_store", "async_store"),
    "the parts lie on top of one another": ("start_n + part * COLS", "start_n"),
    "a tile is skipped": ("range(gl.program_id(0), tiles,", "range(gl.program_id(0) + 1, tiles,"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_model_sees_a_slip(name: str) -> None:
    before, after = MUTANTS[name]
    assert before in SOURCE
    product = make(17, 33, 26, 7, keep=True)
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(product, run_on_model(product, source=SOURCE.replace(before, after), seed=seed))


def on_meta(dtype: torch.dtype = torch.float16) -> Product:
    product = make(16, 32, 64, 8, dtype=dtype)
    return Product(*(None if part is None else part.to("meta") for part in vars(product).values()))


def launch(product: Product, **changes: Any) -> Tensor:
    config = replace(SPECIALISED, **changes)
    y, _ = lora_gemm(
        *(product.x, product.w, product.up),
        t=product.t,
        bias=product.bias,
        keep=product.keep,
        config=config,
    )
    return y


def test_no_rule_chooses_it_on_other_chips_or_in_fp32() -> None:
    for arch in ARCHITECTURES.values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            serves = arch.name == "sm_90" and dtype is not torch.float32
            for rows in (16, 8192):
                sizes = (arch, rows, 4096, 4096, 16, dtype)
                for plan in (forward_plan(*sizes, False), backward_plan(*sizes)):
                    assert plan.gemm.specialised == (serves and rows > 16)


def test_forced_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"sm_90.*got a tensor on cpu.*specialised=False"):
        launch(make(16, 32, 64, 8))


def test_forced_on_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_launch, "architecture", lambda device: ARCHITECTURES["sm_80"])
    with pytest.raises(ValueError, match=r"sm_90.*got sm_80.*specialised=False"):
        launch(on_meta())


def test_forced_on_what_it_is_not_made_for() -> None:
    with pytest.raises(ValueError, match=r"fp16 or bf16, got torch\.float32"):
        launch(on_meta(torch.float32))
    for changes in ({"block_m": 64}, {"num_warps": 4}):
        with pytest.raises(ValueError, match=r"expected num_warps=8 and block_m=128 or 256"):
            launch(on_meta(), **changes)


@pytest.mark.parametrize(
    ("error", "serves"),
    [
        (CompilationError(None, None, "no such name"), True),
        (AttributeError("no such name"), True),
        (RuntimeError("error encountered during parsing"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), False),
        (torch.OutOfMemoryError("full"), False),
        (ValueError("config: wrong"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_triton_cannot_compile_is_left_to_the_other_kernel(
    error: Exception,
    serves: bool,
    kernel_device: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = []

    def refuse(*args: Any, **options: Any) -> None:
        tries.append(args)
        raise error

    monkeypatch.setattr(lora_gemm_hopper, "lora_gemm_hopper", refuse)
    monkeypatch.setattr(hopper_product, "_refused", set())
    x, w, up, t = (torch.randn(64, 64, device=kernel_device).half() for _ in range(4))
    if not serves:
        with pytest.raises(type(error)) as raised:
            lora_gemm(x, w, up, t=t, config=SPECIALISED)
        assert raised.value is error
        return
    for _ in range(2):
        y, _ = lora_gemm(x, w, up, t=t, config=SPECIALISED)
    exact = x.double() @ w.double().t() + t.double() @ up.double().t()
    assert_within_budget(y, x @ w.t() + t @ up.t(), exact)
    assert len(tries) == 1
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"Triton {triton.__version__} does not compile" in warning.getMessage()


def test_operands_off_the_grid_take_the_kernel_with_pointers(kernel_device: Any) -> None:
    product = make(5, 9, 7, 3, device=kernel_device)
    check(product, launch(product))


@pytest.mark.parametrize("rank", [1, 5, 8, 12])
def test_what_the_accelerator_reads_along_the_rank(rank: int) -> None:
    for operand in (torch.randn(6, rank), torch.randn(rank, 16).t(), torch.randn(6, 40)[:, :rank]):
        for dtype in (torch.float16, torch.float32):
            given = operand.to(dtype)
            fitted = rank_operand(given, torch.float16)
            assert fitted.dtype is torch.float16
            assert descriptor_fits(fitted) or descriptor_fits(fitted.t())
            assert torch.equal(fitted[:, :rank], given.half())
            assert torch.count_nonzero(fitted[:, rank:]) == 0


IS_HOPPER = torch.cuda.is_available() and architecture(torch.device("cuda", 0)).name == "sm_90"
hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU: Gluon has no interpreter")
TRIAL = """
import torch
from lora_fast.kernels.configs import ARCHITECTURES
from lora_fast.kernels.lora_gemm import lora_gemm

sizes = ((300, 264), (520, 264), (300, 16), (520, 16))
x, w, t, up = (torch.randn(*size, device="cuda").half() for size in sizes)
y, _ = lora_gemm(x, w, up, t=t, config=ARCHITECTURES["sm_90"].gemm_specialised)
torch.cuda.synchronize()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Call it in another process first: one that waits for ever must not stop the other tests."""
    elsewhere = tmp_path_factory.mktemp("answers")
    subprocess.run([sys.executable, "-c", TRIAL], cwd=elsewhere, timeout=90, check=True)


GPU_SHAPES = [
    (1, 8, 8, 1),
    (7, 264, 72, 5),
    (130, 520, 136, 16),
    (257, 1032, 520, 64),
    (1000, 768, 2048, 256),
    (4096, 4096, 1024, 16),  # several tiles for each program
]


@hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_on_a_gpu(shape: Any, dtype: torch.dtype, keep: bool, kernel_device: Any) -> None:
    product = make(*shape, device=kernel_device, dtype=dtype, keep=keep, bias=not keep)
    y = launch(product)
    check(product, y)
    assert torch.equal(y, launch(product)), "other bits in another run"


@hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("changes", [
    {"block_m": 256, "block_n": 128, "parts": 2, "num_stages": 3},
    {"block_n": 128, "parts": 2},
    {"num_stages": 2},
    {"num_stages": 3},
], ids=str)  # fmt: skip
def test_other_tiles_on_a_gpu(changes: Any, kernel_device: Any) -> None:
    product = make(700, 776, 520, 24, device=kernel_device, keep=True)
    check(product, launch(product, **changes))


@hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("w_is_kn", [False, True])
@pytest.mark.parametrize("up_is_rn", [False, True])
@pytest.mark.parametrize("adapter", [torch.float16, torch.float32], ids=str)
def test_memory_orders_and_adapters_on_a_gpu(
    w_is_kn: bool, up_is_rn: bool, adapter: torch.dtype, kernel_device: Any
) -> None:
    product = make(300, 520, 264, 12, device=kernel_device)
    expected = product.result(torch.float64)
    product.up = product.up.to(adapter)
    if w_is_kn:
        product.w = product.w.t().contiguous().t()
    if up_is_rn:
        product.up = product.up.t().contiguous().t()
    assert_within_budget(launch(product), product.result(), expected)


@hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("answers")
def test_strided_rows_and_nan_on_a_gpu(kernel_device: Any) -> None:
    product = make(200, 264, 136, 8, device=kernel_device, keep=True)
    product.x = torch.randn(200, 512, device=kernel_device).half()[:, 64:200]
    check(product, launch(product))
    product.t[3, 1], product.x[9, 2] = float("inf"), float("nan")
    y, expected = launch(product), product.result()
    assert torch.equal(y.isfinite(), expected.isfinite())


@hopper
@pytest.mark.gpu
@pytest.mark.usefixtures("answers")
def test_an_update_off_by_two_percent_is_seen_on_a_gpu(kernel_device: Any) -> None:
    product = make(300, 520, 264, 16, device=kernel_device)
    y = launch(replace(product, t=product.t * 1.02))
    with pytest.raises(AssertionError, match="budget"):
        check(product, y)
