"""The dropout mask: its rate, its independence in every direction, and what its bits depend on.

Seeds are fixed, so a bound of five standard deviations either holds or does not, on every run.
"""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lora_fast.kernels import lora_linear_fwd
from lora_fast.kernels.configs import ShrinkConfig
from lora_fast.kernels.dropout import LEVELS, keep_scale, keep_threshold, unpack_mask

M, K = 256, 1024
SIGMAS = 5.0
RATES = [2**-16, 0.001, 0.1, 0.25, 0.5, 0.9, 0.999, 1 - 2**-16]


@pytest.fixture
def draw(kernel_device: torch.device) -> Any:
    """Draw the (m, k) mask of a call as bools, True where an element stays."""

    def drawn(p: float, seed: int, m: int = M, k: int = K) -> Tensor:
        x = torch.zeros(m, k, device=kernel_device)
        _, packed = lora_linear_fwd.lora_shrink(
            *(x, torch.zeros(1, k, device=kernel_device), 1.0),
            config=ShrinkConfig(64, 256, 16, num_warps=4, num_stages=2),
            dropout_p=p,
            seed=torch.tensor([seed], device=kernel_device),
        )
        return unpack_mask(packed, k)

    return drawn


def assert_rate(keep: Tensor, p: float) -> None:
    """Fail unless as many are dropped as a coin of this bias drops, give or take."""
    expected = keep.numel() * p
    spread = math.sqrt(keep.numel() * p * (1.0 - p))
    dropped = keep.numel() - int(keep.sum())
    # The tail of a rare event is Poisson's, not the normal's: two more.
    assert abs(dropped - expected) <= SIGMAS * spread + 2.0, f"{dropped} dropped, not {expected}"


def assert_uncorrelated(one: Tensor, other: Tensor, what: object) -> None:
    """Fail unless the two masks' covariance is that of independent draws."""
    a, b = one.double() - one.double().mean(), other.double() - other.double().mean()
    spread = (a.square().mean() * b.square().mean()).sqrt().item() / math.sqrt(a.numel())
    assert abs((a * b).mean().item()) <= SIGMAS * spread, f"{what}: dependent"


def assert_bits_of_a_byte_independent(keep: Tensor) -> None:
    octets = keep.view(keep.shape[0], -1, 8)
    for i, j in combinations(range(8), 2):
        assert_uncorrelated(octets[..., i], octets[..., j], f"bits {i} and {j}")


def assert_neighbours_independent(keep: Tensor) -> None:
    for lag in (1, 2, 3, 7, 8, 9, 16, 64, 512):
        assert_uncorrelated(keep[:, lag:], keep[:, :-lag], f"columns {lag} apart")
    for lag in (1, 2, 16, 64, 128):
        assert_uncorrelated(keep[lag:], keep[:-lag], f"rows {lag} apart")
    assert_uncorrelated(keep[1:, 1:], keep[:-1, :-1], "diagonal neighbours")


@pytest.mark.parametrize("p", RATES)
def test_the_rate(p: float, draw: Any) -> None:
    keep = draw(p, seed=7)
    assert_rate(keep, p)
    for part in (keep[:, ::2], keep[:, 1::2], keep[::2], keep[:, :8], keep[:, -8:]):
        assert_rate(part, p)


@pytest.mark.parametrize("p", [0.0, 1e-6, *RATES, 1 - 1e-6, 1.0])
def test_the_rate_is_rounded_and_the_scale_is_exact(p: float) -> None:
    """A multiple of 2^-16, the nearest; what stays is scaled so that the mean is x, exactly."""
    drawn = keep_threshold(p) / LEVELS
    assert abs(drawn - p) <= 0.5 / LEVELS
    assert (1.0 - drawn) * keep_scale(p) == (1.0 if drawn < 1.0 else 0.0)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (1e-6, 1.0), (1.0, 0.0), (1 - 1e-6, 0.0)])
def test_the_ends_of_the_range(p: float, kept: float, draw: Any) -> None:
    assert draw(p, seed=3, m=32).double().mean().item() == kept


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence_of_positions(p: float, draw: Any) -> None:
    keep = draw(p, seed=11)
    assert_bits_of_a_byte_independent(keep)
    assert_neighbours_independent(keep)
    spread = math.sqrt(p * (1 - p))
    assert (keep.double().mean(1) - (1 - p)).abs().max() <= SIGMAS * spread / math.sqrt(K)
    assert (keep.double().mean(0) - (1 - p)).abs().max() <= SIGMAS * spread / math.sqrt(M)


def test_every_byte_is_equally_likely(draw: Any) -> None:
    octets = draw(0.5, seed=13).view(-1, 8).long()
    counts = torch.bincount((octets << torch.arange(8, device=octets.device)).sum(1), minlength=256)
    expected = octets.shape[0] / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) <= SIGMAS * math.sqrt(2 * 255)


@pytest.mark.parametrize("other", [1, 2, 1 << 31, 1 << 32, 1 << 62], ids=lambda d: f"+{d}")
def test_seeds_that_hardly_differ(other: int, draw: Any) -> None:
    """Consecutive seeds, and both words of the seed: independent masks, also when shifted."""
    one, two = draw(0.5, seed=12345), draw(0.5, seed=12345 + other)
    assert_uncorrelated(one, two, "same place")
    assert_uncorrelated(one[:, 1:], two[:, :-1], "next column")
    assert_uncorrelated(one[1:], two[:-1], "next row")


def test_an_element_keeps_its_bit_whatever_surrounds_it(draw: Any) -> None:
    whole = draw(0.3, seed=5)
    for m, k in ((1, 1), (7, 130), (130, 7), (65, 513)):
        assert torch.equal(draw(0.3, seed=5, m=m, k=k), whole[:m, :k])


def test_a_higher_rate_drops_the_same_and_more(draw: Any) -> None:
    low, high = draw(0.2, seed=17), draw(0.6, seed=17)
    assert not (high & ~low).any()


def test_no_two_rows_are_alike(draw: Any) -> None:
    assert len(torch.unique(draw(0.5, seed=19, m=2048, k=64), dim=0)) == 2048


def test_the_checks_can_fail(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold off by 2 %, a half used twice, and counters that repeat are seen."""
    keep = draw(0.5, seed=23)
    twice = keep.clone().view(M, -1, 8)
    twice[..., 1] = twice[..., 0]
    with pytest.raises(AssertionError, match="bits 0 and 1"):
        assert_bits_of_a_byte_independent(twice.view(M, K))
    repeated = torch.cat([keep[:128], keep[:128]])
    with pytest.raises(AssertionError, match="rows 128 apart"):
        assert_neighbours_independent(repeated)
    monkeypatch.setattr(
        lora_linear_fwd, "keep_threshold", lambda p: round(1.02 * keep_threshold(p))
    )
    with pytest.raises(AssertionError, match="dropped, not"):
        assert_rate(draw(0.5, seed=7), 0.5)
