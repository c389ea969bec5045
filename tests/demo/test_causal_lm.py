from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fast.demo import causal_lm

transformers = pytest.importorskip("transformers")


def save(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A GPT-2: q, k and v in one Conv1D. Without a tokenizer, so its tokens are bytes."""
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return save(tmp_path / "gpt2", config)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama: q and v in linear layers of their own, fewer heads for v than for q."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16,
        intermediate_size=32, max_position_embeddings=32, vocab_size=300,
    )  # fmt: skip
    return save(tmp_path / "llama", config)


@pytest.fixture
def bigcode(tmp_path: Path) -> Path:
    """A GPTBigCode: what GPT-2 has in a Conv1D is a linear layer here."""
    config = transformers.GPTBigCodeConfig(
        n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=256, multi_query=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return save(tmp_path / "bigcode", config)


@pytest.mark.parametrize("name", ["gpt2", "bigcode", "llama"])
def test_models_of_transformers_are_tuned(
    name: str, demo: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    result = demo("--model", str(request.getfixturevalue(name)))
    assert result.status == 0, result.stdout + result.stderr
    runs = result.metrics["runs"]
    assert runs["loralib"]["loss"] == pytest.approx(runs["lora_fast"]["loss"], abs=1e-4)
    fused, separate = (1, 8 * (2 * 16 + 2 * 16)), (2, 8 * (16 + 16 + 16 + 8))
    layers, rank = separate if name == "llama" else fused
    assert runs["lora_fast"]["trainable_parameters"] == layers * rank


def test_a_fresh_adapter_changes_nothing(gpt2: Path) -> None:
    import lora_fast
    from lora_fast.demo.gpt import Adapter

    base = causal_lm.load(str(gpt2)).eval()
    model = causal_lm.adapted(lora_fast, base, Adapter(), seed=0).eval()
    ids = torch.randint(256, (2, 9))
    torch.testing.assert_close(model(ids), base(ids))


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_one_line(demo: Callable[..., Any], gpt2: Path, damaged: str) -> None:
    (gpt2 / damaged).write_text("{")
    result = demo("--model", str(gpt2))
    assert (result.status, result.out.exists()) == (2, False)
    (line,) = (text for text in result.stderr.splitlines() if text.startswith("lora-fast demo"))
    assert "--model: cannot load " in line


def test_fused_projections_of_unequal_widths_are_left(
    demo: Callable[..., Any], tmp_path: Path
) -> None:
    config = transformers.GPTBigCodeConfig(
        n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=256, multi_query=True
    )
    result = demo("--model", str(save(tmp_path / "bigcode", config)))
    assert result.status == 2
    assert "found no attention projection" in result.stderr


def test_no_such_model(demo: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    result = demo("--model", str(tmp_path / "nothing"))
    assert result.status == 2
    assert "--model" in result.stderr
    assert not result.out.exists()
    result = demo("--model", str(tmp_path / "elsewhere"))
    assert "--model: there is no folder" in result.stderr


def test_a_model_without_known_projections(demo: Callable[..., Any], tmp_path: Path) -> None:
    config = transformers.BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=256)
    result = demo("--model", str(save(tmp_path / "bloom", config)))
    assert result.status == 2
    assert "no attention projection" in result.stderr


def test_a_vocabulary_too_small_for_bytes(demo: Callable[..., Any], tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=100,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    result = demo("--model", str(save(tmp_path / "small", config)))
    assert result.status == 2
    assert "no tokenizer" in result.stderr
