"""What an adapter adds to a frozen layer, as `torch.jit.script` can compile it.

TorchScript knows neither this package's dispatch nor its checks: in a script the layers compute
with these functions instead. The formulas are those of `lora_fast.reference`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Y + scaling (X A^T) B^T."""
    s, rest = _scaled_s(F.linear(x, lora_A.to(x.dtype)), scaling)
    return y + _product(s, lora_B.to(x.dtype), rest)


def grouped_update(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    enable_lora: list[bool],
    widths: list[int],
) -> Tensor:
    """Y, and to block g of it scaling (X A_g^T) B_g^T added where g is enabled."""
    s, rest = _scaled_s(F.linear(x, lora_A.to(x.dtype)), scaling)
    b = lora_B.to(x.dtype)
    rank, row, column, group = b.size(1), 0, 0, 0
    for i in range(len(widths)):
        if enable_lora[i]:
            s_block = s[..., group * rank : (group + 1) * rank]
            update = _product(s_block, b[row : row + widths[i]], rest)
            y = y + F.pad(update, [column, y.size(-1) - column - widths[i]])
            row += widths[i]
            group += 1
        column += widths[i]
    return y


def _scaled_s(s: Tensor, scaling: float) -> tuple[Tensor, float]:
    """S and the factor of S B^T, of which one is `scaling`, as `lora_fast.reference.scaled_s`."""
    if s.dtype == torch.float16 and abs(scaling) > 1.0:
        return s, scaling
    return s * scaling, 1.0


def _product(s: Tensor, lora_B: Tensor, factor: float) -> Tensor:
    product = F.linear(s, lora_B)
    return product if factor == 1.0 else product * factor


def merged_kernel(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling (B A).view(W), for a convolution's kernel."""
    flat = weight.reshape(lora_B.size(0), lora_A.size(1))
    lora_A, lora_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype) * scaling
    return torch.addmm(flat, lora_B, lora_A).view(weight.shape)
