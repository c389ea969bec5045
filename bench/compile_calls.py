"""What the compile report compiles: every public call, on tensors without data.

To add a call: a function that makes it for one architecture, a generator of its cases, and the
generator's name in `CALLS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.shapes import dtype_name
from lora_fast.kernels import configs, plans
from lora_fast.kernels.candidates import candidates
from lora_fast.kernels.configs import Architecture
from lora_fast.kernels.decode_configs import DecodeSplits, decode_config
from lora_fast.kernels.lora_decode import lora_decode
from lora_fast.kernels.lora_embedding_bwd import lora_embedding_bwd
from lora_fast.kernels.lora_embedding_fwd import lora_embedding_fwd
from lora_fast.kernels.lora_linear_bwd import lora_linear_bwd
from lora_fast.kernels.lora_linear_fwd import lora_linear_fwd
from lora_fast.kernels.merged_weight import merged_weight
from lora_fast.kernels.shared_memory import bytes_taken
from lora_fast.kernels.sizes import MAX_BLOCK_R
from lora_fast.kernels.tables import Call

WIDTH = 4096  # features in and out; the kernels see only what divides it
EDGES = (0, 2064, 3072, 4096)  # of a merged layer's blocks; tiles cross one of them
DEFAULT_ARCHS = ("sm_80", "sm_90")
ONE_ARCH = "sm_90"  # for what changes the code by a few instructions, on every chip alike
AUTOCAST = ((8192, 32), (8192, 48), (512, 64), (16, 128))  # rows and rank
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call on one chip.

    Attributes:
        arch: name of the chip, a key of `configs.ARCHITECTURES`.
        words: what tells this case from the others.
        launch: makes the call for an architecture; must pickle.
    """

    arch: str
    words: str
    launch: Callable[[Architecture], object]


Cases = Callable[[Architecture, bool], Iterator[Case]]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor that has everything but data."""
    return torch.empty(shape, device="meta", dtype=dtype)


def describe(dtype: torch.dtype, rows: int, rank: int, *more: str) -> str:
    """Return a case in a few words."""
    return " ".join((dtype_name(dtype), f"M={rows}", f"r={rank}", *more))


@dataclass(frozen=True)
class Sizes:
    """What the kernels of a linear layer can depend on, besides the way of running it."""

    dtype: torch.dtype
    rows: int
    rank: int
    width: int = WIDTH
    adapter_dtype: torch.dtype | None = None
    edges: tuple[int, ...] | None = None

    @property
    def wide_adapters(self) -> bool:
        """Return whether A and B have more bytes an element than x."""
        return (self.adapter_dtype or self.dtype).itemsize > self.dtype.itemsize

    @property
    def ranks(self) -> int:
        """Return the rank of all blocks together."""
        return self.rank if self.edges is None else self.rank * len(self.edges) // 2

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x, the weight, A and B."""
        n = k = self.width
        adapter = self.adapter_dtype or self.dtype
        x, weight = meta(self.rows, k, dtype=self.dtype), meta(n, k, dtype=self.dtype)
        rows_b = n if self.edges is None else sum(self.edges[1::2]) - sum(self.edges[::2])
        lora_a, lora_b = meta(self.ranks, k, dtype=adapter), meta(rows_b, self.rank, dtype=adapter)
        return x, weight, lora_a, lora_b

    def describe(self, *more: str) -> str:
        """Return them in a few words."""
        words = [] if self.width == WIDTH else [f"N=K={self.width}"]
        if self.adapter_dtype is not None:
            words.append(f"{dtype_name(self.adapter_dtype)} adapter")
        if self.edges is not None:
            words.append(f"{len(self.edges) // 2} blocks")
        return describe(self.dtype, self.rows, self.rank, *words, *more)


