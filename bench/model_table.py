"""The byte model as a table: what each design of a LoRA layer must cost. A model, no measurement.

    python bench/model_table.py [--tflops 790] [--bandwidth 4.3]
    python bench/model_table.py FOLDER

Times follow from a dense rate and a copy bandwidth; those preset were seen on an H200 in bf16. With
a folder of results the ceilings are that run's, and the model's ratio of loralib to the frozen
layer stands beside the one that was measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.floor import DESIGNS, Ceilings, extra_seconds, frozen_seconds
from harness.names import FROZEN, LORALIB
from harness.results import markdown, read
from harness.shapes import DTYPES, find_shapes
from lora_fast.commands import more_than_zero, positive, status_of


def modelled(ceilings: Ceilings, M: int, r: int) -> Iterator[dict[str, Any]]:
    """Yield the modelled times of every shape, pass and dropout, in us."""
    for shape in find_shapes(["gpt2-medium", "llama-3-8b", "llama-3-70b"]):
        for backward in (False, True):
            for dropout in (False, True):
                sizes = (M, shape.K, shape.N)
                base = frozen_seconds(*sizes, ceilings, backward=backward)
                line: dict[str, Any] = {
                    "shape": shape.name,
                    "M": M,
                    "r": r,
                    "pass": "fwd+bwd" if backward else "fwd",
                    "dropout": dropout,
                    "frozen us (model)": base * 1e6,
                }
                for design in DESIGNS:
                    more = extra_seconds(
                        design, *sizes, r, ceilings, backward=backward, dropout=dropout
                    )
                    line[f"{design} us (model)"] = (base + more) * 1e6
                yield line


def against(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each measured row loralib / frozen, by the model and as measured."""
    facts = table["machine"]
    for row in table["rows"]:
        columns, entries = row["columns"], row["peers"]
        rates = [facts.get(f"{columns['dtype']} TFLOP/s"), facts.get("copy GB/s")]
        times = [entries.get(peer, {}).get("us") for peer in (LORALIB, FROZEN)]
        if not all(rates) or None in times:
            continue
        ceilings = Ceilings(rates[0] * 1e12, rates[1] * 1e9)
        sizes = (columns["M"], columns["K"], columns["N"])
        size, backward = DTYPES[columns["dtype"]].itemsize, columns["pass"] != "fwd"
        more = extra_seconds(
            *("loralib", *sizes, columns["r"], ceilings),
            backward=backward,
            dropout=columns["dropout"] > 0,
            size=size,
        )
        yield {
            "row": row["id"],
            "loralib / frozen (model of the extra, on the measured frozen)": 1
            + more * 1e6 / times[1],
            "loralib / frozen (measured)": times[0] / times[1],
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--tflops", type=more_than_zero, default=790.0, help="dense rate, TFLOP/s")
    parser.add_argument("--bandwidth", type=more_than_zero, default=4.3, help="of a copy, TB/s")
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--rank", type=positive, default=16)
    arguments = parser.parse_args(argv)
    if arguments.folder is None:
        ceilings = Ceilings(arguments.tflops * 1e12, arguments.bandwidth * 1e12)
        lines = list(modelled(ceilings, arguments.tokens, arguments.rank))
        print(f"MODEL, not measured: {arguments.tflops:g} TFLOP/s, {arguments.bandwidth:g} TB/s\n")
    else:
        try:
            tables = read(arguments.folder)
        except ValueError as error:
            print(f"model_table.py: {error}", file=sys.stderr)
            return 2
        lines = list(against(tables["linear"])) if "linear" in tables else []
        print("The model beside what was measured\n")
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(status_of("model_table.py", main))
