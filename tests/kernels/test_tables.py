"""Tables of measured choices: what is read, what wins, and that what is refused fails nothing."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.kernels import configs, plans, tables
from lora_fast.kernels.candidates import candidates
from lora_fast.kernels.tables import Call, Row, Table

GPU = "NVIDIA Imaginary 9000"
ARCH = replace(configs.ARCHITECTURES["sm_90"], gpu=GPU)
SIZES = (4096, 4096, 4096, 16, torch.bfloat16)  # M, N, K, R
CALL = Call.of("lora_linear_fwd", *SIZES, False)
TILE = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "tma": False}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty folders in place of the user's and the package's own tables."""
    monkeypatch.setenv("LORA_FAST_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    plans.reload_tables()
    yield
    plans.reload_tables()


def table(plan: Any, call: Call = CALL, **machine: str) -> Table:
    here = replace(tables.this_machine(GPU, "sm_90"), **machine)
    return Table(here, (Row(call, plan, 10.0, 12.5),), "0.1.0", "2026-11-24")


def put(found: Table, *, shipped: str | None = None) -> Path:
    """Write a table where the package looks for it; return the file."""
    here = tables.this_machine(GPU, "sm_90")
    path = tables.SHIPPED / shipped if shipped else tables.user_path(here)
    tables.write(found, path)
    plans.reload_tables()
    return path


def plan(dropout: bool = False, arch: configs.Architecture = ARCH, **sizes: int) -> Any:
    m, n, k, r, dtype = SIZES
    return plans.forward_plan(arch, sizes.get("M", m), n, k, sizes.get("R", r), dtype, dropout)


RULE = plans.forward_rule(ARCH, *SIZES, False)
# Something that the rule does not choose, so that its effect shows.
OTHER = "split"


def test_the_rule_does_not_choose_what_these_tables_say() -> None:
    assert plan() == RULE
    assert RULE.impl != OTHER


# --------------------------------------------------------------------------- what wins


def test_the_users_table_wins_over_the_shipped_ones_and_those_over_the_rule() -> None:
    put(table({"shrink": {"block_m": 64}}), shipped="sm_90.json")
    assert plan() == replace(RULE, shrink=replace(RULE.shrink, block_m=64))
    path = put(table({"impl": OTHER}))
    assert plan() == replace(RULE, impl=OTHER)
    path.unlink()
    plans.reload_tables()
    assert plan().impl == RULE.impl


def test_a_shipped_table_of_the_same_gpu_wins_over_another_of_the_architecture() -> None:
    put(table({"impl": OTHER}), shipped="z.json")
    put(table({"impl": "one_pass"}, gpu="NVIDIA Imaginary 1"), shipped="a.json")
    put(table({"impl": "one_pass"}, gpu="NVIDIA Imaginary 1"), shipped="zz.json")
    assert plan().impl == OTHER
    assert plan(arch=replace(ARCH, gpu="NVIDIA Imaginary 2")).impl == "one_pass"
    assert plan(arch=replace(configs.ARCHITECTURES["sm_80"], gpu="A")).impl != OTHER


def test_a_shipped_table_serves_other_versions_the_users_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    put(table({"impl": OTHER}, torch="1.0", triton="1.0"), shipped="sm_90.json")
    assert plan().impl == OTHER
    other = table({"impl": "one_pass"}, triton="1.0")
    tables.write(other, tables.user_path(other.machine))
    plans.reload_tables()
    assert plan().impl == OTHER
    assert not caplog.records  # a table of another version is in a file of its own, and stays


def test_rows_of_another_call_change_nothing() -> None:
    put(table({"impl": OTHER}))
    assert plan(R=8).impl == RULE.impl
    assert plan(dropout=True).impl == RULE.impl
    assert plan(M=4097).impl == RULE.impl
    assert plans.backward_plan(ARCH, *SIZES) == plans.backward_rule(ARCH, *SIZES)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4095, 4096), (4097, 8192)])
