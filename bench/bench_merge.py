"""One eval() and train() of a layer: lora_fast against loralib, and against copying the weight.

    python bench/bench_merge.py [--threads 2] [--out FOLDER]

Columns: times in ms; loralib/fast, above 1 where lora_fast is faster; fast/2 clones, the cycle
against two plain copies of the weight; bytes a weight that the merged layer keeps as its way back,
and that a merge holds at its peak. loralib keeps nothing, and does not restore the weight.
"""

import argparse
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import loralib
import torch
from harness import interleave, machine, markdown, peak_bytes, write
from layers import QKV
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_fast
from lora_fast.testing import randomize_

LAYERS = {
    "Linear 4096 x 4096": lambda lib, **kw: lib.Linear(4096, 4096, **kw),
    "MergedLinear 3072 x 1024": lambda lib, **kw: lib.MergedLinear(
        1024, 3072, enable_lora=QKV, **kw
    ),
    "Embedding 50000 x 1024": lambda lib, **kw: lib.Embedding(50_000, 1024, **kw),
    "Conv2d 512 x 512 x 3 x 3": lambda lib, **kw: lib.Conv2d(512, 512, 3, **kw),
    "Linear 256 x 256": lambda lib, **kw: lib.Linear(256, 256, **kw),
}
RANKS = {"Linear 4096 x 4096": (1, 8, 16, 64, 256)}


def build(library: ModuleType, name: str, r: int, dtype: torch.dtype) -> Any:
    """Return a layer with an adapter whose delta is about a hundredth of the weight."""
    torch.manual_seed(0)
    layer = LAYERS[name](library, r=r, lora_alpha=r, dtype=dtype)
    return randomize_(layer, 0.02 / r**0.25)


def flip(layer: Any) -> None:
    """Merge and unmerge."""
    layer.eval()
    layer.train()


def measure(name: str, r: int, dtype: torch.dtype, budget: float) -> dict[str, Any]:
    """Return one line of the table."""
    theirs, ours = (build(library, name, r, dtype) for library in (loralib, lora_fast))
    copied = ours._weight_owner().weight.detach().clone()  # shares nothing with the layer

    def clones() -> None:
        copied.clone()
        copied.clone()

    steps = {"loralib": partial(flip, theirs), "lora_fast": partial(flip, ours), "clones": clones}
    rounds = interleave(steps, budget=budget)
    peak = peak_bytes(ours.eval)
    kept = ours._record.nbytes()
    ours.train()
    return {
        "layer": name,
        "r": r,
        "dtype": str(dtype).removeprefix("torch."),
        "loralib ms": rounds.median("loralib") * 1e3,
        "lora_fast ms": rounds.median("lora_fast") * 1e3,
        "2 clones ms": rounds.median("clones") * 1e3,
        "loralib/fast": rounds.ratio("loralib", "lora_fast")[0],
        "fast/2 clones": rounds.ratio("lora_fast", "clones")[0],
        "kept B/weight": kept / copied.numel(),
        "peak B/weight": peak / copied.numel(),
    }


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each line")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = machine() | {"merge_": lora_fast.merging.explain("cpu")[0]}
    lines = [
        (name, r, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name in LAYERS
        for r in RANKS.get(name, (16,))
    ]
    rows = [measure(*line, arguments.budget) for line in tqdm(lines, unit="line")]
    write(arguments.out, "merge", facts, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
