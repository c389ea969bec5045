"""`report.py`: tables and pictures come from results, and the README's numbers are theirs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from example_rows import CEILINGS, row

import report
from harness import rendered, results, tables
from harness.results import device_name, number, read


@pytest.fixture
def folder(save):
    smaller = row("b", M=16) | {"id": "b-M16"}
    return save("machine", row("a"), smaller, row("b"), row("c", r=4), **CEILINGS)


def test_the_readme_shows_the_results():
    assert report.main(["--check"]) == 0, "run python bench/report.py"


def test_no_number_is_typed_outside_of_the_markers():
    text = report.README.read_text(encoding="utf-8")
    before, rest = text.split(report.BEGIN)
    typed = before[before.index("## Measured") :] + rest.split(report.END)[1]
    assert not re.search(r"\d\s*(ms|us|%|MiB|GB|times|x\b)", typed)


def test_a_changed_result_is_noticed(folder, monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n{report.BEGIN}\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    assert report.main([str(folder)]) == 0
    assert report.main(["--check", str(folder)]) == 0
    results = folder / "linear.json"
    results.write_text(results.read_text().replace("1.25", "1.26"))
    assert report.main(["--check", str(folder)]) == 1
    assert "differs" in capsys.readouterr().err


def test_a_damaged_machine_is_told_and_not_dropped(folder, monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(results, "RESULTS", folder.parent)
    assert report.main([]) == 0
    before = readme.read_text()
    (folder / "linear.json").write_text("{")
    assert report.main([]) == report.main(["--check"]) == 2
    assert capsys.readouterr().err.count("is no JSON that can be read") == 2
    assert readme.read_text() == before


def test_a_gpu_comes_first_and_then_the_newest_which_alone_shows_its_rows(save):
    folders = [
        save("older", row("a"), date="2026-01-02"),
        save("newest", row("a"), date="2026-01-03"),
        save("old", row("a"), date="2025-12-31", gpu="NVIDIA H200"),
        save("first", row("a")),  # of the first of January
    ]
    text = report.section(folders)
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert headings == ["old", "Other machines", "Targets on CPUs"]
    assert text.count("Rank 16, the most rows of each shape") == 1
    assert text.index("Rank 16") < text.index("### Other machines")
    assert "| layer | what | newest | older | first |" in text
    cells = " | ".join(["1.25 (1.25-1.25)"] * 3)
    assert f"| Linear | fwd+bwd | {cells} |" in text
    assert re.findall(r"^- (\w+): ", text, re.MULTILINE) == ["newest", "older", "first"]


def test_the_targets_on_cpus_are_held_against_the_furthest_row(save):
    slow = row("b") | {"id": "slow"}
    slow["peers"]["loralib"]["ratio"] = [0.5, 0.4, 0.6]
    cycle = row("4096 x 4096", **{"pass": "eval+train"}) | {"id": "cycle"}
    cycle["peers"]["lora_fast"]["peak B/weight"] = 1.25
    text = report.section([save("cpu", row("a"), slow, cycle), save("gpu", row("a"), gpu="H200")])
    lines = text[text.index("### Targets on CPUs") :].splitlines()
    assert "| what | target | cpu |" in lines
    assert "| Linear: loralib's time, all rows | >= 0.97 | 0.50 (1 of 2) |" in lines
    assert any(line.startswith("| eval + train") and ">= 8 | 1.25 |" in line for line in lines)
    assert any(line.endswith("bytes a weight | <= 1.1 | 1.25 |") for line in lines)
    assert not any("MergedLinear" in line for line in lines)  # was not measured


def test_twice_is_as_once(folder, monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n{report.BEGIN}\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    report.main([str(folder)])
    once = {path.name: path.read_bytes() for path in (readme, *folder.iterdir())}
    assert readme.read_text().startswith("# a\n")
    assert readme.read_text().endswith("\n\nafter\n")
    report.main([str(folder)])
    assert once == {path.name: path.read_bytes() for path in (readme, *folder.iterdir())}
    pictures = {"speedup", "efficiency", "roofline", "memory"}
    assert {f"{p}.{kind}" for p in pictures for kind in ("png", "svg")} <= set(once)
    assert once["speedup.png"].startswith(b"\x89PNG")


def test_the_folder_table_has_everything(folder):
    line = tables.full_rows(read(folder)["linear"]["rows"])[0]
    assert line["lora_fast ms"] == 2.0
    assert line["frozen layer /"] == "0.90 (0.88-0.93)"
    assert line["loralib /"] == "1.25 (1.20-1.31)"
    assert line["PEFT /"] == "out of memory"
    assert line["lora_fast:split /"] == "1.10 (1.00-1.20)"
    assert (line["efficiency"], line["error"], line["GB/s"]) == (0.91, 0.4, 3.0)
    assert (line["lora_fast saved MiB"], line["loralib saved MiB"]) == (1.0, 4.0)
    assert "LoRA-first order /" not in line  # absent everywhere: no empty column


def product(name: str, **times: float) -> dict[str, Any]:
    columns = {"layer": "product", "shape": name, "M": 8, "K": 4, "N": 4, "dtype": "bfloat16"}
    return {"id": name, "columns": columns, "peers": {p: {"us": us} for p, us in times.items()}}


def test_times_are_not_called_ratios(tmp_path):
    rows = [product("a", mm=400.0, triton=500.0), product("b", mm=40.0)]
    rows[1]["peers"] |= {"triton": {"failed": "out of memory"}}
    results.write_json(tmp_path, "gemm", {"cpu": "a cpu"}, rows)
    rendered.write_folder(tmp_path)
    heading, _, *table = (tmp_path / "gemm.md").read_text().splitlines()
    assert heading == "cpu a cpu"
    assert table == [
        "| layer | shape | M | K | N | dtype | mm ms | triton ms |",
        "|---|---|---|---|---|---|---|---|",
        "| product | a | 8 | 4 | 4 | bfloat16 | 0.4 | 0.5 |",
        "| product | b | 8 | 4 | 4 | bfloat16 | 0.04 | out of memory |",
    ]


def test_ratios_are_explained(folder):
    rendered.write_folder(folder)
    text = (folder / "linear.md").read_text()
    assert "\n\nColumns that end in / are how many times as long as lora_fast" in text


def test_the_options_that_narrowed_a_run_are_told():
    facts = {"cpu": "a cpu", "narrowed by": {"--peers": "loralib,lora_fast:*"}}
    assert tables.facts_line(facts) == "cpu a cpu; narrowed by `--peers loralib,lora_fast:*`"


@pytest.mark.parametrize("refused", ["README.md", "linear.md"])
def test_what_cannot_be_written_is_one_line(refused, folder, monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "README", readme)
    before = readme.read_text()
    replace = Path.replace

    def refusing(path: Path, target: Path) -> Path:
        if target.name == refused:
            raise PermissionError(13, "Permission denied", str(path), None, str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refusing)
    assert report.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report.py: [Errno 13] Permission denied: ")
    assert refused in line
    assert readme.read_text() == before
    assert not list(folder.glob("*.part"))


def test_a_bar_in_a_message_ends_no_cell(save):
    damaged = row("a")
    damaged["peers"]["peft"] = {"failed": "a|b\nc"}
    folder = save("bars", damaged)
    rendered.write_folder(folder)
    heading, _, line = (folder / "linear.md").read_text().splitlines()[-3:]
    assert r"| a\|b c |" in line
    assert line.replace(r"\|", "").count("|") == heading.count("|")


def test_an_error_that_was_not_checked_is_told(save):
    unchecked = row("a")
    del unchecked["peers"]["lora_fast"]["error"]
    unchecked["peers"]["lora_fast"]["unchecked"] = "the oracle was out of memory"
    (line,) = tables.full_rows([unchecked])
    assert line["error"] == "not checked: the oracle was out of memory"


def test_rows_without_ratios_have_a_picture_without_a_legend(save):
    bare = row("a")
    bare["peers"] = {"frozen": {"us": 3.0}, "lora_fast": {"us": 2.0}}
    folder = save("bare", bare)
    rendered.write_folder(folder)  # matplotlib's warning would be an error
    assert (folder / "speedup.svg").is_file()


def test_each_table_is_credited_to_its_own_run(save):
    folder = save("runs", row("a"), commit="abc", torch="2.13.0", **CEILINGS)
    facts = {"cpu": "a cpu", "cores": 2, "date": "2026-01-05", "commit": "def", "torch": "2.13.0"}
    results.write_json(folder, "merge", facts | {"narrowed by": {"items": "1 of 9"}}, [row("a")])
    assert (
        "cpu a cpu; cores 2; torch 2.13.0; float32 TFLOP/s 1.5; copy GB/s 20. "
        "linear: date 2026-01-01; commit abc. "
        "merge: date 2026-01-05; commit def; narrowed by items 1 of 9. All rows: "
    ) in report.section([folder])


def test_the_readme_shows_rank_16_and_the_most_rows(folder):
    lines = tables.readme_rows(read(folder)["linear"]["rows"])
    assert [(line["layer"], line["rows"]) for line in lines] == [
        ("Linear 48 x 64 (a)", 512),
        ("Linear 48 x 64 (b)", 512),
    ]
    assert lines[0]["loralib /"] == "1.25"
    assert "lora_fast:split /" not in lines[0]


def test_missing_peers_are_named(folder):
    line = tables.facts_line(read(folder)["linear"]["machine"])
    assert "missing: LoRAFusion (no checkout)" in line


def test_summary_covers_all_rows(folder):
    (line,) = tables.summary_rows(read(folder))
    assert line["rows measured"] == 4
    assert line["median"] == "1.25"


@pytest.mark.parametrize(
    ("value", "cell"), [(1234.5, "1234"), (0.01234, "0.0123"), (0.0, "0"), (1.0, "1"), ("x", "x")]
)
def test_numbers(value, cell):
    assert number(value) == cell


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, folder):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "known are" in error
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    monkeypatch.setattr(report, "README", readme)
    assert report.main([str(folder)]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "no markers"


@pytest.mark.parametrize(
    ("facts", "folder"),
    [
        ({"gpu": "NVIDIA H200", "cpu": "AMD EPYC"}, "nvidia-h200"),
        ({"cpu": "AMD EPYC (family 25 model 1)"}, "epyc-25.1-2-cores"),
        ({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6 model 79)"}, "xeon-6.79-2-cores"),
        ({"cpu": "AMD EPYC (family 25 model 1)", "vectors": "AVX512"}, "epyc-25.1-2-cores"),
        ({"cpu": "AMD EPYC (family 25 model 1)", "vectors": "AVX2"}, "epyc-25.1-avx2-2-cores"),
        ({"cpu": "unknown (family None model None)"}, "unknown-2-cores"),
        ({"cpu": ""}, "cpu-2-cores"),
    ],
)
def test_generations_of_one_processor_get_folders_of_their_own(facts, folder):
    assert device_name({"cores": 2, **facts}) == folder


def test_a_changed_benchmark_is_told_and_a_changed_result_is_not(tmp_path, monkeypatch):
    def git(*arguments: str | Path) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source, result = tmp_path / "bench" / "harness" / "clock.py", tmp_path / "bench" / "linear.json"
    source.parent.mkdir(parents=True)
    for path in (source, result):
        path.write_text("1")
    git("init")
    git("add", "bench")
    git("commit", "-m", "a")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for path, changed in ((result, False), (source, True)):
        path.write_text("2")
        assert results.machine(torch.device("cpu"))["commit"].endswith(" with changes") is changed
