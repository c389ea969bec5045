"""Files of measured choices: what is written is read, and what is refused fails nothing."""

import importlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from made_tables import ARCH, CALL, GPU, OTHER, RULE, TILE, plan, put, table

from lora_fast.kernels import configs, plans, tables
from lora_fast.kernels.tables import Call, Row

pytestmark = pytest.mark.usefixtures("no_tables")


def test_what_is_written_is_read_again() -> None:
    found = table({"impl": OTHER, "gemm": TILE})
    path = put(found)
    assert tables.read(path) == replace(found, path=path)
    assert list(path.parent.iterdir()) == [path]
    assert tables.user_tables() == [path]


def test_the_folder_is_the_variables_or_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FAST_CACHE", "~/somewhere")
    assert tables.user_folder() == Path.home() / "somewhere"
    for unset in (lambda: monkeypatch.delenv("LORA_FAST_CACHE"), None):
        if unset is None:
            monkeypatch.setenv("LORA_FAST_CACHE", "")
        else:
            unset()
        assert tables.user_folder().is_absolute()
        assert "lora_fast" in tables.user_folder().parts


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_users_table_is_for_one_minor_version(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of torch 2.10 does not serve 2.13; another patch, or build, is the same."""
    module = importlib.import_module(package)
    monkeypatch.setattr(module, "__version__", "2.10.1+cu130")
    machine = tables.this_machine(GPU, "sm_90")
    assert getattr(machine, package) == "2.10"
    put(table({"impl": OTHER}))
    assert plan().impl == OTHER
    for version, serves in (("2.10.0", True), ("2.13.0", False)):
        monkeypatch.setattr(module, "__version__", version)
        plans.reload_tables()
        assert (plan().impl == OTHER) is serves


def test_the_file_name_has_the_gpu_and_the_versions() -> None:
    machine = tables.Machine("AMD Instinct MI300X/OAM (gfx942)", "gfx942", "2.11", "3.6")
    name = "amd-instinct-mi300x-oam-gfx942-torch-2.11-triton-3.6.json"
    assert tables.user_path(machine).name == name


VALID = {
    **{"format": 1, **asdict(tables.this_machine(GPU, "sm_90"))},
    **{"lora_fast": "0.1.0", "date": "2026-11-24"},
    "rows": [{**CALL._asdict(), "plan": {"impl": OTHER}, "us": 1, "rule_us": 2.5}],
}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in VALID.items() if key != name}


def with_row(**changes: Any) -> dict[str, Any]:
    return {**VALID, "rows": [{**VALID["rows"][0], **changes}]}


BROKEN = {
    "empty": (b"", "Expecting value"),
    "cut off": (json.dumps(VALID).encode()[:-3], "Expecting"),
    "not UTF-8": (b"\xff\xfe\x00", "utf-8"),
    "nested too deep": (b"[" * 100_000, "recursion"),
    "a list": ([], "expected a JSON object"),
    "another format": ({**VALID, "format": 2}, "format 1"),
    "no GPU": (without("gpu"), "gpu must be of type str, got None"),
    "a number for a version": ({**VALID, "torch": 2.1}, "torch must be of type str, got 2.1"),
    "no rows": (without("rows"), "rows must be of type list"),
    "another GPU": ({**VALID, "gpu": "GeForce"}, "it is for Machine(gpu='GeForce'"),
    "another triton": ({**VALID, "triton": "2.0"}, "triton='2.0'"),
    "a row that is no object": ({**VALID, "rows": [3]}, "row 0 must be an object, got 3"),
    "a size of text": (with_row(M="4096"), "row 0: M must be of type int, got '4096'"),
    "a size of true": (with_row(K=True), "row 0: K must be of type int, got True"),
    "a size of zero": (with_row(N=0), "row 0: M, N, K and R must be at least 1"),
    "dropout of a number": (with_row(dropout=0), "row 0: dropout must be of type bool, got 0"),
    "a plan of text": (with_row(plan="split"), "row 0: plan must be of type dict"),
    "no time": (with_row(us=None), "row 0: us must be of type float, got None"),
    # These are found when the row is first used.
    "an unknown impl": (
        with_row(plan={"impl": "magic"}),
        "impl must be one of ",
    ),
    "an unknown field": (with_row(plan={"warp": 1}), "ForwardPlan has no field 'warp'"),
    "an unknown nested field": (
        with_row(plan={"gemm": {"block_q": 4}}),
        "GemmConfig has no field 'block_q'",
    ),
    "a tile of text": (with_row(plan={"gemm": "big"}), "gemm must be an object, got 'big'"),
    "a tile of a fraction": (
        with_row(plan={"gemm": {"block_m": 64.0}}),
        "block_m must be of type int, got 64.0",
    ),
    "a tile of no power of two": (
        with_row(plan={"gemm": {"block_m": 96}}),
        "block_m must be a power of two, got 96",
    ),
    "a row of no power of two": (
        with_row(plan={"decode": {"row_bytes": 384}}),
        "row_bytes must be a power of two, got 384",
    ),
    "no stages": (with_row(plan={"gemm": {"num_stages": 0}}), "num_stages must be from 1 to 16"),
    "a row of less than a product": (
        with_row(plan={"decode": {"row_bytes": 2}}),
        "row_bytes must be from 64 to 4096, got 2",
    ),
    "three parts": (with_row(plan={"gemm": {"parts": 3}}), "parts must be a power of two, got 3"),
    "sixteen parts": (
        with_row(plan={"gemm": {"block_n": 256, "parts": 16}}),
        "parts must be from 1 to 8, got 16",
    ),
    "a huge tile": (
        with_row(plan={"gemm": {"block_m": 2**25}}),
        "block_m must be from 16 to 1024, got 33554432",
    ),
    "a huge group": (
        with_row(plan={"gemm": {"group_m": 10**99}}),
        "group_m must be from 1 to 1024, got 1000",
    ),
    "a time without end": (
        with_row(us=10**400),
        "row 0: us and rule_us must be times in us, got [1",
    ),
    "a time of no number": (with_row(rule_us=float("nan")), "must be times in us, got [1, nan]"),
    "a flag of a number": (with_row(plan={"gemm": {"tma": 1}}), "tma must be of type bool, got 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_is_ignored_with_one_warning(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, reason = BROKEN[case]
    path = tables.user_path(tables.this_machine(GPU, "sm_90"))
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for rows in (4096, 4095, 4094):
        assert plan(M=rows) == RULE
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "lora_fast.dispatch")
    assert str(path) in record.getMessage()
    assert "is ignored: " in record.getMessage()
    assert reason in record.getMessage()


def test_a_broken_table_does_not_hide_the_shipped_one() -> None:
    put(table({"impl": OTHER}), shipped="sm_90.json")
    path = put(table({"impl": OTHER}))
    path.write_text("{")
    plans.reload_tables()
    assert plan().impl == OTHER


def test_a_table_that_is_a_folder_or_may_not_be_read_is_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tables.user_path(tables.this_machine(GPU, "sm_90")).mkdir(parents=True)
    assert plan() == RULE
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_what_may_never_end_is_not_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", None)
    path = tables.user_path(tables.this_machine(GPU, "sm_90"))
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert plan() == RULE
    (record,) = caplog.records
    assert f"{path} is ignored: expected a file, " in record.getMessage()


def test_no_home_folder_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tables, "user_folder", homeless)
    assert plan() == RULE
    assert "the user's tables are ignored: Could not determine" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [({"dropout": True}, "draws no dropout"), ({"R": 65}, "a rank of at most 64, got 65")],
)
def test_a_plan_that_cannot_serve_the_call_is_ignored(
    sizes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    dropout = sizes.get("dropout", False)
    call = Call.of("lora_linear_fwd", 4096, 4096, 4096, sizes.get("R", 16), torch.bfloat16, dropout)
    put(table({"impl": "one_pass"}, call))
    assert plan(**sizes).impl != "one_pass"
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("changes", "rank", "dropout", "reason"),
    [
        ({"input_grad": "library"}, 16, True, "library draws no dropout and applies no mask"),
        ({"input_grad": "lora_first"}, 65, False, "lora_first takes a rank of at most 64, got 65"),
        ({"input_grad": "library"}, 65, False, None),
    ],
)
def test_a_row_that_would_run_as_another_is_ignored(
    changes: dict[str, str],
    rank: int,
    dropout: bool,
    reason: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = Call.of("lora_linear_bwd", 4096, 4096, 4096, rank, torch.bfloat16, dropout)
    path = put(table(changes, call))
    rule = plans.rule_for(ARCH, call)
    found, source = plans.measured(ARCH, call, rule)
    assert source == ("the rule" if reason else str(path))
    assert found == (rule if reason else replace(rule, **changes))
    assert (reason or "") in caplog.text
    forward = call._replace(op="lora_linear_fwd")
    library = replace(plans.rule_for(ARCH, forward), impl="library")
    assert (plans.why_not(ARCH, library, forward) is not None) is dropout


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, None), ({"block_m": 64}, "block_m=128 or 256"), ({"num_warps": 4}, "num_warps=8 and")],
)
def test_specialised_warps_are_refused_where_there_is_no_kernel(
    change: dict[str, int], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    put(table({"impl": OTHER, "gemm": {"specialised": True, **change}}))
    assert (plan().impl == OTHER) is (reason is None)
    assert (reason or "") in caplog.text
    other = replace(configs.ARCHITECTURES["sm_80"], gpu=GPU)
    put(table({"gemm": {"specialised": True}}, arch="sm_80"))
    assert not plan(arch=other).gemm.specialised
    assert "specialised warps need a Hopper GPU (sm_90)" in caplog.text


EMBEDDING, WEIGHT = ("lora_embedding_fwd", "lora_embedding_bwd"), "merged_weight"
UNUSABLE = [
    ("lora_linear_fwd", {"gemm": {"block_m": 8}}, "block_m must be from 16 to 1024, got 8"),
    ("lora_linear_bwd", {"grad_sb": {"chunk_n": 500}}, "chunk_n must be a multiple of block_n"),
    ("lora_linear_bwd", {"grad_a": {"chunk_m": 32}}, "chunk_m must be a multiple of block_m"),
    (
        "lora_linear_bwd",
        {"gemm": {"block_n": 16, "parts": 4}},
        "parts must leave 16 columns of block_n each",
    ),
    (EMBEDDING[0], {"block_m": 48}, "block_m must be a power of two, got 48"),
    (EMBEDDING[0], {"chunk_d": 500}, "chunk_d must be a multiple of block_d"),
    (EMBEDDING[0], {"impl": "split"}, "EmbeddingConfig has no field 'impl'"),
    (EMBEDDING[1], {"segment_m": 48}, "segment_m must be a power of two, got 48"),
    (EMBEDDING[1], {"library_sb": "yes"}, "library_sb must be of type bool, got 'yes'"),
    (EMBEDDING[1], {"grad_sb": {"block_n": 8}}, "block_n must be from 16 to 1024, got 8"),
    (WEIGHT, {"fused": 1}, "fused must be of type bool, got 1"),
    (WEIGHT, {"config": {"block_k": 8}}, "block_k must be from 16 to 1024, got 8"),
    (WEIGHT, {"config": {"num_stages": 2}}, "WeightConfig has no field 'num_stages'"),
]


@pytest.mark.parametrize(("op", "changes", "reason"), UNUSABLE)
def test_a_plan_that_no_kernel_can_run_is_ignored_with_one_warning(
    op: str, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    call = CALL._replace(op=op, M=1 if op == WEIGHT else CALL.M)
    path = put(table(changes, call))
    rule = plans.rule_for(ARCH, call)
    for _ in range(2):
        plans.reload_tables()
        caplog.clear()
        for _ in range(2):
            assert plans.measured(ARCH, call, rule) == (rule, "the rule")
        (record,) = caplog.records
        assert f"{path}: the row for {call} is ignored: " in record.getMessage()
        assert reason in record.getMessage()


def test_the_other_rows_of_the_table_still_serve() -> None:
    bad = Row(CALL._replace(R=8), {"impl": "magic"}, 1.0, 2.0)
    good = table({"impl": OTHER})
    put(replace(good, rows=(bad, *good.rows)))
    assert plan(R=8).impl == RULE.impl
    assert plan().impl == OTHER


MEASURED = Path(__file__).parents[2] / "bench" / "results" / "nvidia-h200" / "tuned.json"


# None ships yet: the one among the results is what `lora-fast tune` wrote on an H200.
@pytest.mark.parametrize(
    "path", [MEASURED, *sorted(tables.SHIPPED.glob("*.json"))], ids=os.path.basename
)
def test_what_ships_is_valid(path: Path) -> None:
    found = tables.read(path)
    assert found.rows
    chip = replace(configs.ARCHITECTURES[found.machine.arch], gpu=found.machine.gpu)
    for row in found.rows:
        rule = plans.rule_for(chip, row.call)
        assert plans.why_not(chip, tables.changed(rule, row.plan), row.call) is None
        assert row.us < row.rule_us
