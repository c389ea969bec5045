"""How a command ends: bad input, Ctrl-C, a reader that went away; what its arguments may be."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import lora_fast
from lora_fast.commands import (
    BadInputError,
    first_line,
    in_one_line,
    more_than_zero,
    path,
    positive,
    share,
    status_of,
    writable_folder,
)


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        raise error

    return command


def test_the_status_is_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert [status_of("a", lambda: 0), status_of("a", lambda: 1)] == [0, 1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BadInputError("--data: empty"), 2, "a: --data: empty\n"),
        (KeyboardInterrupt(), 130, "a: interrupted\n"),
    ],
)
def test_one_line_says_why_it_ended(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("a", raising(error)) == status
    assert capsys.readouterr().err == message


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        status_of("a", raising(ZeroDivisionError()))


@pytest.mark.parametrize("module", ["lora_fast", "lora_fast.cli"])
def test_a_module_is_the_command(module: str) -> None:
    for arguments, status, said in (
        (["--version"], 0, f"lora_fast {lora_fast.__version__}"),
        (["tune", "--shapes", "1"], 2, "lora-fast tune: --shapes: expected M,K,N,r"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout[: len(said)]) == (status, said)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_path_is_printed_whatever_its_name(encoding: str) -> None:
    code = (
        "import sys; from lora_fast.commands import BadInputError, status_of\n"
        "def command():\n"
        "    print('\\udcff日')\n"
        "    raise BadInputError('\\udcff日')\n"
        "sys.exit(status_of('a', command))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    name = b"\\udcff" + "日".encode(encoding, "backslashreplace")
    assert (done.returncode, done.stdout, done.stderr) == (2, name + b"\n", b"a: " + name + b"\n")


@pytest.mark.parametrize("command", [["tune", "--show"], ["doctor"]])
def test_a_cache_folder_is_printed_whatever_its_name(command: list[str], tmp_path: Path) -> None:
    code = "import sys; from lora_fast import cli, selftest; selftest.outcomes = lambda: iter(())\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(cli.main({command}))"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LORA_FAST_CACHE": str(tmp_path / "ö")},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"your tables would be in " in done.stdout and b"\\xf6" in done.stdout


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_failure(lines: int) -> None:
    code = (
        "import sys; from lora_fast.commands import status_of\n"
        f"sys.exit(status_of('a', lambda: [print(n) for n in range({lines})] and 0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 141


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (positive, ("1", "7", "2147483647"), ("0", "-3", "many", "1.5", "", "2147483648")),
        (more_than_zero, ("0.1", "3"), ("0", "-1", "nan", "inf", "many")),
        (share, ("0", "0.5"), ("1", "-0.1", "nan", "many")),
    ],
)
def test_numbers(read: Callable[[str], float], good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    assert [read(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            read(text)


def test_an_empty_path_is_refused(tmp_path: Path) -> None:
    assert path(str(tmp_path)) == tmp_path
    with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a path, got ''$"):
        path("")


def test_a_folder_is_made_or_refused(tmp_path: Path) -> None:
    writable_folder(tmp_path / "a" / "b", "--out")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match=r"^--out: expected a folder that can be written to"):
        writable_folder(tmp_path / "file", "--out")


def test_a_command_may_have_no_output() -> None:
    code = "import sys; from lora_fast.commands import status_of; sys.exit(status_of('a', int))"
    closed = f"exec >&-; exec {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(["sh", "-c", closed], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_may_have_nowhere_for_its_progress() -> None:
    code = (
        "import sys; from tqdm import tqdm; from lora_fast.commands import status_of\n"
        "sys.exit(status_of('a', lambda: print(sum(tqdm(range(3)))) or 0))"
    )
    closed = f"exec 2>&-; exec {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(["sh", "-c", closed], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("flushes", [True, False])
def test_output_that_cannot_be_written_is_one_line(options: list[str], flushes: bool) -> None:
    code = (
        "import sys; from lora_fast.commands import status_of\n"
        f"sys.exit(status_of('a', lambda: print('b', flush={flushes}) or 0))"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 74
    (line,) = done.stderr.splitlines()
    assert line == "a: the output cannot be written: [Errno 28] No space left on device"


def test_what_the_system_refuses_elsewhere_is_no_matter_of_the_output() -> None:
    with pytest.raises(FileNotFoundError):
        status_of("a", raising(FileNotFoundError(2, "No such file or directory", "b")))


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("\n one\ntwo"), "one", "ValueError: one"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (OSError("\n"), "OSError", "OSError"),
    ],
)
def test_an_exception_is_one_line(error: Exception, line: str, typed: str) -> None:
    assert (first_line(error), in_one_line(error)) == (line, typed)
