"""B12 beyond torch: modules of other libraries and one's own that read a layer's weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_
from lora_fast.utils import expose_effective_weight


class Reading(nn.Module):
    """It reads the weight of one projection, and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.qkv.weight, self.qkv.bias).tanh()
        return self.proj(y) + F.linear(y, self.proj.weight)


class ShiftedWindowAttention(Reading):
    """As torchvision names it; a subclass is that of Swin V2."""


ShiftedWindowAttention.__module__ = "torchvision.models.swin_transformer"


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    pass


def adapt(module: nn.Module, *names: str) -> None:
    for name in names:
        old: Any = module.get_submodule(name)
        new: Any
        if isinstance(old, nn.Conv1d):
            sizes = (old.in_channels, old.out_channels, *old.kernel_size)
            options = {"groups": old.groups, "padding": old.padding, "bias": old.bias is not None}
            new = lora.Conv1d(*sizes, r=2, **options)
        elif isinstance(old, nn.Embedding):
            new = lora.Embedding(old.num_embeddings, old.embedding_dim, r=2)
        else:
            new = lora.Linear(old.in_features, old.out_features, r=2, bias=old.bias is not None)
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, randomize_(new))


def plain_twin(make: Callable[[], nn.Module], module: nn.Module) -> nn.Module:
    """The same model without adapters, whose weights are the sums."""
    twin = make()
    state = {k: v for k, v in module.state_dict().items() if "lora_" not in k}
    for name, layer in module.named_modules():
        if isinstance(layer, lora.LoRALayer):
            state.pop(f"{name}.conv.weight", None)
            state[f"{name}.weight"] = layer.effective_weight().detach()
            if getattr(layer, "bias", None) is not None:
                state.pop(f"{name}.conv.bias", None)
                state[f"{name}.bias"] = layer.bias.detach()
    twin.load_state_dict(state)
    return twin.train(module.training)


def check(
    make: Callable[[], nn.Module], module: nn.Module, x: Tensor, learns: bool = True, **more: Tensor
) -> None:
    lora.mark_only_lora_as_trainable(module)
    twin = plain_twin(make, module)
    for mode in (True, False, True):
        found, expected = module.train(mode)(x, **more), twin.train(mode)(x, **more)
        found, expected = (getattr(y, "last_hidden_state", y) for y in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if learns:
        found.sum().backward()
        parameters = module.named_parameters()
        assert not [name for name, p in parameters if "lora_" in name and p.grad is None]
    assert not any("weight" in vars(m) for m in module.modules() if isinstance(m, lora.LoRALayer))


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_swin(kind: type[nn.Module]) -> None:
    module = kind()
    adapt(module, "qkv", "proj")
    check(kind, module, torch.randn(3, 6))


def test_a_module_of_ones_own() -> None:
    module = Reading()
    adapt(module, "qkv", "proj")
    base = module.qkv.weight.detach().clone()
    expose_effective_weight(module, "qkv", "proj")
    expose_effective_weight(module, "proj")  # once is enough
    check(Reading, module, torch.randn(3, 6))
    assert len(module._forward_pre_hooks) == 1
    assert torch.equal(module.qkv.weight, base)


def test_a_module_that_is_not_told_of_reads_the_base_weight() -> None:
    module, x = Reading(), torch.randn(3, 6)
    expected = module(x)
    adapt(module, "qkv")
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("name", ["qkv", "nothing"])
def test_what_is_no_lora_layer_is_refused(name: str) -> None:
    module = Reading()
    adapt(module, "proj")
    with pytest.raises(ValueError, match=f"'{name}' must name a LoRA layer in Reading, got"):
        expose_effective_weight(module, "proj", name)
    assert not module._forward_pre_hooks
    with pytest.raises(TypeError, match="Module, got type"):
        expose_effective_weight(Reading, "qkv")  # type: ignore[arg-type]


def test_the_dropout_that_is_passed_by_warns() -> None:
    module = Reading()
    module.qkv = lora.Linear(6, 12, r=2, lora_dropout=0.5)
    with pytest.warns(UserWarning, match="Reading.qkv: Reading reads .* lora_dropout is not"):
        expose_effective_weight(module, "qkv")


def _x_vector() -> nn.Module:
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer

    sizes = {"tdnn_dim": (4, 6), "tdnn_kernel": (3,), "tdnn_dilation": (1,)}
    return TDNNLayer(Wav2Vec2Config(**sizes))


def test_x_vector_heads() -> None:
    module = _x_vector()
    adapt(module, "kernel")
    check(_x_vector, module, torch.randn(2, 9, 4))


def _deberta() -> nn.Module:
    from transformers import DebertaConfig, DebertaModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    sizes |= {"intermediate_size": 8, "max_relative_positions": 8}
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    kind = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    return DebertaModel(DebertaConfig(**sizes, **off, **kind))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_deberta() -> None:
    model = _deberta()
    adapt(model, "encoder.rel_embeddings")
    check(_deberta, model, torch.randint(11, (2, 5)))


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaModel

    return MambaModel(MambaConfig(**_SMALL))


def _falcon_mamba() -> nn.Module:
    from transformers import FalconMambaConfig, FalconMambaModel

    return FalconMambaModel(FalconMambaConfig(**_SMALL))


def _mamba_2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2Model

    heads = {"num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 4}
    return Mamba2Model(Mamba2Config(**_SMALL, **heads))


_SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "vocab_size": 11,
    "state_size": 4,
}


def _wavlm() -> nn.Module:
    from transformers import WavLMConfig, WavLMModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (4,), "conv_stride": (2,), "conv_kernel": (3,)}
    rest = {"intermediate_size": 8, "num_conv_pos_embeddings": 4}
    off = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
    ) | {"layerdrop": 0.0, "mask_time_prob": 0.0, "num_conv_pos_embedding_groups": 2}
    return WavLMModel(WavLMConfig(**sizes, **convolutions, **rest, **off))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (_mamba, ("x_proj", "dt_proj", "out_proj", "conv1d")),
        (_falcon_mamba, ("x_proj", "dt_proj", "out_proj", "conv1d")),
        (_mamba_2, ("out_proj", "conv1d")),
    ],
)
def test_mamba(make: Callable[[], nn.Module], names: tuple[str, ...]) -> None:
    model = make()
    adapt(model, *(f"layers.0.mixer.{name}" for name in names))
    check(make, model, torch.randint(11, (2, 5)))


