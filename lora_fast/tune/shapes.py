"""Which calls are tuned: sizes from the command line, or those of a model's linear layers."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fast.commands import BadInputError


class Shape(NamedTuple):
    """M rows, K in_features, N out_features, R rank."""

    M: int
    K: int
    N: int
    R: int


def parsed(texts: Sequence[str]) -> list[Shape]:
    """Return the shapes that `--shapes` names, each once.

    Raises:
        BadInputError: a text is not four whole numbers.
    """
    shapes = []
    for text in texts:
        try:
            sizes = [int(part) for part in text.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1:
            raise BadInputError(
                "--shapes: expected M,K,N,r, four whole numbers of at least 1 such as "
                f"8192,4096,4096,16; got {text!r}"
            )
        shapes.append(Shape(*sizes))
    return list(dict.fromkeys(shapes))


def of_model(name: str, rows: Sequence[int], ranks: Sequence[int]) -> list[Shape]:
    """Return the shapes of a transformers model's linear layers, the output embedding excepted.

    The model is built without weights, so its size does not matter.

    Args:
        name: a folder with a config.json, or a name on the hub.
        rows: M of the calls.
        ranks: ranks of the adapters.

    Raises:
        BadInputError: transformers is missing or has no such model, or it has no linear layer.
    """
    sizes = list(dict.fromkeys(_linear_sizes(_model(name))))
    if not sizes:
        raise BadInputError(f"--model: expected a model with linear layers; {name!r} has none")
    return [Shape(m, k, n, r) for m, (k, n), r in itertools.product(rows, sizes, ranks)]


def _model(name: str) -> nn.Module:
    try:
        import transformers  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise BadInputError("--model needs transformers: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            try:
                model = transformers.AutoModelForCausalLM.from_config(config)
            except ValueError:  # not a causal language model
                model = transformers.AutoModel.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(
            f"--model: expected a folder with a config.json or a name on the hub, got {name!r}: "
            f"{reason}"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _linear_sizes(model: Any) -> Iterator[tuple[int, int]]:
    """In and out features of every linear layer that an adapter may be put on."""
    output = model.get_output_embeddings()
    for module in model.modules():
        if module is output:
            continue
        if isinstance(module, nn.Linear):
            yield module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D" and module.weight.dim() == 2:  # GPT-2's linear
            k, n = module.weight.shape
            yield k, n
