"""The command `pytest bench --benchmark`: results, Ctrl-C, a profile, one line for bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The smallest rows that are measured, on one thread: this is about what is written.
SMALL = ("--quick", "--rounds", "1", "--budget", "0", "--threads", "1", "--device", "cpu")
# pytest-benchmark measures nothing in a process that takes itself for one of pytest-xdist's. The
# package is the installed one: from Python 3.11 on this folder can be kept off the path.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
ENVIRONMENT["PYTHONSAFEPATH"] = "1"
pytestmark = pytest.mark.slow


def command(
    *arguments: str | Path,
    start: str = "bench",
    first: str = "",
    without: str = "",
    elsewhere: Path | None = None,
    xdist: tuple[str, ...] = ("-p", "no:xdist"),
) -> list[str]:
    """Return pytest's command line; `elsewhere` takes the place of the default folders."""
    hide = f"sys.modules[{without!r}] = None; " if without else ""
    if elsewhere is not None:
        first += (
            "sys.path.insert(0, 'bench'); from pathlib import Path; from harness import results; "
            f"results.RESULTS = Path({str(elsewhere)!r}, 'results'); "
            f"results.UNPUBLISHED = Path({str(elsewhere)!r}, 'bench-out'); "
        )
    code = f"import sys, pytest; {hide}{first}sys.exit(pytest.main(sys.argv[1:]))"
    options = (start, "-q", "-p", "no:cacheprovider", *xdist)
    return [sys.executable, "-c", code, *options, *map(str, arguments)]


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, **options),
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


def test_ctrl_c_writes_what_was_measured(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("--benchmark", *SMALL, "-k", "Conv2d", "--out", out),
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 200
    while not (out / "layers.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Into the next row: between two tests it may meet a line of CPython 3.11's that has no number,
    # which pytest's report of it can't take.
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 2, text
    assert "KeyboardInterrupt" in text
    (row,) = json.loads((out / "layers.json").read_text())["rows"]
    assert row["columns"]["layer"] == "Conv2d"
    assert (out / "layers.md").exists()
    assert (out / "speedup.png").exists()
    assert f"results: {out}" in text


def test_results_and_pytest_benchmarks_own_json(tmp_path):
    own = tmp_path / "own.json"
    done = run(
        "--benchmark", *SMALL, "-k", "Conv2d and layers", "--out", tmp_path, "--benchmark-json", own
    )
    assert done.returncode == 0, done.stdout
    table = json.loads((tmp_path / "layers.json").read_text())
    facts, (row,) = table["machine"], table["rows"]
    assert {"cpu", "torch", "loralib", "python", "commit", "date", "threads"} <= set(facts)
    assert facts["missing"]["lorafusion"] == "no --lorafusion DIR was given"
    ours = row["peers"]["lora_fast"]
    assert {"us", "ratio", "saved_bytes", "peak_bytes", "error"} <= set(ours)
    found = json.loads(own.read_text())
    names = {bench["name"].rpartition("-")[2].rstrip("]"): bench for bench in found["benchmarks"]}
    peers = {"frozen", "loralib", "peft", "lora_fast", "lora_fast:reference"}
    assert set(names) == peers - set(facts["missing"])
    assert {bench["group"] for bench in names.values()} == {f"layers {row['id']}"}
    assert names["lora_fast"]["stats"]["median"] * 1e6 == pytest.approx(ours["us"])
    assert found["machine_info"]["lora_fast"]["commit"] == facts["commit"]


def test_a_missing_peft_is_listed_and_the_row_goes_on(tmp_path):
    only = ("-k", "Conv2d and layers", "--peers", "peft", "--out", tmp_path)
    done = run("--benchmark", *SMALL, *only, without="peft")
    assert done.returncode == 0, done.stdout
    assert "peft: missing, peft is not installed" in done.stdout
    table = json.loads((tmp_path / "layers.json").read_text())
    assert table["machine"]["missing"]["peft"] == "peft is not installed"
    assert {peer for row in table["rows"] for peer in row["peers"]} == {"frozen", "lora_fast"}
    narrowed = table["machine"]["narrowed by"]
    items = narrowed.pop("items")
    assert re.fullmatch(r"\d+ of \d+", items)
    assert narrowed == {"--peers": "peft", "-k": "Conv2d and layers"}
    heading = (tmp_path / "layers.md").read_text().splitlines()[0]
    told = f"`--peers peft`, `-k Conv2d and layers`, items {items}"
    assert f"; narrowed by {told}; missing: " in heading


def test_a_node_id_is_a_part_and_publishes_nothing(tmp_path):
    node = "bench/bench_merge.py::test_merge[Linear-256x256-r16-float32-eval+train-lora_fast]"
    done = run("--benchmark", *SMALL[1:], start=node, elsewhere=tmp_path)
    assert done.returncode == 0, done.stdout
    (found,) = tmp_path.rglob("merge.json")
    assert found.parent.parent.name == "bench-out"
    table = json.loads(found.read_text())
    assert len(table["rows"]) == 1
    narrowed = table["machine"]["narrowed by"]
    assert narrowed["node ids"] == node
    assert narrowed["items"].startswith("1 of ")
    assert f"merge: {narrowed['items']} items were run" in done.stdout


def test_results_that_cannot_be_written_are_one_line(tmp_path):
    """As on a full disk: no file may be longer than a few bytes."""
    out = tmp_path / "out"
    few = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)); "
    done = run("--benchmark", *SMALL, "--out", out, start="bench/bench_merge.py", first=few)
    assert done.returncode == 74, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "merge.json" in line]
    assert "results cannot be written: [Errno 27] File too large: " in line
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(out.iterdir())


