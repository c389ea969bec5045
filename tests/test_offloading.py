"""Models whose weights accelerate keeps elsewhere and lends to the layers for their forward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_
from lora_fast.utils import expose_effective_weight

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


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention.out_proj = lora.Linear(8, 8, r=2)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


class Reading(Attending):
    """It reads a convolution's weight itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = lora.Conv1d(8, 8, 1, r=2)
        expose_effective_weight(self, "conv")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.conv.weight.squeeze(-1)


def outer(kind: type[Attending]) -> nn.Sequential:
    net = randomize_(nn.Sequential(kind()))
    lora.mark_only_lora_as_trainable(net)
    return net


def lend_to(name: str, net: nn.Module) -> None:
    """All that a module of that name holds is there during its forward."""
    device = torch.device("cpu")
    accelerate.cpu_offload(net, execution_device=device, preload_module_classes=[name])


PRELOADED = [(Attending, "MultiheadAttention"), (Attending, "Attending"), (Reading, "Reading")]


@pytest.mark.parametrize(("kind", "name"), PRELOADED)
@pytest.mark.parametrize("training", [False, True])
def test_b12_weights_that_are_lent_to_their_reader(
    kind: type[Attending], name: str, training: bool
) -> None:
    net, x = outer(kind).train(training), torch.randn(2, 3, 8)
    twin = copy.deepcopy(net)
    expected = twin(x)
    lend_to(name, net)
    for _ in range(2):
        assert torch.equal(net(x), expected)
        for layer in net.modules():
            if isinstance(layer, lora.LoRALayer):
                assert "weight" not in vars(layer)
                assert layer.weight.is_meta and not layer.weight.requires_grad
    accelerate.hooks.remove_hook_from_submodules(net)
    assert torch.equal(net(x), expected)
    net.train()(x).sum().backward()
    twin.train()(x).sum().backward()
    for found, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert found.grad is other.grad is None or torch.equal(found.grad, other.grad)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_b12_a_loan_that_fails(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = outer(Reading), torch.randn(2, 3, 8)
    expected = net(x)
    lend_to("Reading", net)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(net[0]._hf_hook, "pre_forward", fails)
        with pytest.raises(error):
            net(x)
    assert torch.equal(net(x), expected)
    accelerate.hooks.remove_hook_from_submodules(net)
    assert torch.equal(net(x), expected)
    assert not any("weight" in vars(layer) for layer in net.modules())


def mamba() -> nn.Module:
    """A model that has transformers lend it the weights of some layers in it one by one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 11, "state_size": 4}
    net: nn.Module = transformers.MambaModel(transformers.MambaConfig(**sizes))
    mixer = net.get_submodule("layers.0.mixer")
    mixer.dt_proj = randomize_(lora.Linear(1, 16, r=1))
    mixer.conv1d = randomize_(lora.Conv1d(16, 16, 4, r=2, groups=16, padding=3))
    return net


def hidden(net: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(TOKENS).last_hidden_state
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Conv1d", "MambaMixer"])
@pytest.mark.parametrize("training", [False, True])
def test_b12_weights_that_are_lent_one_by_one_or_together(name: str, training: bool) -> None:
    net = mamba().train(training)
    expected = hidden(net)
    lend_to(name, net)
    for _ in range(2):
        assert torch.equal(hidden(net), expected)
        assert not any("weight" in vars(layer) for layer in net.modules())
    accelerate.hooks.remove_hook_from_submodules(net)
    assert torch.equal(hidden(net), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("training", [False, True])
def test_b12_a_weight_that_is_not_lent_with_its_adapter(training: bool) -> None:
    """A convolution's is the inner module's."""
    net = mamba().train(training)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    with pytest.raises((RuntimeError, ValueError), match=r"meta.*cpu"):
        hidden(net)
