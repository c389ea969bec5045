"""Weights into which nothing can be merged, and merges that fail: the layer goes on unmerged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast as lora
from lora_fast import merging, reference
from lora_fast.testing import randomize_


class Quantized(Tensor):
    """Holds 8 bits and a scale, and takes part in other ops by a copy of its values, or in none."""

    refused: tuple[Any, ...] = ()
    kept: tuple[Any, ...] = (torch.ops.aten.detach.default,)

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, dtype=scale.dtype
        )

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Any:
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def whole(self) -> Tensor:
        return self.values * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in cls.refused:
            raise NotImplementedError(f"{func} of {cls.__name__}")
        if func in cls.kept:
            return cls(args[0].values.clone(), args[0].scale)

        def plain(value: Any) -> Any:
            return value.whole() if isinstance(value, cls) else value

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class QuantizedAsItsCopies(Quantized):
    kept = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)


class QuantizedWithoutWrites(QuantizedAsItsCopies):
    refused = (torch.ops.aten.add_.Tensor, torch.ops.aten.equal.default)


@pytest.mark.parametrize("kind", [Quantized, QuantizedAsItsCopies, QuantizedWithoutWrites])
@pytest.mark.parametrize("whole", [False, True], ids=["eval", "merge"])
def test_a_weight_that_was_quantized_before_stays_as_it_is(
    whole: bool, kind: Any, backend: str
) -> None:
    layer, x = randomize_(lora.Linear(6, 4, r=2)), torch.randn(3, 6)
    layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
    with torch.no_grad():
        expected = layer(x)
        if whole:
            with pytest.raises(RuntimeError, match="into which nothing can be merged"):
                lora.merge(layer)
        else:
            layer.eval()
        assert not layer.merged
        torch.testing.assert_close(layer(x), expected)
    layer.train()
    assert type(layer.weight) is kind


@pytest.mark.filterwarnings("ignore:.*was not merged:RuntimeWarning")
def test_a_weight_that_can_not_be_written_to(layer: Any, backend: str) -> None:
    owner = layer._weight_owner()
    row = owner.weight.data[:1]
    owner.weight.data = row.expand_as(owner.weight)
    base = owner.weight.detach().clone()
    for _ in range(2):
        layer.eval()
        assert not layer.merged
        layer.train()
        assert torch.equal(owner.weight, base)


@pytest.mark.filterwarnings("ignore:.*was not merged:RuntimeWarning")
def test_no_memory_for_a_merge_nor_for_the_way_back(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written: so it is not merged, whatever else fails."""

    def no_memory(*args: Any, **options: Any) -> None:
        raise MemoryError("no memory")

    base = layer._weight_owner().weight.detach().clone()
    with lora.use_backend("reference"), monkeypatch.context() as patch:
        patch.setattr(reference, "merge_beside_", no_memory)
        patch.setattr(merging, "unmerge_many", no_memory)
        layer.eval()
        assert not layer.merged
    assert layer.eval().merged
    layer.train()
    assert torch.equal(layer._weight_owner().weight, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_deltas_near_the_largest_number(dtype: torch.dtype, backend: str) -> None:
    layer = lora.Linear(4, 4, r=1).to(dtype)
    base = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_A.fill_(0.5 * torch.finfo(dtype).max)
        layer.lora_B.fill_(1.0)
    assert layer.eval().merged
    assert torch.equal(layer.train().weight, base)


def test_a_refused_load_leaves_what_is_merged_to_be_merged_anew(backend: str) -> None:
    layer, x = randomize_(lora.Linear(4, 5, r=2)).eval(), torch.ones(1, 4)
    layer.scaling = 3.0
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**layer.state_dict(), "lora_A": torch.ones(3, 4)})
    with torch.no_grad():
        merged = layer.eval()(x)
        torch.testing.assert_close(merged, layer.train()(x))


def test_a_failed_merge_of_a_model_leaves_stale_layers_to_be_merged_anew(backend: str) -> None:
    one, two = (randomize_(lora.Linear(4, 4, r=2)) for _ in range(2))
    x = torch.ones(1, 4)
    one.eval()
    with torch.no_grad():
        one.lora_A.add_(1.0)
        two.half()
        two.lora_A.fill_(60000.0)
        two.lora_B.fill_(60000.0)
    with pytest.raises(RuntimeError, match="1: the merged weight does not fit"):
        lora.merge(nn.Sequential(one, two))
    with torch.no_grad():
        merged = one.eval()(x)
        torch.testing.assert_close(merged, one.train()(x))


def test_merge_weights_is_switched_off_when_the_weight_is_unmerged(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = randomize_(lora.Linear(4, 5, r=2))
    base = layer.weight.detach().clone()
    layer.eval()

    def no_memory(*args: Any) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "unmerge_many", no_memory)
        with pytest.raises(MemoryError):
            layer.merge_weights = False
    assert layer.merge_weights
    assert torch.equal(layer.train().weight, base)


@pytest.mark.parametrize("whole", [False, True], ids=["eval", "merge"])
def test_a_base_that_was_put_back_is_merged_anew(whole: bool, backend: str) -> None:
    """As averages put it back after a validation, by `copy_`."""
    layer, x = randomize_(lora.Linear(4, 5, r=2)), torch.randn(3, 4)
    kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        expected = layer(x)
        layer.eval()
        for name, parameter in layer.named_parameters():
            parameter.copy_(kept[name])
        if whole:
            lora.merge(layer)
        else:
            layer.eval()
        torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.train().weight, kept["weight"])


def test_each_layer_that_overflows_is_named(backend: str) -> None:
    """Layers that are alike, of which Python would show one warning."""
    layers = [randomize_(lora.Linear(8, 12, r=2)).half() for _ in range(3)]
    model = nn.ModuleDict({"first": layers[0], "rest": nn.Sequential(*layers[1:])})
    for layer in layers:
        nn.init.constant_(layer.weight, 6e4)
        nn.init.constant_(layer.lora_A, 2e2)
        nn.init.constant_(layer.lora_B, 1e2)
    with pytest.warns(RuntimeWarning) as told:
        model.eval()
    named = [str(warning.message).partition(":")[0] for warning in told]
    assert named == ["first", "rest.0", "rest.1"]
