"""Text that every machine has: the documentation and the code of Python's standard library."""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_fast.commands import BadInputError

# Files that are tables or generated teach little.
_LARGEST_FILE = 200_000
_MOST_DATA = 2**26  # bytes of the user's text: as ids, 8 times as many, and far more than is drawn
_SKIPPED_FOLDERS = frozenset(("test", "tests", "site-packages", "lib2to3", "idlelib", "encodings"))


@dataclass(frozen=True)
class Corpus:
    """Token ids to train on and to validate on, int64, one dimension."""

    train: Tensor
    valid: Tensor

    def batch(self, size: int, context: int, generator: torch.Generator) -> Tensor:
        """Draw `size` random windows of `context` + 1 ids from the training part."""
        starts = torch.randint(len(self.train) - context, (size,), generator=generator)
        return torch.stack([self.train[s : s + context + 1] for s in starts.tolist()])

    def validation(self, size: int, context: int) -> Tensor:
        """Return `size` windows of `context` + 1 ids, spread over the validation part."""
        last = len(self.valid) - context - 1
        starts = [last * i // max(1, size - 1) for i in range(size)]
        return torch.stack([self.valid[s : s + context + 1] for s in starts])


def prose(size: int = 600_000) -> bytes:
    """Return docstrings of the standard library, about `size` bytes."""
    parts, total = [], 0
    for path in _modules():
        for docstring in _docstrings(path):
            parts.append(docstring.encode())
            total += len(parts[-1])
        if total > size:
            break
    return b"\n\n".join(parts)[:size]


def code(size: int = 600_000) -> bytes:
    """Return source code of the standard library, about `size` bytes, from the last file on."""
    parts, total = [], 0
    for path in reversed(_modules()):
        parts.append(path.read_bytes())
        total += len(parts[-1])
        if total > size:
            break
    return b"\n\n".join(parts)[:size]


def from_path(path: Path) -> bytes:
    """Return the bytes of a file, or of the files below a folder; of many bytes the first 64 MiB.

    Raises:
        BadInputError: there is no such path, or nothing in it.
    """
    parts: list[bytes] = []
    room = _MOST_DATA
    try:
        path.stat()
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            with file.open("rb") as opened:
                parts.append(opened.read(room))
            room -= len(parts[-1])
            if room <= 0:
                print(f"--data: the first {_MOST_DATA / 2**20:.0f} MiB of {path} are used")
                break
    except OSError as error:
        raise BadInputError(f"--data: {error}") from error
    data = b"\n\n".join(parts)
    if not data.strip():
        raise BadInputError(f"--data: {path} is empty; give it some text")
    return data


def corpus(ids: Tensor, context: int) -> Corpus:
    """Hold the last tenth of `ids` out for validation.

    Raises:
        BadInputError: there are not enough of them for windows of `context` + 1.
    """
    cut = len(ids) - max(len(ids) // 10, context + 2)
    if cut < context + 2:
        raise BadInputError(
            f"the text has {len(ids)} tokens, too few to train on windows of {context}: at least "
            f"{2 * (context + 2)} are needed"
        )
    return Corpus(ids[:cut], ids[cut:])


def byte_ids(data: bytes) -> Tensor:
    """Return the bytes as int64 ids from 0 to 255."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def _modules() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        and 0 < path.stat().st_size < _LARGEST_FILE
    ]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or for another Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
