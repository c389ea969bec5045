import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_fast
from lora_fast.cli import main
from lora_fast.demo import text, training

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_table_has_all_that_is_promised(demo: Callable[..., Any]) -> None:
    result = demo()
    assert result.status == 0, result.stdout + result.stderr
    for what in (
        "training loss, first step",
        "training loss, last step",
        "validation loss before",
        "validation loss after",
        "step time",
        "activations saved by a step",
        "trainable parameters",
        "adapter on disk",
        "merged against unmerged logits",
        "base weight lost, 3 cycles, float32",
        "base weight lost, 3 cycles, bfloat16",
        "adapter of the other",
    ):
        assert result.row(what)["passed"]
        assert what in result.stdout
    assert "same draws" in result.row("training loss, last")["verdict"]
    assert "times as fast" in result.row("step time")["verdict"]
    assert "FAILED" not in result.stdout


def test_both_libraries_train_alike_and_only_ours_restores_the_base(
    demo: Callable[..., Any],
) -> None:
    runs = demo(steps=6).metrics["runs"]
    assert len(runs["loralib"]["loss"]) == len(runs["lora_fast"]["loss"]) == 6
    assert runs["loralib"]["loss"] == pytest.approx(runs["lora_fast"]["loss"], abs=1e-4)
    assert runs["loralib"]["trainable_parameters"] == runs["lora_fast"]["trainable_parameters"] > 0


def test_the_base_weight_row_tells_the_libraries_apart(demo: Callable[..., Any]) -> None:
    row = demo(steps=20).row("base weight lost, 3 cycles, bfloat16")
    assert row["lora_fast"] == "0, exact"
    assert row["loralib"] != "0, exact"


def test_dropout_draws_the_same_masks_on_a_cpu(demo: Callable[..., Any]) -> None:
    result = demo("--dropout", "0.3")
    runs = result.metrics["runs"]
    assert result.status == 0
    assert runs["loralib"]["loss"] == pytest.approx(runs["lora_fast"]["loss"], abs=1e-4)


def test_the_files(demo: Callable[..., Any]) -> None:
    result = demo()
    assert {p.name for p in result.out.iterdir()} == {
        "adapter-loralib.pt",
        "adapter.safetensors",
        "loss.png",
        "metrics.json",
    }
    assert (result.out / "loss.png").read_bytes().startswith(PNG)
    ours = load_file(result.out / "adapter.safetensors")
    theirs = torch.load(result.out / "adapter-loralib.pt", weights_only=True)
    assert set(ours) == set(theirs)
    for key in ("device", "torch", "threads", "steps", "seed", "passed", "interrupted"):
        assert key in result.metrics
    assert not result.metrics["interrupted"]


@pytest.mark.parametrize("at", ["pretraining", "fine-tuning", "comparing"])
def test_ctrl_c_leaves_what_was_done(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    calls = 0
    name = {"pretraining": "language_loss", "fine-tuning": "_timed_step"}.get(at, "step_memory")
    original = getattr(training, name)

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == {"pretraining": 2, "fine-tuning": 6, "comparing": 1}[at]:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, name, interrupted)
    result = demo()
    assert result.status == 130
    assert result.metrics["interrupted"]
    assert "Interrupted" in result.stdout
    steps = {"pretraining": None, "fine-tuning": 2, "comparing": 4}[at]
    adapter = result.out / "adapter.safetensors"
    if steps is None:
        assert result.metrics["runs"] == {}
        assert result.metrics["passed"] is None
        assert not (result.out / "loss.png").exists()
        assert not adapter.exists()
    else:
        assert len(result.metrics["runs"]["lora_fast"]["loss"]) == steps
        assert (result.out / "loss.png").read_bytes().startswith(PNG)
        assert result.row("step time")["passed"]
        assert str(adapter) in result.stdout
        assert all("lora_" in key for key in load_file(adapter))


def test_an_interrupted_run_lists_its_own_files_only(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "adapter.safetensors" in demo().stdout

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "language_loss", interrupted)
    result = demo()
    assert result.status == 130
    assert "metrics.json" in result.stdout
    assert "adapter" not in result.stdout.split("written:")[1]


