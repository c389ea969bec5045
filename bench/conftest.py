"""`pytest bench --benchmark` measures; without the option toy sizes show that everything runs.

An item is one peer in one row. The first item of a row measures all of its peers in turns; each
item then hands its own samples to pytest-benchmark, whose options work as ever.
"""

import argparse
import difflib
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness.clock import Clock, cpus, pin_cpu
from harness.contest import Lab
from harness.measured import OUTPUT_FAILED, Measured, Replay, Store
from harness.names import OURS
from harness.results import RESULTS, UNPUBLISHED, check_folder, device_name, machine
from harness.selection import Level, nothing_fits, parse
from lora_fast.commands import device_named, not_empty, number, path, positive, writable_folder

_NARROWING = ("shapes", "tokens", "ranks", "dtypes", "peers")
_WENT_TO_ITS_END = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
_STORE = pytest.StashKey[Store]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("bench", "lora_fast's benchmarks")
    add = group.addoption
    add("--benchmark", action="store_true", help="measure; without it toy sizes show that all runs")
    add("--quick", action="store_true", help="a few rows: under two minutes on a CPU")
    add("--full", action="store_true", help="every combination: hours")
    add("--device", type=not_empty, help="cpu, cuda, cuda:1 ...; a GPU if there is one by default")
    add("--shapes", help="shape sets or shapes of Linear, with commas")
    add("--tokens", help="numbers of rows M, with commas")
    add("--ranks", help="ranks, with commas")
    add("--dtypes", help="dtypes, with commas")
    add(
        "--peers",
        help="who takes part beside lora_fast and the frozen layer: names or patterns, with commas",
    )
    add("--lorafusion", metavar="DIR", help="a checkout of LoRAFusion, another peer")
    add("--rounds", type=positive, default=31, help="the most rounds of a row")
    budget = "seconds for a row, five rounds in any case"
    add("--budget", type=_not_negative, default=1.0, help=budget)
    add("--threads", type=positive, help="on a CPU, bound to as many cores; 2 by default")
    add("--out", type=path, metavar="FOLDER", help="where results go")
    add("--profile", metavar="ROW", help="no times, a profile of every peer in this row")


def _not_negative(text: str) -> float:
    value = number(float, text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    if value < 0.0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def pytest_configure(config: pytest.Config) -> None:
    """Set up the device and what is measured on it."""
    if not torch.cuda.is_available() and not config.getoption("--benchmark"):
        # Triton reads it when it is imported: without a GPU, toy kernels run in its interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # pytest-xdist's own, which need not be installed.
    config.addinivalue_line("markers", "xdist_group(name): tests of a group run in one process")
    try:
        config.stash[_STORE] = _store(config)
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(str(error)) from None


def _store(config: pytest.Config) -> Store:
    from peers.roster import PEERS, missing  # which imports the kernels

    option = config.getoption
    measuring, profiling = option("--benchmark"), option("--profile") is not None
    if measuring or profiling:
        _refuse_processes(config)
    if not measuring:
        # pytest-benchmark reads its option after this.
        config.option.benchmark_disable = True
    level, device = _level(config), _device(option("--device"))
    lists = {name: option(f"--{name}") for name in _NARROWING}
    selection = parse(level, device, **lists, known_peers=[p for p in PEERS if p != OURS])
    if measuring and device.type == "cpu":
        pin_cpu(_threads(option("--threads")))
    clock = Clock(device, rounds=option("--rounds"), budget=option("--budget"))
    if not measuring:
        clock = Clock(device, rounds=1, budget=0.0, sample=0.0)
    lab = Lab(device, level, clock, option("--lorafusion"))
    facts = machine(device)
    absent = missing(lab)
    known = {
        p: reason for p, reason in absent.items() if not selection.peers or p in selection.peers
    }
    narrowed = {f"--{name}": text for name, text in lists.items() if text} | _chosen(config)
    out, published = _folders(config, device_name(facts), narrowed)
    if not (measuring or profiling):
        out = published = None
    for folder, argument in ((out, "--out"), (published, str(RESULTS))):
        if folder is not None:
            check_folder(folder, facts)
            writable_folder(folder, argument)
    facts |= {"selection": level, "missing": known}
    facts |= {"narrowed by": narrowed} if narrowed else {}
    return Store(lab, selection, facts, out, published)


def _refuse_processes(config: pytest.Config) -> None:
    # pytest-xdist's own options, which need not be installed; -n sets both.
    if config.getoption("dist", "no") != "no" and config.getoption("tx", None):
        raise ValueError("-n: processes that measure at once slow each other down; leave it out")


def _level(config: pytest.Config) -> Level:
    option = config.getoption
    if option("--quick") and option("--full"):
        raise ValueError("--quick, --full: expected at most one of them, got both; leave one out")
    if not option("--benchmark"):
        return "toy"
    return "quick" if option("--quick") else "full" if option("--full") else "standard"


def _device(name: str | None) -> torch.device:
    cuda = torch.cuda.is_available()
    name = name or ("cuda" if cuda else "cpu")
    if name.startswith("cuda") and not cuda:
        raise ValueError(f"--device {name}: there is no GPU here; known is cpu")
    device = device_named(name)
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"--device {name}: expected cpu or cuda")
    return device


