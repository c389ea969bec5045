"""What commands share: how they end, and their arguments: numbers, a path, a device, a folder."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Number = TypeVar("Number", int, float)


class BadInputError(ValueError):
    """Input that a command cannot work with, in one line: argument, expectation, what came."""


def status_of(name: str, command: Callable[[], int]) -> int:
    """Run a command.

    Args:
        name: what its messages begin with.
        command: returns its exit status.

    Returns:
        That status, 2 for bad input, 130 after Ctrl-C, 141 where nobody reads its output any more.
    """
    try:
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
        # What is still buffered must not be written there when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def not_empty(text: str) -> str:
    """Return an argument that is not, as that of a variable which was never set, empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return text


def path(text: str) -> Path:
    """Return the path of an argument; an empty one would be that of the current folder."""
    return Path(not_empty(text))


def number(kind: type[Number], text: str) -> Number:
    """Return an argument as a number of this type."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None


def positive(text: str) -> int:
    """Return the whole number of an argument, from 1 on."""
    value = number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def more_than_zero(text: str) -> float:
    """Return the number of an argument, above 0 and finite."""
    value = number(float, text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """Return the number of an argument, from 0 on and finite."""
    value = number(float, text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
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
        reason = str(error).splitlines()[0]
        raise BadInputError(f"--device: cannot use {name!r}: {reason}") from error
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
