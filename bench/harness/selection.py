"""Which rows a run measures: from toy sizes, which only show that all runs, to everything."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from harness.shapes import DTYPES, Shape, find_shapes
from lora_fast.products import slow_dtypes

Level = Literal["toy", "quick", "standard", "full"]
# Where torch multiplies by loops of its own, more take the frozen layer a second and more for each
# step: 0.5 s for 1024 to 3072 features in bf16, two threads of an EPYC with AVX2, 2026-12-01.
_MOST_IN_LOOPS = 32


def at_most(tokens: int, dtype: torch.dtype) -> int:
    """Return `tokens`, or the fewer that a CPU without instructions for `dtype` can measure."""
    return min(tokens, _MOST_IN_LOOPS) if dtype in slow_dtypes() else tokens


@dataclass(frozen=True)
class Selection:
    """What was asked for; an empty tuple means that the level decides.

    Attributes:
        level: `toy` checks that every benchmark runs; `quick`, `standard` and `full` measure.
        device: where; a CPU measures fewer and smaller rows.
        shapes: shapes of `lora.Linear`.
        tokens: numbers of rows M.
        ranks: ranks.
        dtypes: floating-point types.
        peers: who takes part, beside lora_fast and the frozen layer.
    """

    level: Level = "toy"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shapes: tuple[Shape, ...] = ()
    tokens: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    peers: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    def wants(self, *, tokens: int, r: int, dtype: torch.dtype) -> bool:
        """Tell whether a row with these values passes what was asked for."""
        return (
            (not self.tokens or tokens in self.tokens)
            and (not self.ranks or r in self.ranks)
            and (not self.dtypes or dtype in self.dtypes)
        )


def parse(
    level: Level,
    device: torch.device,
    *,
    shapes: str | None = None,
    tokens: str | None = None,
    ranks: str | None = None,
    dtypes: str | None = None,
    peers: str | None = None,
    known_peers: Iterable[str] = (),
) -> Selection:
    """Return the selection that command-line options, lists with commas, ask for.

    Raises:
        ValueError: a name or a number is unknown; the message lists what is known.
    """
    chosen_dtypes = _known("dtype", _split(dtypes), DTYPES)
    return Selection(
        level,
        device,
        find_shapes(_split(shapes)),
        tuple(_positive("--tokens", text) for text in _split(tokens)),
        tuple(_positive("--ranks", text) for text in _split(ranks)),
        tuple(DTYPES[name] for name in chosen_dtypes),
        _matching("peer", _split(peers), tuple(known_peers)),
    )


def nothing_fits(
    selection: Selection,
    options: dict[str, str],
    tables: Iterable[Callable[[Selection], Iterable[Any]]],
) -> str:
    """Return a line that says why no row is left, and which values there are.

    Args:
        selection: what leaves no row.
        options: those that narrowed it, with what was given.
        tables: each returns the rows of a selection.
    """
    what = f"no row of level {selection.level} on {selection.device.type}"
    anything = Selection(selection.level, selection.device)
    rows = [row.columns() for table in tables for row in table(anything)]
    if not rows:
        return f"{what} in the tables that were asked for"
    there = []
    for name, column in (("tokens", "M"), ("ranks", "r"), ("dtypes", "dtype")):
        values = sorted({columns[column] for columns in rows if column in columns})
        there += [f"{name} {', '.join(map(str, values))}"] if values else []
    asked = " ".join(f"{option} {text}" for option, text in options.items())
    return f"{what} fits {asked}; without that there are {'; '.join(there)}"


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _known(what: str, names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return tuple(names)


def _matching(what: str, patterns: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Like `_known`, and a name may have the wildcards of a shell."""
    found = {pattern: fnmatch.filter(known, pattern) for pattern in patterns}
    _known(what, [pattern for pattern, names in found.items() if not names], known)
    return tuple(dict.fromkeys(name for names in found.values() for name in names))


def _positive(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option} takes whole numbers from 1 on with commas, got {text!r}")
    return int(text)
