"""What docstrings call the source of a formula is there, in the released loralib."""

import ast
import inspect
import re
from pathlib import Path

import loralib
import pytest

import lora_fast

PACKAGE = Path(lora_fast.__file__).parent
ORIGINAL = Path(loralib.__file__).parent
# The function that each of ours has its formula from.
FORMULAS = {
    "lora_linear": "Linear.forward",
    "lora_merged_linear": "MergedLinear.forward",
    "lora_embedding": "Embedding.forward",
    "lora_conv": "ConvLoRA.forward",
    "merge_": "Linear.train",
    "merged_delta": "MergedLinear.merge_AB",
    "merged_weight": "ConvLoRA.forward",
    "unmerge_": "Linear.train",
    "mark_only_lora_as_trainable": "mark_only_lora_as_trainable",
    "lora_state_dict": "lora_state_dict",
}


def cited() -> list[tuple[str, str, int, int]]:
    """The function with the docstring, the file of loralib, the first line and the last."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for file, first, last in re.findall(
                r"loralib/(\w+\.py):(\d+)-(\d+)", ast.get_docstring(node) or ""
            ):
                found.append((node.name, file, int(first), int(last)))
    return found


def test_every_formula_has_a_source() -> None:
    assert {name for name, *_ in cited()} == set(FORMULAS)


@pytest.mark.parametrize(("name", "file", "first", "last"), cited())
def test_the_lines_are_those_of_the_function(name: str, file: str, first: int, last: int) -> None:
    function = vars(loralib)[FORMULAS[name].split(".")[0]]
    for part in FORMULAS[name].split(".")[1:]:
        function = vars(function)[part]
    lines, begin = inspect.getsourcelines(function)
    assert Path(inspect.getsourcefile(function) or "").name == file
    assert begin == first
    assert last <= begin + len(lines) - 1
    assert (ORIGINAL / file).read_text().splitlines()[last - 1].strip()
