"""`lora-fast tune` from its arguments to its exit status."""

import argparse
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

import lora_fast
from lora_fast import backend, ops
from lora_fast.commands import BadInputError, device_named, writable_folder
from lora_fast.files import written_whole
from lora_fast.tune import ahead, search, shapes, show
from lora_fast.tune.problems import Job

# From so many rows on a call is one of training, which has a backward.
_TRAINING_ROWS = 64
# The operators of a layer: that of its forward first.
_OPS = {
    "linear": ("lora_linear_fwd", "lora_linear_bwd"),
    "embedding": ("lora_embedding_fwd", "lora_embedding_bwd"),
    "conv": ("merged_weight",),
}
# So that a table of interpreted times is never taken for one of a GPU.
_INTERPRETER = "Triton's interpreter"


def run(arguments: argparse.Namespace) -> int:
    """Run the command; see `lora_fast.cli.main` for the exit status.

    Raises:
        BadInputError: an argument cannot be used. Nothing was measured or changed.
    """
    if arguments.show:
        print("\n".join(show.tables_in_force(rows=True)))
        return 0
    if arguments.reset:
        return _reset()
    wanted = None if arguments.shapes is None else shapes.parsed(arguments.shapes)
    device = _device(arguments)
    if wanted is None:  # last, as the hub may take its time to answer
        wanted = shapes.of_model(arguments.model, arguments.rows, arguments.rank)
    jobs = list(_jobs(arguments, wanted, device))
    target = _Target(device, arguments.out)
    if device.type == "cpu":
        print("Interpreted on a CPU: the times mean nothing, this only shows that tuning runs.")
    elif (workers := arguments.processes or ahead.processes()) > 1:
        ahead.compile_ahead(jobs, device, workers)
    found = search.Found()
    # Events are of the current device, whatever they are to time.
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with here:
            clock = search.DeviceClock(device)
            return _measured(jobs, device, clock, arguments.minutes * 60, found)
    finally:  # what was measured counts, also when a kernel breaks the GPU's context
        _print_found(found, len(jobs))
        print(target.write(found))


def _measured(
    jobs: list[Job],
    device: torch.device,
    clock: search.Clock,
    seconds: float,
    found: search.Found,
) -> int:
    """Search with a progress bar; what was found until Ctrl-C or the last minute counts."""
    total = sum(len(step) for job in jobs for step in job.steps)
    with tqdm(total=total, unit="plan", disable=None) as bar:

        def tried(job: Job) -> None:
            bar.set_description(f"{job.call.op} {','.join(map(str, job.shape[:4]))}", refresh=False)
            bar.update()

        try:
            search.search(jobs, device, clock, seconds, found, tried)
        except KeyboardInterrupt:
            return 130
        except search.OutOfTimeError:
            pass
    return 0


def _print_found(found: search.Found, jobs: int) -> None:
    for line in found.dropped:
        print(f"dropped: {line}")
    for row in found.rows:
        print(show.described(row))
    done = len(found.jobs)
    better = len(found.rows)
    print(f"{done} of {jobs} kinds of calls measured out, {better} better served than by default")
    if done < jobs and not found.dropped:
        print("--minutes gives it more time")


def _device(arguments: argparse.Namespace) -> torch.device:
    """The device to measure on; the kernels must run there."""
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInputError(
            f"--device: expected a CUDA device to measure on, and this machine has none for "
            f"{arguments.device!r}"
        )
    device = device_named(arguments.device)
    interpreted = device.type == "cpu" and ops.interpreted()
    if device.type != "cuda" and not interpreted:
        raise BadInputError(f"--device: the kernels need a CUDA device, got {arguments.device!r}")
    if interpreted and arguments.out is None:
        raise BadInputError(
            "--out: a file is needed with --device cpu, because interpreted times mean nothing and "
            "do not go into the cache folder; got none"
        )
    if not backend.has_triton():
        raise BadInputError("there are no kernels to tune without triton: pip install triton")
    return device


