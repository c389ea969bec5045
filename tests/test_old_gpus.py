"""GPUs whose shared memory is too small for the kernels: plain torch serves them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lora_fast
from lora_fast import backend, torch_internals


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    """The default backend, whatever the process was started with."""
    with lora_fast.use_backend("auto"):
        yield


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("too_old", [True, False])
def test_a_gpu_of_long_ago_is_told_also_while_a_graph_is_traced(
    too_old: bool,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_lacks_shared_memory", lambda device: too_old)
    torch.compiler.reset()

    def chosen(x: Tensor) -> Tensor:
        return x + 1.0 if backend._is_too_old(torch.device("cuda", 0)) else x

    if compiled:
        chosen = torch.compile(chosen, backend="eager", fullgraph=True)
    assert chosen(torch.zeros(())).item() == float(too_old)


class OnGpu:
    """What `choose` asks a CUDA tensor."""

    is_cuda, is_cpu, is_nested, requires_grad = True, False, False, True
    device, dtype, layout = torch.device("cuda", 0), torch.float32, torch.strided

    def numel(self) -> int:
        return 12

    def is_complex(self) -> bool:
        return False

    is_neg = _is_zerotensor = is_complex


@pytest.mark.parametrize(
    ("autocast", "compiling", "expected"),
    [(False, False, "eager"), (True, False, "reference"), (False, True, "reference")],
)
def test_a_gpu_without_kernels(
    autocast: bool, compiling: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only plain torch casts under autocast, and traces, what the kernels do not serve."""
    monkeypatch.setattr(backend, "_lacks_shared_memory", lambda device: True)
    monkeypatch.setattr(backend, "Tensor", OnGpu)
    monkeypatch.setattr(backend, "autocasts", lambda x: autocast)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch_internals, "is_batched", lambda x: False)
    tensors = [OnGpu() for _ in range(4)]
    assert backend.choose("lora_merged_linear", *tensors).value == expected
    assert backend.choose("lora_linear", *tensors).value == "reference"


@pytest.mark.parametrize(("capability", "too_old"), [((7, 5), True), ((8, 0), False)])
def test_turing_is_of_long_ago(
    capability: tuple[int, int], too_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asked = backend._lacks_shared_memory.__wrapped__  # past the answers that are remembered
    assert asked(torch.device("cuda", 0)) == too_old
