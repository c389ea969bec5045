"""States whose values change after they were taken; layers that lose their adapter while merged."""

import copy
import io
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import lora_fast as lora
from lora_fast import sample
from lora_fast.testing import randomize_

pytestmark = pytest.mark.usefixtures("backend")

SPLIT = {"enable_lora": [True, False, True], "out_splits": [3, 4, 2]}
MAKERS = {
    "linear": lambda: lora.Linear(6, 9, r=2),
    "transposed": lambda: lora.Linear(6, 9, r=2, fan_in_fan_out=True),
    "merged": lambda: lora.MergedLinear(6, 9, r=2, **SPLIT),
    "embedding": lambda: lora.Embedding(6, 9, r=2),
    "conv2d": lambda: lora.Conv2d(4, 6, 3, r=2),
    "channels_last": lambda: lora.Conv2d(4, 6, 3, r=2).to(memory_format=torch.channels_last),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = layer.conv.weight if hasattr(layer, "conv") else layer.weight
    return weight.detach()


def written(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def converted(state: Any, dtype: torch.dtype) -> Any:
    other = OrderedDict((key, value.to(dtype)) for key, value in state.items())
    other._metadata = state._metadata  # type: ignore[attr-defined]
    return other


@pytest.mark.parametrize(("dtype", "trained"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_state_of_the_evaluation_written_after_it(
    name: str, dtype: torch.dtype, trained: bool
) -> None:
    """As best_state = model.state_dict() in an evaluation: its tensors go on with the model."""
    layer = randomize_(MAKERS[name]()).to(dtype)
    base = weight_of(layer).clone()
    state = layer.eval().state_dict()
    layer.train()
    if trained:
        randomize_(layer)
    saved = written(state)
    assert saved._metadata[""]["lora_merged"]
    for target in (MAKERS[name]().to(dtype), layer, layer.eval()):
        target.load_state_dict(saved)
        assert torch.equal(weight_of(target.train()), base)
        assert torch.equal(target.lora_B, layer.lora_B)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_state_is_still_a_merged_one(name: str, dtype: torch.dtype) -> None:
    layer = randomize_(MAKERS[name]()).to(dtype)
    base = weight_of(layer).clone()
    saved = written(layer.eval().state_dict())
    other = MAKERS[name]().to(dtype)
    other.load_state_dict(saved)
    room = {"rtol": 0.0, "atol": 8 * torch.finfo(dtype).eps * weight_of(layer).abs().max().item()}
    torch.testing.assert_close(weight_of(other), base, **room)


@pytest.mark.parametrize("change", ["rows", "columns", "order"])
def test_a_merged_state_that_was_changed_as_a_whole_is_still_one(change: str) -> None:
    """As for new tokens, wider layers, or another convention of rotary embeddings."""
    layer = randomize_(lora.Linear(8, 12, r=2))
    base = layer.weight.detach().clone()
    state = copy.deepcopy(layer.eval().state_dict())
    order = torch.randperm(12)
    if change == "rows":
        state["weight"] = torch.cat([state["weight"], torch.randn(5, 8)])
        state["lora_B"] = torch.cat([state["lora_B"], torch.zeros(5, 2)])
        state["bias"] = torch.cat([state["bias"], torch.zeros(5)])
    elif change == "columns":
        state["weight"] = torch.cat([state["weight"], torch.randn(12, 3)], 1)
        state["lora_A"] = torch.cat([state["lora_A"], torch.zeros(2, 3)], 1)
    else:
        state["weight"], state["lora_B"] = state["weight"][order], state["lora_B"][order]
        base = base[order]
    rows, columns = state["weight"].shape
    other = lora.Linear(columns, rows, r=2)
    other.load_state_dict(state)
    torch.testing.assert_close(other.weight.detach()[:12, :8], base)


def test_a_merged_state_is_loaded_under_a_default_device() -> None:
    layer = randomize_(lora.Linear(8, 12, r=2))
    base = layer.weight.detach().clone()
    state = copy.deepcopy(layer.eval().state_dict())
    with torch.device("meta"):
        other = lora.Linear(8, 12, r=2)
        other.load_state_dict(state, assign=True)
    torch.testing.assert_close(other.weight.detach(), base)


def test_a_merged_state_in_8_bits(name: str) -> None:
    layer = randomize_(MAKERS[name]())
    base = weight_of(layer).clone()
    state = copy.deepcopy(layer.eval().state_dict())
    key = "conv.weight" if hasattr(layer, "conv") else "weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    other = MAKERS[name]()
    other.load_state_dict(state)
    room = 0.07 * weight_of(layer).abs().max().item()
    torch.testing.assert_close(weight_of(other), base, rtol=0.0, atol=room)


def test_what_is_as_near_to_the_base_as_to_the_sum_is_not_the_base() -> None:
    weight, factors = torch.zeros(2, 2), (torch.zeros(1, 2), torch.zeros(2, 1))
    element = [[0.0, 0.0, 1.0 + 2**-9, 1.0]]  # one number in bf16
    weight[0, 0] = 1.0
    now = sample.compared(element, weight.bfloat16(), *factors, 1.0, torch.bfloat16)
    assert now == "merged"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_base_put_into_a_merged_state(name: str, dtype: torch.dtype) -> None:
    """To bring an adapter to another model: the mark is of the weight that was there."""
    layer, other, target = (randomize_(MAKERS[name]()).to(dtype) for _ in range(3))
    saved = written(layer.eval().state_dict())
    saved.update({k: v.clone() for k, v in other.state_dict().items() if "lora" not in k})
    target.load_state_dict(saved)
    assert torch.equal(weight_of(target), weight_of(other))
    assert torch.equal(target.lora_A, layer.lora_A)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("was_unmerged", [False, True])
def test_in_another_dtype(name: str, low: torch.dtype, was_unmerged: bool) -> None:
    layer = randomize_(MAKERS[name]())
    base = weight_of(layer).clone()
    state = layer.eval().state_dict()
    if was_unmerged:
        layer.train()
    saved = written(converted(state, low))
    other = MAKERS[name]()
    other.load_state_dict(saved)
    room = 8 * torch.finfo(low).eps * max(weight_of(layer).abs().max().item(), 1.0)
    torch.testing.assert_close(weight_of(other), base, rtol=0.0, atol=room)


def test_a_sample_is_of_what_the_delta_changes(name: str) -> None:
    layer = randomize_(MAKERS[name]())
    base = layer._as_delta(weight_of(layer)).clone()
    layer.eval()
    merged, blocks = layer._as_delta(weight_of(layer)), layer._blocks()
    factors = (layer.lora_A.detach(), layer.lora_B.detach())
    elements = sample.taken(merged, *factors, layer.scaling, **blocks)
    assert 0 < len(elements) <= 8
    parts = [sample._parts(weight, *factors, blocks) for weight in (merged, base)]
    for number, at, shown, original in elements:
        index = torch.unravel_index(torch.tensor(int(at)), parts[0][int(number)][0].shape)
        assert parts[0][int(number)][0][index] == shown
        assert parts[1][int(number)][0][index] == pytest.approx(original, rel=1e-5, abs=1e-6)
    options = {"like": merged.dtype, "lora_A": factors[0], "lora_B": factors[1], **blocks}
    options["scaling"] = layer.scaling
    assert sample.compared(elements, base, **options) == "base"
    assert sample.compared(elements, merged, **options) == "merged"
    assert sample.compared(elements, base + 0.5 * (merged - base), **options) == "merged"
    assert sample.compared(elements, base - (merged - base), **options) == "other"
    assert sample.compared([], base, **options) is None
    options["lora_B"] = factors[1].flip(0)  # the rows of the whole layer are in another order
    assert sample.compared(elements, base - (merged - base), **options) is None


def test_a_delta_that_shows_nowhere_has_no_sample(name: str) -> None:
    layer = MAKERS[name]().eval()  # one factor is zero
    assert layer.state_dict()._metadata[""]["lora_sample"] == []


@pytest.mark.parametrize("how", ["r", "deleted"])
def test_loading_after_the_adapter_was_switched_off(name: str, how: str) -> None:
    layer: Any = randomize_(MAKERS[name]()).eval()
    key = layer._weight_key()
    fresh = torch.randn_like(weight_of(layer))
    if how == "deleted":
        del layer.lora_A, layer.lora_B
    layer.r = 0
    layer.load_state_dict({key: fresh}, strict=False)
    assert torch.equal(weight_of(layer), fresh)
    assert torch.equal(weight_of(layer.train()), fresh)


def test_unmerging_after_the_adapter_was_switched_off(name: str) -> None:
    model = nn.Sequential(*(randomize_(MAKERS[name]()) for _ in range(2)))
    bases = [weight_of(layer).clone() for layer in model]
    lora.merge(model)
    model[0].r = 0
    assert model.state_dict()._metadata["0"]["lora_merged"]
    assert lora.unmerge(model) == 2
    assert all(torch.equal(weight_of(m), w) for m, w in zip(model, bases, strict=True))


class Doubled(nn.Module):
    def forward(self, factor: Tensor) -> Tensor:
        return 2 * factor


def test_a_merged_state_with_parametrized_factors() -> None:
    def layer() -> Any:
        made = lora.Linear(4, 5, r=2)
        parametrize.register_parametrization(made, "lora_A", Doubled())
        return made

    one, x = layer(), torch.randn(3, 4)
    nn.init.normal_(one.lora_B)
    y, base = one(x), one.weight.detach().clone()
    state = copy.deepcopy(one.eval().state_dict())
    for mode in (True, False):
        other = layer().train(mode)
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), y)
        torch.testing.assert_close(other.train().weight.detach(), base)


@pytest.mark.filterwarnings("ignore:.*the adapter was saved with scaling")
@pytest.mark.parametrize("what", ["lora_A", "lora_B", "scaling"])
def test_a_state_after_the_factors_changed_while_merged(name: str, what: str) -> None:
    layer: Any = randomize_(MAKERS[name]())
    base = weight_of(layer).clone()
    layer.eval()
    if what == "scaling":
        layer.scaling = 2.0
    else:
        nn.init.normal_(getattr(layer, what))
    state = written(layer.state_dict())
    assert torch.equal(weight_of(layer.train()), base)
    layer.load_state_dict(state)
    torch.testing.assert_close(weight_of(layer), base)
    other = MAKERS[name]()
    other.load_state_dict(state)
    torch.testing.assert_close(weight_of(other), base)


@pytest.mark.parametrize(
    ("own", "low"),
    [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.half)],
    ids=str,
)
def test_a_plain_dict_in_another_dtype_is_recognised(
    name: str, own: torch.dtype, low: torch.dtype
) -> None:
    layer: Any = randomize_(MAKERS[name]()).to(own)
    base = weight_of(layer).clone()
    plain = {key: value.to(low) for key, value in layer.eval().state_dict().items()}
    layer.train()
    layer.load_state_dict(plain)
    assert torch.equal(weight_of(layer), base)


def test_a_merged_state_without_its_factors_warns() -> None:
    layer = randomize_(lora.Linear(4, 5, r=2)).eval()
    state = copy.deepcopy(layer.state_dict())
    del state["lora_A"], state["lora_B"]
    with pytest.warns(UserWarning, match="weight: it was saved merged, and without the lora_A"):
        lora.Linear(4, 5, r=2).load_state_dict(state, strict=False)


def test_a_sample_of_a_layer_with_other_blocks_tells_nothing() -> None:
    wide = {"enable_lora": [True, True], "out_splits": [8, 1]}
    narrow = {"enable_lora": [True, True], "out_splits": [1, 8]}
    factors = (torch.randn(4, 6), torch.randn(9, 2))
    elements = sample.taken(torch.randn(9, 6), *factors, 0.5, **wide)
    weight = torch.randn(9, 6)
    assert sample.compared(elements, weight, *factors, 0.5, torch.float32, **narrow) is None
    outside = [[0.0, 40.0, 1.0, 0.0]]
    assert sample.compared(outside, weight, *factors, 0.5, torch.float32, **narrow) is None
    element = [[2.0, 0.0, 1.0, 0.0]]
    assert sample.compared(element, weight, *factors, 0.5, torch.float32, **narrow) is None


def test_a_state_taken_under_fake_tensors(name: str) -> None:
    layer = randomize_(MAKERS[name]()).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.state_dict()._metadata[""]["lora_sample"] == []


SPAWNING = """
import torch
import lora_fast as lora
from lora_fast.testing import randomize_

def train(model, bases):
    model.train()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model, bases))

if __name__ == "__main__":
    model = torch.nn.Sequential(*(randomize_(lora.Linear(64, 64, r=2)) for _ in range(3)))
    bases = [layer.weight.detach().clone() for layer in model]
    arguments = (model.eval(), bases)
    child = torch.multiprocessing.get_context("spawn").Process(target=train, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert model.train()[0]._merge_state.given_to_child is None
"""


def test_merged_layers_go_to_a_spawned_process(tmp_path: Path, backend: str) -> None:
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    environment = os.environ | {"LORA_FAST_BACKEND": backend}
    subprocess.run([sys.executable, script], check=True, timeout=120, env=environment)


def test_a_sample_is_taken_once_for_a_weight_that_nobody_writes_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Averages ask for a state at each step, and to take a sample takes longer than the rest."""
    layer = randomize_(lora.Linear(8, 6, r=2)).eval()
    if layer._merge_state.record.original is not None:
        pytest.skip("a copy says nothing of what was written past torch's count")
    calls, taken = [], sample.taken
    monkeypatch.setattr(sample, "taken", lambda *a, **b: calls.append(1) or taken(*a, **b))

    def marks() -> dict[str, Any]:
        return layer.state_dict()._metadata[""]

    first = marks()
    first["lora_sample"][0][2] += 1.0
    assert marks()["lora_sample"][0][2] != first["lora_sample"][0][2]
    assert len(calls) == 1
    layer.weight.data.mul_(1.5)  # which torch does not count
    assert marks()["lora_sample"] != first["lora_sample"]
    assert len(calls) == 2
    layer.train().eval()
    marks()
    assert len(calls) == 3
