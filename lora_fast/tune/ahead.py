"""Compiling what will be measured, in several processes at once, before anything is measured.

A plan is compiled by running it: the kernels then lie in Triton's cache on disk, where the process
that measures finds them.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from lora_fast.tune.problems import Job

# A process takes seconds to start, and GPU memory for a context of its own.
_MOST_PROCESSES = 16
_PLANS_OF_A_TASK = 4

Change = dict[str, Any]


def processes() -> int:
    """Return how many processes compile side by side here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_PROCESSES, cores or 1)


def compile_ahead(jobs: list[Job], device: torch.device, workers: int) -> int:
    """Run the plans that the jobs will try, once each; what fails here will fail there, and say so.

    Calls that differ in sizes alone take the same kernels, nearly always: one of them stands for
    the others.

    Args:
        jobs: what is to be measured.
        device: a GPU.
        workers: how many processes.

    Returns:
        How many plans ran.
    """
    tasks = [(job, changes) for job in _representatives(jobs) for changes in _portions(job)]
    context = multiprocessing.get_context("spawn")  # a forked process has no use of CUDA
    with ProcessPoolExecutor(min(workers, len(tasks)) or 1, context) as pool:
        futures = [pool.submit(_run_each, job, changes, str(device)) for job, changes in tasks]
        try:
            done = list(tqdm(as_completed(futures), "compiling", len(tasks), disable=None))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sum(future.result() for future in done if future.exception() is None)


def _representatives(jobs: list[Job]) -> Iterator[Job]:
    seen = set()
    for job in jobs:
        kind = (job.op, job.dtype, job.dropout, job.call.M, job.shape.R)
        if kind not in seen:
            seen.add(kind)
            yield job


def _portions(job: Job) -> Iterator[list[Change]]:
    changes = [change for step in job.steps for change in step]
    for start in range(0, len(changes), _PLANS_OF_A_TASK):
        yield changes[start : start + _PLANS_OF_A_TASK]


def _run_each(job: Job, changes: list[Change], device: str) -> int:
    try:
        problem = job.prepare(torch.device(device))
    except Exception:  # the measurement will tell
        return 0
    ran = 0
    for change in changes:
        for way in _ways(change):
            try:
                problem.run(replace(job.rule, **way, **change))
                ran += 1
            except Exception:
                continue
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    return ran


def _ways(change: Change) -> Iterator[Change]:
    """Combinations with what an earlier step may choose, where it decides about the same kernel."""
    if "shrink" in change:
        yield from ({"impl": impl} for impl in ("split", "lora_first"))
    elif "grad_a" in change:
        yield from ({"input_grad": impl} for impl in ("fused", "lora_first"))
    else:
        yield {}
