"""Results as tables and pictures, and the README's measurements made from them.

    python bench/report.py [--check] [FOLDER...]

Writes every table of each folder as Markdown, its pictures, and the part of the README between its
two markers. Without folders: all in bench/results. With --check nothing is written, and the exit
status is 1 if the README differs from the results.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.rendered import write_folder
from harness.results import ROOT, markdown, read, result_folders, write_text
from harness.tables import comparison_rows, facts_line, ordered, readme_rows, summary_rows
from harness.targets import target_rows
from lora_fast.commands import status_of

README = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def section(folders: Sequence[Path]) -> str:
    """Return the README's part: the first folder's summary, rows and picture, the others' summary.

    GPUs come first, then what was measured last.

    Raises:
        ValueError: a folder has no results.
    """
    if not folders:
        raise ValueError("there are no results in bench/results yet: make bench")
    found = sorted(((folder, read(folder)) for folder in folders), key=_rank, reverse=True)
    first, *others = found
    parts = [
        "Tables show how many times as long as lora_fast another library takes: above 1, lora_fast "
        "is faster. The first covers all rows that were measured of each layer.",
        f"### {first[0].name}",
        _facts(*first),
        markdown(summary_rows(first[1])),
        *_details(*first),
    ]
    if others:
        parts += [
            "### Other machines",
            "loralib / lora_fast, the median over the rows of each layer (and the extremes):",
            markdown(comparison_rows({folder.name: tables for folder, tables in others})),
            "\n".join(f"- {folder.name}: {_facts(folder, tables)}" for folder, tables in others),
        ]
    on_cpus = {folder.name: tables for folder, tables in found if not _rank((folder, tables))[0]}
    lines = target_rows(on_cpus)
    if lines:
        parts += [
            "### Targets on CPUs",
            "Each is a ratio to lora_fast, or bytes; where it is of several rows, the one that is "
            "furthest from it, and how many reach it.",
            markdown(lines),
        ]
    return "\n\n".join(parts)


def _rank(result: tuple[Path, dict[str, Any]]) -> tuple[bool, str]:
    """What of a result comes first: a GPU, then the later date."""
    facts = [table["machine"] for table in result[1].values()]
    return "gpu" in facts[0], max(one.get("date", "") for one in facts)


def _facts(folder: Path, tables: dict[str, Any]) -> str:
    """Return what all tables share, then of each table what it has for itself."""
    found = {name: _told(table["machine"]) for name, table in ordered(tables)}
    first = next(iter(found.values()))
    shared = {
        key: value
        for key, value in first.items()
        # Ceilings are measured anew by each run: those of the first table stand for all.
        if isinstance(value, float) or all(facts.get(key) == value for facts in found.values())
    }
    parts = [facts_line(shared)]
    for name, facts in found.items():
        own = {k: v for k, v in facts.items() if k not in shared and not isinstance(v, float)}
        parts += [f"{name}: {facts_line(own)}"] if own else []
    links = ", ".join(f"[{name}]({_relative(folder)}/{name}.md)" for name in found)
    return f"{'. '.join(parts)}. All rows: {links}."


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "missing"}


def _details(folder: Path, tables: dict[str, Any]) -> list[str]:
    rows = [row for _, table in ordered(tables) for row in table["rows"]]
    parts = [
        "Rank 16, the most rows of each shape; columns that end in / are such ratios:",
        markdown(readme_rows(rows)),
    ]
    if (folder / "speedup.svg").is_file():
        picture = f"{_relative(folder)}/speedup.svg"
        parts.append(f"![Speed-up by shape against each peer]({picture})")
    return parts


def _relative(folder: Path) -> str:
    folder = folder.resolve()
    return folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else str(folder)


def with_section(text: str, generated: str) -> str:
    """Return a README with its generated part replaced.

    Raises:
        ValueError: the markers are not there, once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README needs the markers {BEGIN} and {END}, once and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write everything; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="compare the README, write nothing")
    arguments = parser.parse_args(argv)
    try:
        folders = arguments.folders or result_folders()
        text = README.read_text(encoding="utf-8")
        with_section(text, "")  # before anything is written
        if not arguments.check:
            for folder in folders:
                write_folder(folder)
        new = with_section(text, section(folders))
        if not arguments.check:
            write_text(README, new)
    except (OSError, ValueError) as error:  # of an OSError the text names the file
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    if arguments.check and new != text:
        print("the README differs from the results: run python bench/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(status_of("report.py", main))
