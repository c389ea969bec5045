"""Modules that read the weight of a LoRA layer inside them, past its forward and its adapter.

During their own forward they find the effective weight there; the fast path of
`nn.TransformerEncoderLayer`, which is no module's forward, is kept from being taken.
"""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrize

from lora_fast import caller, torch_internals

_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")
_MAMBA_2 = ("conv1d", "out_proj")
_CONV = ("conv1d",)
_POSITIONS = ("embed_positions",)
_LAYOUT = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
# Which layers' weights the classes read that are known to, by the package and the name of each.
# Those of transformers are of 5.23; some read some of these on a GPU alone.
_KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": {"MultiheadAttention": ("out_proj",)},
    "torchvision": {"ShiftedWindowAttention": ("qkv", "proj")},
    "mamba_ssm": {"Mamba": ("in_proj", *_MAMBA), "Mamba2": _MAMBA_2},
    "transformers": {
        **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), _MAMBA),
        "JambaMambaMixer": ("conv1d", "dt_proj"),
        **dict.fromkeys(("Mamba2Mixer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"), _MAMBA_2),
        **dict.fromkeys(("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer"), _MAMBA_2),
        **dict.fromkeys(("ZambaMambaMixer", "BailingHybridDeltaAttention"), _CONV),
        **dict.fromkeys(("KimiLinearDeltaAttention", "Glm5NextTextLinearAttention"), _CONV),
        **dict.fromkeys(("OlmoHybridGatedDeltaNet", "Qwen3NextGatedDeltaNet"), _CONV),
        **dict.fromkeys(("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"), _CONV),
        **dict.fromkeys(("Qwen4ExpTextGatedDeltaNet",), _CONV),
        **dict.fromkeys(("InklingShortConvolution", "Inkling2ShortConvolution"), _CONV),
        **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"), ("conv",)),
        "RecurrentGemmaRecurrentBlock": ("conv_1d",),
        **dict.fromkeys(("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap"), ("k_proj",)),
        "MaskFormerDetrMHAttentionMap": ("k_proj",),
        "DisentangledSelfAttention": ("in_proj",),
        "DabDetrMHAttentionMap": ("k_linear",),
        **dict.fromkeys(("DebertaEncoder", "DebertaV2Encoder"), ("rel_embeddings",)),
        "SEWDTransformerEncoder": ("rel_embeddings",),
        "ProphetNetDecoder": ("ngram_embeddings",),
        **dict.fromkeys(("LayoutLMv2Encoder", "LayoutLMv3Encoder"), _LAYOUT),
        "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
        "LongcatFlashTopkRouter": ("classifier",),
        "MobileBertLMPredictionHead": ("dense", "decoder"),
        "NeoMMEForMaskedLM": ("unembedding_projection",),
        **dict.fromkeys(("Qwen2AudioEncoder", "AudioFlamingo3Encoder"), _POSITIONS),
        **dict.fromkeys(("VoxtralEncoder", "MossTranscribeDiarizeAudioModel"), _POSITIONS),
        "TDNNLayer": ("kernel",),
        "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    },
}
_NAMES = "_reads_effective_weights_of"
_OWN_WEIGHT = "_weight_behind_the_effective_one"


