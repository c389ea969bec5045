"""Outputs, gradients, merged weights and dropout draws are those of loralib.

In float64 to ten digits; in lower precision both are held against loralib in float64, because the
two round differently and neither rounding is the right one.
"""

from collections.abc import Callable
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor

import lora_fast
from lora_fast.testing import randomize_

# The fastest path that serves a call, and the one that serves any.
both_backends = pytest.mark.parametrize("backend", ["auto", "reference"])


def both(cls: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The layer of lora_fast and that of loralib, with the same random A and B."""
    layers = []
    for library in (lora_fast, loralib):
        torch.manual_seed(0)
        layers.append(randomize_(getattr(library, cls)(*args, **kwargs)))
    return layers[0], layers[1]


def run(layer: Any, x: Tensor) -> list[Tensor | None]:
    """The output, and all gradients of its sum of squares."""
    leaf = x.detach()
    if x.is_floating_point():
        leaf.requires_grad_()
    y = layer(leaf)
    if y.requires_grad:
        y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def assert_equal_runs(ours: Any, theirs: Any, x: Tensor) -> None:
    torch.manual_seed(1)
    mine = run(ours, x)
    torch.manual_seed(1)
    its = run(theirs, x)
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@both_backends
def test_in_train_mode(drawn: Any, backend: str, assert_same_results: Callable[..., None]) -> None:
    with lora_fast.use_backend(backend):
        assert_same_results(drawn, *drawn.pair())


def test_in_eval_mode(drawn: Any, assert_same_results: Callable[..., None]) -> None:
    ours, theirs = drawn.pair()
    ours.eval()
    theirs.eval()
    assert ours.merged == theirs.merged
    assert_same_results(drawn, ours, theirs)


def test_trained_again_after_eval(drawn: Any, assert_same_results: Callable[..., None]) -> None:
    drawn = drawn.but(dtype=torch.float64)  # in lower precision loralib's weight has drifted
    ours, theirs = drawn.pair()
    for mode in (False, False, True, False, True, True):
        ours.train(mode)
        theirs.train(mode)
        assert ours.merged == theirs.merged
    assert_same_results(drawn, ours, theirs)


def test_the_weight_trained_too(drawn: Any, assert_same_results: Callable[..., None]) -> None:
    ours, theirs = drawn.pair()
    for layer in (ours, theirs):
        layer.requires_grad_(True)
    assert_same_results(drawn, ours, theirs)


@both_backends
def test_state_in_both_modes(drawn: Any, backend: str, assert_same: Callable[..., None]) -> None:
    ours, theirs = drawn.pair()
    for mode in (True, False):
        with lora_fast.use_backend(backend):
            ours.train(mode)
        theirs.train(mode)
        # loralib merges in the layer's dtype; in float64 its merge is the oracle.
        wide = drawn.oracle(drawn.pair()[1], torch.zeros(1))
        wide.train(mode)
        assert_same_states(assert_same, ours, theirs, wide)


def assert_same_states(assert_same: Callable[..., None], ours: Any, theirs: Any, wide: Any) -> None:
    mine, its, exact = ours.state_dict(), theirs.state_dict(), wide.state_dict()
    assert list(mine) == list(its)
    for key, value in its.items():
        assert mine[key].stride() == value.stride(), key
        assert_same(mine[key], value, exact[key], key)


def test_the_generator_moves_as_in_loralib(drawn: Any) -> None:
    ours, theirs = drawn.pair()
    x = drawn.input()
    states = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        for mode in (True, True, False):
            layer.train(mode)
            layer(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_output_lies_as_in_loralib(drawn: Any) -> None:
    ours, theirs = drawn.pair()
    x = drawn.input()
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        mine, its = ours(x), theirs(x)
        assert mine.stride() == its.stride()
        assert mine.dtype == its.dtype
        assert mine.requires_grad == its.requires_grad


def test_merge_AB_and_zero_pad(drawn_merged_linear: Any, assert_same: Callable[..., None]) -> None:
    drawn = drawn_merged_linear.but(r=2)
    ours, theirs = drawn.pair()
    wide = drawn.oracle(theirs, torch.zeros(1))
    assert_same(ours.merge_AB(), theirs.merge_AB(), wide.merge_AB(), "merge_AB()")
    rows = torch.randn(int(theirs.lora_ind.sum()), 3)
    assert torch.equal(ours.zero_pad(rows), theirs.zero_pad(rows))
    assert torch.equal(ours.zero_pad(rows[:, 0]), theirs.zero_pad(rows[:, 0]))


SHAPES = [(5,), (1, 5), (7, 5), (0, 5), (2, 3, 5), (2, 0, 5), (2, 1, 3, 5), (2, 2, 1, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
def test_linear_layers_take_any_number_of_dimensions(
    cls: str, p: float, shape: tuple[int, ...]
) -> None:
    blocks = {"enable_lora": [True, False, True]} if cls == "MergedLinear" else {}
    layers = both(cls, 5, 6, r=2, lora_dropout=p, dtype=torch.float64, **blocks)
    assert_equal_runs(*layers, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
def test_linear_layers_take_any_strides(cls: str, p: float, layout: str) -> None:
    blocks = {"enable_lora": [True, False, True]} if cls == "MergedLinear" else {}
    layers = both(cls, 5, 6, r=2, lora_dropout=p, dtype=torch.float64, **blocks)
    x = {
        "transposed": lambda: torch.randn(5, 7, 3, dtype=torch.float64).permute(1, 2, 0),
        "sliced": lambda: torch.randn(4, 3, 10, dtype=torch.float64)[::2, :, 1::2],
        "expanded": lambda: torch.randn(5, dtype=torch.float64).expand(4, 5),
    }[layout]()
    assert_equal_runs(*layers, x)


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_embedding_takes_indices_of_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layers = both("Embedding", 9, 4, r=2, padding_idx=3, dtype=torch.float64)
    assert_equal_runs(*layers, torch.randint(0, 9, shape, dtype=dtype))


def test_an_embedding_gives_its_padding_no_gradient() -> None:
    layers = both("Embedding", 9, 4, r=2, padding_idx=3, dtype=torch.float64)
    for layer in layers:
        layer.weight.requires_grad = True
    assert_equal_runs(*layers, torch.tensor([3, 3, 1]))
    ours = layers[0]
    assert not ours.weight.grad[3].any()
    assert not ours.lora_A.grad[:, 3].any()
    assert ours.lora_A.grad[:, 1].all()


@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_without_an_adapter_has_all_of_torchs_options(sparse: bool) -> None:
    options = {
        "max_norm": 0.5,
        "norm_type": 1.0,
        "sparse": sparse,
        "scale_grad_by_freq": not sparse,
    }
    ours, theirs = both("Embedding", 9, 4, **options)
    x = torch.tensor([[1, 1, 8], [0, 2, 1]])
    for layer in (ours, theirs):
        layer(x).sum().backward()
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.grad.layout == theirs.weight.grad.layout
    torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2},
    "two groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "no bias": {"bias": False},
    "rectangular stride": {"stride": (1, 2), "padding": (0, 1)},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (4, 7, 6), (0, 4, 7, 6)], ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_with(
    options: dict[str, Any], shape: tuple[int, ...], training: bool
) -> None:
    layers = both("Conv2d", 4, 8, 3, r=2, lora_alpha=3, dtype=torch.float64, **options)
    for layer in layers:
        layer.train(training)
    assert_equal_runs(*layers, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["input", "layer", "both"])
def test_a_convolution_in_channels_last(which: str, training: bool) -> None:
    layers = both("Conv2d", 4, 8, 3, r=2, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    if which != "input":
        layers = tuple(layer.to(memory_format=torch.channels_last) for layer in layers)
    if which != "layer":
        x = x.to(memory_format=torch.channels_last)
    for layer in layers:
        layer.train(training)
    assert_equal_runs(*layers, x)
    ours, theirs = layers
    assert ours(x).stride() == theirs(x).stride()
    assert ours.conv.weight.stride() == theirs.conv.weight.stride()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("cls", ["Linear", "MergedLinear"])
def test_dropout_drops_what_loralib_drops(cls: str, p: float) -> None:
    blocks = {"enable_lora": [True, True, False]} if cls == "MergedLinear" else {}
    layers = both(cls, 40, 30, r=4, lora_dropout=p, dtype=torch.float64, **blocks)
    x = torch.randn(50, 40, dtype=torch.float64)
    for _ in range(3):
        assert_equal_runs(*layers, x)
    assert_equal_runs(layers[0].lora_dropout, layers[1].lora_dropout, x)


@pytest.mark.parametrize("cls", ["Conv1d", "Conv2d", "Conv3d"])
def test_a_convolution_never_drops(cls: str) -> None:
    torch.manual_seed(0)
    theirs = randomize_(getattr(loralib, cls)(2, 3, 1, r=2, lora_dropout=0.9))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="no effect"):
        ours = randomize_(getattr(lora_fast, cls)(2, 3, 1, r=2, lora_dropout=0.9))
    x = torch.randn(2, 2, *(5,) * int(cls[4]))
    before = torch.get_rng_state()
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


@pytest.mark.parametrize("merge_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_autocast_chooses_the_same_dtypes(cls: str, training: bool, merge_weights: bool) -> None:
    args = (4, 6, 3) if cls == "Conv2d" else (4, 6)
    kwargs = {"r": 2, "merge_weights": merge_weights}
    if cls == "MergedLinear":
        kwargs["enable_lora"] = [True, False]
    ours, theirs = both(cls, *args, **kwargs)
    x = {"Embedding": torch.tensor([1, 3]), "Conv2d": torch.randn(2, 4, 5, 5)}.get(
        cls, torch.randn(3, 4)
    )
    found = []
    for layer in (ours, theirs):
        layer.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward() if y.requires_grad else None
        grads = [None if p.grad is None else p.grad.dtype for p in layer.parameters()]
        found.append((y.dtype, grads, [p.dtype for p in layer.parameters()]))
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    assert found[0] == found[1]
    assert found[0][0] is (torch.float32 if cls == "Embedding" else torch.bfloat16)
