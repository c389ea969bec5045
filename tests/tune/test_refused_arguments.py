"""What `lora-fast tune` refuses before it measures anything: devices and arguments."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lora_fast import backend
from lora_fast.cli import main

Refused = Callable[..., str]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", [(), ("--device", "cuda:1")])
def test_without_cuda(device: tuple[str, ...], refused: Refused) -> None:
    line = refused("--shapes", "1,2,3,4", *device)
    assert line.startswith("lora-fast tune: --device: expected a CUDA device to measure on")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_no_model_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """The hub may take its time to say that it has none of that name."""
    monkeypatch.setattr("lora_fast.tune.shapes.of_model", None)
    assert "--device: expected a CUDA device to measure on" in refused("--model", "x")
    assert "--shapes: expected M,K,N,r" in refused("--shapes", "1")


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    line = refused("--shapes", "1,2,3,4", "--device", "cpu")
    assert line == "lora-fast tune: --device: the kernels need a CUDA device, got 'cpu'"


def test_interpreted_times_do_not_go_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, cache: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    line = refused("--shapes", "1,2,3,4", "--device", "cpu")
    assert "--out: a file is needed with --device cpu" in line
    assert not cache.exists()


def test_an_unknown_device(refused: Refused) -> None:
    line = refused("--shapes", "1,2,3,4", "--device", "toaster")
    assert "--device: cannot use 'toaster'" in line


def test_without_triton(monkeypatch: pytest.MonkeyPatch, refused: Refused, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_TRITON_FOUND", False)
    arguments = ("--shapes", "1,2,3,4", "--device", "cpu", "--out", tmp_path / "t.json")
    assert "pip install triton" in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--shapes"),
        (("--shapes", "1,2,3,4", "--model", "x"), "--model"),
        (("--shapes", "1,2,3,4", "--minutes", "0"), "--minutes"),
        (("--shapes", "1,2,3,4", "--minutes", "nan"), "--minutes"),
        (("--shapes", "1,2,3,4", "--dtype", "int8"), "--dtype"),
        (("--model", "x", "--rows", "0"), "--rows"),
    ],
)
def test_arguments_that_argparse_refuses(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["tune", *arguments])
    assert error.value.code == 2
    assert named in capsys.readouterr().err
