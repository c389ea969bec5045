"""Rows of results as lines of tables: all that was measured, and what the README shows."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from harness.names import (
    ADDMM_ORDER,
    CLONES,
    FROZEN,
    LORA_FIRST,
    LORAFUSION,
    LORALIB,
    LORALIB_COMPILED,
    MIB,
    OURS,
    PEFT,
    is_ours,
)
from harness.results import number

TABLES = ("linear", "layers", "merge", "models", "gemm")
LABELS = {
    FROZEN: "frozen layer",
    LORALIB_COMPILED: "compiled loralib",
    PEFT: "PEFT",
    ADDMM_ORDER: "addmm order (Unsloth, Axolotl)",
    LORA_FIRST: "LoRA-first order",
    LORAFUSION: "LoRAFusion",
    CLONES: "two clones of the weight",
}


def ordered(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield tables by name, the most important first."""
    for name in sorted(tables, key=lambda n: (TABLES.index(n) if n in TABLES else 99, n)):
        yield name, tables[name]


def peers_of(rows: Sequence[dict[str, Any]], *, forced: bool) -> list[str]:
    """Return the peers that occur; `forced` with lora_fast's single implementations."""
    names = dict.fromkeys(peer for row in rows for peer in row["peers"])
    return [p for p in names if p != OURS and (forced or not is_ours(p))]


def label(peer: str) -> str:
    """Return how a table calls a peer."""
    return LABELS.get(peer, peer)


def layer_name(columns: dict[str, Any]) -> str:
    """Return a layer with its size, and the model that has it."""
    shape = columns["shape"]
    if "K" not in columns:
        return f"{columns['layer']} {shape}"
    model = "" if shape.startswith("square") else f" ({shape})"
    return f"{columns['layer']} {columns['N']} x {columns['K']}{model}"


def ratio_cell(entry: dict[str, Any] | None, *, spread: bool) -> str:
    """Return how many times as long as lora_fast a peer takes, with quartiles if they are there."""
    if entry is None or "absent" in entry:
        return ""
    if "failed" in entry:
        return entry["failed"].split(":")[0]
    if "ratio" not in entry:
        return ""
    median, *around = entry["ratio"]
    text = f"{median:.2f}"
    return f"{text} ({around[0]:.2f}-{around[1]:.2f})" if spread and around else text


def full_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a folder's table: all that was measured."""
    lines = []
    for row in rows:
        line = dict(row["columns"])
        own = row["peers"].get(OURS, {})
        if "us" in own:
            line["lora_fast ms"] = own["us"] / 1e3
            if "us_low" in own:
                line["quartiles ms"] = (
                    f"{number(own['us_low'] / 1e3)}-{number(own['us_high'] / 1e3)}"
                )
        elif "failed" in own:
            line["lora_fast ms"] = own["failed"]
        for peer in peers_of([row], forced=True):
            entry = row["peers"][peer]
            cell = ratio_cell(entry, spread=True)
            if "us" in own or "ratio" in entry:
                line[f"{label(peer)} /"] = cell
            else:  # there is no time of ours to hold it against
                line[f"{label(peer)} ms"] = entry["us"] / 1e3 if "us" in entry else cell
        line["efficiency"] = own.get("efficiency", "")
        for peer in (OURS, LORALIB):
            entry = row["peers"].get(peer, {})
            for key, name in (("saved_bytes", "saved"), ("peak_bytes", "peak")):
                if key in entry:
                    line[f"{peer} {name} MiB"] = entry[key] / MIB
        for peer, entry in row["peers"].items():
            if "error" in entry:
                line[_error_column(peer)] = entry["error"]
            elif "unchecked" in entry:
                line[_error_column(peer)] = f"not checked: {entry['unchecked']}"
        for key in ("host_us", "tokens/s", "GB/s", "kept B/weight", "peak B/weight"):
            if key in own:
                line[key.replace("host_us", "host us")] = own[key]
        if "chosen" in own:
            line["chosen"] = ", ".join(f"{what} {name}" for what, name in own["chosen"].items())
        lines.append(line)
    return _without_empty_columns(lines)


