"""Results on disk: which machine they belong to, as JSON, and as Markdown tables."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harness.clock import nvidia_smi
from harness.form import check_one_machine, check_table, is_table
from lora_fast.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
UNPUBLISHED = ROOT / "bench-out"


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions and the commit that a measurement belongs to."""
    facts: dict[str, Any] = {}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
        facts["driver"] = next(iter(nvidia_smi("driver_version")), "unknown")
    facts |= {"cpu": _cpu(), "vectors": torch.backends.cpu.get_cpu_capability()}
    facts |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    for package in ("torch", "triton", "loralib", "peft"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "missing"
    facts |= {
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": _commit(),
    }
    return facts


def device_name(facts: dict[str, Any]) -> str:
    """Return the folder of a machine's results: `nvidia-h200`, `epyc-25.17-2-cores`.

    A processor's family and model are in it: a virtual machine's "EPYC" may be of any generation.
    So may be its vectors, which are told where they are not AVX-512, without which 16-bit products
    are others: `epyc-25.17-avx2-2-cores`.
    """
    if "gpu" in facts:
        return _slug(facts["gpu"])
    cpu = re.sub(r"\(family (\d+) model (\d+)\)", r" \1.\2 ", facts["cpu"])
    name = re.sub(r"\(.*?\)|@ \S+|\b(Intel|AMD|CPU|Processor)\b", " ", cpu)
    vectors = facts.get("vectors", "AVX512")  # older results, all of them of AVX-512
    kind = "" if vectors == "AVX512" else f"-{_slug(vectors)}"
    return f"{_slug(name) or 'cpu'}{kind}-{facts['cores']}-cores"


def _slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9.]+", text.lower()))


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    # What was measured is this commit only if the sources are as they are in it.
    # git's * also stands for folders: benchmarks, harness and peers, but no results.
    sources = ("lora_fast", "kernels", "csrc", "bench/*.py")
    return f"{commit} with changes" if git("status", "--porcelain", "--", *sources) else commit


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    # Virtual machines hide the name; family and model still tell the generation.
    numbers = f"family {fields.get('cpu family')} model {fields.get('model')}"
    return f"{fields.get('model name', 'unknown')} ({numbers})"


def write(folder: Path, name: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write flat `rows` as JSON and as a Markdown table, headed by the machine."""
    write_json(folder, name, facts, rows)
    head = ", ".join(f"{key} {value}" for key, value in facts.items())
    write_text(folder / f"{name}.md", f"{head}\n\n{markdown(rows)}\n")


def write_json(
    folder: Path, name: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    """Write rows as `name.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n"
    write_text(folder / f"{name}.json", text)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every table of a folder of results, by name.

    Raises:
        ValueError: there is no such folder, or no results in it; the message lists those known.
    """
    tables = tables_in(folder)
    if not tables:
        known = ", ".join(map(str, result_folders())) or "none"
        raise ValueError(f"no results in folder {str(folder)!r}; known are {known}")
    return tables


def tables_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every table of a folder, by name; JSON of another form is passed over.

    Raises:
        ValueError: a file is damaged, lacks what the readers of its table need, or is of another
            machine than the others.
    """
    tables = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON that can be read: {error}") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if is_table(found):
            check_table(str(path), path.stem, found)
            tables[path.stem] = found
    check_one_machine(str(folder), {name: table["machine"] for name, table in tables.items()})
    return tables


def check_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder that a run on this machine cannot write to and read again at its end.

    Raises:
        ValueError: a table in it is damaged or of another machine.
    """
    there = {name: table["machine"] for name, table in tables_in(folder).items()}
    check_one_machine(str(folder), {**there, "this run": facts})


def result_folders() -> list[Path]:
    """Return the folders of bench/results that hold measurements.

    Raises:
        ValueError: a file in one of them is damaged.
    """
    folders = sorted(RESULTS.iterdir()) if RESULTS.is_dir() else []
    return [folder for folder in folders if tables_in(folder)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return `rows` as a Markdown table; numbers get three significant digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [_line(columns), "|" + "---|" * len(columns)]
    lines += [_line([row.get(column, "") for column in columns]) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    # A bar or a line's end in a message is no end of its cell.
    texts = (" ".join(number(cell).splitlines()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(texts) + " |"


def number(value: object) -> str:
    """Return a cell: three significant digits, without an exponent below a million."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:.3g}"
    return short if "e" not in short or not 1e-4 < abs(value) < 1e6 else f"{value:.0f}"
