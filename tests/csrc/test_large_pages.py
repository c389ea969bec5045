"""The code of a large weight lies on large pages, where the system has them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_fast import functional

PAGE = 2**21
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(not SYSTEM.exists(), reason="the system has no large pages")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address; hg: large pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return fields
    raise AssertionError(f"nothing is mapped at {address:#x}")


def first_page(tensor: Tensor) -> int:
    return -(-tensor.data_ptr() // PAGE) * PAGE


@pytest.mark.parametrize("shape", [(3072, 4096), (4095, 3001)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_a_large_code(shape: tuple[int, int], transposed: bool) -> None:
    weight = torch.randn(*shape, dtype=torch.bfloat16)
    factors = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    if transposed:
        weight, factors = weight.t(), (factors[1].t(), factors[0].t())
    before = weight.clone()
    record = functional.merge_(weight, *factors, 0.1)
    (code,) = record.codes
    page = first_page(code.code)
    assert page + PAGE <= code.code.data_ptr() + code.code.numel()
    assert "hg" in flags_at(page)
    functional.unmerge_(weight, record)
    assert torch.equal(weight, before)


def test_the_flag_tells_something() -> None:
    memory = torch.zeros(64 * 2**20, dtype=torch.int8)  # of a mapping of its own
    assert "hg" not in flags_at(first_page(memory))