def expose_effective_weight(module: nn.Module, *names: str) -> None:
    """Let a module that reads the weights of LoRA layers inside it find W + scaling B A there.

    For a module that computes with `self.layer.weight` in the place of calling `self.layer`, which
    leaves the adapter out. During the module's forward the layers' `weight` is their
    `effective_weight()`, through which gradients flow to A and B; it takes a dense product each.
    nn.MultiheadAttention, torchvision's Swin transformers, mamba_ssm and those of transformers that
    are known to do so (docs/differences.md, B12) need no call: their layers are found when set.

    Args:
        module: the one that reads.
        names: of its attributes that are LoRA layers.

    Raises:
        TypeError: `module` is no module.
        ValueError: there is no such LoRA layer in `module`; nothing was changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "expose_effective_weight: module must be a torch.nn.Module, got "
            f"{type(module).__name__}"
        )
    for name in names:
        layer = getattr(module, name, None)
        if not _is_adapted(layer):
            raise ValueError(
                f"expose_effective_weight: {name!r} must name a LoRA layer in "
                f"{type(module).__name__}, got {type(layer).__name__}"
            )
    for name in names:
        _expose_from_now_on(module, name, getattr(module, name))


def _is_adapted(layer: Any) -> bool:
    return hasattr(type(layer), "effective_weight")


def _expose_from_now_on(module: nn.Module, name: str, layer: Any) -> None:
    names = vars(module).get(_NAMES, ())
    if name not in names:
        vars(module)[_NAMES] = (*names, name)
    if _expose not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_expose)
        module.register_forward_hook(_hide, always_call=True)
    if isinstance(layer.lora_dropout, nn.Dropout):
        caller.warn(
            f"{_described(module, name)}, so its lora_dropout is not applied; build the layer with "
            "lora_dropout=0",
            UserWarning,
        )


def _described(module: nn.Module, name: str) -> str:
    kind = type(module).__name__
    return f"{kind}.{name}: {kind} reads the layer's weight directly"


@torch_internals.untraced  # it is called for modules of torch.compile's own, half made
def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Prepare modules that read a child's weight directly for a LoRA layer as that child."""
    if child is None or not _is_adapted(child):
        return
    if name in _read_by(type(parent)):
        _expose_from_now_on(parent, name, child)
    elif isinstance(parent, nn.TransformerEncoderLayer):
        # A hook keeps the encoder layer off its fast path, which reads weights past forward.
        child.register_forward_pre_hook(_no_fast_path)


def _read_by(kind: type) -> tuple[str, ...]:
    """The names of the layers whose weights a class is known to read, or one that it inherits."""
    for base in kind.__mro__:
        known = _KNOWN.get(base.__module__.partition(".")[0], {})
        if base.__qualname__ in known:
            return known[base.__qualname__]
    return ()


def _adapted(module: nn.Module) -> list[tuple[str, Any]]:
    """The layers whose weights a module reads, but for those that others have replaced since."""
    pairs = [(name, getattr(module, name, None)) for name in vars(module).get(_NAMES, ())]
    return [(name, layer) for name, layer in pairs if _is_adapted(layer)]


# Seconds after which who waits for another's forward looks again whether it still runs.
_PATIENCE = 0.1
Reader = Callable[[], nn.Module | None]  # a weak reference