def linear_forward(
    arch: Architecture,
    sizes: Sizes,
    impl: plans.ForwardImpl,
    dropout: bool,
    gemm: configs.GemmConfig | None = None,
) -> None:
    """Make one forward call of the linear layer, with the default tile or another one."""
    x, weight, lora_a, lora_b = sizes.tensors()
    p, seed = (0.1, meta(1, dtype=torch.int64)) if dropout else (0.0, None)
    n, k = weight.shape
    plan = plans.forward_plan(
        *(arch, sizes.rows, n, k, sizes.ranks, sizes.dtype, dropout), sizes.wide_adapters
    )
    default = configs.gemm_config(arch, sizes.rows, sizes.dtype, one_pass=impl == "one_pass")
    bias = meta(n, dtype=sizes.dtype)
    lora_linear_fwd(
        *(x, weight, bias, lora_a, lora_b, 1.0, p, seed, sizes.edges),
        plan=replace(plan, impl=impl, gemm=gemm or default),
    )


def linear_backward(
    arch: Architecture,
    sizes: Sizes,
    input_grad: plans.InputGradImpl,
    dropout: bool,
    gemm: configs.GemmConfig | None = None,
) -> None:
    """Make one backward call of the linear layer: all gradients, or those of the usual layer.

    That is one whose weight and bias are frozen; it is the one whose dx goes to the vendor.
    """
    x, weight, lora_a, lora_b = sizes.tensors()
    n, k = weight.shape
    s = meta(sizes.rows, sizes.ranks, dtype=sizes.dtype)
    mask = meta(sizes.rows, -(-k // 8), dtype=torch.uint8) if dropout else None
    plan = plans.backward_plan(
        *(arch, sizes.rows, n, k, sizes.rank, sizes.dtype, dropout), sizes.wide_adapters
    )
    plan = replace(plan, input_grad=input_grad, gemm=gemm or plan.gemm)
    trained = input_grad == "fused"
    needs = [True, trained, trained, True, True]  # x, weight, bias, A, B
    lora_linear_bwd(
        *(meta(sizes.rows, n, dtype=sizes.dtype), x, weight, lora_a, lora_b, s, mask),
        *(1.0, 0.1 if dropout else 0.0, needs, sizes.dtype, sizes.edges),
        plan=plan,
    )


def linear_sizes(arch: Architecture, everything: bool) -> list[Sizes]:
    """Return the sizes at which the linear layer's kernels differ."""
    if not everything:
        small, large = (Sizes(BF16, rows, 16) for rows in (16, 8192))
        return [small, large, replace(large, edges=EDGES)]
    ranks = ((BF16, 16), (BF16, 64), (BF16, 256), (FP32, 16), (FP32, 256))
    # The tiles for few rows, and for many.
    found = [Sizes(dtype, rows, rank) for dtype, rank in ranks for rows in (16, 8192)]
    found += [Sizes(BF16, rows, rank, edges=EDGES) for rows in (16, 8192) for rank in (16, 64)]
    found.append(Sizes(FP32, 8192, 16, edges=EDGES))
    # As under autocast. A rank of 32, 33 to 64, and one that is cut into blocks.
    found += [Sizes(BF16, rows, rank, adapter_dtype=FP32) for rows, rank in AUTOCAST]
    found.append(Sizes(BF16, 8192, 16, adapter_dtype=FP32, edges=EDGES))
    if arch.gemm.tma:
        found.append(Sizes(BF16, 8192, 16, width=4093))  # no descriptors, nothing divides
    if arch.name == ONE_ARCH:
        found.append(Sizes(FP16, 8192, 16))  # bf16's code with other instructions
        found.append(Sizes(BF16, 8192, 16, adapter_dtype=FP32))
        found.append(Sizes(BF16, 8192, 16, edges=(0, 2057, 3072, 4096)))  # off every grid
        found.append(Sizes(BF16, 1, 1, width=1))  # sizes of one are constants to Triton
    return found


def linear(arch: Architecture, everything: bool) -> Iterator[Case]:
    """Yield the cases of the linear layer: each implementation, with and without dropout."""
    forwards: tuple[plans.ForwardImpl, ...] = ("one_pass", "split", "lora_first")
    for sizes in linear_sizes(arch, everything):
        for dropout in (False, True):
            for impl in forwards:
                if impl != "split" and sizes.ranks > MAX_BLOCK_R:
                    continue
                if impl == "one_pass" and dropout:
                    continue
                if impl == "one_pass" and sizes.dtype is FP32:  # that the rule never chooses
                    continue
                call = partial(linear_forward, sizes=sizes, impl=impl, dropout=dropout)
                words = sizes.describe("forward", impl, *["dropout"] * dropout)
                yield Case(arch.name, words, call)
            adding = plans.adding_input_grad(sizes.ranks, dropout)
            for input_grad in dict.fromkeys(("fused", adding)):
                call = partial(linear_backward, sizes=sizes, input_grad=input_grad, dropout=dropout)
                words = sizes.describe("backward", input_grad, *["dropout"] * dropout)
                yield Case(arch.name, words, call)


def specialised_linear(arch: Architecture, everything: bool) -> Iterator[Case]:
    """Yield the cases of the product whose warps have a work of their own, where there is one."""
    gemm = arch.gemm_specialised
    if gemm is None:
        return
    sizes = [Sizes(BF16, 8192, rank) for rank in ((16, 64, 256) if everything else (16,))]
    if everything:
        sizes.append(Sizes(FP16, 8192, 16))
    for one in sizes:
        forward = partial(linear_forward, sizes=one, impl="split", dropout=False, gemm=gemm)
        yield Case(arch.name, one.describe("forward split specialised"), forward)
        for dropout in (False, True):
            backward = partial(
                linear_backward, sizes=one, input_grad="fused", dropout=dropout, gemm=gemm
            )
            words = one.describe("backward fused specialised", *["dropout"] * dropout)
            yield Case(arch.name, words, backward)


def decode_forward(arch: Architecture, sizes: Sizes, transposed: bool) -> None:
    """Make one call of the kernel for few rows, with K in as many slices as it may be."""
    x, weight, lora_a, lora_b = sizes.tensors()
    config = decode_config(arch.name, sizes.rows, sizes.dtype)
    most, k = config.max_splits, weight.shape[1]
    splits = DecodeSplits(w=most, a=2 * most, slice_w=k // most, slice_a=k // (2 * most))
    weight = weight.t().contiguous().t() if transposed else weight
    bias = meta(weight.shape[0], dtype=sizes.dtype)
    lora_decode(x, weight, bias, lora_a, lora_b, 1.0, config=config, splits=splits)


def decode(arch: Architecture, everything: bool) -> Iterator[Case]:
    """Yield the cases of the kernel for few rows, whose weight may be stored (K, N)."""
    sizes = [Sizes(BF16, rows, 16) for rows in (1, 16, 64)]
    if everything:
        sizes += [Sizes(BF16, rows, 64) for rows in (1, 2, 32, 64)]
        sizes += [Sizes(FP32, rows, 64) for rows in (1, 16, 32, 64)]
        sizes += [Sizes(BF16, 32, 64, adapter_dtype=FP32), Sizes(BF16, 1, 16, width=4093)]
        sizes += [Sizes(FP32, rows, rank, width=4093) for rows in (16, 32, 64) for rank in (16, 64)]
    for one in sizes:
        for transposed in (False, True) if everything else (False,):
            words = one.describe("forward decode", *["(K, N)"] * transposed)
            call = partial(decode_forward, sizes=one, transposed=transposed)
            yield Case(arch.name, words, call)


def look_up(arch: Architecture, sizes: Sizes, by_freq: bool) -> None:
    """Look tokens up in a table, and differentiate with or without division by frequency."""
    num, dtype = 50257, sizes.dtype
    index, weight = meta(sizes.rows, dtype=torch.int64), meta(num, sizes.width, dtype=dtype)
    adapter = sizes.adapter_dtype or dtype
    lora_a = meta(sizes.rank, num, dtype=adapter)
    lora_b = meta(sizes.width, sizes.rank, dtype=adapter)
    what = (arch, sizes.rows, sizes.width, num, sizes.rank, dtype)
    config = plans.embedding_plan(*what)
    plan = plans.embedding_backward_plan(*what, sizes.wide_adapters)
    dy = lora_embedding_fwd(index, weight, lora_a, lora_b, 1.0, config=config)
    lora_embedding_bwd(dy, index, lora_a, lora_b, 1.0, 0, by_freq, True, [True, True], plan=plan)


def embedding(arch: Architecture, everything: bool) -> Iterator[Case]:
    """Yield the cases of the embedding."""
    for sizes in linear_sizes(arch, everything):
        for by_freq in (False, True):
            words = sizes.describe("embedding", *["by frequency"] * by_freq)
            yield Case(arch.name, words, partial(look_up, sizes=sizes, by_freq=by_freq))


def merge_kernel(
    arch: Architecture,
    dtype: torch.dtype,
    rank: int,
    layout: torch.memory_format,
    adapter_dtype: torch.dtype,
) -> None:
    """Form the merged 3 x 3 kernel of a convolution."""
    channels = 512
    weight = meta(channels, channels, 3, 3, dtype=dtype).to(memory_format=layout)
    lora_a = meta(rank, 3 * channels, dtype=adapter_dtype)
    lora_b = meta(3 * channels, rank, dtype=adapter_dtype)
    merged_weight(weight, lora_a, lora_b, 1.0)


def convolution(arch: Architecture, everything: bool) -> Iterator[Case]:
    """Yield the cases of a convolution's weight: contiguous, and with channels last."""
    sizes = [(dtype, rank, dtype) for dtype in (BF16, FP32) for rank in (16, 256)]
    sizes += [(FP16, 16, FP16), (BF16, 256, FP32)]
    for dtype, rank, adapter in sizes if everything else sizes[:1]:
        for layout in (torch.contiguous_format, torch.channels_last):
            wide = [] if adapter is dtype else [f"{dtype_name(adapter)} adapter"]
            words = " ".join((dtype_name(dtype), f"r={rank}", *wide, f"merged weight {layout}"))
            call = partial(
                merge_kernel, dtype=dtype, rank=rank, layout=layout, adapter_dtype=adapter
            )
            yield Case(arch.name, words.replace("torch.", ""), call)


def largest_measured(arch: Architecture, op: str) -> Any:
    """Return, of the plans that `lora-fast tune` tries, the one whose tile takes most memory."""
    call = Call.of(op, 8192, WIDTH, WIDTH, MAX_BLOCK_R, BF16, False)
    rule = plans.rule_for(arch, call)
    ways = [replace(rule, **way) for step in candidates(arch, call, rule) for way in step]
    return max(ways, key=lambda plan: bytes_taken(arch, plans.tile_with_factors(plan), call.R))


def run_measured(arch: Architecture, op: str) -> None:
    """Make a call with A and B in fp32 by a plan that was measured with them in 16 bits."""
    plan = largest_measured(arch, op)
    x, weight, lora_a, lora_b = Sizes(BF16, 8192, MAX_BLOCK_R, adapter_dtype=FP32).tensors()
    if op == "lora_linear_fwd":
        shrink = configs.for_wide_adapters(arch, plan.shrink)
        plan = replace(plan, impl="library_expand", shrink=shrink)
        lora_linear_fwd(x, weight, None, lora_a, lora_b, 1.0, plan=plan)
    elif op == "lora_embedding_fwd":
        index = meta(8192, dtype=torch.int64)
        lora_embedding_fwd(index, weight, lora_a, lora_b, 1.0, config=plan)
    else:
        merged_weight(weight, lora_a, lora_b, 1.0, config=plan.config)


def measured(arch: Architecture, everything: bool) -> Iterator[Case]:
    """Yield the cases of the largest tiles that a measured table may choose on a small chip.

    Not of the pass over dY, whose largest spills: that costs time, which the measurement tells.
    """
    ops = ("lora_linear_fwd", "lora_embedding_fwd", "merged_weight")
    for op in ops if everything and arch.shared_memory < 100 * 1024 else ():
        words = describe(BF16, 8192, MAX_BLOCK_R, "fp32 adapter", op, "largest tile measured")
        yield Case(arch.name, words, partial(run_measured, op=op))


CALLS: tuple[Cases, ...] = (linear, specialised_linear, decode, embedding, convolution, measured)


def cases(*, everything: bool) -> list[Case]:
    """Return every call's default configuration on the default chips, or the whole matrix."""
    archs = configs.ARCHITECTURES if everything else DEFAULT_ARCHS
    return [
        case
        for name in archs
        for call in CALLS
        for case in call(configs.ARCHITECTURES[name], everything)
    ]
