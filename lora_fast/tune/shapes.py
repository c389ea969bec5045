"""Which calls are tuned: sizes from the command line, or those of a model's layers."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lora_fast.commands import BadInputError, first_line, transformers

_CONVS = ("conv1d", "conv2d", "conv3d")


class Shape(NamedTuple):
    """M rows, K in_features, N out_features, R rank.

    Of an embedding: M tokens, K rows (num_embeddings) and N columns (embedding_dim) of its table.
    Of a convolution: the factors B (N, R) and A (R, K) of its weight, and an M of 1.
    """

    M: int
    K: int
    N: int
    R: int
    layer: Literal["linear", "embedding", "conv"] = "linear"


def parsed(texts: Sequence[str]) -> list[Shape]:
    """Return the shapes that `--shapes` names, each once.

    Args:
        texts: each `M,K,N,r` for a linear layer, `embedding:M,num,D,r` for an embedding, or
            `conv2d:C_in,C_out,k,r` or `conv2d:C_in,C_out,k,r,groups` for a convolution, likewise
            `conv1d` and `conv3d`.

    Raises:
        BadInputError: a text is none of these.
    """
    return list(dict.fromkeys(_shape(text) for text in texts))


def _shape(text: str) -> Shape:
    *layer, numbers = text.replace(" ", "").split(":")
    try:
        sizes = [int(part) for part in numbers.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) >= 1:
        match layer, sizes:
            case [], [m, k, n, r]:
                return Shape(m, k, n, r)
            case ["embedding"], [m, num, d, r]:
                return Shape(m, num, d, r, "embedding")
            case [kind], [c_in, c_out, k, r, *groups] if kind in _CONVS and len(groups) <= 1:
                g = groups[0] if groups else 1
                if c_in % g == c_out % g == 0:
                    return of_convolution(_CONVS.index(kind) + 1, c_in, c_out, k, r, g)
    raise BadInputError(
        "--shapes: expected M,K,N,r such as 8192,4096,4096,16, embedding:M,num,D,r such as "
        "embedding:8192,50257,768,16, or conv2d:C_in,C_out,k,r[,groups] such as "
        "conv2d:256,512,3,16, in whole numbers of at least 1, with channels that the groups "
        f"divide; got {text!r}"
    )


def of_convolution(dims: int, c_in: int, c_out: int, k: int, r: int, groups: int = 1) -> Shape:
    """Return the shape of a convolution's adapter, in `dims` dimensions with a kernel of size k."""
    return Shape(1, c_in * k, c_out // groups * k ** (dims - 1), r * k, "conv")


def of_model(name: str, rows: Sequence[int], ranks: Sequence[int]) -> list[Shape]:
    """Return the shapes of a transformers model's layers, the output embedding excepted.

    Those are its linear layers, then its embeddings, then its convolutions with square kernels: all
    that an adapter can be put on, the most usual first. The model is built without weights, so its
    size does not matter.

    Args:
        name: a folder with a config.json, or a name on the hub.
        rows: M of the calls of linear layers and embeddings.
        ranks: ranks of the adapters.

    Raises:
        BadInputError: transformers is missing or has no such model, or it has no such layer.
    """
    model, each = _model(name), itertools.product
    linear, embeddings = dict.fromkeys(_linear_sizes(model)), dict.fromkeys(_embedding_sizes(model))
    convolutions = dict.fromkeys(_convolutions(model))
    shapes = [Shape(m, k, n, r) for m, (k, n), r in each(rows, linear, ranks)]
    shapes += [Shape(m, k, n, r, "embedding") for m, (k, n), r in each(rows, embeddings, ranks)]
    shapes += [
        of_convolution(dims, c_in, c_out, k, r, groups)
        for (dims, c_in, c_out, k, groups), r in each(convolutions, ranks)
    ]
    if not shapes:
        raise BadInputError(
            f"--model: expected a model with linear layers, embeddings or convolutions; {name!r} "
            "has none; name what to measure with --shapes"
        )
    return shapes


def _model(name: str) -> nn.Module:
    package = transformers()
    try:
        config = package.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            try:
                model = package.AutoModelForCausalLM.from_config(config)
            except ValueError:  # not a causal language model
                model = package.AutoModel.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        raise BadInputError(
            f"--model: expected a folder with a config.json or a name on the hub, got {name!r}: "
            f"{first_line(error)}"
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


def _embedding_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Rows and columns of every embedding's table."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.num_embeddings, module.embedding_dim


def _convolutions(model: nn.Module) -> Iterator[tuple[int, int, int, int, int]]:
    """Dimensions, channels in and out, kernel size and groups of every square convolution."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            dims, (size, *others) = len(module.kernel_size), module.kernel_size
            if all(other == size for other in others):
                yield dims, module.in_channels, module.out_channels, size, module.groups