class _Turn:
    """Whose forwards read a layer's effective weight: those of one thread at a time.

    torch calls no hook after what is no Exception, Ctrl-C say, so a turn may not be given back.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.thread = 0
        # The modules whose forwards have begun, one within the other.
        self.readers: list[Reader] = []

    def take(self, module: nn.Module) -> bool:
        """Wait for other threads' forwards to end, for one of `module` in this thread.

        Returns:
            Whether it is within no other that reads the same layer.
        """
        thread = threading.get_ident()
        with self.changed:
            while self.thread != thread and self._still_running():
                self.changed.wait(_PATIENCE)
            self.readers = self._still_running(module) if self.thread == thread else []
            self.thread = thread
            self.readers.append(weakref.ref(module))
            return len(self.readers) == 1

    def _still_running(self, besides: nn.Module | None = None) -> list[Reader]:
        """The readers but those that ended without the hook, besides a forward of now."""
        if not self.readers:
            return []
        found, running = [], _forwards(self.thread)
        running[id(besides)] -= 1
        for reader in self.readers:
            running[id(reader())] -= 1
            if running[id(reader())] >= 0:
                found.append(reader)
        return found

    def ends(self, module: nn.Module) -> bool:
        """End a forward of `module`; return whether it is within no other that reads the layer."""
        if self.thread != threading.get_ident():
            return False
        others = self._still_running(module) if len(self.readers) > 1 else []
        if others:
            self.readers = others
        return not others

    def give_back(self) -> None:
        """Let the next thread in, once the weight is no longer exposed."""
        with self.changed:
            self.readers = []
            self.changed.notify()


def _forwards(thread: int) -> Counter[int]:
    """The modules, by their ids, whose forwards a thread is in the middle of."""
    found: Counter[int] = Counter()
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is _CALL:
            found[id(frame.f_locals["self"])] += 1
        frame = frame.f_back
    return found


_CALL = nn.Module._call_impl.__code__  # within which a module's hooks and its forward are called
_turns: "weakref.WeakKeyDictionary[nn.Module, _Turn]" = weakref.WeakKeyDictionary()
_turns_lock = threading.Lock()


def _turn(layer: nn.Module) -> _Turn:
    with _turns_lock:
        return _turns.setdefault(layer, _Turn())


def _expose(module: nn.Module, args: Any) -> None:
    is_first: dict[nn.Module, bool] = {}
    if not torch.compiler.is_compiling():
        # In one order for all modules, so that no two wait for each other.
        for _, layer in sorted(_adapted(module), key=lambda pair: id(pair[1])):
            if not parametrize.is_parametrized(layer, "weight"):
                is_first[layer] = _turn(layer).take(module)
    layers = []
    for name, layer in _adapted(module):
        if parametrize.is_parametrized(layer, "weight"):  # by a property, which would hide it
            if not torch.compiler.is_compiling():
                caller.warn(
                    f"{_described(module, name)}, and a parametrized one without the adapter; "
                    "build the layer without it, or parametrize another one",
                    UserWarning,
                )
        elif is_first.get(layer, True):  # else a forward around this one has it exposed
            layers.append(layer)
    if not torch.compiler.is_compiling():
        for layer in layers:
            _end(module, layer)  # what an interrupted forward has left
    for layer in layers:
        weight = getattr(layer._weight_owner(), "weight", None)
        is_away = _HOOK in vars(layer) and weight is not None and weight.is_meta
        owner = layer if is_away else module
        if _HOOK in vars(owner):
            vars(owner)[_HOOK] = _Exposing(vars(owner)[_HOOK], layer)
        else:
            _put_in(layer)


def _put_in(layer: Any) -> None:
    effective = layer.effective_weight()
    if effective.is_meta and layer._has_adapter() and not layer.lora_A.is_meta:
        raise RuntimeError(
            f"{type(layer).__name__}: the weight is on the meta device, the adapter on "
            f"{layer.lora_A.device}; where accelerate offloads them, name in "
            "preload_module_classes the class that has the weight, or that of the module that "
            "reads it"
        )
    # An instance attribute is found before the parameter of the same name. A replica of
    # nn.DataParallel and a pruned layer have their own weight there.
    vars(layer)[_OWN_WEIGHT] = vars(layer).get("weight")
    vars(layer)["weight"] = effective


# As accelerate calls what it runs around a module's forward, between torch's hooks and that.
_HOOK = "_hf_hook"


class _Exposing:
    """accelerate's hook that brings weights in, or moves them, and a layer that has one of them."""

    def __init__(self, hook: Any, layer: Any) -> None:
        self.hook, self.layer = hook, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("hook"), name)  # a copy has none yet

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = self.hook.pre_forward(module, *args, **kwargs)
        _take_back(self.layer)  # where it is run twice
        _put_in(self.layer)
        return arguments

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        _take_back(self.layer)
        return self.hook.post_forward(module, output)


def _end(module: nn.Module, layer: Any) -> None:
    """Leave the layer, and the hooks that would expose its weight, as they were found."""
    _take_back(layer)
    for owner in (module, layer):
        while isinstance(vars(owner).get(_HOOK), _Exposing):
            vars(owner)[_HOOK] = vars(owner)[_HOOK].hook


def _take_back(layer: nn.Module) -> None:
    without_exposed(vars(layer))


def without_exposed(attributes: dict[str, Any]) -> None:
    """Take an exposed weight out of a layer's attributes, or of a copy of them."""
    if _OWN_WEIGHT not in attributes:
        return
    own = attributes[_OWN_WEIGHT]
    if own is None:
        attributes.pop("weight", None)
    else:
        attributes["weight"] = own
    del attributes[_OWN_WEIGHT]  # last: if Ctrl-C comes before, this is done again


def _hide(module: nn.Module, args: Any, output: Any) -> None:
    for _, layer in _adapted(module):
        if torch.compiler.is_compiling():
            _end(module, layer)
        else:
            turn = _turn(layer)
            if turn.ends(module):
                _end(module, layer)
                turn.give_back()


def _no_fast_path(layer: nn.Module, args: tuple[Tensor]) -> None:  # as torch.jit.script wants it
    return None


def recompute_weight(owner: nn.Module, x: Tensor) -> None:
    """Do what pruning and weight norm do before a forward of `owner`, for one who goes past it."""
    if not owner._forward_pre_hooks:
        return
    own = owner._parameters
    if "weight" in own and "bias" in own:  # where there is no bias, None is
        return
    for key, hook in owner._forward_pre_hooks.items():
        if key not in owner._forward_pre_hooks_with_kwargs:
            hook(owner, (x,))


register_module_module_registration_hook(_on_registration)
