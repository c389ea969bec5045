"""Convolutions with an adapter on the kernel: conv(X, W + lora_alpha / r * (B A).view(W), bias)."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from lora_fast import bypasses, caller, checks, functional, notices, scripting
from lora_fast.lora_layer import LoRALayer, MergingLayer, redrawing

# What a caller finds on a plain nn.Conv*d, and may read and write here too.
_CONV_ATTRIBUTES = frozenset(
    (
        "weight",
        "bias",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "transposed",
        "output_padding",
        "groups",
        "padding_mode",
        "_reversed_padding_repeated_twice",  # of padding, for other modes than zeros
    )
)


class ConvLoRA(MergingLayer, nn.Module, LoRALayer):
    """A convolution module, kept as `conv`, with an adapter on its kernel.

    Args:
        conv_module: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, a subclass, or a function that makes
            one; of another kind only for a subclass of this with a `forward` of its own.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: k; with an adapter the same in every dimension, also as a tuple.
        r: rank of the adapter; 0 for none. With r > 0 the kernel is frozen, the bias is not.
        lora_alpha: scale of the update.
        lora_dropout: accepted as in loralib, where it has no effect either; warns.
        merge_weights: whether `eval()` folds the adapter into the kernel.
        kwargs: `stride`, `padding` and so on, as for the convolution module.

    Raises:
        ValueError: with r > 0, the kernel is not the same size in every dimension; a number of
            channels is negative, `lora_alpha` not finite or `lora_dropout` outside [0, 1].
        TypeError: with r > 0, the module is of another kind; `r` or a number of channels is no
            integer, or `lora_alpha` or `lora_dropout` no number.

    Note:
        A is (r k, in_channels k), B (out_channels / groups * k^(d-1), r k) with d spatial
        dimensions: for d = 2 loralib's shapes. The rank of the update is up to r k, not r.
    """

    if TYPE_CHECKING:  # what `__getattr__` finds; TorchScript would look for it here
        weight: nn.Parameter
        bias: nn.Parameter | None
        in_channels: int
        out_channels: int
        kernel_size: tuple[int, ...]
        stride: tuple[int, ...]
        padding: str | tuple[int, ...]
        dilation: tuple[int, ...]
        transposed: bool
        output_padding: tuple[int, ...]
        groups: int
        padding_mode: str

    def __init__(
        self,
        conv_module: Callable[..., nn.Conv1d | nn.Conv2d | nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        has_adapter = checks.adapter(r, lora_alpha, lora_dropout) > 0
        checks_kind = has_adapter and self._computes_here()
        _check_kind(conv_module, checks_kind)
        if conv_module in _KINDS:  # others may take more than integers
            groups = {"groups": kwargs["groups"]} if "groups" in kwargs else {}
            channels = {"in_channels": in_channels, "out_channels": out_channels}
            checks.size(type(self).__name__, **channels, **groups)
        k: Any = _square(kernel_size, conv_module) if has_adapter else kernel_size
        if lora_dropout > 0.0:
            caller.warn(
                f"{type(self).__name__}: lora_dropout={lora_dropout} has no effect on a "
                "convolution, as in loralib; leave it out",
                UserWarning,
            )
        super().__init__()
        self.conv = conv_module(in_channels, out_channels, k, **kwargs)  # draws
        _check_kind(type(self.conv), checks_kind)  # what a function has made
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if self.r > 0:
            weight = self.conv.weight
            rows = out_channels // self.conv.groups * k ** (weight.dim() - 3)
            self.lora_A = nn.Parameter(weight.new_zeros((self.r * k, in_channels * k)))
            self.lora_B = nn.Parameter(weight.new_zeros((rows, self.r * k)))
            self.scaling = checks.scaling_of(self.lora_alpha, self.r)
            weight.requires_grad = False
        self.reset_parameters()
        self._register_hooks()

    def reset_parameters(self) -> None:
        """Draw the convolution and A anew; B is zero, so the adapter's update is too."""
        with redrawing(self):
            self.conv.reset_parameters()
            if self._has_adapter():
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
                nn.init.zeros_(self.lora_B)

    def _computes_here(self) -> bool:
        """Tell whether the forward is ours: a subclass's own may be for transposed kernels."""
        forward = type(self).forward
        return getattr(forward, "__wrapped__", forward) is MergingLayer.forward

    def _weight_owner(self) -> nn.Module:
        return self.conv

    def _weight_key(self) -> str:
        return "conv.weight"

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, (batch, in_channels, *space) or without the batch."""
        conv: Any = self._modules["conv"]  # past the lookups of an attribute, three calls
        try:
            if self.r > 0 and not self.merged:
                bypasses.recompute_weight(conv, x)
                lora_A, lora_B = self._look_up(x, "lora_A", "lora_B")
                weight = functional.merged_weight(conv.weight, lora_A, lora_B, self.scaling)
                if type(conv).forward not in _TORCH_FORWARDS:  # standardizes the weight, say
                    return functional_call(conv, {"weight": weight}, x)  # type: ignore[no-any-return]
                y: Tensor = conv._conv_forward(x, weight, conv.bias)
                return y
            notices.no_gradient(self)
            y = conv(x)
            return y
        except RuntimeError:
            own, bias = getattr(conv, "weight", None), getattr(conv, "bias", None)
            checks.one_dtype(type(self).__name__, "weight", own, x=x, bias=bias)
            raise

    def _forward_in_script(self, x: Tensor) -> Tensor:
        if hasattr(self, "lora_A") and not self.merged:
            weight = scripting.merged_kernel(
                self.conv.weight, self.lora_A, self.lora_B, self.scaling
            )
            y: Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
        else:
            y = self.conv(x)
        return y

    def __getattr__(self, name: str) -> Any:
        """Read the convolution's settings and parameters as if this were the convolution."""
        if name in _CONV_ATTRIBUTES and "conv" in self.__dict__.get("_modules", ()):
            return getattr(self.conv, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Write the convolution's settings and parameters where they are, never a second copy."""
        is_its = name in _CONV_ATTRIBUTES and "conv" in self.__dict__.get("_modules", ())
        if is_its and name in ("weight", "bias"):  # else a flag of a subclass
            is_its = value is None or isinstance(value, Tensor)
        if is_its:
            setattr(self.conv, name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse what pruning and the like would put in the place of the convolution's weight.

        Raises:
            ValueError: `name` is such a name. Nothing has changed.
        """
        if name in ("weight_orig", "bias_orig"):
            raise ValueError(
                f"{type(self).__name__} has no {name.removesuffix('_orig')} of its own to prune or "
                "parametrize: its convolution has; apply it to layer.conv"
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # loralib 0.1.1 wrote weight and bias, its newest commit those and conv.weight, conv.bias.
        # That commit's are the same memory; a state that was updated by a plain convolution's has
        # two, and the latter is meant.
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}conv.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _OfOneKind(ConvLoRA):
    """A convolution whose module is that of its class."""

    _conv_module: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]

    if TYPE_CHECKING:

        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int | Sequence[int],
            r: int = 0,
            lora_alpha: float = 1,
            lora_dropout: float = 0.0,
            merge_weights: bool = True,
            **kwargs: Any,
        ) -> None: ...

    else:  # the signature is loralib's, too

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(self._conv_module, *args, **kwargs)


class Conv1d(_OfOneKind):
    """`nn.Conv1d` with an adapter; arguments as for `ConvLoRA` without `conv_module`."""

    _conv_module = nn.Conv1d


class Conv2d(_OfOneKind):
    """`nn.Conv2d` with an adapter; arguments as for `ConvLoRA` without `conv_module`."""

    _conv_module = nn.Conv2d


class Conv3d(_OfOneKind):
    """`nn.Conv3d` with an adapter; arguments as for `ConvLoRA` without `conv_module`."""

    _conv_module = nn.Conv3d


_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TORCH_FORWARDS = frozenset(kind.forward for kind in _KINDS)


def _check_kind(conv_module: Any, has_adapter: bool) -> None:
    """Refuse what makes no convolution that an adapter fits: a transposed one, say."""
    makes_none = not callable(conv_module) or isinstance(conv_module, nn.Module)
    is_other = isinstance(conv_module, type) and not issubclass(conv_module, _KINDS)
    if makes_none or (has_adapter and is_other):
        raise TypeError(
            "conv_module must be nn.Conv1d, nn.Conv2d or nn.Conv3d, or a subclass, for whose "
            f"kernels the adapter is built, got {conv_module!r}"
        )


def _square(kernel_size: int | Sequence[int], conv_module: Any) -> int:
    given: list[Any] = list(kernel_size) if checks.in_order(kernel_size) else [kernel_size]
    sizes = [None if isinstance(size, bool) else checks.integer(size) for size in given]
    k = sizes[0] if sizes else None
    classes = enumerate(_KINDS, start=1)
    is_class = isinstance(conv_module, type)
    dims = [d for d, cls in classes if is_class and issubclass(conv_module, cls)]
    fits = len(sizes) == 1 or not dims or len(sizes) == dims[0]
    if k is None or not fits or any(size != k for size in sizes):
        raise ValueError(
            "kernel_size must be one integer, or a tuple of equal ones, because the adapter's "
            f"factors are built for square kernels, got {kernel_size!r}"
        )
    return k