def _error_column(peer: str) -> str:
    return "error" if peer == OURS else f"{label(peer)} error"


def facts_line(facts: dict[str, Any]) -> str:
    """Return the machine in one line."""
    parts = [
        f"{key} {number(value)}"
        for key, value in facts.items()
        if not isinstance(value, dict) and value != "missing"
    ]
    narrowed = facts.get("narrowed by", {})
    if narrowed:
        told = (f"{k} {v}" for k, v in narrowed.items())
        parts.append("narrowed by " + ", ".join(f"`{t}`" if t[0] == "-" else t for t in told))
    missing = facts.get("missing", {})
    if missing:
        reasons: dict[str, list[str]] = {}
        for peer, why in missing.items():
            reasons.setdefault(why, []).append(label(peer))
        parts.append(
            "missing: " + "; ".join(f"{', '.join(p)} ({why})" for why, p in reasons.items())
        )
    return "; ".join(parts)


def headline(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows for the README: rank 16, with backward, the largest M of each shape."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        columns = row["columns"]
        return tuple(columns.get(c) for c in ("layer", "shape", "dtype"))

    wanted = [
        row
        for row in rows
        if row["columns"].get("r") == 16
        and row["columns"].get("pass") != "fwd"
        and row["columns"].get("mode", "eager") == "eager"
        and "us" in row["peers"].get(OURS, {})
    ]
    largest: dict[tuple[Any, ...], int] = {}
    for row in wanted:
        largest[key(row)] = max(largest.get(key(row), 0), row["columns"].get("M", 0))
    return [row for row in wanted if row["columns"].get("M", 0) == largest[key(row)]]


def readme_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the README's table."""
    lines = []
    chosen = headline(rows)
    peers = peers_of(chosen, forced=False)
    for row in chosen:
        columns, own = row["columns"], row["peers"][OURS]
        line = {
            "layer": layer_name(columns),
            "rows": columns.get("M", ""),
            "dtype": columns["dtype"],
            "dropout": columns.get("dropout", ""),
            "what": columns.get("pass", ""),
            "lora_fast (ms)": own["us"] / 1e3,
        }
        for peer in peers:
            line[f"{label(peer)} /"] = ratio_cell(row["peers"].get(peer), spread=False)
        line["efficiency"] = own.get("efficiency", "")
        saved = [row["peers"].get(p, {}).get("saved_bytes") for p in (OURS, LORALIB)]
        if None not in saved:
            line["saved, loralib's (MiB)"] = ", ".join(number(b / MIB) for b in saved)
        lines.append(line)
    return _without_empty_columns(lines)


def _without_empty_columns(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    filled = {column for line in lines for column, value in line.items() if value != ""}
    return [{k: v for k, v in line.items() if k in filled} for line in lines]


def summary_rows(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each layer and pass how it stands to loralib over all of its rows."""
    return [
        {
            "layer": layer,
            "what": what,
            "rows measured": len(ratios),
            "loralib / lora_fast, smallest": f"{min(ratios):.2f}",
            "median": f"{statistics.median(ratios):.2f}",
            "largest": f"{max(ratios):.2f}",
        }
        for (layer, what), ratios in _ratios_to_loralib(tables).items()
    ]


def comparison_rows(machines: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same for several machines, a column for each."""
    found = {name: _ratios_to_loralib(tables) for name, tables in machines.items()}
    kinds = dict.fromkeys(kind for ratios in found.values() for kind in ratios)
    return [
        {"layer": layer, "what": what}
        | {name: _median_and_extremes(ratios.get((layer, what))) for name, ratios in found.items()}
        for layer, what in kinds
    ]


def _ratios_to_loralib(tables: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Return the ratios of all rows by layer and pass."""
    found: dict[tuple[str, str], list[float]] = {}
    for _, table in ordered(tables):
        for row in table["rows"]:
            entry = row["peers"].get(LORALIB, {})
            if "ratio" in entry:
                columns = row["columns"]
                key = (columns["layer"], columns.get("pass", ""))
                found.setdefault(key, []).append(entry["ratio"][0])
    return found


def _median_and_extremes(ratios: list[float] | None) -> str:
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
