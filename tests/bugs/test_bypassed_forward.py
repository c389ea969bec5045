"""Parents that read a child's weight and never call it: attention, the encoder's fast path."""

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from attention import attended, attention, effective
from torch import nn
from torch.nn.utils import prune

import lora_fast as lora
from lora_fast.testing import randomize_

# The encoder turns a padded batch into a nested tensor, and torch calls those a prototype.
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("merge", [True, False], ids=["merge", "no_merge"])
def test_b12_attention_applies_the_adapter_in_every_mode(merge: bool, need_weights: bool) -> None:
    module, x = attention(merge_weights=merge), torch.randn(3, 5, 8)
    expected = attended(module, x, effective(module.out_proj))
    before = module.out_proj.weight.detach().clone()
    for training in (True, False, True):
        module.train(training)
        assert module.out_proj.merged is (merge and not training)
        got, _ = module(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            got, _ = module(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(got, expected)
    assert torch.equal(module.out_proj.weight, before)


def test_b12_attention_gives_the_adapter_its_gradients() -> None:
    module, x = attention(), torch.randn(3, 5, 8, requires_grad=True)
    layer: Any = module.out_proj
    inputs = [layer.lora_A, layer.lora_B, layer.bias, module.in_proj_weight, x]
    seed = torch.randn(3, 5, 8)
    expected = torch.autograd.grad(attended(module, x, effective(layer)), inputs, seed)
    got = torch.autograd.grad(module(x, x, x)[0], inputs, seed)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    assert layer.weight.grad is None


def test_b12_training_attention_moves_the_adapter_only() -> None:
    module, x = attention(), torch.randn(3, 5, 8)
    lora.mark_only_lora_as_trainable(module)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    adam = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        module.train()
        loss = module(x, x, x)[0].square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        module.eval()
    assert losses[-1] < losses[0] / 2
    changed = {k for k, v in module.train().state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"out_proj.lora_A", "out_proj.lora_B"}


def test_b12_a_replaced_projection_counts_once() -> None:
    """The adapter of the projection that is there now, and only once."""
    module, x = attention(), torch.randn(3, 5, 8)
    module.out_proj = randomize_(lora.Linear(8, 8, r=4))
    expected = attended(module, x, effective(module.out_proj))
    torch.testing.assert_close(module(x, x, x)[0], expected)
    plain = nn.Linear(8, 8)
    module.out_proj = plain  # type: ignore[assignment]
    torch.testing.assert_close(module(x, x, x)[0], attended(module, x, plain.weight))


def test_b12_a_forward_that_raises_leaves_the_layer_as_it_was() -> None:
    module, x = attention(), torch.randn(3, 5, 8)
    with pytest.raises((AssertionError, RuntimeError)):
        module(x[..., :3], x, x)
    layer: Any = module.out_proj
    assert layer.weight is layer._parameters["weight"]
    assert "weight" not in vars(layer)
    torch.testing.assert_close(module(x, x, x)[0], attended(module, x, effective(layer)))


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch_save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_b12_copies_of_attention_apply_the_adapter_too(how: str) -> None:
    module, x = attention(), torch.randn(3, 5, 8)
    twin, expected = COPIES[how](module), module(x, x, x)[0]
    randomize_(module)
    torch.testing.assert_close(twin(x, x, x)[0], expected)
    torch.testing.assert_close(twin.eval()(x, x, x)[0], expected)
    assert (module(x, x, x)[0] - expected).abs().max() > 0.01


def test_b12_dropout_that_cannot_apply_warns() -> None:
    with pytest.warns(UserWarning, match="lora_dropout is not applied"):
        attention(lora_dropout=0.1)


def test_b12_loralib_ignores_the_adapter_in_train_mode() -> None:
    module, x = attention(loralib), torch.randn(3, 5, 8)
    y = module(x, x, x)[0]
    y.sum().backward()
    assert module.out_proj.lora_A.grad is None
    module.eval()
    assert (module(x, x, x)[0] - y).abs().max() > 0.01


def encoder_layer(lib: ModuleType, where: str, merge: bool) -> nn.TransformerEncoderLayer:
    """An encoder layer that takes its fast path where it can, with adapters at `where`."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    if where in ("linear1", "all"):
        layer.linear1 = lib.Linear(8, 16, r=2, merge_weights=merge)
    if where in ("linear2", "all"):
        layer.linear2 = lib.Linear(16, 8, r=2, merge_weights=merge)
    if where in ("out_proj", "all"):
        layer.self_attn.out_proj = lib.Linear(8, 8, r=2, merge_weights=merge)
    return randomize_(layer)


PLACES = ["linear1", "linear2", "out_proj", "all"]


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "no_merge"])
@pytest.mark.parametrize("where", PLACES)
def test_b13_the_encoder_layer_uses_the_adapter_without_gradients(where: str, merge: bool) -> None:
    layer, x = encoder_layer(lora, where, merge), torch.randn(2, 5, 8)
    expected = layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x), expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(layer(x), expected.detach())


@NESTED
@pytest.mark.parametrize("merge", [True, False], ids=["merge", "no_merge"])
@pytest.mark.parametrize("where", PLACES)
def test_b13_the_encoder_uses_the_adapter_on_padded_batches(where: str, merge: bool) -> None:
    """With padding, the encoder's fast path hands nested tensors to its layers."""
    encoder = nn.TransformerEncoder(encoder_layer(lora, where, merge), 2)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = encoder(x, src_key_padding_mask=padding)[~padding]
    encoder.eval()
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=padding)[~padding]
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("where", PLACES)
def test_b13_the_encoder_layer_trains_its_adapters(where: str) -> None:
    layer, x = encoder_layer(lora, where, True), torch.randn(2, 5, 8)
    layer(x).square().sum().backward()
    grads = {k: p.grad for k, p in layer.named_parameters() if "lora_" in k}
    assert len(grads) == (6 if where == "all" else 2)
    for grad in grads.values():
        assert grad is not None
        assert grad.abs().max() > 0.0


@pytest.mark.parametrize("where", ["linear1", "linear2"])
def test_b13_loralib_ignores_unmerged_adapters(where: str) -> None:
    layer, x = encoder_layer(loralib, where, False), torch.randn(1, 3, 8)
    layer.eval()
    expected = layer(x)
    with torch.no_grad():
        assert (layer(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@NESTED
def test_b13_linear_layers_take_nested_tensors(linear_case: Any, layout: torch.layout) -> None:
    layer, rows = linear_case.build(), [torch.randn(3, 8), torch.randn(5, 8)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    got = layer(nested).unbind()
    sum(part.square().sum() for part in got).backward()
    grads = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    layer.zero_grad()
    expected = [layer(row) for row in rows]
    sum(part.square().sum() for part in expected).backward()
    torch.testing.assert_close(list(got), expected)
    torch.testing.assert_close(grads, (layer.lora_A.grad, layer.lora_B.grad))
    torch.testing.assert_close(list(layer.eval()(nested).unbind()), expected)


@pytest.mark.parametrize("how", ["pruned", "normed", "replica"])
def test_b12_a_projection_whose_weight_is_no_parameter(how: str) -> None:
    """Pruning and weight norm leave a plain attribute in its place, as DataParallel's replicas."""
    module, x = attention(), torch.randn(3, 5, 8)
    layer: Any = module.out_proj
    if how == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    elif how == "normed":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer, "weight")
    else:
        weight = layer._parameters.pop("weight").detach()
        vars(layer)["weight"] = weight
    own = vars(layer)["weight"]
    expected = attended(module, x, effective(layer))
    for _ in range(2):
        got, _ = module(x, x, x)
        torch.testing.assert_close(got, expected)
        assert vars(layer)["weight"] is own
    got.sum().backward()
    assert layer.lora_B.grad is not None


def test_b12_a_parametrized_projection_warns() -> None:
    module, x = attention(), torch.randn(3, 5, 8)
    nn.utils.parametrizations.weight_norm(module.out_proj)
    with pytest.warns(UserWarning, match="reads the layer's weight directly, and a parametrized"):
        got, _ = module(x, x, x)
    torch.testing.assert_close(got, attended(module, x, module.out_proj.weight))
