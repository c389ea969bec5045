"""Forward and backward of every layer on a CPU: lora_fast against loralib and the frozen layer.

    python bench/bench_layers.py [--quick] [--threads 2] [--out FOLDER]

Columns: times of one step in ms; loralib/fast, above 1 where lora_fast is faster; fast/frozen, the
price of the adapter; MiB that a step saves for backward and holds at its peak.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import interleave, machine, markdown, peak_bytes, write
from layers import LIBRARIES, Case, cases
from tqdm import tqdm  # type: ignore[import-untyped]

from lora_fast.layers import LoRALayer
from lora_fast.testing import saved_bytes

MIB = 2**20


def measure(case: Case, budget: float) -> dict[str, Any]:
    """Return one line of the table."""
    steps = case.steps()
    rounds = interleave(steps, budget=budget)
    row = case.columns()
    for name in steps:
        row[f"{name} ms"] = rounds.median(name) * 1e3
    row.setdefault("frozen ms", "")
    row["loralib/fast"] = rounds.ratio("loralib", "lora_fast")[0]
    row["fast/frozen"] = rounds.ratio("lora_fast", "frozen")[0] if "frozen" in steps else ""
    for name, library in LIBRARIES.items():
        layer, x = case.build(library), case.input()
        row[f"{name} saved"] = saved_bytes(partial(layer, x), [*layer.parameters(), x]) / MIB
    for name in LIBRARIES:
        row[f"{name} peak"] = peak_bytes(steps[name]) / MIB
    return row


def measure_flips(case: Case, budget: float) -> dict[str, Any]:
    """Return the line of one eval() and train()."""
    layers = {name: case.build(library) for name, library in LIBRARIES.items()}

    def flip(layer: LoRALayer) -> object:
        layer.eval()  # type: ignore[attr-defined]
        return layer.train()  # type: ignore[attr-defined]

    steps = {name: partial(flip, layer) for name, layer in layers.items()}
    rounds = interleave(steps, budget=budget)
    row = {"layer": f"{case.layer} eval+train", **dict(list(case.columns().items())[1:])}
    for name in steps:
        row[f"{name} ms"] = rounds.median(name) * 1e3
    row["loralib/fast"] = rounds.ratio("loralib", "lora_fast")[0]
    return row


def main() -> None:
    """Measure, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each case")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = machine()
    chosen = list(cases(quick=arguments.quick))
    rows = [measure(case, arguments.budget) for case in tqdm(chosen, unit="case")]
    write(arguments.out, "layers", facts, rows)
    flips = [
        measure_flips(Case(layer, n, 0, 16, 0.0, dtype), arguments.budget)
        for layer, n in (("Linear", 1024), ("MergedLinear", 1024), ("Conv2d", 256))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    write(arguments.out, "flips", facts, flips)
    print(markdown(rows), "\n", markdown(flips), sep="\n")
    slowest = min(rows, key=lambda row: row["loralib/fast"])
    print(f"\nslowest against loralib: {slowest['loralib/fast']:.2f} ({slowest['layer']})")


if __name__ == "__main__":
    main()