def _threads(wanted: int | None) -> int:
    there = cpus()
    if wanted is not None and wanted > there:
        raise ValueError(f"--threads {wanted}: expected at most {there}, the cores of this machine")
    return wanted or min(2, there)


def _chosen(config: pytest.Config) -> dict[str, str]:
    """What pytest's own options say of the items; `Progress` counts what came of it."""
    option = config.option
    told = {
        "-k": option.keyword,
        "-m": option.markexpr,
        "--deselect": " ".join(option.deselect or ()),
        "node ids": " ".join(argument for argument in config.args if "::" in argument),
    }
    return {name: text for name, text in told.items() if text}


def _folders(
    config: pytest.Config, name: str, narrowed: dict[str, str]
) -> tuple[Path, Path | None]:
    """Where rows go at once, and where their tables go too when all of them are whole."""
    option = config.getoption
    if option("--out"):
        return option("--out"), None
    partial = narrowed or option("--quick") or option("--profile") is not None
    return UNPUBLISHED / name, None if partial else RESULTS / name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item for each peer in each row of a benchmark's table."""
    if "measured" not in metafunc.fixturenames:
        return
    from peers.roster import select

    store = metafunc.config.stash[_STORE]
    module, cases = metafunc.module, []
    store.asked.append(module.rows)
    for row in module.rows(store.selection):
        peers = select(store.selection.peers, module.peers(row))
        peers = [peer for peer in peers if peer not in store.facts["missing"]]
        for peer in peers:
            store.progress.plan(row.table, row.id, peer)
            replay = Replay()
            marks = [
                pytest.mark.benchmark(group=f"{row.table} {row.id}", timer=replay),
                pytest.mark.xdist_group(f"{row.table} {row.id}"),  # all of a row in one process
            ]
            cases.append(
                pytest.param((row, peers, peer, replay), id=f"{row.id}-{peer}", marks=marks)
            )
    metafunc.parametrize("measured", cases, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a selection without rows, and keep the one row that is to be profiled."""
    store = config.stash[_STORE]
    is_worker = hasattr(config, "workerinput")  # pytest-xdist's can't refuse, and measures nothing
    if store.asked and store.progress.is_empty and not is_worker:
        options = {f"--{name}": config.getoption(f"--{name}") for name in _NARROWING}
        given = {option: text for option, text in options.items() if text}
        raise pytest.UsageError(nothing_fits(store.selection, given, store.asked))
    wanted = config.getoption("--profile")
    if wanted is not None:
        _keep(wanted, config, items)


def _keep(wanted: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    rows: dict[str, list[pytest.Item]] = {}
    for item in items:
        case = item.callspec.params.get("measured") if hasattr(item, "callspec") else None
        if isinstance(case, tuple):  # and not the mark of a table without rows
            rows.setdefault(case[0].id, []).append(item)
    if wanted not in rows:
        near = difflib.get_close_matches(wanted, rows, n=5, cutoff=0.0)
        raise pytest.UsageError(f"unknown row {wanted!r}; known are {', '.join(near)} and others")
    config.hook.pytest_deselected(items=[item for item in items if item not in rows[wanted]])
    items[:] = rows[wanted]


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Measured:
    """One peer in one row, measured."""
    row, peers, peer, replay = request.param
    store = request.config.stash[_STORE]
    if request.config.getoption("--profile"):
        return store.profiled(row, peer, benchmark)
    return store.measured(row, peers, peer, benchmark, replay)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Put versions, GPU, driver and commit into pytest-benchmark's JSON."""
    machine_info["lora_fast"] = config.stash[_STORE].all_facts()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write tables and pictures of what was measured, also after Ctrl-C."""
    if not session.config.stash[_STORE].finish() and session.exitstatus in _WENT_TO_ITS_END:
        session.exitstatus = OUTPUT_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say who was missing, what failed and where the results are."""
    store = config.stash[_STORE]
    if store.out is None or not store.tables:
        return
    terminalreporter.section("lora_fast")
    for line in store.summary():
        terminalreporter.write_line(line)
