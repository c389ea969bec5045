"""Results that are damaged, or of two machines, are refused in one line."""

import pytest
from example_rows import CEILINGS, row

import model_table
import report
from harness import results


@pytest.mark.parametrize("main", [report.main, model_table.main], ids=["report", "model_table"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"K": None}, "row a: column K must be a whole number from 1 on, got nothing"),
        ({"N": None}, "row a: column N must be a whole number from 1 on, got nothing"),
        ({"M": 0}, "row a: column M must be a whole number from 1 on, got 0"),
        ({"r": "16"}, "row a: column r must be a whole number from 1 on, got '16'"),
        ({"pass": None}, "row a: column pass must be a text, got nothing"),
        ({"shape": 7}, "row a: column shape must be a text, got 7"),
        ({"dropout": -0.1}, "row a: column dropout must be a number from 0 to 1, got -0.1"),
    ],
)
def test_columns_that_readers_need_are_checked(main, changed, message, save, capsys):
    damaged = row("a", **changed)
    damaged["columns"] = {k: v for k, v in damaged["columns"].items() if v is not None}
    folder = save("damaged", damaged, **CEILINGS)
    assert main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"linear.json: {message}; measure again or delete the file")


def test_tables_without_rows_and_broken_rows_are_refused(save, capsys):
    broken = row("b")
    del broken["peers"]
    for rows, message in (
        ([], "linear.json: expected rows, got none; measure again or delete the file"),
        ([row("a"), broken], "linear.json: row 1 must have an id, columns and peers, as the"),
    ):
        before = report.README.read_bytes()
        assert report.main([str(save("bad", *rows))]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert report.README.read_bytes() == before


def test_tables_of_two_machines_in_a_folder_are_refused(save, capsys):
    folder = save("mixed", row("a"))
    results.write_json(folder, "merge", {"cpu": "another", "cores": 2}, [row("a")])
    assert report.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    told = "expected one machine, got linear of cpu a cpu, cores 2 and merge of cpu another, cores"
    assert told in line


DAMAGED = [
    ({"us_low": "abc"}, "us_low of lora_fast must be a finite number above 0, got 'abc'"),
    ({"us_low": 9e9}, "us of lora_fast must lie between its quartiles, got [9000000000.0, 2000.0,"),
    ({"us": True}, "us of lora_fast must be a finite number above 0, got True"),
    ({"us": 10**400}, "us of lora_fast must be a finite number above 0, got 1000"),
    ({"ratio": [1.0, 1.2, 0.9]}, "ratio of lora_fast must be 1 or 3 finite numbers above 0"),
    ({"saved_bytes": "x"}, "saved_bytes of lora_fast must be a finite number from 0 on, got 'x'"),
    ({"peak_bytes": "x"}, "peak_bytes of lora_fast must be a finite number from 0 on, got 'x'"),
    ({"efficiency": None}, "efficiency of lora_fast must be a finite number from 0 on, got None"),
    ({"error": "x"}, "error of lora_fast must be a number from 0 on, got 'x'"),
    ({"chosen": "str"}, "chosen of lora_fast must be an object of texts, got 'str'"),
    ({"failed": 3}, "failed of lora_fast must be a text, got 3"),
]


@pytest.mark.parametrize("main", [report.main, model_table.main], ids=["report", "model_table"])
@pytest.mark.parametrize(("changed", "message"), DAMAGED, ids=[m for _, m in DAMAGED])
def test_what_a_peer_measured_is_checked(main, changed, message, save, capsys):
    damaged = row("a")
    damaged["peers"]["lora_fast"] |= changed
    assert main([str(save("damaged", damaged))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"linear.json: row a: {message}" in line
    assert line.endswith("; measure again or delete the file")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"narrowed by": "-k"}, "narrowed by must be an object of texts, got '-k'"),
        ({"missing": "peft"}, "missing must be an object of texts, got 'peft'"),
        ({"date": 3}, "date must be a text, got 3"),
        ({"float32 TFLOP/s": "fast"}, "float32 TFLOP/s must be a finite number above 0, got"),
        ({"torch": ["2.13"]}, "torch must be a line of text or a number, got ['2.13']"),
        ({"cpu": "a\nb"}, r"cpu must be a line of text or a number, got 'a\nb'"),
    ],
)
def test_a_machines_facts_are_checked(facts, message, save, capsys):
    assert report.main([str(save("damaged", row("a"), **facts))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"linear.json: machine: {message}" in line


def test_rows_have_ids_of_their_own(save, capsys):
    for damaged, told in (
        ((row("a"), row("a")), "row 1 must have a line of its own as id, got 'a'"),
        ((row("a") | {"id": ["a"]},), "row 0 must have a line of its own as id, got ['a']"),
        ((row("a\n"),), r"row 0 must have a line of its own as id, got 'a\n'"),
    ):
        assert report.main([str(save("damaged", *damaged))]) == 2
        assert told in capsys.readouterr().err


def test_json_nested_too_deeply_is_one_line(tmp_path, capsys):
    (tmp_path / "linear.json").write_text("[" * 100_000)
    assert report.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "linear.json is no JSON that can be read: " in line
