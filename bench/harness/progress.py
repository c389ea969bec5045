"""How much of its tables a run has measured: only whole tables take the place of published ones."""

from collections import defaultdict

Item = tuple[str, str]  # a row's id and a peer


class Progress:
    """Which items the tables of a run have, and which of them were run.

    It counts instead of asking why: an option of pytest, one of any plugin, a failure at which to
    stop, or Ctrl-C may have left an item out.
    """

    def __init__(self) -> None:
        self._planned: defaultdict[str, set[Item]] = defaultdict(set)
        self._ran: defaultdict[str, set[Item]] = defaultdict(set)

    def plan(self, table: str, row: str, peer: str) -> None:
        """Note an item that belongs to a table."""
        self._planned[table].add((row, peer))

    def ran(self, table: str, row: str, peer: str) -> None:
        """Note an item that was run."""
        self._ran[table].add((row, peer))

    @property
    def is_empty(self) -> bool:
        """Whether no table has a row."""
        return not self._planned

    @property
    def is_whole(self) -> bool:
        """Whether all items of all tables were run."""
        return not any(map(self.part, self._planned))

    def part(self, table: str) -> str:
        """Return how many of a table's items were run, `3 of 18`; nothing where all were."""
        ran, planned = self._ran[table], self._planned[table]
        return f"{len(ran)} of {len(planned)}" if planned - ran else ""
