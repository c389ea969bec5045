"""Measured choices as data: which plan serves a call best, on which GPU, and where that is written.

A table is a JSON file of rows that `lora-fast tune` measured on one GPU:

    {"format": 1, "gpu": "...", "arch": "sm_90", "torch": "2.11", "triton": "3.6",
     "lora_fast": "0.1.0", "date": "2026-11-24",
     "rows": [{"op": "lora_linear_fwd", "M": 8192, "N": 4096, "K": 4096, "R": 16,
               "dtype": "bfloat16", "dropout": false, "plan": {"impl": "split", "gemm": {...}},
               "us": ..., "rule_us": ...}]}

`plan` holds fields of the op's plan in `plans`; those that it leaves out are the rule's. The sizes
of an embedding's call are M tokens, N columns and K rows of its table; those of a merged weight
N K elements, as B is (N, R) and A (R, K), and an M of 1. The
user's table is for exactly one GPU, torch and triton, and wins over the tables that ship in
`tables/`, which serve every GPU of their architecture, those of the same name first. What no table
holds is left to the rule. Nothing here can fail a training step: what cannot be used is ignored,
with one warning for each file on the logger `lora_fast.dispatch`.
"""

import json
import logging
import os
import re
import stat
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

FORMAT = 1
SHIPPED = Path(__file__).with_name("tables")
_POWERS_OF_TWO = ("block_", "row_", "segment_", "num_warps", "parts")  # what such fields must be
_LEAST_PART = 16  # columns of a product; a mask takes 8
# From what to what a number makes sense: a product on the tensor cores takes 16 at least, which of
# a row in fp32 are 64 bytes, and no chip holds, or is worth, more than the others.
_BOUNDS = {
    "block_": (16, 1024),
    "chunk_": (16, 2**16),
    "segment_": (16, 1024),
    "row_": (64, 4096),
    "num_warps": (1, 32),
    "num_stages": (1, 16),
    "parts": (1, 8),
    "group_": (1, 1024),
    "max_splits": (1, 64),
}

_log = logging.getLogger("lora_fast.dispatch")
_warned: set[Path] = set()


class Call(NamedTuple):
    """A kind of call. M is a power of two and stands for the numbers of rows up to it."""

    op: str
    M: int
    N: int
    K: int
    R: int
    dtype: str
    dropout: bool

    @classmethod
    def of(
        cls, op: str, M: int, N: int, K: int, R: int, dtype: torch.dtype | str, dropout: bool
    ) -> "Call":
        """The kind of a call with M rows."""
        name = str(dtype).removeprefix("torch.")
        return cls(op, 1 << max(M - 1, 0).bit_length(), N, K, R, name, dropout)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that its name stands for."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class Machine:
    """What a measurement depends on; versions are major.minor."""

    gpu: str
    arch: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Row:
    """The fields of the plan that served a call best, and its time beside that of the rule's."""

    call: Call
    plan: dict[str, Any]
    us: float
    rule_us: float


@dataclass(frozen=True)
class Table:
    """The rows of a file; `path` is None before it is written."""

    machine: Machine
    rows: tuple[Row, ...]
    lora_fast: str
    date: str
    path: Path | None = None


def this_machine(gpu: str, arch: str) -> Machine:
    """The machine of this process, for one of its GPUs."""
    import triton

    def minor(version: str) -> str:
        return ".".join(version.split(".")[:2])

    return Machine(gpu, arch, minor(torch.__version__), minor(triton.__version__))


def user_folder() -> Path:
    """The folder of the user's tables: LORA_FAST_CACHE, else the user's cache folder.

    Raises:
        ValueError: the variable names the home folder of nobody.
    """
    chosen = os.environ.get("LORA_FAST_CACHE")
    if chosen:
        try:
            return Path(chosen).expanduser()
        except RuntimeError as error:
            raise ValueError(
                f"LORA_FAST_CACHE: expected a folder, got {chosen!r}: {error}"
            ) from None
    import platformdirs

    return Path(platformdirs.user_cache_dir("lora_fast", appauthor=False))


def user_path(machine: Machine) -> Path:
    """The file of the user's table for a machine."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    return user_folder() / f"{gpu}-torch-{machine.torch}-triton-{machine.triton}.json"


def user_tables() -> list[Path]:
    """The files of all the user's tables, whichever machine they are for.

    Raises:
        ValueError: there can be no such folder, its name being too long, say.
    """
    folder = user_folder()
    try:
        folder.stat()  # to look for files says nothing in some versions of Python
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(
            f"LORA_FAST_CACHE: expected a folder, got {_short(str(folder))}: {error.strerror}"
        ) from error
    return sorted(folder.glob("*-torch-*-triton-*.json"))


def read(path: Path) -> Table:
    """Read a table.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table of this format; the message says what is wrong where.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a device may never end, a pipe never begin
        raise ValueError("expected a file, not a folder, a device or a pipe")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))  # its other errors are ValueErrors
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"expected a JSON object with format {FORMAT}")
    machine = Machine(*(_member(data, name, str) for name in ("gpu", "arch", "torch", "triton")))
    rows = tuple(_row(row, i) for i, row in enumerate(_member(data, "rows", list)))
    versions = (_member(data, "lora_fast", str), _member(data, "date", str))
    return Table(machine, rows, *versions, path)


