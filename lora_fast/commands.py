"""What the commands of `lora-fast` share: how bad input is refused, and which device is meant."""

import torch


class BadInputError(ValueError):
    """Input that a command cannot work with, in one line: argument, expectation, what came."""


def device_named(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        BadInputError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInputError(f"--device: cannot use {name!r}: {reason}") from error
    return device
