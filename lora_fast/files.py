"""Files that are there whole or not at all."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PERMISSIONS = 0o777


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield where to write what takes the place of `path` when it is whole, and not after an error.

    Several processes may write to one path, each rank of a training run, say. Who may read and
    write the file stays as it is; a new one is as open as the umask allows, whatever writes it.

    Raises:
        OSError: the system refuses the file, its folder being read-only, say, or the disk full;
            it names `path`. Any other exception is the writer's own.
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # not longer where `path` has a long name
    try:
        permissions = _made(part, path)
        yield part
        if part.stat().st_mode & _PERMISSIONS != permissions:  # safetensors makes its own file
            part.chmod(permissions)
        part.replace(path)
    except Exception as error:
        number = _refusal(error, part)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _made(part: Path, path: Path) -> int:
    """Make the part, no more open than `path` is; return the permissions that it must end with."""
    try:
        there = path.stat().st_mode & _PERMISSIONS
    except FileNotFoundError:
        there = None
    wanted = 0o666 if there is None else there | 0o200  # the part itself must be written to
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, wanted)
    try:
        # The umask is in it, which could be asked for only by changing it, for all threads.
        made = os.fstat(descriptor).st_mode & _PERMISSIONS
    finally:
        os.close(descriptor)
    return made if there is None else there


def _refusal(error: Exception, part: Path) -> int | None:
    """Return the system's number for why it refused the part, where that was the reason."""
    if isinstance(error, OSError):
        is_of_part = error.filename is None or str(error.filename) == str(part)
        return error.errno if is_of_part else None
    # By safetensors, whose file is gone; the second way before its version 0.6.
    told = re.search(r"(?:\(os error |\bOs \{ code: )(\d+)", str(error))
    if told:
        return int(told[1])
    if not isinstance(error, RuntimeError):
        return None
    try:  # torch does not tell: go on where it stopped
        with part.open("ab") as file:
            file.write(bytes(2**16))
    except OSError as refused:
        return refused.errno
    return None
