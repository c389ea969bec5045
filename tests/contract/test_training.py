"""Training runs, checkpoints and the models of loralib's own examples."""

import io
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast
from lora_fast.testing import randomize_

LIBRARIES = [lora_fast, loralib]
EPOCHS = 6
STEPS_PER_EPOCH = 4
DOUBLE = {"dtype": torch.float64}


class Classifier(nn.Module):
    """Every kind of layer on the way from tokens and an image to logits."""

    def __init__(self, library: ModuleType, merge_weights: bool, fan_in_fan_out: bool) -> None:
        super().__init__()
        adapter = {"r": 3, "lora_alpha": 6, "merge_weights": merge_weights, **DOUBLE}
        dense = {"lora_dropout": 0.2, "fan_in_fan_out": fan_in_fan_out, **adapter}
        self.embed = library.Embedding(13, 8, padding_idx=0, **adapter)
        self.qkv = library.MergedLinear(8, 24, enable_lora=[True, False, True], **dense)
        self.norm = nn.LayerNorm(8, **DOUBLE)
        self.up = library.Linear(8, 16, **dense)
        self.down = library.Linear(16, 8, bias=False, **dense)
        self.conv = library.Conv2d(1, 4, 3, padding=1, groups=1, **adapter)
        self.head = nn.Linear(4, 3, **DOUBLE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + torch.softmax(q @ k.mT, -1) @ v)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.conv(x.unsqueeze(1)).mean((2, 3)))


def classifier(library: ModuleType, merge_weights: bool = True, transposed: bool = False) -> Any:
    torch.manual_seed(3)
    return Classifier(library, merge_weights, transposed)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 13, (6, 5), generator=generator)
    return tokens, tokens[:, 0] % 3


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
}


def curve(library: ModuleType, model: nn.Module, optimizer: str, bias: str) -> list[Tensor]:
    """Losses of a few epochs with dropout, each followed by a validation in eval mode."""
    library.mark_only_lora_as_trainable(model, bias=bias)
    descend = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(4)
    losses = []
    for epoch in range(EPOCHS):
        model.train()
        for step in range(STEPS_PER_EPOCH):
            tokens, target = batch(step)
            loss = F.cross_entropy(model(tokens), target)
            descend.zero_grad()
            loss.backward()
            descend.step()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            tokens, target = batch(-1 - epoch)
            losses.append(F.cross_entropy(model(tokens), target))
    return losses


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("merge_weights", [True, False])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_curves(optimizer: str, bias: str, merge_weights: bool, transposed: bool) -> None:
    models = [classifier(library, merge_weights, transposed) for library in LIBRARIES]
    mine, its = (
        curve(library, model, optimizer, bias)
        for library, model in zip(LIBRARIES, models, strict=True)
    )
    torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-8)
    epochs = torch.stack(mine).view(EPOCHS, -1)[:, :STEPS_PER_EPOCH].mean(1)
    assert epochs[-1] < 0.97 * epochs[0], "nothing was learnt"
    for (name, ours), (_, theirs) in zip(
        models[0].named_parameters(), models[1].named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7, msg=name)


def test_the_training_curve_with_biases_of_adapted_layers() -> None:
    models = [classifier(library) for library in LIBRARIES]
    for model in models:  # loralib forgets the bias of a convolution
        model.conv.conv.bias = None
    mine, its = (
        curve(library, model, "adamw", "lora_only")
        for library, model in zip(LIBRARIES, models, strict=True)
    )
    torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-8)


def test_training_leaves_the_frozen_weights_alone() -> None:
    model = classifier(lora_fast)
    before = {name: p.clone() for name, p in model.named_parameters()}
    curve(lora_fast, model, "adamw", "none")
    model.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def outputs(model: nn.Module, training: bool) -> Tensor:
    model.train(training)
    torch.manual_seed(6)
    with torch.no_grad():
        return model(batch(100)[0])


DIRECTIONS = pytest.mark.parametrize(
    ("giver", "taker"),
    [(loralib, lora_fast), (lora_fast, loralib), (lora_fast, lora_fast)],
    ids=["from loralib", "to loralib", "to itself"],
)


@DIRECTIONS
@pytest.mark.parametrize("transposed", [False, True])
def test_a_whole_checkpoint_loads_strictly(
    giver: ModuleType, taker: ModuleType, transposed: bool
) -> None:
    trained = classifier(giver, transposed=transposed)
    curve(giver, trained, "adamw", "all")
    trained.train()
    fresh = randomize_(classifier(taker, transposed=transposed))
    fresh.load_state_dict(through_a_file(trained.state_dict()), strict=True)
    for training in (True, False):
        torch.testing.assert_close(outputs(fresh, training), outputs(trained, training))


@DIRECTIONS
@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_checkpoint_completes_the_base(
    giver: ModuleType, taker: ModuleType, bias: str
) -> None:
    trained = classifier(giver)
    curve(giver, trained, "sgd", bias)
    trained.train()
    adapters = through_a_file(giver.lora_state_dict(trained, bias=bias))
    fresh = classifier(taker)
    missing, unexpected = fresh.load_state_dict(adapters, strict=False)
    assert unexpected == []
    assert set(missing) == fresh.state_dict().keys() - adapters.keys()
    for training in (True, False):
        torch.testing.assert_close(outputs(fresh, training), outputs(trained, training))