class Mamba(Reading):
    """As the package of its authors names it, where nothing is installed."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.in_proj.weight @ x.t()).t()


Mamba.__module__ = "mamba_ssm.modules.mamba_simple"


def test_mamba_of_its_authors() -> None:
    module = Mamba()
    adapt(module, "in_proj")
    check(Mamba, module, torch.randn(3, 6))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_wavlm() -> None:
    model = _wavlm()
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    adapt(model, *(f"encoder.layers.0.attention.{name}" for name in names))
    check(_wavlm, model, torch.randn(2, 60))


def _sew_d() -> nn.Module:
    from transformers import SEWDConfig, SEWDModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "squeeze_factor": 1, "position_buckets": 4}
    convolutions = {"conv_dim": (4,), "conv_stride": (2,), "conv_kernel": (3,)}
    rest = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    off = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
    none = dict.fromkeys((*off, "layerdrop", "mask_time_prob"), 0.0)
    return SEWDModel(SEWDConfig(**sizes, **convolutions, **rest, **none))


def _prophetnet() -> nn.Module:
    from transformers import ProphetNetConfig, ProphetNetDecoder

    sizes = {"hidden_size": 8, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
    sizes |= {"decoder_ffn_dim": 8, "vocab_size": 11, "max_position_embeddings": 8}
    none = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    return ProphetNetDecoder(ProphetNetConfig(**sizes, **none))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "name", "x"),
    [
        (_sew_d, "encoder.encoder.rel_embeddings", torch.randn(1, 40)),
        (_prophetnet, "ngram_embeddings", torch.randint(3, 11, (2, 5))),
    ],
)
def test_tables(make: Callable[[], nn.Module], name: str, x: Tensor) -> None:
    model = make()
    adapt(model, name)
    check(make, model, x)


_LAYOUT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "has_relative_attention_bias": True,
}


def _layoutlmv2() -> nn.Module:
    from transformers import LayoutLMv2Config
    from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

    return LayoutLMv2Encoder(LayoutLMv2Config(**_LAYOUT, has_spatial_attention_bias=True))


def _pp_doclayout_v2() -> nn.Module:
    from transformers.models.pp_doclayout_v2 import modeling_pp_doclayout_v2 as pp

    # With the spatial bias it computes the other one, and leaves it out.
    config = pp.PPDocLayoutV2ReadingOrderConfig(**_LAYOUT, has_spatial_attention_bias=False)
    return pp.PPDocLayoutV2ReadingOrderEncoder(config)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [_layoutlmv2, _pp_doclayout_v2])
def test_layouts(make: Callable[[], nn.Module]) -> None:
    """The biases of positions, which these models read where no gradient is recorded."""
    model, boxes = make(), torch.randint(1, 99, (2, 5, 4))
    adapt(model, "rel_pos_bias")
    if make is _layoutlmv2:
        adapt(model, "rel_pos_x_bias", "rel_pos_y_bias")
    where = {"position_ids": torch.arange(5).expand(2, 5), "bbox": boxes}
    where["attention_mask"] = torch.zeros(2, 1, 1, 5)
    check(make, model, torch.randn(2, 5, 8), learns=False, **where)


def _audio(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind.removesuffix('Model')}Config")
        sizes = {"num_mel_bins": 4, "max_source_positions": 6, "intermediate_size": 8}
        layers = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        return getattr(transformers, kind)(config(**sizes, **layers))  # type: ignore[no-any-return]

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind", ["AudioFlamingo3Encoder", "VoxtralEncoder", "MossTranscribeDiarizeAudioModel"]
)
def test_positions_of_audio(kind: str) -> None:
    make = _audio(kind)
    model, x = make(), torch.randn(2, 4, 12)
    adapt(model, "embed_positions")
    is_masked = kind == "AudioFlamingo3Encoder"
    check(make, model, x, **({"input_features_mask": torch.ones(2, 12)} if is_masked else {}))
