"""Which calls are tuned: what the command line and a model's configuration say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fast.commands import BadInputError
from lora_fast.tune import shapes
from lora_fast.tune.shapes import Shape

Refused = Callable[..., str]


def test_shapes_are_read_once_each() -> None:
    texts = ["8192,4096,1024,16", " 1, 2 ,3,4", "8192,4096,1024,16"]
    assert shapes.parsed(texts) == [Shape(8192, 4096, 1024, 16), Shape(1, 2, 3, 4)]


@pytest.mark.parametrize(
    "text", ["", "1", "1,2,3", "1,2,3,4,5", "1,2,3,x", "0,2,3,4", "1,2,3,-4", "1.5,2,3,4"]
)
def test_other_texts_are_refused(text: str, refused: Refused) -> None:
    assert refused("--shapes", "8,8,8,8", text) == (
        "lora-fast tune: --shapes: expected M,K,N,r, four whole numbers of at least 1 such as "
        f"8192,4096,4096,16; got {text!r}"
    )


def config(folder: Path, name: str, **sizes: Any) -> str:
    transformers = pytest.importorskip("transformers")
    getattr(transformers, f"{name}Config")(**sizes).save_pretrained(folder)
    return str(folder)


def test_the_linear_layers_of_models(tmp_path: Path) -> None:
    llama = config(
        tmp_path / "llama", "Llama", num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_size=16, intermediate_size=40, vocab_size=300,
    )  # fmt: skip
    assert shapes.of_model(llama, [8, 1], [4]) == [
        Shape(m, k, n, 4) for m in (8, 1) for k, n in ((16, 16), (16, 8), (16, 40), (40, 16))
    ]
    gpt2 = config(tmp_path / "gpt2", "GPT2", n_layer=1, n_head=2, n_embd=16, vocab_size=256)
    assert [(s.K, s.N) for s in shapes.of_model(gpt2, [1], [4])] == [
        (16, 48), (16, 16), (16, 64), (64, 16),
    ]  # fmt: skip
    t5 = config(tmp_path / "t5", "T5", d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
    assert Shape(1, 16, 24, 2) in shapes.of_model(t5, [1], [2])


def test_a_missing_model(tmp_path: Path, refused: Refused) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    line = refused("--model", tmp_path / "empty")
    expected = "--model: expected a folder with a config.json or a name on the hub, got "
    assert expected in line
    assert str(tmp_path / "empty") in line


def test_a_model_without_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(torch.nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    monkeypatch.setattr(shapes, "_model", lambda name: Bare())
    with pytest.raises(BadInputError, match="expected a model with linear layers; 'bare' has none"):
        shapes.of_model("bare", [1], [1])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert refused("--model", "x").endswith("--model needs transformers: "
                                                    "pip install transformers")  # fmt: skip