def test_a_merged_export_serves_a_plain_model() -> None:
    """People export with `eval()` and `state_dict()`: the weights are the merged ones."""
    exports = []
    for library in LIBRARIES:
        model = randomize_(classifier(library))
        model.eval()
        exports.append(model.state_dict())
    assert list(exports[0]) == list(exports[1])
    torch.testing.assert_close(dict(exports[0]), dict(exports[1]), rtol=1e-10, atol=1e-10)
    plain = nn.Linear(8, 16, **DOUBLE)
    plain.load_state_dict(
        {"weight": exports[0]["up.weight"], "bias": exports[0]["up.bias"]}, strict=True
    )
    adapted = randomize_(classifier(lora_fast))
    adapted.eval()
    x = torch.randn(4, 8, **DOUBLE)
    torch.testing.assert_close(plain(x), adapted.up(x))


def test_a_plain_checkpoint_lacks_only_the_adapters() -> None:
    plain = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Embedding(5, 3)})
    for library in LIBRARIES:
        adapted = nn.ModuleDict({"a": library.Linear(3, 4, r=2), "b": library.Embedding(5, 3, r=2)})
        missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
        assert missing == ["a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B"]
        assert unexpected == []
        assert torch.equal(adapted["a"].weight, plain["a"].weight)
        with pytest.raises(RuntimeError, match="lora_A"):
            adapted.load_state_dict(plain.state_dict())


def test_assigning_a_checkpoint_keeps_what_is_trained() -> None:
    for library in LIBRARIES:
        model, state = classifier(library), classifier(library).state_dict()
        library.mark_only_lora_as_trainable(model)
        before = [p.requires_grad for p in model.parameters()]
        model.load_state_dict(state, assign=True)
        assert [p.requires_grad for p in model.parameters()] == before
        assert model.up.weight.data_ptr() == state["up.weight"].data_ptr()


class Gpt2Attention(nn.Module):
    """The projection in examples/NLG/src/model.py."""

    def __init__(self, library: ModuleType, dropout: float) -> None:
        super().__init__()
        self.c_attn = library.MergedLinear(
            12,
            12 * 3,
            r=4,
            lora_alpha=32,
            lora_dropout=dropout,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(12, dim=2)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_gpt2_example(dropout: float, training: bool) -> None:
    pretrained = {"c_attn.weight": torch.randn(12, 36), "c_attn.bias": torch.randn(36)}
    x, results = torch.randn(2, 5, 12, **DOUBLE), []
    for library in LIBRARIES:
        torch.manual_seed(0)
        model = Gpt2Attention(library, dropout)
        model.load_state_dict(pretrained, strict=False)
        randomize_(model.double())
        library.mark_only_lora_as_trainable(model)
        model.train(training)
        assert not model.c_attn.merged
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


class RobertaLayer(nn.Module):
    """The self-attention's projections in examples/NLU's roberta."""

    def __init__(self, library: ModuleType, hidden: int, lora_r: int, lora_alpha: int) -> None:
        super().__init__()
        self.query = library.Linear(hidden, hidden, lora_r, lora_alpha=lora_alpha)
        self.key = nn.Linear(hidden, hidden)
        self.value = library.Linear(hidden, hidden, lora_r, lora_alpha=lora_alpha)


def roberta(library: ModuleType, lora_r: int = 8) -> nn.Module:
    """12 layers and a classifier, with the names that the published adapters have."""
    torch.manual_seed(0)
    layers = []
    for _ in range(12):
        attention = nn.ModuleDict({"self": RobertaLayer(library, 16, lora_r, 16)})
        layers.append(nn.ModuleDict({"attention": attention}))
    model = nn.ModuleDict(
        {
            "roberta": nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)})}),
            "classifier": nn.ModuleDict({"dense": nn.Linear(16, 16), "out_proj": nn.Linear(16, 3)}),
        }
    )
    return model


def test_the_roberta_example() -> None:
    theirs, ours = randomize_(roberta(loralib)), roberta(lora_fast)
    head = {k: v for k, v in theirs.state_dict().items() if k.startswith("classifier.")}
    published = through_a_file({**loralib.lora_state_dict(theirs), **head})
    assert len(published) == 52
    _, unexpected = ours.load_state_dict(published, strict=False)
    assert unexpected == []
    first = "roberta.encoder.layer.0.attention.self"
    assert published[f"{first}.query.lora_A"].shape == (8, 16)
    x = torch.randn(3, 16)
    for layer in ("query", "value"):
        mine, its = (m.get_submodule(f"{first}.{layer}") for m in (ours, theirs))
        torch.testing.assert_close(mine(x), its(x))
    lora_fast.mark_only_lora_as_trainable(ours)
    for parameter in ours["classifier"].parameters():
        parameter.requires_grad = True
    assert sorted(n for n, p in ours.named_parameters() if p.requires_grad) == sorted(published)


def test_a_rank_of_zero_switches_the_roberta_example_off() -> None:
    model = roberta(lora_fast, lora_r=0)
    assert not any("lora_" in key for key in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("apply_lora", [True, False])
def test_the_deberta_example_asks_for_lora_A(apply_lora: bool) -> None:
    """It scales a projection only where `hasattr(proj, "lora_A")`."""
    found = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        r = 4 if apply_lora else 0
        proj = library.Linear(6, 6, r=r, lora_alpha=8, merge_weights=False)
        plain = nn.Linear(6, 6)
        found.append((hasattr(proj, "lora_A"), hasattr(plain, "lora_A")))
        proj.eval()
        assert not proj.merged
    assert found[0] == found[1] == (apply_lora, False)
