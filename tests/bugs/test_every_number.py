"""Every bug that docs/differences.md counts has a test that carries its number."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
NAMES = re.compile(r"^\s*def test_((?:b\d\d_)+)", re.MULTILINE)


def numbers_with_a_test() -> set[int]:
    """The numbers in the names of the test functions of this folder and all beside it."""
    found: set[int] = set()
    for file in TESTS.rglob("test_*.py"):
        for names in NAMES.findall(file.read_text()):
            found.update(int(number) for number in re.findall(r"\d\d", names))
    return found


def documented_numbers() -> list[int]:
    """The numbers at the head of the rows of docs/differences.md."""
    rows = re.findall(
        r"^\| (B\d\d[B\d, ]*) \|", (ROOT / "docs/differences.md").read_text(), re.MULTILINE
    )
    return [int(number) for row in rows for number in re.findall(r"\d\d", row)]


def test_every_number_is_documented_once_and_has_a_test() -> None:
    documented = documented_numbers()
    assert sorted(documented) == list(range(1, len(documented) + 1))
    assert set(documented) == numbers_with_a_test()


@pytest.mark.parametrize("file", ["README.md", "tests/bugs/conftest.py"])
def test_the_count_in_words_is_right(file: str) -> None:
    (count,) = re.findall(r"all (\d+), each|B01 to B(\d+)", (ROOT / file).read_text())
    assert int("".join(count)) == len(documented_numbers())