def test_processes_that_measure_at_once_are_refused():
    pytest.importorskip("xdist")
    done = run("--benchmark", *SMALL, "-n", "2", start="bench/bench_merge.py", xdist=())
    assert done.returncode == 4
    assert "ERROR: -n: processes that measure at once slow each other down" in done.stderr


def test_profile_of_one_row(tmp_path):
    name = "MergedLinear-16-M6-r4-p0-float32-fwd+bwd-eager"
    only = ("--device", "cpu", "-k", "lora_fast and not lora_fast:")
    done = run("--profile", name, "--out", tmp_path, *only)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    table = (tmp_path / f"profile-{name}-lora_fast.md").read_text()
    assert "aten::addmm" in table or "aten::mm" in table
    assert json.loads((tmp_path / f"profile-{name}-lora_fast.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shapes", "llama-9"), "unknown shape set 'llama-9'; known are square"),
        (("--profile", "Linear"), "unknown row 'Linear'; known are"),
        (("--out", __file__), "--out: expected a folder that can be written to"),
        (("--full",), "--quick, --full: expected at most one of them, got both; leave one out"),
        (("--device", "cpu:3"), "--device cpu:3: expected cpu or cuda"),
        (("--threads", "9999"), "--threads 9999: expected at most "),
        (("--lorafusion", "nowhere"), "--lorafusion: expected a checkout that holds lorafusion/"),
        (("--dtypes", "bfloat16"), "no row of level quick on cpu fits --dtypes bfloat16; without"),
    ],
)
def test_bad_options_are_one_line(options, message):
    done = run("--benchmark", *SMALL, *options)
    assert done.returncode == 4
    (line,) = [part for part in (done.stdout + done.stderr).splitlines() if "ERROR" in part]
    assert line.startswith(f"ERROR: {message}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "linear.json is no JSON that can be read: "),
        (
            '{"machine": {"cpu": "another", "cores": 7}, "rows": [{"id": "a", "columns": '
            '{"layer": "Linear", "shape": "x", "M": 1, "K": 1, "N": 1, "r": 1, "dropout": 0, '
            '"dtype": "float32", "pass": "fwd"}, "peers": {}}]}',
            "expected one machine, got linear of cpu another, cores 7 and this run of cpu ",
        ),
    ],
)
def test_a_folder_is_checked_before_anything_is_measured(table, message, tmp_path):
    (tmp_path / "linear.json").write_text(table)
    done = run("--benchmark", *SMALL, "--out", tmp_path)
    assert done.returncode == 4
    (line,) = [part for part in (done.stdout + done.stderr).splitlines() if "ERROR" in part]
    assert message in line


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rounds", "0", "must be at least 1, got 0"),
        ("--threads", "0", "must be at least 1, got 0"),
        ("--budget", "-1", "must be at least 0, got -1"),
        ("--budget", "inf", "must be finite, got inf"),
        ("--budget", "nan", "must be finite, got nan"),
        ("--device", "", "expected a name, got ''"),
        ("--out", "", "expected a path, got ''"),
    ],
)
def test_values_that_argparse_refuses(option, value, message):
    done = run("--benchmark", *SMALL, f"{option}={value}")
    assert done.returncode == 4
    assert f"argument {option}: {message}" in done.stdout + done.stderr


def test_a_report_of_kernels_needs_a_process():
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "bench" / "compile_report.py"), "--jobs", "0"]
    # A script finds the others in its own folder.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("argument --jobs: must be at least 1, got 0\n")
