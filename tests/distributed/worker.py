"""One of the processes that the tests in this folder run in; conftest.py starts it and sends work.

Usage: worker.py FILE_DESCRIPTOR RANK WORLD_SIZE STORE
"""

import importlib.util
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

# Shorter than the limit of conftest.py, so that a rank that waits for another tells where.
COLLECTIVE_LIMIT = timedelta(seconds=20)

# For spmd.py; with PYTHONSAFEPATH a script's own folder is not searched.
sys.path.insert(0, str(Path(__file__).parent))

_modules: dict[str, ModuleType] = {}


def main(descriptor: int, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    # A merge that does not happen warns, and the model goes on with the same results.
    warnings.simplefilter("error", RuntimeWarning)
    dist.init_process_group(
        "gloo",
        init_method=Path(store).as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_LIMIT,
    )
    with Connection(descriptor) as tests:
        while True:
            try:
                path, name, arguments = pickle.loads(tests.recv_bytes())
            except EOFError:
                break
            failure = None
            try:
                torch.manual_seed(0)
                getattr(_module(path), name)(**arguments)
            except BaseException:
                failure = f"rank {rank}:\n{traceback.format_exc()}"
            tests.send(failure)
    dist.destroy_process_group()


def _module(path: str) -> ModuleType:
    if path not in _modules:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
