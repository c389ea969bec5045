"""`bench_layers.py`: which rows there are, and that PEFT's layers are the same function."""

from collections import Counter
from dataclasses import replace

import loralib
import pytest
import torch

import bench_layers
from bench_layers import LayerRow
from harness import selection
from harness.clock import Clock
from harness.contest import Absent, Lab, measure
from peers.modules import channels_between

FP32 = torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOYS = [row for row in bench_layers.rows(selection.Selection()) if row.backward and not row.p]


def rows(level: selection.Level, device: torch.device) -> list[LayerRow]:
    return list(bench_layers.rows(selection.Selection(level, device)))


def test_the_quick_gpu_selection_has_the_targets():
    found = {
        (row.kind, row.features, row.tokens, row.p, row.backward) for row in rows("quick", CUDA)
    }
    for backward in (False, True):
        for p in (0.0, 0.1):
            assert ("MergedLinear", 4096, 8192, p, backward) in found
        assert ("Embedding", 4096, 8192, 0.0, backward) in found
        for channels in (256, 512):
            assert ("Conv2d", channels, 16384, 0.0, backward) in found
    standard = set(rows("standard", CUDA))
    assert set(rows("quick", CUDA)) <= standard


@pytest.mark.parametrize("kind", ["MergedLinear", "Embedding", "Conv2d"])
def test_a_gpu_measures_both_passes_eager_and_as_a_graph(kind):
    found = [row for row in rows("standard", CUDA) if row.kind == kind]
    assert {(row.backward, row.graph) for row in found} == {
        (backward, graph) for backward in (False, True) for graph in (False, True)
    }
    assert {row.p for row in found} == ({0.0, 0.1} if kind == "MergedLinear" else {0.0})
    assert {row.columns()["mode"] for row in found} == {"eager", "graph"}
    assert {row.columns()["pass"] for row in found} == {"fwd", "fwd+bwd"}
    assert all(row.id.endswith("-graph" if row.graph else "-eager") for row in found)


@pytest.mark.parametrize("level", ["quick", "standard", "full"])
def test_a_cpu_measures_no_graph(level):
    assert not any(row.graph for row in rows(level, CPU))


def test_a_cpu_measures_both_passes_and_few_rows():
    found = rows("standard", CPU)
    passes = Counter((row.kind, row.backward) for row in found)
    for kind in ("MergedLinear", "Embedding", "Conv2d"):
        assert passes[kind, False] >= 4
        assert passes[kind, True] >= 4
    assert passes["Conv1d", True] == passes["Conv3d", True] == 1
    assert len(found) < 50  # a few seconds each


def test_a_graph_row_is_captured(lab, monkeypatch):
    captured = []
    monkeypatch.setattr(lab.clock, "captured", lambda c: captured.append(c) or c)
    row = LayerRow("MergedLinear", 16, 6, 4, 0.0, FP32, True, graph=True)
    found = measure(row, lab, ["frozen", "lora_fast"])
    assert len(captured) == 2
    assert found["columns"]["mode"] == "graph"
    assert "us" in found["peers"]["lora_fast"]


def test_one_row_of_each_kind_is_compiled_on_a_cpu(lab):
    on_cpu = Clock(CPU, sample=0.0)
    standard, quick = (Lab(CPU, level, on_cpu) for level in ("standard", "quick"))
    compiled = [row for row in rows("standard", CPU) if row.compiled_among_few(standard)]
    assert [row.kind for row in compiled] == ["MergedLinear", "Embedding", "Conv2d"]
    assert not any(row.compiled_among_few(quick) for row in rows("quick", CPU))
    small = LayerRow("Conv2d", 8, 16, 2, 0.0, FP32, True)
    with pytest.raises(Absent, match="compiling takes long"):
        small.build("loralib-compiled", standard)


@pytest.mark.parametrize("row", TOYS, ids=lambda row: row.id)
def test_peft_is_the_same_function(lab, row):
    pytest.importorskip("peft")
    for backward in (False, True):
        entry = measure(replace(row, backward=backward), lab, ["peft", "lora_fast"])["peers"][
            "peft"
        ]
        assert entry["error"] <= 1.0
        assert "incomplete" not in entry


@pytest.mark.parametrize("row", TOYS, ids=lambda row: row.id)
@pytest.mark.parametrize("name", ["dA", "dB", "y"])
def test_a_wrong_peft_is_over_its_budget(lab, monkeypatch, row, name):
    pytest.importorskip("peft")
    named = LayerRow._named

    def wrong(self, layer, x, dy, few):
        found = named(self, layer, x, dy, few)
        return found | {name: found[name] * 1.02} if layer.frozen else found  # not the oracle's

    monkeypatch.setattr(LayerRow, "_named", wrong)
    assert measure(row, lab, ["peft"])["peers"]["peft"]["error"] > 10.0


def test_peft_has_a_layer_for_each_block(lab):
    pytest.importorskip("peft")
    row = LayerRow("MergedLinear", 16, 6, 4, 0.0, FP32, True)
    y = row.build("peft", lab).forward()
    assert [part.shape for part in y] == [(6, 16)] * 3


@pytest.mark.parametrize(
    ("kind", "r", "rank"),
    [("Conv1d", 2, 6), ("Conv2d", 2, 2), ("Conv3d", 3, 1), ("Conv3d", 2, None)],
)
def test_pefts_rank_of_a_convolution(lab, kind, r, rank):
    pytest.importorskip("peft")
    assert channels_between(r, 3, int(kind[4])) == rank
    row = LayerRow(kind, 4, 8, r, 0.0, FP32, True)
    if rank is None:
        with pytest.raises(Absent, match="no rank of its own gives a Conv3d of rank 2"):
            row.build("peft", lab)
        return
    sizes = {tuple(t.shape[:2]) for t in row.build("peft", lab).known if t.requires_grad}
    assert {(rank, 4), (4, rank)} <= sizes


def test_who_has_no_such_layer_is_absent(lab):
    lookup = LayerRow("Embedding", 16, 6, 4, 0.0, FP32, True, vocabulary=64)
    assert measure(lookup, lab, ["frozen"])["peers"]["frozen"] == {
        "absent": "nothing of it has a gradient"
    }
    forward = measure(replace(lookup, backward=False), lab, ["frozen", "lora_fast"])["peers"]
    assert "ratio" in forward["frozen"]
    for kind, shape in (("Conv1d", (1, 4, 8)), ("Conv3d", (1, 4, 2, 2, 2))):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            getattr(loralib, kind)(4, 4, 3, r=2)(torch.zeros(shape))
        row = LayerRow(kind, 4, 8, 2, 0.0, FP32, True)
        with pytest.raises(Absent, match="weight's shape"):
            row.build("loralib", lab)


def test_a_look_up_tells_its_bandwidth():
    row = LayerRow("Embedding", 1000, 500, 16, 0.0, torch.bfloat16, False)
    assert row.summary(1e-3) == {"GB/s": pytest.approx(2.0)}  # 4 M D bytes
    assert replace(row, backward=True).summary(1e-3) == {}
    assert LayerRow("Conv2d", 8, 16, 2, 0.0, FP32, False).summary(1e-3) == {}
