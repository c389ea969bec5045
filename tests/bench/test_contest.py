"""A row goes on when a peer fails; what was measured is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.contest import Absent, Contestant, explain, measure
from harness.measured import Measured, Replay, Store
from harness.selection import Selection


def out_of_memory() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def out_of_memory_on_a_cpu() -> Any:
    torch.empty(2**62, dtype=torch.int8)


def quick() -> Contestant:
    return Contestant([lambda: torch.zeros(1000)])


def outputs(value: float) -> Contestant:
    y = torch.tensor([1.0, value])
    return Contestant([lambda: y], outputs=lambda: {"y": y})


def test_out_of_memory_is_told_and_the_row_goes_on(fake_row, lab):
    def absent() -> Contestant:
        raise Absent("has no such layer")

    builders = {
        "builds too much": out_of_memory,
        "runs too much": lambda: Contestant([out_of_memory]),
        "builds too much on a CPU": out_of_memory_on_a_cpu,
        "runs too much on a CPU": lambda: Contestant([out_of_memory_on_a_cpu]),
        "absent": absent,
        "broken": lambda: Contestant([lambda: 1 // 0]),
        "frozen": quick,
        "lora_fast": quick,
    }
    found = measure(fake_row("a", builders), lab, list(builders))["peers"]
    for peer in ("builds too much", "runs too much"):
        for name in (peer, f"{peer} on a CPU"):
            assert found[name] == {"failed": "out of memory"}
    assert found["absent"] == {"absent": "has no such layer"}
    assert found["broken"]["failed"].startswith("ZeroDivisionError")
    for peer in ("frozen", "lora_fast"):
        assert found[peer]["us_low"] <= found[peer]["us"] <= found[peer]["us_high"]
        assert len(found[peer]["samples"]) == 5
        assert found[peer]["peak_bytes"] == 4000
    assert found["lora_fast"]["ratio"] == [1.0, 1.0, 1.0]


def test_a_step_that_fails_later_costs_only_its_own_peer(fake_row, lab):
    calls = iter(range(100))

    def third_time_unlucky() -> None:
        if next(calls) == 2:
            raise RuntimeError("lost")

    builders = {"late": lambda: Contestant([third_time_unlucky]), "lora_fast": quick}
    found = measure(fake_row("a", builders), lab, list(builders))["peers"]
    assert found["late"] == {"failed": "RuntimeError: lost"}
    assert len(found["lora_fast"]["samples"]) == 5


def test_efficiency_is_the_ideal_over_the_time(fake_row, lab):
    builders = {"frozen": quick, "lora_fast": quick}
    row = measure(fake_row("a", builders, extra=1e-6), lab, list(builders))
    assert row["ideal_us"] == pytest.approx(row["peers"]["frozen"]["us"] + 1.0)
    ours = row["peers"]["lora_fast"]
    assert ours["efficiency"] == pytest.approx(row["ideal_us"] / ours["us"])


@pytest.mark.parametrize(("value", "right"), [(2.0, True), (2.04, False)])
def test_error_is_in_units_of_the_budget(fake_row, lab, value, right):
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    builders = {"lora_fast": lambda: outputs(value)}
    row = fake_row("a", builders, oracle=({"y": oracle.float()}, {"y": oracle}))
    error = measure(row, lab, ["lora_fast"])["peers"]["lora_fast"]["error"]
    assert (error <= 1.0) is right


@pytest.mark.parametrize("raises", [out_of_memory, out_of_memory_on_a_cpu])
def test_an_oracle_too_large_costs_the_error_alone(fake_row, lab, monkeypatch, raises):
    monkeypatch.setattr(fake_row, "oracle", lambda self, lab: raises())
    row = fake_row("a", {"lora_fast": lambda: outputs(2.0)})
    entry = measure(row, lab, ["lora_fast"])["peers"]["lora_fast"]
    assert "us" in entry
    assert "error" not in entry
    assert entry["unchecked"] == "the oracle was out of memory"


def test_another_failure_of_the_oracle_is_told(fake_row, lab, monkeypatch):
    monkeypatch.setattr(fake_row, "oracle", lambda self, lab: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        measure(fake_row("a", {"lora_fast": lambda: outputs(2.0)}), lab, ["lora_fast"])


def test_a_failure_without_words_is_one_line():
    assert explain(RuntimeError()) == "RuntimeError"
    assert explain(RuntimeError("x" * 500 + "\ny")) == ("RuntimeError: " + "x" * 500)[:200]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_where_the_oracle_has_a_number_is_a_failure(fake_row, lab, value):
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    row = fake_row(
        "a", {"x": lambda: outputs(value)}, oracle=({"y": oracle.float()}, {"y": oracle})
    )
    entry = measure(row, lab, ["x"])["peers"]["x"]
    assert "error" not in entry
    with pytest.raises(AssertionError, match="infinities or NaN"):
        check(entry)


class Benchmark:
    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target: Any, args: Any = (), rounds: int = 1) -> None:
        target(*args)
        self.rounds = rounds


def check(entry: dict[str, Any], *, held: bool = True) -> Benchmark:
    benchmark = Benchmark()
    Measured(entry, [1.0, 2.0], benchmark, Replay(), held_to_budget=held).check()
    return benchmark


def test_items_pass_skip_and_fail():
    assert check({"us": 1.0, "error": 0.9}).rounds == 2
    assert check({"us": 1.0, "error": 1.1}, held=False).extra_info["error"] == 1.1
    with pytest.raises(AssertionError, match="budget"):
        check({"us": 1.0, "error": 1.1})
    with pytest.raises(AssertionError, match="budget"):
        check({"us": 1.0, "error": float("nan")})
    with pytest.raises(AssertionError, match="ValueError: x"):
        check({"failed": "ValueError: x"})
    with pytest.raises(AssertionError, match="half"):
        check({"us": 1.0, "incomplete": "half"})
    with pytest.raises(pytest.skip.Exception, match="memory"):
        check({"failed": "out of memory"})
    with pytest.raises(pytest.skip.Exception, match="no dropout"):
        check({"absent": "no dropout"})


def test_the_timer_replays_the_samples():
    replay = Replay()
    replay.load([0.5, 0.25])
    times = [replay() for _ in range(4)]
    assert [times[1] - times[0], times[3] - times[2]] == [0.5, 0.25]


def test_what_was_measured_before_ctrl_c_is_on_disk(fake_row, lab, tmp_path):
    def interrupted() -> Contestant:
        raise KeyboardInterrupt

    store = Store(lab, Selection(), {"cpu": "a cpu", "missing": {}}, tmp_path)
    builders = {"loralib": quick, "lora_fast": quick}
    whole = fake_row("first", builders)
    for peer in builders:
        store.measured(whole, list(builders), peer, Benchmark(), Replay())
    with pytest.raises(KeyboardInterrupt):
        broken = fake_row("second", {"lora_fast": interrupted})
        store.measured(broken, ["lora_fast"], "lora_fast", Benchmark(), Replay())
    store.finish()
    (row,) = json.loads((tmp_path / "fake.json").read_text())["rows"]
    assert row["id"] == "first"
    assert "samples" not in row["peers"]["lora_fast"]
    assert "| Fake | first |" in (tmp_path / "fake.md").read_text()
    assert (tmp_path / "speedup.svg").exists()
    assert not list(tmp_path.glob("*.part"))


def planned(fake_row, lab, folder, **rows) -> Store:
    store = Store(lab, Selection(), FACTS, folder / "out", folder / "published")
    for name, builders in rows.items():
        for peer in builders:
            store.progress.plan("fake", name, peer)
    return store


FACTS = {"cpu": "a cpu", "missing": {}, "narrowed by": {"--peers": "loralib"}}


def test_only_whole_tables_are_published_and_a_part_says_so(fake_row, lab, tmp_path):
    builders = {"loralib": quick, "lora_fast": quick}
    store = planned(fake_row, lab, tmp_path, first=builders, second=builders)
    out = tmp_path / "out" / "fake.json"
    items = [(name, peer) for name in ("first", "second") for peer in builders]
    for i, (name, peer) in enumerate(items):
        row = fake_row(name, builders)
        store.measured(row, list(builders), peer, Benchmark(), Replay())
        if i + 1 == len(items):
            break
        assert store.finish()
        assert not (tmp_path / "published").exists()
        part = json.loads(out.read_text())["machine"]["narrowed by"]
        assert part == {"--peers": "loralib", "items": f"{i + 1} of 4"}
        assert f"fake: {i + 1} of 4 items were run" in store.summary()
    assert store.finish()
    for folder in ("out", "published"):
        found = json.loads((tmp_path / folder / "fake.json").read_text())
        assert found["machine"] == FACTS
        assert [row["id"] for row in found["rows"]] == ["first", "second"]
    assert store.summary()[-1] == f"results: {tmp_path / 'published'}"


def test_a_row_whose_items_run_apart_is_measured_once(fake_row, lab, tmp_path):
    """As with `--failed-first`."""
    builders = {"loralib": quick, "lora_fast": quick}
    store = Store(lab, Selection(), FACTS, tmp_path)
    for name, peer in (("b", "lora_fast"), ("a", "loralib"), ("a", "lora_fast"), ("b", "loralib")):
        row = fake_row(name, builders)
        found = store.measured(row, list(builders), peer, Benchmark(), Replay())
        (same,) = [r for r in store.tables["fake"] if r["id"] == name]
        assert found.entry is same["peers"][peer]
    assert [row["id"] for row in store.tables["fake"]] == ["b", "a"]


def test_a_full_disk_is_one_line_and_leaves_files_whole(fake_row, lab, tmp_path, monkeypatch):
    store = Store(lab, Selection(), FACTS, tmp_path)
    store.measured(fake_row("a", {"x": quick}), ["x"], "x", Benchmark(), Replay())
    assert store.finish()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[:9], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    refused = f"results cannot be written: [Errno 28] No space left on device: '{tmp_path}"
    assert not store.finish()
    assert store.summary()[-2].startswith(refused)
    with pytest.raises(pytest.exit.Exception, match="No space left on device"):
        store.measured(fake_row("b", {"x": quick}), ["x"], "x", Benchmark(), Replay())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_ratios_that_ci_demands(monkeypatch, capsys, lab):
    import guard

    first = guard.GUARDS[0]
    low = first.floor - 0.01
    ratios = iter([low / 2, low, 0.9])
    monkeypatch.setattr(guard, "measured_ratio", lambda row, peer, lab: next(ratios))
    assert guard.held(first, lab) == (0.9, 3)  # the best of three, as noise only slows
    monkeypatch.setattr(guard, "measured_ratio", lambda row, peer, lab: low)
    assert guard.held(first, lab) == (low, 3)
    monkeypatch.setattr(guard, "pin_cpu", lambda threads: None)
    monkeypatch.setattr(guard, "measured_ratio", lambda row, peer, lab: 0.3)
    assert guard.main([]) == 1
    assert capsys.readouterr().out.count("TOO SLOW") == len(guard.GUARDS)
    monkeypatch.setattr(guard, "measured_ratio", lambda row, peer, lab: 9.0)
    assert guard.main([]) == 0


def test_help_of_the_ratios_measures_nothing(monkeypatch, capsys):
    import guard

    monkeypatch.setattr(guard, "pin_cpu", lambda threads: pytest.fail("it measures"))
    for argument, status in (("--help", 0), ("--unknown", 2)):
        with pytest.raises(SystemExit) as ended:
            guard.main([argument])
        assert ended.value.code == status
    assert "CPU ratios that must hold" in capsys.readouterr().out
