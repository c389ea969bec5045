"""What got slower between two folders of results, as ratios, so that it holds across machines.

    python bench/compare.py [--slack 0.03] OLD NEW

A row's yardstick is the frozen layer, or loralib, or two copies of the weight: how many times as
long as lora_fast it takes, in one run. A row got slower where the upper quartile of that ratio is
now below its lower quartile then, by more than the slack. It fails where lora_fast was measured
whole and within its error budget then, and is not now. Exit status: 0, 1 if a row got slower or
fails, 2 for bad input.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.names import CLONES, FROZEN, LORALIB, OURS
from harness.results import markdown, number, read
from lora_fast.commands import share, status_of

YARDSTICKS = (FROZEN, LORALIB, CLONES)


def verdict(old: dict[str, Any], new: dict[str, Any], slack: float) -> dict[str, Any] | None:
    """Compare two measurements of a row; return the line of the table, None if nothing compares.

    Args:
        old: the row then.
        new: the row now.
        slack: part of a ratio that is never a difference.
    """
    fault = _fault(new)
    if fault and not _fault(old):
        return {"row": old["id"], "against": "", "then": "", "now": fault, "verdict": "FAILS"}
    for peer in YARDSTICKS:
        pair = [row["peers"].get(peer, {}).get("ratio") for row in (old, new)]
        if None in pair:
            continue
        (then, then_low, then_high), (now, now_low, now_high) = (_quartiles(r) for r in pair)
        word = "same"
        if now_high < then_low * (1 - slack):
            word = "SLOWER"
        elif now_low * (1 - slack) > then_high:
            word = "faster"
        ends = ((then, then_low, then_high), (now, now_low, now_high))
        cells = [f"{m:.3f} ({low:.3f}-{high:.3f})" for m, low, high in ends]
        return {
            "row": old["id"],
            "against": peer,
            "then": cells[0],
            "now": cells[1],
            "verdict": word,
        }
    return None


def _fault(row: dict[str, Any]) -> str:
    """What is wrong with lora_fast in a row, if anything."""
    own = row["peers"].get(OURS, {})
    told = next((own[key] for key in ("failed", "incomplete", "absent") if key in own), "")
    if told or "us" not in own:
        return told or "lora_fast is missing"
    error = own.get("error", 0.0)
    return "" if error <= 1.0 else f"error {number(error)}, of a budget of 1"


def _quartiles(ratio: Sequence[float]) -> tuple[float, float, float]:
    """A measurement without its spread counts as exact."""
    return (ratio[0], *ratio[1:]) if len(ratio) == 3 else (ratio[0],) * 3


def compare(old: Path, new: Path, slack: float) -> tuple[list[dict[str, Any]], int, int]:
    """Return the lines of rows that compare, and how many have no ratio or are in `old` alone.

    Raises:
        ValueError: a folder has no results, or they have no row in common that was measured.
    """
    before, after = (
        {(name, row["id"]): row for name, table in read(folder).items() for row in table["rows"]}
        for folder in (old, new)
    )
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError(f"{old} and {new} have no row in common")
    lines = [verdict(before[key], after[key], slack) for key in shared]
    found = [line for line in lines if line is not None]
    if not found:
        raise ValueError(f"{old} and {new} have rows in common, but no ratio of any of them")
    return found, len(shared) - len(found), len(before) - len(shared)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what changed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of results")
    parser.add_argument("new", type=Path, metavar="NEW", help="folder of results")
    parser.add_argument("--slack", type=share, default=0.03, help="ratios this near are the same")
    arguments = parser.parse_args(argv)
    try:
        lines, without, lost = compare(arguments.old, arguments.new, arguments.slack)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    changed = [line for line in lines if line["verdict"] != "same"]
    if changed:
        print(markdown(changed), end="\n\n")
    counts = Counter(line["verdict"] for line in lines)
    told = [f"{counts['SLOWER']} slower", f"{counts['faster']} faster"]
    told += [f"{counts['FAILS']} failing"] if counts["FAILS"] else []
    rest = f"; {without} without a ratio in both" if without else ""
    rest += f"; {lost} of OLD not in NEW" if lost else ""
    print(f"{len(lines)} rows compared, {', '.join(told)}{rest}")
    return int(counts["SLOWER"] + counts["FAILS"] > 0)


if __name__ == "__main__":
    sys.exit(status_of("compare.py", main))
