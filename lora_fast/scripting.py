"""What an adapter adds to a frozen layer, as `torch.jit.script` can compile it.

TorchScript knows neither this package's dispatch nor its checks: in a script the layers compute
with these functions instead. The formulas are those of `lora_fast.reference`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Y + scaling (X A^T) B^T."""
    s, b = _scaled_factors(F.linear(x, lora_A.to(x.dtype)), lora_B, scaling)
    return y + F.linear(s, b.to(x.dtype))


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
    s, b = _scaled_factors(F.linear(x, lora_A.to(x.dtype)), lora_B, scaling)
    b = b.to(x.dtype)
    rank, row, column, group = b.size(1), 0, 0, 0
    for i in range(len(widths)):
        if enable_lora[i]:
            s_block = s[..., group * rank : (group + 1) * rank]
            update = F.linear(s_block, b[row : row + widths[i]])
            y = y + F.pad(update, [column, y.size(-1) - column - widths[i]])
            row += widths[i]
            group += 1
        column += widths[i]
    return y


def _scaled_factors(s: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """S and B, one of them times `scaling`, as `lora_fast.reference.scaled_factors` chooses."""
    if s.dtype == torch.float16 and abs(scaling) > 1.0:
        wide = lora_B.float() if lora_B.dtype == torch.bfloat16 else lora_B
        return s, wide * scaling
    return s * scaling, lora_B


def merged_kernel(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling (B A).view(W), for a convolution's kernel."""
    flat = weight.reshape(lora_B.size(0), lora_A.size(1))
    lora_A, lora_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype) * scaling
    return torch.addmm(flat, lora_B, lora_A).view(weight.shape)
