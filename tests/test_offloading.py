"""Models whose weights accelerate keeps elsewhere and lends to the layers for their forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

accelerate: Any = pytest.importorskip("accelerate")
TOKENS = torch.tensor([[1, 4, 3]])


def model() -> nn.Sequential:
    layers = (
        lora.Embedding(6, 8, r=2),
        lora.Linear(8, 8, r=2),
        lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True]),
        nn.Flatten(0, 1),
        lora.Conv1d(3, 4, 3, r=2),
    )
    return randomize_(nn.Sequential(*layers))


def offload(model: nn.Module) -> None:
    """All of a convolution at once, as its weight is the inner module's."""
    accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=["Conv1d"]
    )


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def adapted(model: nn.Module) -> list[Any]:
    return [layer for layer in model if isinstance(layer, lora.LoRALayer)]


def bases(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in adapted(model)]


def test_offloaded_then_put_into_eval_mode(caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to merge into: on the meta device the weights have no values."""
    net = model()
    expected, before = outputs(net), bases(net)
    offload(net)
    net.eval()
    assert not any(layer.merged for layer in adapted(net))
    torch.testing.assert_close(outputs(net), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"nothing was merged.*on the meta device"):
        lora.merge(net)
    accelerate.hooks.remove_hook_from_submodules(net)
    torch.testing.assert_close(outputs(net), expected, rtol=0, atol=0)
    assert not caplog.records
    assert all(layer.merged for layer in adapted(net.eval()))
    torch.testing.assert_close(outputs(net), expected)
    assert all(map(torch.equal, bases(net.train()), before))


def test_offloaded_while_merged() -> None:
    net = model()
    before = bases(net)
    expected = outputs(net.eval())
    offload(net)
    torch.testing.assert_close(outputs(net), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the weight on meta; move the weight back"):
        net.train()
    torch.testing.assert_close(outputs(net), expected, rtol=0, atol=0)
    accelerate.hooks.remove_hook_from_submodules(net)
    assert all(map(torch.equal, bases(net.train()), before))


def test_built_on_meta_and_dispatched(tmp_path: Any) -> None:
    source = model()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    with accelerate.init_empty_weights():
        net = model().eval()
    accelerate.load_checkpoint_and_dispatch(net, str(tmp_path / "model.pt"), device_map={"": "cpu"})
    torch.testing.assert_close(outputs(net), outputs(source))
    assert all(map(torch.equal, bases(net.eval().train()), bases(source)))
