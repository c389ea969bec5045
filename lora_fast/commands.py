"""What commands share: how they end and what they say, their arguments, what they need."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

Number = TypeVar("Number", int, float)
_OUTPUT_FAILED = 74  # EX_IOERR of sysexits.h
_MOST = 2**31 - 1  # of steps, rows, processes: what every library takes


class BadInputError(ValueError):
    """Input that a command cannot work with, in one line: argument, expectation, what came."""


def status_of(name: str, command: Callable[[], int]) -> int:
    """Run a command.

    Args:
        name: what its messages begin with.
        command: returns its exit status.

    Returns:
        That status, 2 for bad input, 74 where its output cannot be written, on a full disk, say,
        130 after Ctrl-C, 141 where nobody reads its output any more.
    """
    if sys.stderr is None:  # closed by the shell; progress bars write to it, unlike print
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    try:
        _print_any_text()
        status = command()
        if sys.stdout is not None:  # closed by the shell
            sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last moments
    except BadInputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        if _can_print():
            raise
        _drop_output()
        print(f"{name}: the output cannot be written: {error}", file=sys.stderr)
        return _OUTPUT_FAILED
    return status


def _print_any_text() -> None:
    """Let a path be printed whose name the output's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _can_print() -> bool:
    """Tell whether stdout takes a line, where something failed that may have been it."""
    try:
        print(flush=True)  # to flush alone tells nothing where nothing is buffered
    except OSError:
        return False
    return True


def _drop_output() -> None:
    """Let nothing that is still buffered be written to stdout when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says; of one without a message, its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def in_one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of what it says."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"


def transformers() -> ModuleType:
    """Return the package, which `--model` needs.

    Raises:
        BadInputError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise BadInputError("--model needs transformers: pip install transformers") from error


def not_empty(text: str, what: str = "a name") -> str:
    """Return an argument that is not, as that of a variable which was never set, empty."""
    if not text:
        raise argparse.ArgumentTypeError(f"expected {what}, got ''")
    return text


def path(text: str) -> Path:
    """Return the path of an argument; an empty one would be that of the current folder."""
    return Path(not_empty(text, "a path"))


def number(kind: type[Number], text: str) -> Number:
    """Return an argument as a number of this type."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None


def positive(text: str) -> int:
    """Return the whole number of an argument, from 1 to below 2^31."""
    value = number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {text}")
    return value


def more_than_zero(text: str) -> float:
    """Return the number of an argument, above 0 and finite."""
    value = number(float, text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def share(text: str) -> float:
    """Return the number of an argument, from 0 to below 1."""
    value = number(float, text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {text}")
    return value


def device_named(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        BadInputError: torch knows no such device, this machine has none, or it holds no values.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"--device: cannot use {name!r}: {first_line(error)}") from error
    if device.type == "meta":
        raise BadInputError(f"--device: expected a device that computes, got {name!r}")
    return device


def writable_folder(folder: Path, argument: str) -> None:
    """Make a folder if it is not there; refuse one that cannot be written to.

    To be called before minutes are spent on what goes there.

    Raises:
        BadInputError: it is none, cannot be made or cannot be written to; names `argument`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        raise BadInputError(
            f"{argument}: expected a folder that can be written to: {error}"
        ) from error
