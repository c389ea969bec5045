"""`lora-fast tune` as a command: what it writes, prints, shows, deletes and refuses."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lora_fast import backend
from lora_fast.cli import main
from lora_fast.kernels import candidates, configs, plans, tables
from lora_fast.tune import problems, search
from lora_fast.tune.problems import Job

needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)
GPU = "NVIDIA Imaginary 9000"
ARCH = replace(configs.ARCHITECTURES["sm_90"], gpu=GPU)
# What serves these calls where nothing was measured.
RULED_CALL = tables.Call.of("lora_linear_fwd", 5, 24, 16, 2, torch.float32, False)
RULED = str(plans.rule_for(ARCH, RULED_CALL).impl)
Refused = Callable[..., str]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few candidates for each call, and times that only depend on the plan."""
    ways = {
        "lora_linear_fwd": [[{"impl": "split"}, {"impl": "lora_first"}]],
        "lora_linear_bwd": [[{"library_sb": True}, {"input_grad": "fused"}]],
        "lora_embedding_fwd": [[{"block_m": 32}, {"block_m": 64}]],
        "lora_embedding_bwd": [[{"segment_m": 16}, {"segment_m": 32}]],
        "merged_weight": [[{"fused": True}, {"fused": False}]],
    }
    steps = {op: lambda arch, call, rule: ways[call.op] for op in ways}
    monkeypatch.setattr(candidates, "_STEPS", steps)

    def time(self: problems.Problem, plan: Any) -> Callable[[], float]:
        best = {
            "lora_linear_fwd": {"split": 7.0, "lora_first": 8.0}.get(getattr(plan, "impl", "")),
            "lora_embedding_fwd": {32: 7.0}.get(getattr(plan, "block_m", 0)),
            "lora_embedding_bwd": {16: 7.0}.get(getattr(plan, "segment_m", 0)),
            "merged_weight": 7.0 if getattr(plan, "fused", False) else None,
        }
        return lambda: best.get(self.job.op) or 9.0

    monkeypatch.setattr(problems.Problem, "call", time)
    monkeypatch.setattr(search.DeviceClock, "once", lambda self, call: call())


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_an_interpreted_run_says_so_and_writes_only_where_it_is_told(
    quick: None, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "table.json"
    few = ("--shapes", "5,16,24,2", "70,16,24,2", "--dtype", "float32", "--device", "cpu")
    assert main(["tune", *few, "--dropout", "--out", str(target)]) == 0
    text = capsys.readouterr().out
    assert "the times mean nothing" in text
    assert "6 of 6 kinds of calls measured" in text
    assert f"written: {target}" in text
    assert not cache.exists()
    found = tables.read(target)
    assert found.machine.gpu == "Triton's interpreter"
    plans = {
        (row.call.op, row.call.M, row.call.dropout): row.plan.get("impl") for row in found.rows
    }
    # The backward's plans all take the same time, so the rule stays.
    assert plans == {
        ("lora_linear_fwd", 8, False): "split",
        ("lora_linear_fwd", 128, False): "split",
        ("lora_linear_fwd", 8, True): "split",
        ("lora_linear_fwd", 128, True): "split",
    }


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_embeddings_and_convolutions_are_measured_too(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "table.json"
    few = ("--shapes", "embedding:70,30,24,2", "embedding:5,30,24,2", "conv2d:4,6,3,2")
    arguments = ("--dtype", "float32", "--device", "cpu", "--dropout", "--out", str(target))
    assert main(["tune", *few, *arguments]) == 0
    text = capsys.readouterr().out
    assert "4 of 4 kinds of calls measured out, 4 better served than by default" in text
    assert "merged_weight K 12, N 18, r 6, float32: 7 us instead of 9 with fused True, " in text
    assert "lora_embedding_bwd M 65 to 128, K 30, N 24, r 2, float32: 7 us instead of 9" in text
    found = {(row.call.op, row.call.M): row for row in tables.read(target).rows}
    assert {key: (row.call.K, row.call.N, row.call.R) for key, row in found.items()} == {
        ("lora_embedding_fwd", 128): (30, 24, 2),
        ("lora_embedding_bwd", 128): (30, 24, 2),
        ("lora_embedding_fwd", 8): (30, 24, 2),
        ("merged_weight", 1): (12, 18, 6),
    }
    assert found["lora_embedding_fwd", 8].plan["block_m"] == 32
    assert found["lora_embedding_bwd", 128].plan["segment_m"] == 16
    assert found["merged_weight", 1].plan["fused"] is True


@pytest.fixture
def gpu(quick: None, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """This machine with a GPU, as far as the command sees."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr("lora_fast.tune.run._device", lambda arguments: where)
    monkeypatch.setattr(configs, "architecture", lambda device: ARCH)
    monkeypatch.setattr("lora_fast.kernels.lora_linear_fwd.architecture", lambda device: ARCH)
    return where


def chosen(M: int = 5, R: int = 2) -> str:
    plan: Any = plans.forward_plan(ARCH, M, 24, 16, R, torch.float32, False)
    return str(plan.impl)


@needs_kernels
def test_dispatch_uses_what_was_measured_until_it_is_reset(
    gpu: torch.device, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen() == RULED != "split"
    assert main(["tune", "--shapes", "5,16,24,2", "--dtype", "float32"]) == 0
    assert chosen() == "split"
    assert chosen(R=3) == RULED
    weight = (ARCH, 18, 12, 6, torch.float32)
    assert not plans.weight_plan(*weight).fused
    assert main(["tune", "--shapes", "conv2d:4,6,3,2", "--dtype", "float32"]) == 0
    assert plans.weight_plan(*weight).fused
    (path,) = cache.iterdir()
    assert f"written: {path}, 2 rows" in capsys.readouterr().out
    (cache / "notes.json").write_text("{}")
    assert main(["tune", "--reset"]) == 0
    assert capsys.readouterr().out == f"deleted: {path}\n"
    assert [p.name for p in cache.iterdir()] == ["notes.json"]
    assert chosen() == RULED
    assert main(["tune", "--reset"]) == 0
    assert "nothing to delete" in capsys.readouterr().out


@needs_kernels
def test_rows_of_other_calls_stay_and_those_that_lost_go(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--shapes", "5,16,24,2", "1,16,24,2", "--dtype", "float32"]) == 0
    monkeypatch.setattr(problems.Problem, "call", lambda self, plan: lambda: 5.0)
    assert main(["tune", "--shapes", "5,16,24,2", "--dtype", "float32"]) == 0
    (path,) = tables.user_tables()
    assert [row.call.M for row in tables.read(path).rows] == [1]
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert main(["tune", "--shapes", "3,16,24,2", "--dtype", "float32"]) == 0
    assert "nothing to write: the defaults stay" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


@needs_kernels
def test_a_broken_table_of_the_user_is_replaced(gpu: torch.device) -> None:
    path = tables.user_path(tables.this_machine(GPU, "sm_90"))
    path.parent.mkdir()
    path.write_text("{")
    assert main(["tune", "--shapes", "5,16,24,2", "--dtype", "float32"]) == 0
    assert len(tables.read(path).rows) == 1


@needs_kernels
def test_ctrl_c_keeps_what_was_measured(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = []
    original = Job.prepare

    def prepare(self: Job, device: torch.device) -> Any:
        prepared.append(self)
        if len(prepared) == 2:
            raise KeyboardInterrupt
        return original(self, device)

    monkeypatch.setattr(Job, "prepare", prepare)
    shape = ("5,16,24,2", "1,16,24,2", "9,16,24,2")
    assert main(["tune", "--shapes", *shape, "--dtype", "float32"]) == 130
    (path,) = tables.user_tables()
    assert [row.call.M for row in tables.read(path).rows] == [8]
    assert "1 of 3 kinds of calls measured" in capsys.readouterr().out


@needs_kernels
def test_a_failure_keeps_what_was_measured(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = search.DeviceClock.once
    # 3 plans in 9 rounds and 2 in 31, for each of two calls, which stand for the same rows.
    works = iter(range(2 * (3 * 9 + 2 * 31)))

    def once(self: Any, call: Callable[[], Any]) -> float:
        if next(works, None) is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(self, call)

    monkeypatch.setattr(search.DeviceClock, "once", once)
    shape = ("5,16,24,2", "7,16,24,2", "1,16,24,2")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(["tune", "--shapes", *shape, "--dtype", "float32"])
    assert [row.call.M for row in tables.read(tables.user_tables()[0]).rows] == [8]


@needs_kernels
def test_when_the_minutes_are_over_it_stops_and_says_so(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = iter(range(10**6))
    monkeypatch.setattr(search.DeviceClock, "now", lambda self: float(next(late)))
    shape = ("5,16,24,2", "1,16,24,2")
    arguments = ("--shapes", *shape, "--dtype", "float32", "--minutes", "2")
    assert main(["tune", *arguments]) == 0
    assert next(late) < 130
    text = capsys.readouterr().out
    assert "1 of 2 kinds of calls measured" in text
    assert "--minutes gives it more time" in text
    assert len(tables.read(tables.user_tables()[0]).rows) == 1


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_the_table_is_measured_and_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The whole search compiles for minutes; these few plans take the same way.
    steps = {
        "lora_linear_fwd": [[{"impl": "split"}, {"impl": "lora_first"}]],
        "lora_linear_bwd": [[{"library_sb": True}], [{"input_grad": "fused"}]],
        "lora_embedding_fwd": [[{"chunk_d": 256}, {"block_m": 32}]],
        "lora_embedding_bwd": [[{"library_sb": True}], [{"segment_m": 32}]],
        "merged_weight": [[{"fused": False}, {"config": configs.WeightConfig(64, 64, 4)}]],
    }
    monkeypatch.setattr(
        candidates, "_STEPS", {op: lambda arch, call, rule, op=op: steps[op] for op in steps}
    )
    shape = ("2048,1024,1024,16", "embedding:2048,50257,1024,16", "conv2d:256,512,3,16")
    assert main(["tune", "--shapes", *shape, "--dropout", "--minutes", "3"]) == 0
    text = capsys.readouterr().out
    assert "7 of 7 kinds of calls measured" in text, text
    assert "dropped: " not in text
    for path in tables.user_tables():
        arch = configs.architecture(torch.device("cuda"))
        for row in tables.read(path).rows:
            assert 0.0 < row.us < row.rule_us
            assert tables.find(arch.gpu, arch.name, row.call) == (row, path)


def test_show_prints_the_tables_and_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(configs, "architecture", lambda device: ARCH)
    call = tables.Call.of("lora_linear_fwd", 4000, 1024, 2048, 16, "bfloat16", True)
    row = tables.Row(call, {"impl": "split", "gemm": {"block_m": 64}}, 10.0, 12.5)
    machine = tables.this_machine(GPU, "sm_90")
    own = tables.Table(machine, (row,), "0.1.0", "2026-11-24")
    path = tables.user_path(machine)
    for table, file in ((own, path), (replace(own, rows=()), tables.SHIPPED / "sm_90.json")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tables.to_json(table))
    plans.reload_tables()
    assert main(["tune", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"your tables are in {tables.user_folder()}"
    assert lines[1] == f"cuda:0 {GPU}: 2 tables, then the built-in rule"
    assert lines[2].startswith(f"  {path}: 1 rows, measured on {GPU}, torch {machine.torch}, ")
    assert lines[3] == (
        "    lora_linear_fwd M 2049 to 4096, K 2048, N 1024, r 16, bfloat16, dropout: 10 us "
        "instead of 12.5 with impl split, gemm (block_m 64)"
    )
    assert lines[4].startswith(f"  {tables.SHIPPED / 'sm_90.json'}: 0 rows")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_show_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--show"]) == 0
    assert "no GPU here, so no table is in force" in capsys.readouterr().out


def test_show_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "_TRITON_FOUND", False)
    assert main(["tune", "--show"]) == 0
    assert "triton is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["my notes", json.dumps({"format": 1})])
def test_out_does_not_overwrite_what_is_no_table(
    content: str, gpu: torch.device, tmp_path: Path, refused: Refused
) -> None:
    target = tmp_path / "notes.txt"
    target.write_text(content)
    line = refused("--shapes", "1,2,3,4", "--out", target)
    assert f"--out: expected a new file or a table of this GPU, torch and triton; {target}" in line
    assert target.read_text() == content


@pytest.mark.parametrize("argument", ["--out", "LORA_FAST_CACHE"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(
    argument: str,
    gpu: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    (tmp_path / "file").write_text("")
    arguments: list[str | Path] = ["--shapes", "1,2,3,4"]
    if argument == "--out":
        arguments += ["--out", tmp_path / "file" / "sub" / "t.json"]
    else:
        monkeypatch.setenv("LORA_FAST_CACHE", str(tmp_path / "file" / "sub"))
    assert argument in refused(*arguments)


def test_a_table_that_cannot_be_deleted(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table = cache / "a-torch-2-triton-3.json", cache / "b-torch-2-triton-3.json"
    folder.mkdir(parents=True)
    table.write_text("{}")
    assert main(["tune", "--reset"]) == 2
    out, err = capsys.readouterr()
    assert out == f"deleted: {table}\n"
    assert err.startswith("lora-fast tune: LORA_FAST_CACHE: expected tables that can be deleted: ")
    assert str(folder) in err and err.count("\n") == 1
    assert list(cache.iterdir()) == [folder]


def test_a_cache_folder_of_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report goes on without it; what would write there says what is wrong."""
    monkeypatch.setenv("LORA_FAST_CACHE", "~nobody_of_this_name/x")
    assert main(["tune", "--show"]) == 0
    assert "your tables are ignored: LORA_FAST_CACHE: expected a folder" in capsys.readouterr().out
    assert main(["tune", "--reset"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora-fast tune: LORA_FAST_CACHE: expected a folder, got '~nobody_of_")


@pytest.mark.parametrize("name", ["n" * 5000, "file/sub"], ids=["too long", "below a file"])
def test_a_cache_folder_that_the_system_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FAST_CACHE", str(tmp_path / name))
    expected = f"LORA_FAST_CACHE: expected a folder, got '{str(tmp_path)[:40]}"
    assert main(["tune", "--show"]) == 0
    assert f"your tables are ignored: {expected}" in capsys.readouterr().out
    assert main(["tune", "--reset"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-fast tune: {expected}") and len(line) < 300
