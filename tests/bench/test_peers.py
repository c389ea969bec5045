"""The peers are what they are called, and a wrong one would be found."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import lora_fast
from bench_layers import LayerRow
from bench_linear import LinearRow
from harness.contest import measure
from harness.names import OURS
from harness.shapes import TOY
from peers import implementations, lora_orders, roster

ROW = LinearRow(TOY, 9, 4, 0.0, torch.float32, True)
# fp16: the products whose warps divide the work are not for fp32.
SHORT = LinearRow(TOY, 9, 4, 0.0, torch.float16, True)
MERGED = LayerRow("MergedLinear", 16, 6, 4, 0.0, torch.float16, True)
FORCED = [(row, p) for row in (SHORT, MERGED) for p in implementations.of(row.kind, backward=True)]


def errors(lab, *names: str) -> list[float]:
    found = measure(ROW, lab, names)["peers"]
    return [found[name]["error"] for name in names]


def test_a_wrong_peer_is_over_its_budget(lab, monkeypatch):
    right = errors(lab, "addmm-order", "lora-first", "loralib")
    assert max(right) <= 1.0

    def wrong(x, weight, bias, a, b, scaling):
        return lora_orders.addmm_order(x, weight, bias, a, b, scaling * 1.02)

    layer = lambda weights, lab: roster.in_order(wrong, weights, lab)  # noqa: E731
    monkeypatch.setitem(roster.PEERS, "addmm-order", layer)
    (off,) = errors(lab, "addmm-order")
    assert off > 10.0


def test_a_wrong_gradient_is_over_its_budget(lab, monkeypatch):
    def backward(ctx, dy):
        dx, weight, bias, da, db, s = right(ctx, dy)
        return dx, weight, bias, da * 1.02, db, s

    right = lora_orders._LoraFirst.backward
    monkeypatch.setattr(lora_orders._LoraFirst, "backward", staticmethod(backward))
    (off,) = errors(lab, "lora-first")
    assert off > 10.0


def test_a_peer_without_dropout_is_not_compared_with_those_that_have_it(lab, monkeypatch):
    row = LinearRow(TOY, 9, 4, 0.1, torch.float32, True)
    build = roster.PEERS["loralib"]

    def without(weights, lab):
        layer = build(weights, lab)
        layer.forward.eval()
        return layer

    monkeypatch.setitem(roster.PEERS, "loralib", without)
    found = measure(row, lab, ["frozen", "addmm-order", "loralib"])["peers"]
    assert found["addmm-order"] == {"absent": "written without dropout"}
    assert found["loralib"] == {"absent": "applies no dropout"}
    assert "us" in found["frozen"]


@pytest.mark.parametrize(("row", "peer"), FORCED)
def test_a_forced_implementation_runs(kernel_lab, row, peer):
    contestant = row.build(peer, kernel_lab)
    with contestant.around(), implementations.noted() as seen:
        contestant.steps[0]()
    name = peer.removeprefix(f"{OURS}:")
    what, _, choice = name.partition("_")
    op = "lora_linear" if row.kind == "Linear" else "lora_merged_linear"
    on_torch = name in ("reference", "eager_lora_first")
    assert seen.pop(op) == (name if on_torch else "triton")
    if name == "specialised":
        assert (seen["forward"], seen["dx"]) == ("split", "fused")
    elif on_torch:
        assert seen == {}
    else:
        assert (seen[what] == choice) if what in ("dx", "sb") else (seen["forward"] == name)
    assert lora_fast.backend.get_backend() == "auto"  # and all is as before


@pytest.mark.parametrize(
    ("p", "tokens", "why"), [(0.1, 9, "draws no"), (0.0, 4096, "at most 64 rows")]
)
def test_a_forced_implementation_that_cannot_serve_a_row_is_absent(kernel_lab, p, tokens, why):
    row = replace(SHORT, p=p, tokens=tokens)
    found = measure(row, kernel_lab, [f"{OURS}:decode"])["peers"]
    assert why in found[f"{OURS}:decode"]["absent"]


def test_what_the_dispatch_chose_is_told(kernel_lab):
    row = LayerRow("Conv2d", 8, 16, 2, 0.0, torch.float32, False)
    backend = "reference"  # so small a weight is formed by torch on any device
    assert row.build(OURS, kernel_lab).told == {"chosen": {"merged_weight": backend}}
    contestant = row.build(implementations.MERGED_WEIGHT, kernel_lab)
    with contestant.around(), implementations.noted() as seen:
        contestant.steps[0]()
    assert seen == {"merged_weight": "triton"}


@pytest.mark.parametrize("code", ["import nowhere", "raise SystemExit('no GPU')", "raise OSError"])
def test_missing_peers_have_a_reason(code, lab, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lorafusion").mkdir()
    (tmp_path / "lorafusion" / "__init__.py").write_text(code)
    lab.lorafusion = str(tmp_path)
    found = roster.missing(lab)
    assert "can't be imported" in found["lorafusion"]
    monkeypatch.setattr(roster.importlib.util, "find_spec", lambda name: None)
    assert roster.missing(lab)["peft"] == "peft is not installed"
    assert set(found) <= set(roster.PEERS)


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_lorafusion_is_refused(folder, lab, tmp_path):
    lab.lorafusion = str(tmp_path / folder)
    with pytest.raises(ValueError, match=r"^--lorafusion: expected a checkout that holds"):
        roster.missing(lab)


def test_each_kind_has_its_peers():
    pytest.importorskip("triton")
    known = partial(roster.known, backward=True)
    every = [p for p in roster.PEERS if p != implementations.MERGED_WEIGHT]
    assert known("Linear") == every
    alone = (*roster._LINEAR_ALONE, implementations.EAGER_LORA_FIRST)
    assert known("MergedLinear") == [p for p in every if p not in alone]
    few = ["frozen", "loralib", "loralib-compiled", "peft", OURS, implementations.REFERENCE]
    assert known("Embedding") == few
    assert known("Conv1d") == known("Conv3d") == known("Conv2d")
    assert set(known("Conv2d")) == {*few, implementations.MERGED_WEIGHT}


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_what_serves_backward_takes_no_part_in_a_forward(kind):
    pytest.importorskip("triton")
    forward, both = (roster.known(kind, backward=backward) for backward in (False, True))
    assert {p for p in both if p not in forward} == {
        "lora_fast:dx_fused",
        "lora_fast:dx_lora_first",
        "lora_fast:dx_library",
        "lora_fast:sb_library",
        "lora_fast:sb_kernel",
    }


def test_selecting_peers_keeps_ours_and_the_floor():
    chosen = roster.select(["peft"], list(roster.PEERS))
    assert chosen == ["frozen", "peft", "lora_fast"]
    assert roster.select([], ["a", "b"]) == ["a", "b"]


FUSION = """
import torch.nn.functional as F

def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=0):
    assert x.dim() == 3
    y = F.linear(x, linear_w, linear_bias)
    return y + F.dropout(x, dropout_p) @ lora_a.t() @ lora_b.t() * alpha
"""


def test_lorafusion_from_a_checkout(lab, tmp_path, monkeypatch):
    module = tmp_path / "lorafusion" / "ops" / "lora_v1.py"
    module.parent.mkdir(parents=True)
    module.write_text(FUSION)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lab.lorafusion = str(tmp_path)
    assert "lorafusion" not in roster.missing(lab)
    assert errors(lab, "lorafusion") == [pytest.approx(0.5, abs=0.5)]
    for name in [name for name in sys.modules if name.startswith("lorafusion")]:
        del sys.modules[name]
