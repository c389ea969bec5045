"""What an adapter must cost at least beside the frozen layer: bytes and operations of each design.

The model counts the bytes that pass between memory and the chip beyond those of the frozen layer,
for elements of `size` bytes. M rows, K in_features, N out_features, R rank.
"""

from dataclasses import dataclass

# Terms of a design: multiples of M K and M N elements forward and backward, of M K elements more
# with dropout; `mask` of the fused design is in bits, an eighth of a byte for each element.
_DESIGNS: dict[str, dict[str, float]] = {
    "loralib": {"fwd_mk": 1, "fwd_mn": 6, "bwd_mk": 5, "bwd_mn": 4, "drop_mk": 2.5},
    "addmm order": {"fwd_mk": 1, "fwd_mn": 2, "bwd_mk": 4, "bwd_mn": 3},
    "LoRA first": {"fwd_mk": 1, "fwd_mn": 1, "bwd_mk": 2, "bwd_mn": 1},
    "fused": {"fwd_mk": 1, "fwd_mn": 0, "bwd_mk": 1, "bwd_mn": 1, "mask": 1},
}
DESIGNS = tuple(_DESIGNS)


@dataclass(frozen=True)
class Ceilings:
    """What the device can do: operations a second of a dense product, bytes a second of a copy."""

    rate: float
    bandwidth: float


def extra_bytes(
    design: str, M: int, K: int, N: int, *, backward: bool, dropout: bool, size: int = 2
) -> float:
    """Return the bytes that a design moves beyond the frozen layer, one step.

    Args:
        design: one of `DESIGNS`.
        M: rows.
        K: in_features.
        N: out_features.
        backward: forward and backward instead of forward alone.
        dropout: with dropout on the adapter's input.
        size: bytes of an element.
    """
    terms = _DESIGNS[design]
    passes = ("fwd", "bwd") if backward else ("fwd",)
    moved = sum(terms[f"{p}_mk"] * M * K + terms[f"{p}_mn"] * M * N for p in passes) * size
    if dropout:
        moved += len(passes) * terms.get("drop_mk", 0.0) * M * K * size
        # Written forward; read backward for dx and for dA.
        moved += (3 if backward else 1) * terms.get("mask", 0.0) * M * K / 8
    return moved


def extra_operations(M: int, K: int, N: int, R: int, *, backward: bool) -> float:
    """Return the operations of the adapter: S and S B^T, and twice as many backward."""
    return 2.0 * M * R * (K + N) * (3 if backward else 1)


def dense_operations(M: int, K: int, N: int, *, backward: bool) -> float:
    """Return the operations of the frozen layer: y = x W^T, and dx = dy W."""
    return 2.0 * M * K * N * (2 if backward else 1)


def extra_seconds(
    design: str,
    M: int,
    K: int,
    N: int,
    R: int,
    ceilings: Ceilings,
    *,
    backward: bool,
    dropout: bool,
    size: int = 2,
) -> float:
    """Return the time that a design adds to the frozen layer's, bytes and operations one by one."""
    moved = extra_bytes(design, M, K, N, backward=backward, dropout=dropout, size=size)
    operations = extra_operations(M, K, N, R, backward=backward)
    return moved / ceilings.bandwidth + operations / ceilings.rate


def frozen_seconds(
    M: int, K: int, N: int, ceilings: Ceilings, *, backward: bool, size: int = 2
) -> float:
    """Return the time of the frozen layer: the slower of its operations and its bytes."""
    passes = 2 if backward else 1
    moved = passes * (M * K + M * N + N * K) * size
    operations = dense_operations(M, K, N, backward=backward)
    return max(operations / ceilings.rate, moved / ceilings.bandwidth)