def test_rows_up_to_a_power_of_two_share_a_choice(rows: int, bucket: int) -> None:
    call = Call.of("lora_linear_fwd", bucket, 4096, 4096, 16, torch.bfloat16, False)
    assert call == Call.of("lora_linear_fwd", rows, 4096, 4096, 16, torch.bfloat16, False)
    put(table({"impl": OTHER}, call))
    assert plan(M=rows).impl == OTHER


def test_the_backward_has_rows_with_and_without_dropout() -> None:
    call = Call.of("lora_linear_bwd", *SIZES, True)
    rule = plans.backward_rule(ARCH, *SIZES)
    put(table({"library_sb": True, "gemm": TILE}, call))
    assert plans.backward_plan(ARCH, *SIZES) == rule
    measured = plans.backward_plan(ARCH, *SIZES, True)
    assert (measured.library_sb, rule.library_sb) == (True, False)
    assert measured.gemm == replace(rule.gemm, **TILE)


def test_the_log_says_which_plan_serves_a_call_and_where_it_is_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put(table({"impl": OTHER}))
    with caplog.at_level(logging.DEBUG, logger="lora_fast.dispatch"):
        plan()
        plan()
        plan(R=8)
    measured, ruled = (record.getMessage() for record in caplog.records)
    assert measured.startswith(f"{CALL} -> ForwardPlan(impl={OTHER!r}")
    assert measured.endswith(f": {path}")
    assert ruled.startswith(f"{CALL._replace(R=8)} -> ForwardPlan(impl={RULE.impl!r}")
    assert ruled.endswith(": the rule")


def test_interpreted_and_offline_plans_know_no_table() -> None:
    put(table({"impl": OTHER}))
    assert plan(arch=configs.architecture(torch.device("cpu"))).impl == RULE.impl
    assert plan(arch=configs.ARCHITECTURES["sm_90"]).impl == RULE.impl


def test_the_launcher_runs_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fast.kernels import lora_linear_fwd as module

    m, n, k, r = 5, 6, 7, 2
    monkeypatch.setattr(module, "architecture", lambda device: ARCH)
    called = []
    original = module.lora_shrink
    monkeypatch.setattr(
        module, "lora_shrink", lambda *a, **k: called.append(1) or original(*a, **k)
    )
    x, weight, a, b = (torch.randn(s) for s in ((m, k), (n, k), (r, k), (n, r)))
    if torch.cuda.is_available():
        x, weight, a, b = (t.cuda() for t in (x, weight, a, b))
    for impl, calls in (("one_pass", 0), (OTHER, 1)):
        put(table({"impl": impl}, Call.of("lora_linear_fwd", m, n, k, r, torch.float32, False)))
        y, _, _ = module.lora_linear_fwd(x, weight, None, a, b, 1.0)
        torch.testing.assert_close(y, x @ weight.t() + x @ a.t() @ b.t())
        assert len(called) == calls


# --------------------------------------------------------------------------- files


def test_what_is_written_is_read_again() -> None:
    found = table({"impl": OTHER, "gemm": TILE})
    path = put(found)
    assert tables.read(path) == replace(found, path=path)
    assert list(path.parent.iterdir()) == [path]
    assert tables.user_tables() == [path]


