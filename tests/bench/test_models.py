"""`bench_models.py`: every library trains the same model."""

import pytest
import torch

import bench_models
from bench_models import ModelRow
from harness import selection
from harness.contest import Lab

TOYS = list(bench_models.rows(selection.Selection()))


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("row", TOYS, ids=lambda row: row.id)
def test_all_train_as_many_parameters(row: ModelRow, lab: Lab) -> None:
    pytest.importorskip("peft")
    assert len({trained(row.model(peer, lab)) for peer in ("loralib", "lora_fast", "peft")}) == 1


def test_gpt2_of_peft_is_the_same_function(lab: Lab) -> None:
    pytest.importorskip("peft")
    row = next(row for row in TOYS if row.size.vocabulary)
    ours, theirs = row.model("lora_fast", lab), row.model("peft", lab)
    plain = theirs.base_model.model
    with torch.no_grad():
        plain.load_state_dict(ours.state_dict(), strict=False)
        for mine, other in zip(ours.blocks, plain.blocks, strict=True):
            mine.c_attn.lora_B.normal_()
            blocks = (other.c_attn.q, other.c_attn.k, other.c_attn.v)
            for name in ("weight", "bias"):
                parts = getattr(mine.c_attn, name).chunk(3)
                for block, part in zip(blocks, parts, strict=True):
                    getattr(getattr(block, "base_layer", block), name).copy_(part)
            for block, a, b in zip(
                (other.c_attn.q, other.c_attn.v),
                mine.c_attn.lora_A.chunk(2),
                mine.c_attn.lora_B.chunk(2),
                strict=True,
            ):
                block.lora_A["default"].weight.copy_(a)
                block.lora_B["default"].weight.copy_(b)
    ids = row.input(lab)
    without = row.model("lora_fast", lab)(ids)
    torch.testing.assert_close(theirs(ids), ours(ids))
    assert not torch.allclose(ours(ids), without)
