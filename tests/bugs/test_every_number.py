"""Every bug that docs/differences.md counts has a test that carries its number."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
NAMES = re.compile(r"^\s*def test_((?:b\d\d_)+)", re.MULTILINE)


def numbers_with_a_test() -> set[int]:
    """The numbers in the names of the test functions of this folder and all beside it."""
    found: set[int] = set()
    for file in TESTS.rglob("test_*.py"):
        for names in NAMES.findall(file.read_text()):
            found.update(int(number) for number in re.findall(r"\d\d", names))
    return found


def test_every_number_has_a_test() -> None:
    assert numbers_with_a_test() == set(range(1, 55))
