"""The one setting that may make fp32 products less exact."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels import torch_rules
from lora_fast.kernels.torch_rules import dot_precision


@pytest.fixture(autouse=True)
def precision_as_before() -> Iterator[None]:
    generic, matmul = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    # The old names first: they refuse to be read where only the new ones were set.
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = generic
    torch.backends.cuda.matmul.fp32_precision = matmul


def set_allow_tf32(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def set_matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_everything(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"  # no word of its own: the general one
    torch.backends.fp32_precision = value


@pytest.mark.parametrize(
    ("allow", "refuse"),
    [
        (lambda: set_allow_tf32(True), lambda: set_allow_tf32(False)),
        (lambda: set_matmul("tf32"), lambda: set_matmul("ieee")),
        (lambda: set_everything("tf32"), lambda: set_everything("ieee")),
        (
            lambda: torch.set_float32_matmul_precision("high"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
        (
            lambda: torch.set_float32_matmul_precision("medium"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
    ],
    ids=["allow_tf32", "matmul.fp32_precision", "fp32_precision", "high", "medium"],
)
def test_tf32_where_torch_allows_it(allow: Callable[[], None], refuse: Callable[[], None]) -> None:
    refuse()
    assert dot_precision(torch.float32) == "ieee"
    allow()
    assert dot_precision(torch.float32) == "tf32"
    assert dot_precision(torch.float16) == dot_precision(torch.bfloat16) == "ieee"
    refuse()
    assert dot_precision(torch.float32) == "ieee"


def test_tf32_is_off_by_default() -> None:
    set_everything("none")
    assert dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize(
    ("hip", "chip", "expected"),
    [(None, "", "tf32"), ("6.4", "gfx942:sramecc+", "tf32"), ("6.4", "gfx950", "ieee")],
)
def test_what_has_no_tf32_is_exact(
    hip: str | None, chip: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu = SimpleNamespace(gcnArchName=chip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    set_matmul("tf32")
    torch_rules._has_tf32.cache_clear()
    try:
        assert dot_precision(torch.float32) == expected
    finally:
        torch_rules._has_tf32.cache_clear()
