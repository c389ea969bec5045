"""`Linear` on the fused path end to end: results are loralib's, within the budget of the dtype."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="the drawn layers are on the CPU"
    ),
]


def test_in_train_mode(drawn_fused: Any, assert_same_results: Callable[..., None]) -> None:
    assert_same_results(drawn_fused, *drawn_fused.pair())


def test_all_trained_after_eval(drawn_fused: Any, assert_same_results: Callable[..., None]) -> None:
    """The weight too; our merge leaves no trace, so loralib's layer stays in train mode."""
    ours, theirs = drawn_fused.pair()
    ours.eval()
    ours.train()
    for layer in (ours, theirs):
        layer.requires_grad_(True)
    assert_same_results(drawn_fused, ours, theirs)


def test_the_environment_variable_reaches_the_kernels() -> None:
    code = """
import logging, torch, lora_fast as lora
logging.basicConfig(level=logging.DEBUG, format="%(message)s")
layer = lora.Linear(8, 6, r=2)
layer(torch.randn(3, 8)).sum().backward()
assert layer.lora_B.grad is not None
"""
    done = subprocess.run(
        # Triton 3.6's interpreter converts as NumPy 2.3 would not have it.
        [sys.executable, "-W", "error", "-W", "ignore:Conversion of an array", "-c", code],
        env=os.environ | {"LORA_FAST_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lora_linear -> triton: chosen by set_backend" in done.stderr
