"""What a table on disk must hold for those who read it: told in a line, before anyone stumbles."""

import sys
from collections.abc import Callable
from typing import Any

from harness.shapes import DTYPES

Expected = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether one is that
_AGAIN = "measure again or delete the file"
_MACHINE = ("gpu", "cpu", "cores")  # what one folder's tables have in common
_TEXTS = ("layer", "shape", "dtype", "pass")
_SIZES = ("M", "K", "N", "r")
# The columns that are read of each table; of one with another name, those of every measured layer.
_COLUMNS = {
    "linear": ("layer", "shape", "M", "K", "N", "r", "dropout", "dtype", "pass"),
    "layers": ("layer", "shape", "M", "r", "dropout", "dtype", "pass"),
    "merge": ("layer", "shape", "r", "dtype", "pass"),
    "models": ("layer", "shape", "M", "r", "dropout", "dtype", "pass"),
    "gemm": ("layer", "shape", "M", "K", "N", "dtype"),
}
_OF_ANY = ("layer", "shape", "dtype", "pass")
# What a peer's part of a row may hold beside its times.
_AMOUNTS = (
    *("saved_bytes", "peak_bytes", "host_us", "efficiency", "tokens/s", "GB/s"),
    *("kept B/weight", "peak B/weight"),
)


def is_table(found: Any) -> bool:
    """Tell whether JSON is a table of measurements, or was meant to be one."""
    if not isinstance(found, dict) or not isinstance(found.get("machine"), dict):
        return False
    rows = found.get("rows")
    return isinstance(rows, list) and (not rows or any(map(_is_row, rows)))


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("columns"), dict)
        and isinstance(row.get("peers"), dict)
        and all(isinstance(entry, dict) for entry in row["peers"].values())
        and "id" in row
    )


def check_table(where: str, name: str, table: dict[str, Any]) -> None:
    """Refuse a table that its readers cannot work with.

    Args:
        where: what the message begins with: the file.
        name: of the table.
        table: what `is_table` took for one.

    Raises:
        ValueError: there are no rows, or one lacks something or holds what cannot be, or the
            machine's facts do.
    """
    _check_all(f"{where}: machine", table["machine"], _of_machine)
    if not table["rows"]:
        raise ValueError(f"{where}: expected rows, got none; {_AGAIN}")
    ids: set[str] = set()
    for i, row in enumerate(table["rows"]):
        if not _is_row(row):
            raise ValueError(
                f"{where}: row {i} must have an id, columns and peers, as the others have; {_AGAIN}"
            )
        if not _is_line(row["id"]) or row["id"] in ids:
            raise ValueError(
                f"{where}: row {i} must have a line of its own as id, got {row['id']!r}; {_AGAIN}"
            )
        ids.add(row["id"])
        _check_columns(f"{where}: row {row['id']}", name, row["columns"])
        for peer, entry in row["peers"].items():
            _check_entry(f"{where}: row {row['id']}", peer, entry)


def check_one_machine(where: str, machines: dict[str, dict[str, Any]]) -> None:
    """Refuse tables, by name, that were not all measured on one machine.

    Raises:
        ValueError: they were not; the message names two that differ.
    """
    told = {
        name: ", ".join(f"{key} {facts[key]}" for key in _MACHINE if key in facts)
        for name, facts in machines.items()
    }
    first = next(iter(told), "")
    for name, machine in told.items():
        if machine != told[first]:
            raise ValueError(
                f"{where}: expected one machine, got {first} of {told[first]} and {name} of "
                f"{machine}; give each machine a folder"
            )


def _check_columns(where: str, name: str, columns: dict[str, Any]) -> None:
    with_k = ("N",) if "K" in columns else ()  # a layer is named by both
    for column in dict.fromkeys((*_COLUMNS.get(name, _OF_ANY), *columns, *with_k)):
        what, fits = _of_column(column)
        if column not in columns or not fits(columns[column]):
            got = repr(columns[column]) if column in columns else "nothing"
            raise ValueError(
                f"{where}: column {column} must be {what}, got {_short(got)}; {_AGAIN}"
            )


def _check_entry(where: str, peer: str, entry: dict[str, Any]) -> None:
    """Refuse a peer's part of a row; every comparison with NaN comes out well."""
    for key in ("us_low", "us_high"):
        if key in entry and not {"us", "us_low", "us_high"} <= set(entry):
            raise ValueError(f"{where}: {key} of {peer} needs us and the other quartile; {_AGAIN}")
    _check_all(where, entry, _of_entry, of=f" of {peer}")
    if "us_low" in entry and not entry["us_low"] <= entry["us"] <= entry["us_high"]:
        got = [entry[key] for key in ("us_low", "us", "us_high")]
        raise ValueError(
            f"{where}: us of {peer} must lie between its quartiles, got {got}; {_AGAIN}"
        )


def _check_all(
    where: str,
    found: dict[str, Any],
    expected: Callable[[str], Expected],
    of: str = "",
) -> None:
    for key, value in found.items():
        what, fits = expected(key)
        if not fits(value):
            raise ValueError(
                f"{where}: {key}{of} must be {what}, got {_short(repr(value))}; {_AGAIN}"
            )


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _of_column(column: str) -> Expected:
    if column == "dtype":
        return f"one of {', '.join(DTYPES)}", lambda value: _is_text(value) and value in DTYPES
    if column in _TEXTS:
        return "a text", _is_text
    if column in _SIZES:
        return (
            "a whole number from 1 on",
            lambda value: type(value) is int and 1 <= value <= sys.maxsize,
        )
    if column == "dropout":
        return "a number from 0 to 1", lambda value: _is_number(value) and value <= 1.0
    return _ANYTHING


def _of_entry(key: str) -> Expected:
    if key in ("failed", "absent", "incomplete", "unchecked"):
        return "a text", _is_text
    if key == "chosen":
        return _TEXTS_BY_NAME
    if key == "ratio":
        return "1 or 3 finite numbers above 0, the median first and then its quartiles", _is_ratio
    if key in ("us", "us_low", "us_high"):
        return "a finite number above 0", lambda value: _is_number(value) and value > 0
    if key in _AMOUNTS:
        return "a finite number from 0 on", _is_number
    if key == "error":  # infinitely far from an oracle that is exactly right
        return "a number from 0 on", lambda value: type(value) in (int, float) and value >= 0
    return _ANYTHING


def _of_machine(key: str) -> Expected:
    if key in ("missing", "narrowed by"):
        return _TEXTS_BY_NAME
    if key.endswith(("TFLOP/s", "GB/s")):
        return "a finite number above 0", lambda value: _is_number(value) and value > 0
    if key == "date":
        return "a text", _is_text
    return (
        "a line of text or a number",
        lambda value: value is None or type(value) in (int, float) or _is_line(value),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_line(value: Any) -> bool:
    return _is_text(value) and value.splitlines() in ([], [value])


def _is_number(value: Any) -> bool:
    """Whether it is a number from 0 on that a float can hold; true and false are none."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _is_ratio(value: Any) -> bool:
    if not isinstance(value, list) or len(value) not in (1, 3):
        return False
    if not all(_is_number(number) and number > 0 for number in value):
        return False
    return len(value) == 1 or value[1] <= value[0] <= value[2]


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_ANYTHING: Expected = ("anything", lambda value: True)
_TEXTS_BY_NAME: Expected = ("an object of texts", _is_texts)