def _jobs(
    arguments: argparse.Namespace, wanted: Iterable[shapes.Shape], device: torch.device
) -> Iterable[Job]:
    from lora_fast.kernels.configs import architecture

    arch, dtype = architecture(device), getattr(torch, arguments.dtype)
    for shape in wanted:
        ops = _OPS[shape.layer]
        drops = arguments.dropout and shape.layer == "linear"
        for dropout in (False, True) if drops else (False,):
            for op in ops if shape.M >= _TRAINING_ROWS else ops[:1]:
                yield Job(op, shape, dtype, dropout, arch)


class _Target:
    """The file that the rows go into, and what it held before."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        from lora_fast.kernels import configs, tables

        arch = configs.architecture(device)
        self.machine = tables.this_machine(arch.gpu or _INTERPRETER, arch.name)
        self.is_users = out is None
        path = _users_table(self.machine) if out is None else out
        self.path = _place(path, "LORA_FAST_CACHE" if self.is_users else "--out")
        self.before: tuple[Any, ...] = ()
        try:
            table = tables.read(self.path)
            if table.machine != self.machine:
                raise ValueError(f"it is for {table.machine}")
            self.before = table.rows
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            if out is not None:
                raise BadInputError(
                    f"--out: expected a new file or a table of this GPU, torch and triton; {out}: "
                    f"{error}"
                ) from error

    def write(self, found: search.Found) -> str:
        """Write the rows, beside those of calls that were not measured now; say so."""
        from lora_fast.kernels import plans, tables

        measured = {job.call for job in found.jobs}
        kept = {row.call: row for row in self.before if row.call not in measured}
        rows = tuple({**kept, **{row.call: row for row in found.rows}}.values())
        if rows == self.before and self.is_users:
            return "nothing to write: the defaults stay"
        today = date.today().isoformat()
        table = tables.Table(self.machine, rows, lora_fast.__version__, today)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as part:
            part.write_text(tables.to_json(table), encoding="utf-8")
        plans.reload_tables()
        return f"written: {self.path}, {len(rows)} rows"


def _place(path: Path, argument: str) -> Path:
    """Return where a file is to appear, whose folder is made; refuse what is there but no file.

    Raises:
        BadInputError: there is such a thing, or no folder that can be written to; names `argument`.
    """
    expected = f"{argument}: expected a new file or a table of this GPU, torch and triton"
    try:
        # Else a link would be replaced, not what it points to, and in `new/../notes.txt` a folder
        # that is still to be made would hide the file that is there.
        target = path.resolve()
        # An open pipe, as of /dev/stdout, is there by its link alone.
        others = [p for p in (path, target) if p.exists() and not p.is_file()]
    except (OSError, RuntimeError) as error:  # a long name, a link that leads to itself
        raise BadInputError(f"{expected}; {path}: {error}") from error
    if others:
        raise BadInputError(f"{expected}; {others[0]} is no file but a folder, a device or a pipe")
    writable_folder(target.parent, argument)
    return target


def _reset() -> int:
    from lora_fast.kernels import tables

    try:
        folder, paths = tables.user_folder(), tables.user_tables()
    except ValueError as error:
        raise BadInputError(str(error)) from error
    refused = []
    for path in paths:
        try:
            path.unlink()
            print(f"deleted: {path}")
        except OSError as error:
            refused.append(str(error))
    if not paths:
        print(f"nothing to delete in {folder}")
    if backend.has_triton():
        from lora_fast.kernels import plans

        plans.reload_tables()
    if refused:
        raise BadInputError(
            f"LORA_FAST_CACHE: expected tables that can be deleted: {'; '.join(refused)}; "
            "delete them by hand"
        )
    return 0


def _users_table(machine: Any) -> Path:
    from lora_fast.kernels import tables

    try:
        return tables.user_path(machine)
    except ValueError as error:
        raise BadInputError(str(error)) from error