def test_a_full_disk_costs_no_results(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    result = demo()
    assert result.status == 2
    assert "validation loss after" in result.stdout
    names = {"metrics.json", "loss.png", "adapter.safetensors"}
    assert {path.name for path in result.out.iterdir()} == names
    assert len(result.metrics["runs"]["lora_fast"]["loss"]) == 4
    assert all(name in result.stdout.split("written:")[1] for name in names)
    (line,) = (line for line in result.stderr.splitlines() if "lora-fast demo" in line)
    expected = "--out: not all could be written: adapter-loralib.pt: [Errno 28] No space left on"
    assert expected in line


def test_the_adapters_are_written_first(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_fast.demo.report.Report.write_metrics", interrupted)
    result = demo()
    assert result.status == 130
    names = {"adapter.safetensors", "adapter-loralib.pt"}
    assert {path.name for path in result.out.iterdir()} == names


@pytest.mark.parametrize("error", [TypeError("no text"), ValueError("no formula")])
def test_a_picture_that_fails_costs_only_the_picture(
    error: Exception, demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("matplotlib.axes.Axes.set_title", failing)
    result = demo()
    assert result.status == 2
    names = {"metrics.json", "adapter.safetensors", "adapter-loralib.pt"}
    assert {path.name for path in result.out.iterdir()} == names
    assert f"not all could be written: loss.png: {error}" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="where names of files are text")
def test_data_of_a_name_that_is_no_text(demo: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff$x_$.txt")
    path.write_text("What is the answer? " * 30)
    result = demo("--data", str(path))
    assert result.status == 0, result.stderr
    assert r"\udcff$x_$.txt" in result.stdout
    assert (result.out / "loss.png").read_bytes().startswith(PNG)
    assert result.metrics["title"].endswith(str(path))


def test_numbers_that_cannot_be_written_cost_no_adapter(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_fast.demo.report.Report.write_metrics", full)
    result = demo()
    assert result.status == 2
    names = {"loss.png", "adapter.safetensors", "adapter-loralib.pt"}
    assert {path.name for path in result.out.iterdir()} == names
    assert "not all could be written: metrics.json: [Errno 28]" in result.stderr


def test_a_failed_check_shows_and_sets_the_status(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fast.demo.compare.exchanged_difference", lambda *args: 1.0)
    result = demo()
    assert result.status == 1
    assert not result.metrics["passed"]
    assert "FAILED" in result.stdout


# Bad input


def test_missing_data(demo: Callable[..., Any], tmp_path: Path) -> None:
    result = demo("--data", str(tmp_path / "nowhere.txt"))
    assert result.status == 2
    assert "nowhere.txt" in result.stderr and "No such file or directory" in result.stderr
    assert not result.out.exists()


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_data(demo: Callable[..., Any], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    result = demo("--data", str(path))
    assert result.status == 2
    assert "is empty" in result.stderr
    assert not result.out.exists()


def test_a_name_of_data_that_no_file_can_have(demo: Callable[..., Any]) -> None:
    result = demo("--data", "x" * 5000)
    assert (result.status, result.out.exists()) == (2, False)
    assert "--data: " in result.stderr and "File name too long" in result.stderr


def test_an_empty_folder_of_data(demo: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    result = demo("--data", str(folder))
    assert (result.status, result.out.exists()) == (2, False)
    assert "is empty" in result.stderr


def test_data_that_is_too_short(demo: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    result = demo("--data", str(path))
    assert result.status == 2
    assert "too few" in result.stderr


def test_of_very_much_data_the_beginning_is_used(
    demo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fast.demo.text._MOST_DATA", 2**12)
    for name in "ab":
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"all work and no play " * 1000)
    result = demo("--data", str(tmp_path / "data"))
    assert result.status == 0
    assert "--data: the first 0 MiB of" in result.stdout
    assert len(text.from_path(tmp_path / "data")) == 2**12


def test_data_from_a_file_and_a_folder_with_binary_files(
    demo: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("What is the answer? " * 30)
    (folder / "deep" / "b.bin").write_bytes(bytes(range(256)) * 3)
    assert demo("--data", str(folder)).status == 0
    assert demo("--data", str(folder / "a.txt")).status == 0


@pytest.mark.parametrize("name", ["toaster", "cuda", "meta"])
def test_a_device_that_is_unknown_or_not_there_or_holds_no_values(
    demo: Callable[..., Any], name: str
) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = demo("--device", name)
    assert (result.status, result.out.exists()) == (2, False)
    assert "--device" in result.stderr and repr(name) in result.stderr


def test_a_folder_that_cannot_be_made(demo: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    result = demo("--out", str(file))
    assert result.status == 2
    assert result.stderr.startswith("lora-fast demo: --out: expected a folder")
    assert file.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_forced_backend_that_cannot_run(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with lora_fast.use_backend("triton"):
        result = demo()
    assert (result.status, result.out.exists()) == (2, False)
    assert "LORA_FAST_BACKEND" in result.stderr and "was forced but cannot run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "argument --steps: must be at least 1, got 0"),
        (("--steps", "many"), "argument --steps: expected a whole number, got 'many'"),
        (("--dropout", "1"), "argument --dropout: must be from 0 to below 1, got 1"),
        (("--dropout", "nan"), "argument --dropout: must be from 0 to below 1, got nan"),
        (("--dropout", "p"), "argument --dropout: expected a number, got 'p'"),
        (("--seed", "-1"), "argument --seed: must be from 0 to below 2^63, got -1"),
        (("--seed", "1e3"), "argument --seed: expected a whole number, got '1e3'"),
        (("--data", ""), "argument --data: expected a path, got ''"),
        (("--out", ""), "argument --out: expected a path, got ''"),
        (("--device", ""), "argument --device: expected a name, got ''"),
        (("--model", ""), "argument --model: expected a name, got ''"),
        (("--unknown",), "unrecognized arguments: --unknown"),
    ],
)
def test_arguments_that_argparse_refuses(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["demo", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_without_loralib_it_says_what_to_install(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "loralib", None)
    result = demo()
    assert result.status == 2
    assert "lora_fast[demo]" in result.stderr


def test_without_transformers_it_says_what_to_install(
    demo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = demo("--model", "x")
    assert result.status == 2
    assert "--model needs transformers: pip install transformers" in result.stderr


def test_version_and_help_need_no_extras(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert lora_fast.__version__ in capsys.readouterr().out
    script = (
        "import sys; sys.modules.update(loralib=None, matplotlib=None, transformers=None)\n"
        "from lora_fast.cli import main; main(['demo', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout
    assert "None" not in done.stdout
