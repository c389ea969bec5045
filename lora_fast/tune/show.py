"""The tables in force, as text: for `lora-fast tune --show` and `lora-fast doctor`."""

from collections.abc import Iterator
from typing import Any

import torch

from lora_fast import backend


def tables_in_force(*, rows: bool) -> Iterator[str]:
    """Yield lines that say which tables serve each GPU of this machine, the strongest first.

    Args:
        rows: whether every row of them gets a line.
    """
    if not backend.has_triton():
        yield "triton is not installed: there are no kernels to choose from"
        return
    from lora_fast.kernels import configs, tables

    try:
        are = "are" if tables.user_tables() else "would be"
        yield f"your tables {are} in {tables.user_folder()}"
    except ValueError as error:
        yield f"your tables are ignored: {error}"
    if not torch.cuda.is_available():
        yield "no GPU here, so no table is in force"
    for index in range(torch.cuda.device_count()):
        arch = configs.architecture(torch.device("cuda", index))
        found = tables.in_force(arch.gpu, arch.name)
        yield f"cuda:{index} {arch.gpu}: {len(found) or 'no'} tables, then the built-in rule"
        for table in found:
            yield from _lines(table, rows)


def _lines(table: Any, rows: bool) -> Iterator[str]:
    machine = table.machine
    measured = f"on {machine.gpu}, torch {machine.torch}, triton {machine.triton}, {table.date}"
    yield f"  {table.path}: {len(table.rows)} rows, measured {measured}"
    if rows:
        yield from (f"    {described(row)}" for row in table.rows)


def described(row: Any) -> str:
    """Return a row of a table in a line."""
    call = row.call
    rows = "M 1, " if call.M == 1 else f"M {call.M // 2 + 1} to {call.M}, "
    if call.op == "merged_weight":
        rows = ""
    sizes = f"{rows}K {call.K}, N {call.N}, r {call.R}, {call.dtype}"
    dropout = ", dropout" if call.dropout else ""
    times = f"{row.us:.4g} us instead of {row.rule_us:.4g}"
    return f"{call.op} {sizes}{dropout}: {times} with {_plan(row.plan)}"


def _plan(plan: dict[str, Any]) -> str:
    """A plan as text: choices by name, the tiles of a configuration by its values."""
    parts = []
    for name, value in plan.items():
        if isinstance(value, dict):
            value = "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
        parts.append(f"{name} {value}")
    return ", ".join(parts)
