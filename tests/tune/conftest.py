"""A cache folder of their own for the tests of `lora-fast tune`, and how it refuses."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_fast import backend
from lora_fast.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the user's tables."""
    monkeypatch.setenv("LORA_FAST_CACHE", str(tmp_path / "cache"))
    _forget()
    yield tmp_path / "cache"
    _forget()


def _forget() -> None:
    if backend.has_triton():
        from lora_fast.kernels import plans

        plans.reload_tables()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must refuse in one line; return the line."""

    def run(*arguments: str | Path) -> str:
        assert main(["tune", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        return line

    return run
