"""Every test here runs in two processes at once, as two ranks of a gloo group.

The processes start with the first test and stay, because importing torch takes longer than most
tests. After a failure, which may leave the ranks at different collectives, new ones are started.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import Pipe, connection
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for spmd.py

WORLD_SIZE = 2
LIMIT = 60.0  # seconds for one test, or for the start and the first test


class Ranks:
    """The processes, and a connection to each."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[connection.Connection] = []

    def run(self, path: Path, name: str, arguments: dict[str, object]) -> list[str]:
        """Call a function of a file on every rank; return what went wrong, rank by rank."""
        if not self.processes:
            self._start()
        try:
            for rank in self.connections:
                rank.send_bytes(pickle.dumps((str(path), name, arguments)))
            failures = self._failures()
        except BaseException:
            self.stop(patience=0.0)
            raise
        if failures:
            self.stop(patience=0.0)
        return failures

    def _start(self) -> None:
        store = os.path.join(tempfile.mkdtemp(prefix="ranks"), "store")
        for rank in range(WORLD_SIZE):
            ours, theirs = Pipe()
            settings = [str(theirs.fileno()), str(rank), str(WORLD_SIZE), store]
            command = [sys.executable, str(HERE / "worker.py"), *settings]
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    pass_fds=[theirs.fileno()],
                )
            )
            theirs.close()
            self.connections.append(ours)

    def _failures(self) -> list[str]:
        failures = []
        waiting = list(self.connections)
        end = time.monotonic() + LIMIT
        while waiting:
            ready = connection.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                silent = [self.connections.index(rank) for rank in waiting]
                return [*failures, f"no answer from ranks {silent} within {LIMIT} s"]
            for rank in ready:
                waiting.remove(rank)
                try:
                    failure = rank.recv()
                except EOFError:
                    failure = f"rank {self.connections.index(rank)} died"
                if failure is not None:
                    failures.append(failure)
        return failures

    def stop(self, patience: float) -> None:
        """End the processes: they leave when their connection closes, or are killed."""
        for rank in self.connections:
            rank.close()
        for process in self.processes:
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes, self.connections = [], []


_ranks = Ranks()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("distributed"))


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    failures = _ranks.run(pyfuncitem.path, pyfuncitem.originalname, arguments)
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    return True


@pytest.fixture(scope="session", autouse=True)
def stop_ranks() -> Iterator[None]:
    yield
    _ranks.stop(patience=5.0)
