"""Whatever a layer goes through: its base weight keeps its bits, and its output is right."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_

KINDS = {
    "linear": lambda: lora.Linear(7, 9, r=2, lora_alpha=3),
    "transposed": lambda: lora.Linear(7, 9, r=2, fan_in_fan_out=True),
    "merged_linear": lambda: lora.MergedLinear(7, 9, r=2, enable_lora=[True, False, True]),
    "embedding": lambda: lora.Embedding(9, 7, r=2),
    "conv": lambda: lora.Conv1d(3, 4, 3, r=2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALINGS = st.sampled_from([0.5, 1.0, -2.0, 30.0])


class History(RuleBasedStateMachine):
    """A layer, what its base weight must be, and whether what is merged is out of date."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        dtype=st.sampled_from(DTYPES),
        backend=st.sampled_from(["auto", "reference"]),
        seed=st.integers(0, 3),
    )
    def make(self, kind: str, dtype: torch.dtype, backend: str, seed: int) -> None:
        torch.manual_seed(seed)
        lora.set_backend(backend)
        self.layer: Any = randomize_(KINDS[kind]()).to(dtype)
        self.base = self.weight().clone()
        self.is_stale = False
        self.file: tuple[bytes, Tensor] | None = None

    def teardown(self) -> None:
        lora.set_backend("auto")

    def weight(self, layer: Any = None) -> Tensor:
        layer = self.layer if layer is None else layer
        found: Tensor = getattr(layer, "conv", layer).weight
        return found.detach()

    def changed(self) -> None:
        """The adapter is another: what is merged shows only after the next eval()."""
        self.is_stale = self.layer.merged

    @rule()
    def evaluate(self) -> None:
        self.layer.eval()
        self.is_stale = False

    @rule()
    def train(self) -> None:
        assert self.layer.train() is self.layer
        self.is_stale = False
        assert torch.equal(self.weight(), self.base)

    @rule()
    def merge_model(self) -> None:
        if self.layer.r == 0 or (self.layer.merged and not self.layer._is_stale()):
            with pytest.raises(ValueError, match="merge: "):
                lora.merge(self.layer)
        else:
            assert lora.merge(self.layer) == 1
            self.is_stale = False

    @rule()
    def unmerge_model(self) -> None:
        if self.layer.merged and self.layer._merge_state.record is not None:
            assert lora.unmerge(self.layer) == 1
            self.is_stale = False
            assert torch.equal(self.weight(), self.base)

    @rule(factor=st.sampled_from(["lora_A", "lora_B"]))
    def learn(self, factor: str) -> None:
        with torch.no_grad():
            parameter = getattr(self.layer, factor)
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        self.changed()

    @rule(scaling=SCALINGS)
    def scale(self, scaling: float) -> None:
        self.layer.scaling = scaling
        self.changed()

    @rule(rank=st.sampled_from([0, 2]))
    def switch(self, rank: int) -> None:
        self.layer.r = rank
        self.changed()

    @precondition(lambda self: not self.layer.merged)
    @rule()
    def write(self) -> None:
        with torch.no_grad():
            self.weight().copy_(torch.randn_like(self.base))
        self.base = self.weight().clone()

    @rule()
    def put_back_after_eval(self) -> None:
        self.layer.eval()
        with torch.no_grad():
            getattr(self.layer, "conv", self.layer).weight.copy_(self.base)
        self.train()

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        if how == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        else:
            self.layer = pickle.loads(pickle.dumps(self.layer))

    @rule()
    def convert_and_back(self) -> None:
        dtype = self.base.dtype
        merged, off = self.layer.merged, self.layer.r == 0
        self.layer.double().to(dtype)
        # Merged anew, with what the adapter is now.
        self.is_stale = self.is_stale and (off or not merged)

    @rule()
    def share(self) -> None:
        self.layer.share_memory()
        self.is_stale = self.is_stale and self.layer.r == 0

    @rule()
    def save(self) -> None:
        file = io.BytesIO()
        torch.save(self.layer.state_dict(), file)
        self.file = file.getvalue(), self.base.clone()

    @precondition(lambda self: self.file is not None and self.layer.r > 0)
    @rule(assign=st.booleans(), forgets=st.booleans())
    def load(self, assign: bool, forgets: bool) -> None:
        content, base = self.file  # type: ignore[misc]
        had_it = torch.equal(self.base, base)
        if forgets:
            self.train()
            with torch.no_grad():
                self.weight().normal_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of another scaling
            self.layer.load_state_dict(torch.load(io.BytesIO(content)), assign=assign)
        self.is_stale = False
        found = self.weight(copy.deepcopy(self.layer).train())
        if had_it and not forgets:
            assert torch.equal(found, base)
        # Where the layer had another base weight, the file's is what subtracting the delta gives.
        room = 4 * torch.finfo(base.dtype).eps * (base.double().abs().max() + 60.0)
        torch.testing.assert_close(found.double(), base.double(), rtol=0.0, atol=float(room))
        self.base = found.clone()

    @precondition(lambda self: self.layer.r > 0)
    @rule(evaluates=st.booleans(), learns=st.booleans(), forgets=st.booleans())
    def save_and_load(self, evaluates: bool, learns: bool, forgets: bool) -> None:
        if evaluates:
            self.evaluate()
        if learns:
            self.learn("lora_A")
        self.save()
        self.load(assign=False, forgets=forgets)

    @rule(assign=st.booleans())
    def load_its_own(self, assign: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of another scaling
            self.layer.load_state_dict(self.layer.state_dict(), assign=assign)
        self.is_stale = self.is_stale and self.layer.r == 0

    @invariant()
    def the_base_weight_has_its_bits(self) -> None:
        copied = copy.deepcopy(self.layer)
        copied.train()
        assert torch.equal(self.weight(copied), self.base)

    @invariant()
    def the_output_is_right(self) -> None:
        if self.is_stale:
            return
        layer = self.layer
        plain = copy.deepcopy(layer).train()
        weight = plain.effective_weight().detach().double()
        delta = (weight - self.weight(plain).double()).abs().max()
        eps = torch.finfo(self.base.dtype).eps
        with torch.no_grad():
            if isinstance(layer, nn.Embedding):
                x = torch.arange(9)
                found, exact = layer(x), weight[x]
            else:
                size = (2, 3, 8) if hasattr(layer, "conv") else (5, 7)
                x = torch.ones(size, dtype=self.base.dtype)
                found = layer(x)
                bias = layer.bias.double()
                exact = (
                    nn.functional.conv1d(x.double(), weight, bias)
                    if hasattr(layer, "conv")
                    else nn.functional.linear(
                        x.double(), weight.t() if layer.fan_in_fan_out else weight, bias
                    )
                )
        room = 40 * eps * float(weight.abs().max() + delta + 1.0)
        torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=room)


# To shrink a failure takes minutes.
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
History.TestCase.settings = settings(
    max_examples=50, stateful_step_count=25, phases=WITHOUT_SHRINKING
)
TestHistory = pytest.mark.slow(History.TestCase)
