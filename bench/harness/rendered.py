"""A folder of results as people read it: a Markdown table for each of its tables, and pictures."""

import sys
from pathlib import Path

from harness.results import markdown, read, write_text
from harness.tables import facts_line, full_rows, ordered

_RATIOS = (
    "Columns that end in / are how many times as long as lora_fast the others take, above 1 where "
    "lora_fast is faster, with quartiles. `error` is in units of the error budget, at most 1."
)


def write_folder(folder: Path) -> None:
    """Write the Markdown tables and the pictures of a folder.

    Raises:
        OSError: something cannot be written; what was there stays.
        ValueError: there are no results in it.
    """
    tables = read(folder)
    for name, table in ordered(tables):
        rows = full_rows(table["rows"])
        parts = [facts_line(table["machine"])]
        if any(column.endswith(" /") for line in rows for column in line):
            parts.append(_RATIOS)
        write_text(folder / f"{name}.md", "\n\n".join([*parts, markdown(rows)]) + "\n")
    try:
        from harness.pictures import draw
    except ImportError as error:  # matplotlib is an extra
        print(f"no pictures: {error}", file=sys.stderr)
        return
    draw(folder, tables)
