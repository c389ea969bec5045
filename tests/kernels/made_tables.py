"""Tables of measured choices for a GPU that no machine has, where the package looks for them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_fast.kernels import configs, plans, tables
from lora_fast.kernels.tables import Call, Row, Table

GPU = "NVIDIA Imaginary 9000"
ARCH = replace(configs.ARCHITECTURES["sm_90"], gpu=GPU)
SIZES = (4096, 4096, 4096, 16, torch.bfloat16)  # M, N, K, R
CALL = Call.of("lora_linear_fwd", *SIZES, False)
RULE = plans.rule_for(ARCH, CALL)
# Something that the rule does not choose, so that its effect shows.
OTHER = "library"
TILE = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
TILE |= {"tma": False, "specialised": False}


def table(plan: Any, call: Call = CALL, **machine: str) -> Table:
    """A table of one row."""
    here = replace(tables.this_machine(GPU, "sm_90"), **machine)
    return Table(here, (Row(call, plan, 10.0, 12.5),), "0.1.0", "2026-11-24")


def write(found: Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tables.to_json(found))


def put(found: Table, *, shipped: str | None = None) -> Path:
    """Write a table where the package looks for it; return the file."""
    here = tables.this_machine(GPU, "sm_90")
    path = tables.SHIPPED / shipped if shipped else tables.user_path(here)
    write(found, path)
    plans.reload_tables()
    return path


def plan(dropout: bool = False, arch: configs.Architecture = ARCH, **sizes: int) -> Any:
    """What serves a forward call of the linear layer."""
    m, n, k, r, dtype = SIZES
    return plans.forward_plan(arch, sizes.get("M", m), n, k, sizes.get("R", r), dtype, dropout)
