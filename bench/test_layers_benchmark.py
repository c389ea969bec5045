"""A short selection of bench_layers.py for pytest-benchmark: one group for each case."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from layers import Case

CASES = [
    Case("Linear", 1024, 512, 16, 0.1, torch.float32),
    Case("MergedLinear", 1024, 512, 16, 0.1, torch.float32),
    Case("MergedLinear", 1024, 512, 16, 0.0, torch.bfloat16),
    Case("Embedding", 1024, 512, 16, 0.0, torch.float32),
    Case("Conv2d", 64, 1024, 4, 0.0, torch.float32),
]


@pytest.mark.parametrize("name", ["loralib", "lora_fast", "frozen"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layer}-{case.dtype}")
def test_step(benchmark: Any, case: Case, name: str) -> None:
    """Forward and backward, the gradient of the input included."""
    steps = case.steps()
    if name not in steps:
        pytest.skip("no frozen counterpart: it would have no gradient")
    benchmark.group = f"{case.layer} {case.features} x {case.tokens}, {case.dtype}"
    result = benchmark(steps[name])
    assert all(torch.isfinite(g).all() for g in result)
