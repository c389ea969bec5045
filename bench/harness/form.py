"""What a table on disk must hold for those who read it: told in a line, before anyone stumbles."""

import math
from collections.abc import Callable
from typing import Any

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


def check_rows(where: str, name: str, rows: list[Any]) -> None:
    """Refuse a table that its readers cannot work with.

    Args:
        where: what the message begins with: the file.
        name: of the table.
        rows: its rows.

    Raises:
        ValueError: there are no rows, or one lacks something or holds what cannot be.
    """
    if not rows:
        raise ValueError(f"{where}: expected rows, got none; measure again or delete the file")
    for i, row in enumerate(rows):
        if not _is_row(row):
            raise ValueError(
                f"{where}: row {i} must have an id, columns and peers, as the others have; measure "
                "again or delete the file"
            )
        _check_columns(f"{where}: row {row['id']}", name, row["columns"])
        _check_numbers(f"{where}: row {row['id']}", row["peers"])


def _check_columns(where: str, name: str, columns: dict[str, Any]) -> None:
    with_k = ("N",) if "K" in columns else ()  # a layer is named by both
    for column in dict.fromkeys((*_COLUMNS.get(name, _OF_ANY), *columns, *with_k)):
        what, fits = _expected(column)
        if column not in columns or not fits(columns[column]):
            got = repr(columns[column]) if column in columns else "nothing"
            raise ValueError(
                f"{where}: column {column} must be {what}, got {got}; measure again or delete the "
                "file"
            )


def _expected(column: str) -> tuple[str, Callable[[Any], bool]]:
    """What a column holds, and whether a value is that."""
    if column in _TEXTS:
        return "a text", lambda value: isinstance(value, str)
    if column in _SIZES:
        return "a whole number from 1 on", lambda value: type(value) is int and value >= 1
    if column == "dropout":
        return (
            "a number from 0 to 1",
            lambda value: type(value) in (int, float) and 0.0 <= value <= 1.0,
        )
    return "anything", lambda value: True


def _check_numbers(where: str, peers: dict[str, Any]) -> None:
    """Refuse times and ratios that are none: every comparison with NaN comes out well."""
    for peer, entry in peers.items():
        for key, lengths in (("us", (1,)), ("ratio", (1, 3))):
            if key not in entry:
                continue
            numbers = entry[key] if key == "ratio" else [entry[key]]
            if (
                not isinstance(numbers, list)
                or len(numbers) not in lengths
                or not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers)
            ):
                raise ValueError(
                    f"{where}: {key} of {peer} must be {' or '.join(map(str, lengths))} finite "
                    f"numbers above 0, got {entry[key]!r}"
                )
