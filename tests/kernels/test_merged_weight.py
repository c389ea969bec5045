"""A convolution's merged weight against plain torch and float64, in every layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_fast.testing import assert_within_budget

pytest.importorskip("triton")

from lora_fast.kernels import merged_weight as kernel
from lora_fast.kernels.configs import WeightConfig
from lora_fast.kernels.merged_weight import joined_axes, merged_weight
from lora_fast.kernels.plans import merged_weight_pays
from lora_fast.kernels.sizes import MAX_GRID_Y

CONFIG = WeightConfig(16, 32, num_warps=4)
SCALING = 0.75


def make(
    shape: tuple[int, ...], r: int, groups: int, device: torch.device,
    dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weight, A and B as the convolution layers have them."""
    k = shape[2] if len(shape) > 2 else 1
    rows = shape[0] // groups * k ** (len(shape) - 3) if len(shape) > 2 else shape[0]
    adapter = adapter or dtype
    weight = torch.randn(shape, device=device).to(dtype)
    a = torch.randn(r * k, weight.numel() // rows, device=device).to(adapter)
    b = torch.randn(rows, r * k, device=device).to(adapter)
    return weight, a, b


def formula(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    return weight + ((b * SCALING) @ a).view(weight.shape)


def check(weight: Tensor, a: Tensor, b: Tensor, scaling: float = SCALING) -> Tensor:
    found = merged_weight(weight, a, b, scaling, config=CONFIG)
    wide = formula(weight.double(), a.double(), b.double())
    assert_within_budget(found, formula(weight, a, b), wide)
    assert found.stride() == torch.empty_like(weight).stride()
    return found


SHAPES = {
    "conv1d": ((6, 5, 3), 2, 1),
    "conv2d": ((9, 7, 3, 3), 3, 1),
    "conv2d 1x1": ((7, 5, 1, 1), 1, 1),
    "conv2d groups": ((6, 2, 3, 3), 2, 3),
    "depthwise": ((8, 1, 5, 5), 1, 8),
    "conv3d": ((4, 3, 3, 3, 3), 1, 1),
    "conv3d groups": ((4, 2, 2, 2, 2), 2, 2),
    "linear": ((130, 33), 4, 1),
    "large rank": ((4, 3, 3), 70, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[tuple[int, ...], int, int], kernel_device: torch.device) -> None:
    check(*make(*shape, kernel_device))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "flipped axes": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: Callable[[Tensor], Tensor], kernel_device: torch.device) -> None:
    weight, a, b = make((9, 7, 3, 3), 3, 1, kernel_device)
    a, b = a.t().contiguous().t(), b.repeat_interleave(2, 1)[:, ::2]
    check(layout(weight), a, b)


def test_channels_last_in_three_dimensions(kernel_device: torch.device) -> None:
    weight, a, b = make((4, 3, 3, 3, 3), 2, 1, kernel_device)
    check(weight.to(memory_format=torch.channels_last_3d), a, b)


@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_round_once(
    dtype: torch.dtype, adapter: torch.dtype | None, kernel_device: torch.device
) -> None:
    weight, a, b = make((9, 7, 3, 3), 3, 1, kernel_device, dtype, adapter)
    found = check(weight.to(memory_format=torch.channels_last), a, b)
    if dtype is torch.bfloat16 and kernel_device.type == "cpu":
        return  # Triton's interpreter cuts bf16 off where a GPU rounds
    wide = formula(*(t.to(dtype).double() for t in (weight, a, b)))
    # One rounding, of half a unit in the last place, beside the sums in fp32.
    ulp = torch.finfo(dtype).eps * wide.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((found.double() - wide).abs() <= 0.5001 * ulp + 1e-6).all()


def test_no_elements(kernel_device: torch.device) -> None:
    weight, a, b = make((1, 7, 3), 2, 1, kernel_device)
    assert merged_weight(weight[:0], a, b[:0], SCALING).shape == (0, 7, 3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels
def test_nan_and_inf_spread_as_in_torch(kernel_device: torch.device) -> None:
    weight, a, b = make((9, 7, 3, 3), 3, 1, kernel_device)
    weight[2, 1, 0, 2], a[1, 3], b[20, 2] = float("nan"), float("inf"), float("nan")
    found = merged_weight(weight, a, b, SCALING, config=CONFIG)
    assert torch.equal(found.isfinite(), formula(weight, a, b).isfinite())


def test_the_same_bits_every_time(kernel_device: torch.device) -> None:
    tensors = make((9, 7, 3, 3), 3, 1, kernel_device, torch.float16)
    assert torch.equal(check(*tensors), check(*tensors))


def test_contiguous_weights_are_one_axis() -> None:
    weight = torch.empty(5, 4, 3, 3)
    assert joined_axes(weight, weight) == ((180,), (1,), (1,))
    last = weight.to(memory_format=torch.channels_last)
    assert joined_axes(last, last) == ((9, 4, 5), (4, 1, 36), (4, 1, 36))
    assert joined_axes(torch.empty(1, 1), torch.empty(1, 1)) == ((1,), (1,), (1,))


def test_where_the_kernel_pays() -> None:
    def weight(channels: int) -> Tensor:
        return torch.empty(channels, channels, 3, 3, device="meta", dtype=torch.bfloat16)

    def pays(weight: Tensor, adapter: torch.dtype = torch.bfloat16) -> bool:
        k = 3 * weight.shape[0]
        a, b = torch.empty(48, k, dtype=adapter), torch.empty(k, 48, dtype=torch.bfloat16)
        return merged_weight_pays(weight, a, b)

    assert pays(weight(1024))
    assert not pays(weight(512))
    assert pays(weight(64), adapter=torch.float32)
    assert pays(weight(64).to(memory_format=torch.channels_last))


def test_a_scale_off_by_two_percent_is_seen(kernel_device: torch.device) -> None:
    """The tests can fail."""
    with pytest.raises(AssertionError, match="budget"):
        check(*make((9, 7, 3, 3), 3, 1, kernel_device), scaling=SCALING * 1.02)


def test_a_transposed_kernel_is_seen(kernel_device: torch.device) -> None:
    """The tests can fail: the product in another order of the axes."""
    weight, a, b = make((9, 7, 3, 3), 3, 1, kernel_device)
    found = merged_weight(weight.transpose(2, 3), a, b, SCALING, config=CONFIG).transpose(2, 3)
    with pytest.raises(AssertionError, match="budget"):
        wide = formula(weight.double(), a.double(), b.double())
        assert_within_budget(found, formula(weight, a, b), wide)


def test_a_table_of_more_rows_than_a_second_axis_has_tiles(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **constants: None

    monkeypatch.setattr(kernel, "merged_weight_kernel", Recorder())
    n = (MAX_GRID_Y + 1) * CONFIG.block_n
    weight, a, b = make((n, 1), 1, 1, kernel_device, torch.bfloat16)
    merged_weight(weight, a, b, SCALING, config=CONFIG)
    assert grids == [(MAX_GRID_Y + 1,)]


@pytest.mark.parametrize(
    ("rows", "wide"),
    [(2**16, True), (2**16 - 15, True), (2**16 - 16, False), (3, False)],
)
def test_offsets_of_64_bits_where_32_do_not_reach(
    rows: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last tile, which has 16 rows, whether they are there or not."""
    seen = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: seen.append(constants["WIDE"])

    monkeypatch.setattr(kernel, "merged_weight_kernel", Recorder())
    shapes = (rows, 2**15), (1, 2**15), (rows, 1)
    merged_weight(*(torch.empty(s, device="meta") for s in shapes), SCALING, config=CONFIG)
    assert seen == [wide]