def to_json(table: Table) -> str:
    """Return a table as `read` wants it in a file."""
    rows = [
        {**row.call._asdict(), "plan": row.plan, "us": row.us, "rule_us": row.rule_us}
        for row in table.rows
    ]
    head = {"format": FORMAT, **asdict(table.machine)}
    data = {**head, "lora_fast": table.lora_fast, "date": table.date, "rows": rows}
    return json.dumps(data, indent=1) + "\n"


@cache
def in_force(gpu: str, arch: str) -> tuple[Table, ...]:
    """The tables that serve a GPU, the strongest first; none for an empty name."""
    if not gpu:
        return ()
    shipped = [_usable(path) for path in sorted(SHIPPED.glob("*.json"))]
    fitting = [table for table in shipped if table is not None and table.machine.arch == arch]
    fitting.sort(key=lambda table: table.machine.gpu != gpu)
    try:
        machine = this_machine(gpu, arch)
        path = user_path(machine)
        own = _usable(path, machine) if path.exists() else None
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # no platformdirs, no home
        warn_once(Path(), f"the user's tables are ignored: {error}")
        own = None
    return (*([] if own is None else [own]), *fitting)


@cache
def _rows(gpu: str, arch: str) -> dict[Call, tuple[Row, Path]]:
    found: dict[Call, tuple[Row, Path]] = {}
    for table in reversed(in_force(gpu, arch)):
        found.update({row.call: (row, table.path) for row in table.rows})
    return found


def find(gpu: str, arch: str, call: Call) -> tuple[Row, Path] | None:
    """The row for a call and the file that it is from, or None where nothing was measured."""
    return _rows(gpu, arch).get(call)


def forget() -> None:
    """Read the files again when they are next needed, and warn again."""
    in_force.cache_clear()
    _rows.cache_clear()
    _warned.clear()


def warn_once(path: Path, message: str) -> None:
    """Log that a table, or a row of it, is not used; only the first time for each file.

    A log line and no Python warning, which `-W error` would turn into a failed training step.
    """
    if path not in _warned:
        _warned.add(path)
        _log.warning("%s", message)


def changed(plan: Any, changes: dict[str, Any]) -> Any:
    """The plan with some fields changed, those of nested configurations by nested dicts.

    Raises:
        ValueError: a field is unknown, or no kernel can be launched with a value.
    """
    hints = typing.get_type_hints(type(plan))
    known = {field.name for field in fields(plan)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"{type(plan).__name__} has no field {', '.join(map(repr, unknown))}")
    values = {
        name: _value(hints[name], value, name, getattr(plan, name))
        for name, value in changes.items()
    }
    found = replace(plan, **values)
    if "parts" in known and found.block_n // found.parts < _LEAST_PART:
        raise ValueError(f"parts must leave {_LEAST_PART} columns of block_n each, got {found}")
    for name in known:
        block = name.replace("chunk_", "block_")
        if name.startswith("chunk_") and getattr(found, name) % getattr(found, block):
            raise ValueError(f"{name} must be a multiple of {block}, got {found}")
    return found


def _value(hint: Any, value: Any, name: str, before: Any) -> Any:
    """A value from JSON as a field of this type."""
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {_short(value)}")
        return changed(before, value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise ValueError(f"{name} must be one of {choices}, got {_short(value)}")
    elif type(value) is not hint:
        raise ValueError(f"{name} must be of type {hint.__name__}, got {_short(value)}")
    elif hint is int:
        least, most = next(ends for kind, ends in _BOUNDS.items() if name.startswith(kind))
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {_short(value)}")
        if name.startswith(_POWERS_OF_TWO) and value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")
    return value


def _short(value: object) -> str:
    """A value from a file, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _usable(path: Path, machine: Machine | None = None) -> Table | None:
    """The table in a file; None, with a warning, where it is broken or of another machine."""
    try:
        table = read(path)
        if machine is not None and table.machine != machine:
            raise ValueError(f"it is for {table.machine}, and this is {machine}")
    except (OSError, ValueError) as error:
        warn_once(path, f"{path} is ignored: {error}; `lora-fast tune` measures again")
        return None
    return table


def _row(row: Any, index: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"row {index} must be an object, got {_short(row)}")
    where = f"row {index}: "
    sizes = [_member(row, name, int, where) for name in ("M", "N", "K", "R")]
    if min(sizes) < 1:
        raise ValueError(f"{where}M, N, K and R must be at least 1, got {_short(sizes)}")
    call = Call.of(
        _member(row, "op", str, where),
        *sizes,
        _member(row, "dtype", str, where),
        _member(row, "dropout", bool, where),
    )
    plan = _member(row, "plan", dict, where)
    times = [_member(row, name, float, where) for name in ("us", "rule_us")]
    if not all(0 < time < 1e12 for time in times):  # false for NaN too
        raise ValueError(f"{where}us and rule_us must be times in us, got {_short(times)}")
    return Row(call, plan, *map(float, times))


def _member(data: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
    value = data.get(name)
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{where}{name} must be of type {kind.__name__}, got {_short(value)}")
    return value
