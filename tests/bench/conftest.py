"""The modules of bench/ as scripts there find them, and a row that does what a test wants."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for example_rows
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from harness.clock import Clock
from harness.contest import Contestant, Lab, Row


class FakeRow(Row):
    table = "fake"

    def __init__(self, name: str, builders: dict[str, Callable[[], Contestant]], **more: Any):
        self.name, self.builders = name, builders
        self._oracle, self._extra = more.get("oracle"), more.get("extra")

    @property
    def id(self) -> str:
        return self.name

    def columns(self) -> dict[str, Any]:
        return {
            "layer": "Fake",
            "shape": self.name,
            "M": 2,
            "r": 16,
            "dtype": "float32",
            "pass": "x",
        }

    def build(self, peer: str, lab: Lab) -> Contestant:
        return self.builders[peer]()

    def oracle(self, lab: Lab) -> Any:
        return self._oracle

    def extra_seconds(self, lab: Lab) -> float | None:
        return self._extra


@pytest.fixture
def fake_row() -> type[FakeRow]:
    return FakeRow


@pytest.fixture
def lab() -> Lab:
    device = torch.device("cpu")
    return Lab(device, "toy", Clock(device, rounds=5, budget=0.0, sample=0.0))


@pytest.fixture
def kernel_lab(kernel_device: torch.device) -> Lab:
    """Where Triton's kernels run."""
    pytest.importorskip("triton")
    clock = Clock(kernel_device, rounds=1, budget=0.0, sample=0.0)
    return Lab(kernel_device, "toy", clock)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a folder of results and return it."""
    from harness.results import write_json

    def write(name: str, *rows: dict[str, Any], **facts: Any) -> Path:
        folder = tmp_path / name
        write_json(
            folder, "linear", {"cpu": "a cpu", "cores": 2, "date": "2026-01-01", **facts}, rows
        )
        return folder

    return write
