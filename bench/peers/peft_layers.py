"""PEFT's layers, from the weights that all peers share, as the same function of x.

Where loralib has one `MergedLinear`, PEFT has three `Linear`, as a model without a fused weight
has them, q and v with an adapter. Where loralib adds B A to a convolution's weight, PEFT convolves
x once more, to a few channels, and those with a kernel of size 1.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.contest import Absent, Outputs
from harness.names import QKV
from peers.modules import SCALING, Layer, Weights, bare, channels_between, module


def peft(weights: Weights) -> Layer:
    """PEFT's layer, without the model that it is wrapped in.

    Of MergedLinear three Linear layers, as a model without a fused weight has them, q and v with
    an adapter. Of a convolution one to `rank` channels and one of size 1 from there.

    Raises:
        Absent: no rank of PEFT's is the same function.
    """
    if weights.kind == "MergedLinear":
        return _peft_blocks(weights)
    a, b, expected = _peft_factors(weights)
    library = importlib.import_module("peft")
    rank = b.shape[1]
    config = library.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, lora_dropout=weights.p, target_modules=["0"]
    )
    base = nn.Sequential(bare(weights))
    wrapped = library.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0].to(weights.weight.dtype)
    if weights.kind == "Embedding":
        adapters = (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
    else:
        adapters = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with torch.no_grad():
        for parameter, value in zip(adapters, (a, b), strict=True):
            parameter.copy_(value)
    return module(layer, expected=expected)


def _peft_factors(weights: Weights) -> tuple[Tensor, Tensor, Callable[[Outputs], Outputs]]:
    """Return PEFT's A and B, and the oracle's results in them."""
    if not weights.dimensions:
        return weights.a, weights.b, lambda results: results
    k, d = weights.kernel_size, weights.dimensions
    rank = channels_between(weights.r, k, d)
    if rank is None:
        raise Absent(f"no rank of its own gives a {weights.kind} of rank {weights.r}")
    n, width = weights.weight.shape[:2]
    a_shape, b_shape = (rank, width, *[k] * d), (n, rank, *[1] * d)
    blocks = (n, k ** (d - 1), rank, k ** (d - 1))

    def expected(results: Outputs) -> Outputs:
        found = dict(results)
        if "dB" in found:  # of b, which B holds once for each block
            along = found["dB"].view(blocks).diagonal(dim1=1, dim2=3).sum(-1)
            found |= {"dA": found["dA"].view(a_shape), "dB": along.view(b_shape)}
        return found

    b = weights.b.view(blocks)[:, 0, :, 0].reshape(b_shape)
    return weights.a.view(a_shape), b, expected


def _peft_blocks(weights: Weights) -> Layer:
    size = weights.weight.shape[0] // len(QKV)
    biases = [None] * len(QKV) if weights.bias is None else weights.bias.split(size)
    factors = zip(weights.a.split(weights.r), weights.b.split(size), strict=True)
    layers = []
    for weight, bias, enabled in zip(weights.weight.split(size), biases, QKV, strict=True):
        block = replace(weights, kind="Linear", weight=weight, bias=bias)
        if enabled:
            a, b = next(factors)
            layers.append(peft(replace(block, a=a, b=b)))
        else:
            layers.append(module(bare(block)))
    pairs = [layer.trained for layer in layers if layer.trained]
    return Layer(
        lambda x: tuple(layer.forward(x) for layer in layers),
        [*(a for a, _ in pairs), *(b for _, b in pairs)],
        [tensor for layer in layers for tensor in layer.frozen],
        parts=len(QKV),
    )
