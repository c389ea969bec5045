"""A demo small enough for a test: the command line with a tiny GPT."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_fast.cli import main
from lora_fast.demo import gpt, run, text


@dataclass
class Result:
    """How a run of the command ended."""

    status: int
    out: Path
    stdout: str
    stderr: str
    metrics: dict[str, Any] = field(default_factory=dict)

    def row(self, what: str) -> dict[str, Any]:
        """The line of the table that begins with `what`."""
        (found,) = (row for row in self.metrics["table"] if row["what"].startswith(what))
        return found


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the GPT and the texts small."""
    size = gpt.Size(layers=1, width=16, heads=2, context=16)
    monkeypatch.setattr(gpt, "Size", lambda: size)
    for name in ("prose", "code"):
        whole = getattr(text, name)
        monkeypatch.setattr(text, name, lambda whole=whole: whole(size=5_000))
    monkeypatch.setattr(run, "CYCLES", 3)


@pytest.fixture
def demo(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `lora-fast demo` with a few steps and return how it ended."""

    def run_demo(*arguments: str, steps: int = 4) -> Result:
        out = tmp_path / "out"
        few = ("--steps", str(steps), "--pretrain-steps", "3", "--out", str(out))
        status = main(["demo", *few, *arguments])
        captured = capsys.readouterr()
        result = Result(status, out, captured.out, captured.err)
        if (out / "metrics.json").exists():
            result.metrics = json.loads((out / "metrics.json").read_text())
        return result

    return run_demo
