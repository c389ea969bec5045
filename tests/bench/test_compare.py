"""`compare.py`: what counts as slower."""

import json
from typing import Any

import pytest

import compare
from harness.results import result_folders


def row(name: str, ratio: list[float], **more: Any) -> dict[str, Any]:
    ours = more.get("ours", {"us": 1.0, "error": 0.5})
    columns = {"layer": "Linear", "shape": "square-1024", "M": 8, "K": 1024, "N": 1024, "r": 16}
    columns |= {"dropout": 0.0, "dtype": "float32", "pass": "fwd"}
    return {
        "id": name,
        "columns": columns,
        "peers": {"frozen": {"ratio": ratio}, "lora_fast": ours},
    }


@pytest.mark.parametrize(
    ("then", "now", "word"),
    [
        ([0.90, 0.88, 0.92], [0.90, 0.88, 0.92], "same"),
        ([0.90, 0.88, 0.92], [0.86, 0.84, 0.89], "same"),  # the spreads overlap
        ([0.90, 0.88, 0.92], [0.86, 0.85, 0.87], "same"),  # apart, but within the slack
        ([0.90, 0.88, 0.92], [0.80, 0.78, 0.82], "SLOWER"),
        ([0.90, 0.88, 0.92], [1.00, 0.98, 1.02], "faster"),
        ([0.90, 0.88, 0.92], [0.94, 0.93, 0.95], "same"),  # likewise
        ([0.90], [0.80], "SLOWER"),  # without a spread
    ],
)
def test_verdict(then, now, word):
    line = compare.verdict(row("a", then), row("a", now), slack=0.03)
    assert line["verdict"] == word
    assert line["against"] == "frozen"


FAULTS = {
    "out of memory": {"failed": "out of memory"},
    "the cycle did not": {"us": 1.0, "incomplete": "the cycle did not restore the weight"},
    "error 3.2, of a budget of 1": {"us": 1.0, "error": 3.2},
    "error nan, of a budget of 1": {"us": 1.0, "error": float("nan")},
    "no such layer": {"absent": "no such layer"},
    "lora_fast is missing": {},
}


@pytest.mark.parametrize(("fault", "ours"), FAULTS.items(), ids=FAULTS)
def test_a_row_fails_where_lora_fast_is_no_longer_right(fault, ours):
    good, bad = row("a", [0.9]), row("a", [0.9], ours=ours)
    line = compare.verdict(good, bad, 0.03)
    assert line["verdict"] == "FAILS"
    assert line["now"].startswith(fault)
    assert compare.verdict(bad, bad, 0.03)["verdict"] == "same"
    assert compare.verdict(bad, good, 0.03)["verdict"] == "same"


def test_a_row_without_lora_fast_fails():
    gone = row("a", [0.9])
    del gone["peers"]["lora_fast"]
    assert compare.verdict(row("a", [0.9]), gone, 0.03)["now"] == "lora_fast is missing"


def test_failing_rows_and_rows_without_a_ratio_are_counted(save, capsys):
    bare = row("c", [1.0])
    del bare["peers"]["frozen"]["ratio"]
    old = save("old", row("a", [0.9]), row("b", [0.9]), bare)
    new = save("new", row("a", [0.9], ours={"us": 1.0, "error": 1.2}), row("b", [0.9]), bare)
    assert compare.main([str(old), str(new)]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    told = "2 rows compared, 0 slower, 0 faster, 1 failing; 1 without a ratio in both"
    assert last == told


def test_loralib_is_the_yardstick_where_there_is_no_frozen_layer():
    old, new = ({"id": "a", "peers": {"loralib": {"ratio": [r]}}} for r in (3.0, 2.0))
    assert compare.verdict(old, new, 0.03)["against"] == "loralib"
    assert compare.verdict({"id": "a", "peers": {}}, new, 0.03) is None


def test_exit_status(save, capsys):
    old = save("old", row("a", [0.9, 0.88, 0.92]), row("b", [2.0, 1.9, 2.1]))
    slower = save("slower", row("a", [0.7, 0.68, 0.72]), row("c", [1.0]))
    assert compare.main([str(old), str(old)]) == 0
    assert "2 rows compared, 0 slower, 0 faster" in capsys.readouterr().out
    assert compare.main([str(old), str(slower)]) == 1
    assert "1 rows compared, 1 slower, 0 faster; 1 of OLD not in NEW" in capsys.readouterr().out
    assert compare.main([str(slower), str(old)]) == 0


def test_bad_folders_are_one_line(save, capsys, tmp_path):
    good = save("good", row("a", [0.9]))
    other = save("other", row("z", [0.9]))
    assert compare.main([str(good), str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere" in error
    assert "bench/results" in error  # what is known
    assert compare.main([str(good), str(other)]) == 2
    assert "no row in common" in capsys.readouterr().err
    (good / "linear.json").write_text("{")
    assert compare.main([str(good), str(other)]) == 2
    assert "is no JSON that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "found",
    [
        [],
        {"rows": []},
        {"machine": {}, "rows": None},
        {"machine": {}, "rows": [1]},
        {"machine": {}, "rows": [{"id": "a", "columns": {}, "peers": ["frozen"]}]},
        {"machine": {}, "rows": [{"columns": {}, "peers": {}}]},
    ],
)
def test_json_of_another_form_is_no_result(found, tmp_path, capsys):
    (tmp_path / "linear.json").write_text(json.dumps(found))
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "no results in folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ratio", [[float("nan")] * 3, [], [1.0, 2.0], "1.0", [0.0], [True], None], ids=str
)
def test_ratios_that_are_none_are_refused(ratio, save, capsys):
    """NaN is neither slower nor faster than anything."""
    good, bad = save("good", row("a", [0.9])), save("bad", row("a", ratio))
    assert compare.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "linear.json: row a: ratio of frozen must be 1 or 3 finite numbers above 0" in error


def test_known_are_only_folders_of_measurements(tmp_path, capsys):
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    known = capsys.readouterr().err.partition("known are ")[2].strip().split(", ")
    assert known == [str(folder) for folder in result_folders()]
    assert not [folder for folder in known if folder.endswith("compile")]


@pytest.mark.parametrize("slack", ["nan", "-0.1", "1", "some"])
def test_slack_is_a_share(slack, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--slack", slack, str(tmp_path), str(tmp_path)])
    assert "--slack" in capsys.readouterr().err
