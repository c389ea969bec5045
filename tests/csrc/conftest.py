"""The native ops must be there where demanded, and are skipped with a reason elsewhere."""

import os
from collections.abc import Iterator

import pytest
import torch

from lora_fast import functional, ops


@pytest.fixture(autouse=True)
def native_ops() -> None:
    """Load the CPU ops."""
    reason = ops.load_native("cpu")
    if reason is None:
        return
    if os.environ.get("LORA_FAST_REQUIRE_BUILD") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set of this machine."""
    monkeypatch.setenv("LORA_FAST_CPU_ISA", request.param)
    try:
        functional.merge_(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    except RuntimeError as error:
        if "LORA_FAST_CPU_ISA is" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])
    yield request.param
