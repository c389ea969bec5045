"""Pictures of results, each as PNG and SVG: speed-up, efficiency, roofline, memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from harness.floor import dense_operations, extra_operations
from harness.names import LORALIB, MIB, OURS, is_ours
from harness.shapes import DTYPES
from harness.tables import headline, label, layer_name, ordered
from lora_fast.files import written_whole

Row = dict[str, Any]
_KINDS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 120, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None}},
}


def draw(folder: Path, tables: dict[str, Any]) -> list[str]:
    """Draw what the tables have data for; return the names of the pictures.

    The same data give the same bytes.
    """
    rows = [row for _, table in ordered(tables) for row in table["rows"]]
    linear = tables.get("linear", {"rows": [], "machine": {}})
    drawn = {
        "speedup": _speedup(rows),
        "efficiency": _efficiency(rows),
        "roofline": _roofline(linear["rows"], linear["machine"]),
        "memory": _memory(rows),
    }
    with matplotlib.rc_context({"svg.hashsalt": "lora_fast"}):
        for name, figure in drawn.items():
            if figure is None:
                continue
            for kind, options in _KINDS.items():
                with written_whole(folder / f"{name}.{kind}") as part:
                    figure.savefig(part, format=kind, bbox_inches="tight", **options)
            plt.close(figure)
    return [name for name, figure in drawn.items() if figure is not None]


def _name(row: Row) -> str:
    columns = row["columns"]
    parts = [layer_name(columns)]
    parts += [f"M {columns['M']}"] if "M" in columns else []
    parts += [f"p {columns['dropout']}"] if columns.get("dropout") else []
    parts += [columns["dtype"], columns["pass"]]
    return " ".join(str(part) for part in parts)


def _others(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(peer for row in rows for peer in row["peers"])
    return [peer for peer in names if not is_ours(peer)]


def _legend(axes: Axes) -> None:
    """Name the points, if any peer has one: matplotlib warns of a legend of nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _speedup(rows: Sequence[Row]) -> Figure | None:
    """Of each headline row a dot for every peer: its time over lora_fast's, on a log axis."""
    chosen = headline(rows)
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(chosen)))
    places = range(len(chosen))
    for peer in _others(chosen):
        points = [
            (row["peers"][peer]["ratio"][0], i)
            for i, row in enumerate(chosen)
            if "ratio" in row["peers"].get(peer, {})
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=label(peer), alpha=0.8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(StrMethodFormatter("{x:g}"))
    axes.set_yticks(places, [_name(row) for row in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of the other / time of lora_fast (right of 1: lora_fast is faster)")
    axes.grid(axis="x", which="both", alpha=0.3)
    _legend(axes)
    return figure


def _efficiency(rows: Sequence[Row]) -> Figure | None:
    """T_ideal / T of lora_fast against M, a line for each shape."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        columns, own = row["columns"], row["peers"].get(OURS, {})
        if "efficiency" in own and columns.get("r") == 16 and "M" in columns:
            drop = f" p {columns['dropout']}" if columns.get("dropout") else ""
            name = f"{layer_name(columns)} {columns['dtype']} {columns['pass']}"
            mode = " graph" if columns.get("mode") == "graph" else ""
            lines.setdefault(name + drop + mode, []).append((columns["M"], own["efficiency"]))
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(9, 5))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, markersize=3, linewidth=1)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows M")
    axes.set_ylabel("efficiency, T_ideal / T")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _roofline(rows: Sequence[Row], facts: dict[str, Any]) -> Figure | None:
    """Operations a second against operations a byte, under the two ceilings of the run."""
    bandwidth = facts.get("copy GB/s", 0.0) * 1e9
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        columns = row["columns"]
        for peer in (OURS, LORALIB):
            seconds = row["peers"].get(peer, {}).get("us", 0.0) * 1e-6
            if not seconds or f"{columns['dtype']} TFLOP/s" not in facts:
                continue
            M, K, N, backward = (columns["M"], columns["K"], columns["N"], columns["pass"] != "fwd")
            operations = dense_operations(M, K, N, backward=backward)
            operations += extra_operations(M, K, N, columns["r"], backward=backward)
            elements = (2 if backward else 1) * (M * K + M * N + N * K)
            moved = elements * DTYPES[columns["dtype"]].itemsize
            name = f"{peer} {columns['dtype']}"
            points.setdefault(name, []).append((operations / moved, operations / seconds / 1e12))
    if not points or not bandwidth:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, marks in points.items():
        axes.plot(*zip(*marks, strict=True), "o", label=name, markersize=4, alpha=0.6)
    reach = [x for marks in points.values() for x, _ in marks]
    ends = (min(reach) / 2, max(reach) * 2)
    for dtype in DTYPES:
        rate = facts.get(f"{dtype} TFLOP/s")
        if rate:
            corner = min(max(rate * 1e12 / bandwidth, ends[0]), ends[1])
            xs = (ends[0], corner, ends[1])
            ys = [min(rate, x * bandwidth / 1e12) for x in xs]
            axes.plot(xs, ys, linewidth=1, label=f"ceiling {dtype}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of the frozen layer")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return figure


def _memory(rows: Sequence[Row]) -> Figure | None:
    """What each peer keeps for backward, by layer, beyond parameters and the input."""
    chosen = [
        row
        for row in headline(rows)
        if any("saved_bytes" in entry for entry in row["peers"].values())
    ]
    if not chosen:
        return None
    peers = [p for p in (*_others(chosen), OURS)]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(chosen)))
    for peer in peers:
        points = [
            (row["peers"][peer]["saved_bytes"] / MIB, i)
            for i, row in enumerate(chosen)
            if "saved_bytes" in row["peers"].get(peer, {})
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=label(peer), alpha=0.8)
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_yticks(range(len(chosen)), [_name(row) for row in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("kept for backward beyond parameters and the input, MiB")
    axes.grid(axis="x", alpha=0.3)
    _legend(axes)
    return figure
