"""The compiled merge must be there where it is demanded, and is skipped with a reason elsewhere."""

import os

import pytest

from lora_fast import ops


@pytest.fixture(autouse=True)
def compiled_ops() -> None:
    """Load the CPU ops."""
    reason = ops.load_compiled("cpu")
    if reason is None:
        return
    if os.environ.get("LORA_FAST_REQUIRE_BUILD") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