def test_a_write_that_fails_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(table({"impl": OTHER}))
    before = path.read_bytes()

    def full_disk(self: Path, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b'{"format"')
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        tables.write(table({"impl": "one_pass"}), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


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


def test_the_file_name_has_the_gpu_and_the_versions() -> None:
    machine = tables.Machine("AMD Instinct MI300X/OAM (gfx942)", "gfx942", "2.11", "3.6")
    name = "amd-instinct-mi300x-oam-gfx942-torch-2.11-triton-3.6.json"
    assert tables.user_path(machine).name == name


# --------------------------------------------------------------------------- what is refused

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
    "no stages": (with_row(plan={"gemm": {"num_stages": 0}}), "num_stages must be at least 1"),
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


def test_the_other_rows_of_the_table_still_serve() -> None:
    bad = Row(CALL._replace(R=8), {"impl": "magic"}, 1.0, 2.0)
    good = table({"impl": OTHER})
    put(replace(good, rows=(bad, *good.rows)))
    assert plan(R=8).impl == RULE.impl
    assert plan().impl == OTHER


# --------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 100, 8192])
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_candidate_is_a_valid_row_for_the_call(
    arch: str, rows: int, dtype: torch.dtype
) -> None:
    chip = configs.ARCHITECTURES[arch]
    rules: dict[str, Callable[..., Any]] = {
        "lora_linear_fwd": lambda *a: plans.forward_rule(*a, True),
        "lora_linear_bwd": plans.backward_rule,
    }
    for op, rule_of in rules.items():
        call = Call.of(op, rows, 4096, 4096, 128, dtype, True)
        rule = rule_of(chip, rows, 4096, 4096, 128, dtype)
        steps = candidates(chip, call, rule)
        assert all(steps)
        seen: set[Any] = set()
        for change in (change for step in steps for change in step):
            found = replace(rule, **change)
            data = json.loads(json.dumps(asdict(found)))
            assert found not in seen
            seen.add(found)
            assert tables.changed(rule, data) == found != rule
            assert plans.why_not(chip, found, call) is None
            assert found.gemm.tma is False or chip.gemm.tma


def test_one_pass_is_a_candidate_where_it_can_serve() -> None:
    def impls(R: int, dropout: bool) -> set[str]:
        call = Call.of("lora_linear_fwd", 64, 4096, 4096, R, torch.bfloat16, dropout)
        rule = plans.forward_rule(ARCH, 64, 4096, 4096, R, torch.bfloat16, dropout)
        found = candidates(ARCH, call, rule)[0]
        return {rule.impl, *(change["impl"] for change in found)}

    assert impls(16, False) == set(get_args(plans.ForwardImpl))
    assert impls(16, True) == impls(65, False) == {"split", "lora_first"}


def test_specialised_warps_are_a_candidate_on_hopper_alone() -> None:
    def offered(arch: configs.Architecture, dtype: torch.dtype) -> bool:
        call = Call.of("lora_linear_fwd", *SIZES[:4], dtype, False)
        rule = plans.forward_rule(arch, *SIZES[:4], dtype, False)
        ways = candidates(arch, call, rule)[0]
        return any("gemm" in way and way["gemm"].specialised for way in ways)

    assert offered(ARCH, torch.bfloat16)
    assert not offered(ARCH, torch.float32)
    assert not offered(configs.ARCHITECTURES["sm_90"], torch.bfloat16)  # interpreted
    assert not offered(replace(configs.ARCHITECTURES["sm_100"], gpu="B200"), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, None), ({"block_m": 64}, "block_m 128 or 256"), ({"num_warps": 4}, "num_warps 8")],
)
def test_specialised_warps_are_refused_where_there_is_no_kernel(
    change: dict[str, int], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    put(table({"impl": OTHER, "gemm": {"specialised": True, **change}}))
    assert plan().gemm.specialised is (reason is None)
    assert (reason or "") in caplog.text
    other = replace(configs.ARCHITECTURES["sm_80"], gpu=GPU)
    put(table({"gemm": {"specialised": True}}, arch="sm_80"))
    assert not plan(arch=other).gemm.specialised
    assert "specialised warps need 16-bit products on Hopper" in caplog.text


def test_an_op_without_candidates_is_named() -> None:
    with pytest.raises(ValueError, match=r"op must be one of lora_linear_fwd, .*got 'lora_conv'"):
        candidates(ARCH, CALL._replace(op="lora_conv"), RULE)


@pytest.mark.skipif(not list(tables.SHIPPED.glob("*.json")), reason="no table ships yet")
@pytest.mark.parametrize("path", sorted(tables.SHIPPED.glob("*.json")), ids=os.path.basename)
def test_what_ships_is_valid(path: Path) -> None:
    found = tables.read(path)
    chip = replace(configs.ARCHITECTURES[found.machine.arch], gpu=found.machine.gpu)
    for row in found.rows:
        op, *sizes, dtype, dropout = row.call
        rule: Any = (
            plans.forward_rule(chip, *sizes, getattr(torch, dtype), dropout)
            if op == "lora_linear_fwd"
            else plans.backward_rule(chip, *sizes, getattr(torch, dtype))
        )
        assert plans.why_not(chip, tables.changed(rule, row.plan), row.call) is None
        assert row.us < row.rule_us
