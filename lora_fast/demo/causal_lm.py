"""Fine-tuning a causal language model of transformers instead of the small GPT."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fast.commands import BadInputError, first_line, transformers
from lora_fast.demo.gpt import BYTES, Adapter
from lora_fast.demo.text import byte_ids

# The projections that loralib's recipe adapts, under the names that architectures give them.
_FUSED = ("c_attn",)
_SEPARATE = ("q_proj", "v_proj", "query", "value")


class CausalLM(nn.Module):
    """A transformers model as a function of ids (batch, time) to logits (batch, time, N)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the token that follows each of `ids`."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def load(name: str) -> CausalLM:
    """Load a model from a folder or the hub.

    Raises:
        BadInputError: transformers is not installed, or has no such model.
    """
    package = transformers()
    looks_like_a_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if looks_like_a_path and not Path(name).exists():  # else the hub calls it a bad name
        raise BadInputError(f"--model: there is no folder {name!r}")
    try:
        model = package.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # of many kinds, where a file is damaged
        raise BadInputError(f"--model: cannot load {name!r}: {first_line(error)}") from error
    return CausalLM(model)


def encode(name: str, data: bytes, vocabulary: int) -> Tensor:
    """Return `data` as token ids, by the model's tokenizer or, where there is none, as bytes.

    Raises:
        BadInputError: the tokenizer cannot be read; or there is none, and bytes don't fit the
            vocabulary.
    """
    has_tokenizer = not Path(name).is_dir() or any(Path(name).glob("*token*"))
    if has_tokenizer:
        try:
            tokenizer = transformers().AutoTokenizer.from_pretrained(name)
        except Exception as error:
            message = f"--model: cannot load the tokenizer of {name!r}: {first_line(error)}"
            raise BadInputError(message) from error
        ids = tokenizer(data.decode("utf-8", "replace"), verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    if vocabulary < BYTES:
        raise BadInputError(
            f"--model: {name!r} has no tokenizer, and fewer than 256 tokens for bytes"
        )
    return byte_ids(data)


def adapted(library: ModuleType, base: CausalLM, adapter: Adapter, seed: int) -> CausalLM:
    """Return a copy of `base` whose q and v projections have a fresh adapter, which alone trains.

    Raises:
        BadInputError: the model has no projection of a known name.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            layer = _layer(library, name, child, adapter)
            if layer is not None:
                setattr(parent, name, layer)
                count += 1
    if count == 0:
        known = ", ".join(_FUSED + _SEPARATE)
        raise BadInputError(f"--model: found no attention projection; known names are {known}")
    library.mark_only_lora_as_trainable(model)
    return model


def _layer(library: ModuleType, name: str, old: nn.Module, adapter: Adapter) -> Any:
    """A layer of `library` with the weights of `old`; None if `old` is not to be adapted."""
    options: dict[str, Any] = {
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
    }
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    options["bias"] = bias is not None
    if name in _FUSED:
        is_linear = isinstance(old, nn.Linear)  # GPT-2's Conv1D keeps its weight as (in, out)
        in_features, out_features = reversed(weight.shape) if is_linear else weight.shape
        enable = list(adapter.enable_lora)
        if out_features != len(enable) * in_features:
            return None  # query, key and value of other widths, or in another order
        fused = {"enable_lora": enable, "fan_in_fan_out": not is_linear}
        layer = library.MergedLinear(in_features, out_features, **fused, **options)
    elif name in _SEPARATE and isinstance(old, nn.Linear):
        layer = library.Linear(old.in_features, old.out_features, **options)
    else:
        return None
    layer.weight.data.copy_(weight.data)
    if bias is not None:
        layer.bias.data.copy_(bias.data)
    return layer.to(weight.device)
