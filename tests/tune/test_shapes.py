"""Which calls are tuned: what the command line and a model's configuration say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fast
from lora_fast.commands import BadInputError
from lora_fast.tune import shapes
from lora_fast.tune.shapes import Shape

Refused = Callable[..., str]


def test_shapes_are_read_once_each() -> None:
    texts = ["8192,4096,1024,16", " 1, 2 ,3,4", "8192,4096,1024,16"]
    assert shapes.parsed(texts) == [Shape(8192, 4096, 1024, 16), Shape(1, 2, 3, 4)]


def test_embeddings_and_convolutions_have_names() -> None:
    texts = ["embedding:8192,50257,768,16", "conv2d:256,512,3,16", " conv1d:8, 6,5,2,2", "1,2,3,4"]
    assert shapes.parsed(texts) == [
        Shape(8192, 50257, 768, 16, "embedding"),
        Shape(1, 768, 1536, 48, "conv"),
        Shape(1, 40, 3, 10, "conv"),
        Shape(1, 2, 3, 4, "linear"),
    ]


@pytest.mark.parametrize(
    ("kind", "dims", "channels", "groups"),
    [
        (lora_fast.Conv1d, 1, (6, 4), 2),
        (lora_fast.Conv2d, 2, (6, 9), 3),
        (lora_fast.Conv3d, 3, (2, 4), 1),
    ],
)
def test_the_shape_of_a_convolution_is_that_of_its_factors(
    kind: Any, dims: int, channels: tuple[int, int], groups: int
) -> None:
    layer = kind(*channels, 3, r=2, groups=groups)
    shape = shapes.of_convolution(dims, *channels, 3, 2, groups)
    assert layer.lora_A.shape == (shape.R, shape.K)
    assert layer.lora_B.shape == (shape.N, shape.R)
    assert layer.conv.weight.numel() == shape.N * shape.K


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "1,2,3", "1,2,3,4,5", "1,2,3,x", "0,2,3,4", "1,2,3,-4", "1.5,2,3,4"),
        *(
            "embedding:1,2,3",
            "embedding:1,2,3,4,5",
            "conv2d:1,2,3",
            "conv4d:1,2,3,4",
            "conv:1,2,3,4",
        ),
        *("conv2d:4,6,3,2,4", "conv2d:6,4,3,2,3", ":1,2,3,4", "linear:1,2,3,4", "1,2,3,4:conv2d"),
    ],
)
def test_other_texts_are_refused(text: str, refused: Refused) -> None:
    assert refused("--shapes", "8,8,8,8", text) == (
        "lora-fast tune: --shapes: expected M,K,N,r such as 8192,4096,4096,16, "
        "embedding:M,num,D,r such as embedding:8192,50257,768,16, or "
        "conv2d:C_in,C_out,k,r[,groups] such as conv2d:256,512,3,16, in whole numbers of at least "
        f"1, with channels that the groups divide; got {text!r}"
    )


def config(folder: Path, name: str, **sizes: Any) -> str:
    transformers = pytest.importorskip("transformers")
    getattr(transformers, f"{name}Config")(**sizes).save_pretrained(folder)
    return str(folder)


def test_the_layers_of_models(tmp_path: Path) -> None:
    llama = config(
        tmp_path / "llama", "Llama", num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_size=16, intermediate_size=40, vocab_size=300,
    )  # fmt: skip
    assert shapes.of_model(llama, [8, 1], [4]) == [
        *(Shape(m, k, n, 4) for m in (8, 1) for k, n in ((16, 16), (16, 8), (16, 40), (40, 16))),
        *(Shape(m, 300, 16, 4, "embedding") for m in (8, 1)),
    ]
    gpt2 = config(
        tmp_path / "gpt2", "GPT2", n_layer=1, n_head=2, n_embd=16, vocab_size=256, n_positions=32
    )
    assert [(s.K, s.N, s.layer) for s in shapes.of_model(gpt2, [1], [4])] == [
        *((16, n, "linear") for n in (48, 16, 64)), (64, 16, "linear"),
        *((num, 16, "embedding") for num in (256, 32)),
    ]  # fmt: skip
    t5 = config(tmp_path / "t5", "T5", d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
    assert Shape(1, 16, 24, 2) in shapes.of_model(t5, [1], [2])


class Bare(torch.nn.Module):
    """A model of given layers, without an output embedding."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def get_output_embeddings(self) -> None:
        return None


def test_the_convolutions_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ones and those with adapters, each once; none where no adapter can be put on."""
    model = Bare(
        torch.nn.Conv2d(6, 4, 3, groups=2),
        torch.nn.Conv1d(8, 16, 5),
        torch.nn.Conv2d(6, 4, (3, 1)),
        torch.nn.ConvTranspose2d(6, 4, 3),
        lora_fast.Conv2d(6, 4, 3, groups=2, r=2),
        lora_fast.Embedding(30, 12, r=2),
        torch.nn.Conv3d(2, 4, 3),
    )
    monkeypatch.setattr(shapes, "_model", lambda name: model)
    assert shapes.of_model("made here", [7, 1], [2, 3]) == [
        *(Shape(m, 30, 12, r, "embedding") for m in (7, 1) for r in (2, 3)),
        *(Shape(1, 18, 6, 3 * r, "conv") for r in (2, 3)),
        *(Shape(1, 40, 16, 5 * r, "conv") for r in (2, 3)),
        *(Shape(1, 6, 36, 3 * r, "conv") for r in (2, 3)),
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with a GPU, which is asked for before a model."""
    monkeypatch.setattr("lora_fast.tune.run._device", lambda arguments: torch.device("cuda"))


def test_a_missing_model(gpu: None, tmp_path: Path, refused: Refused) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    line = refused("--model", tmp_path / "empty")
    expected = "--model: expected a folder with a config.json or a name on the hub, got "
    assert expected in line
    assert str(tmp_path / "empty") in line


def test_a_model_without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_model", lambda name: Bare(torch.nn.ReLU()))
    expected = "model with linear layers, embeddings or convolutions; 'bare' has none"
    with pytest.raises(BadInputError, match=expected):
        shapes.of_model("bare", [1], [1])


def test_without_transformers(gpu: None, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert refused("--model", "x").endswith("--model needs transformers: "
                                                    "pip install transformers")  # fmt: skip
