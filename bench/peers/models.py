"""Two real architectures with random weights, in plain torch: GPT-2 and a block of Llama 3.

The layers that get an adapter come from a factory, so that every library builds the same model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (in_features, out_features, bias, blocks): blocks is 3 for q, k, v with adapters on q and v, which
# come out in one tensor or in a tuple.
LinearFactory = Callable[[int, int, bool, int], nn.Module]


@dataclass(frozen=True)
class ModelSize:
    """What a model is built from.

    Attributes:
        kv_heads: heads of keys and values, for grouped-query attention.
        hidden: width of the feed-forward part.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int


GPT2_MEDIUM = ModelSize("gpt2-medium", 24, 1024, 16, 16, 4096, 50_257)
LLAMA_3_8B_BLOCK = ModelSize("llama-3-8b-block", 1, 4096, 32, 8, 14_336, 0)
TOY_GPT2 = ModelSize("toy-gpt2", 1, 32, 2, 2, 64, 61)
TOY_LLAMA = ModelSize("toy-llama-block", 1, 32, 4, 2, 48, 0)


class Gpt2(nn.Module):
    """GPT-2 with adapters on q and v of the fused c_attn, loralib's own recipe.

    Args:
        size: what to build.
        linear: makes the layers with an adapter.
        tokens: the longest sequence.
    """

    def __init__(self, size: ModelSize, linear: LinearFactory, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(tokens, size.width)
        self.blocks = nn.ModuleList(_Gpt2Block(size, linear) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean loss of predicting `ids` (batch, tokens), each from those before it."""
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x[:, :-1]), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class SeparateQkv(nn.Module):
    """q, k and v by a layer each, for libraries that adapt whole layers."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v of `x`."""
        return self.q(x), self.k(x), self.v(x)


class _Gpt2Block(nn.Module):
    def __init__(self, size: ModelSize, linear: LinearFactory) -> None:
        super().__init__()
        self.heads, width = size.heads, size.width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = linear(width, 3 * width, True, 3)
        self.c_proj = nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, size.hidden), nn.Linear(size.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(self.norm_1(x))
        blocks = qkv if isinstance(qkv, tuple) else qkv.chunk(3, dim=-1)
        q, k, v = (_heads(t, self.heads) for t in blocks)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.norm_2(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    """One block of Llama 3 with adapters on all seven projections; the loss is a mean square.

    Args:
        size: what to build.
        linear: makes the layers with an adapter.
        tokens: the longest sequence.
    """

    def __init__(self, size: ModelSize, linear: LinearFactory, tokens: int) -> None:
        super().__init__()
        self.size, width = size, size.width
        head = width // size.heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.o = linear(width, width, False, 1), linear(width, width, False, 1)
        self.k = linear(width, head * size.kv_heads, False, 1)
        self.v = linear(width, head * size.kv_heads, False, 1)
        self.gate, self.up = (linear(width, size.hidden, False, 1) for _ in range(2))
        self.down = linear(size.hidden, width, False, 1)
        angles = torch.outer(torch.arange(tokens), 500_000.0 ** -torch.linspace(0, 1, head // 2))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of the block's output for `x` (batch, tokens, width)."""
        h, groups = self.norm_1(x), self.size.heads // self.size.kv_heads
        q = self._rotate(_heads(self.q(h), self.size.heads))
        k = self._rotate(_heads(self.k(h), self.size.kv_heads)).repeat_interleave(groups, 1)
        v = _heads(self.v(h), self.size.kv_heads).repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x.float().square().mean()

    def _rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = (t[: x.shape[2]].to(x.dtype) for t in (self.cos, self.sin))
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return (batch, tokens, heads * d) as (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
