"""Embeddings with an adapter on the table: W[x] + lora_alpha / r * A^T[x] B^T."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import checks, functional, notices, shapes
from lora_fast.lora_layer import LoRALayer, MergingLayer, redrawing
from lora_fast.record import MergeRecord
from lora_fast.resizing import of_first_columns


class Embedding(MergingLayer, nn.Embedding, LoRALayer):
    """`nn.Embedding` with an adapter: Y = W[x] + lora_alpha / r * A^T[x] B^T.

    Args:
        num_embeddings: number of rows of the table.
        embedding_dim: width of a row.
        r: rank of the adapter; 0 for none. With r > 0 the table is frozen.
        lora_alpha: scale of the update.
        merge_weights: whether `eval()` folds the adapter into the table.
        kwargs: as for `nn.Embedding`.

    Raises:
        TypeError: `r`, a size or `padding_idx` is no integer, `lora_alpha` no number or `_weight`
            no tensor.
        ValueError: a size is negative, `padding_idx` no row or `lora_alpha` not finite.

    Note:
        A (r, num_embeddings) starts at zero and B (embedding_dim, r) random, the reverse of the
        other layers, as in loralib. A layer with `max_norm` is never merged.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        checks.size("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if kwargs.get("padding_idx") is not None:
            shapes.padding_row("Embedding", kwargs["padding_idx"], num_embeddings)
        rank = checks.adapter(r, lora_alpha, 0.0)  # before anything is drawn
        given = kwargs.get("_weight")
        if given is not None:
            checks.tensors("Embedding", _weight=given)
            # A merge must not write to the caller's tensor.
            kwargs["_weight"] = given.clone() if rank > 0 else given
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(
            self, r=r, lora_alpha=lora_alpha, lora_dropout=0, merge_weights=merge_weights
        )
        if self.r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros((self.r, num_embeddings)))
            self.lora_B = nn.Parameter(self.weight.new_zeros((embedding_dim, self.r)))
            self.scaling = checks.scaling_of(self.lora_alpha, self.r)
            self.weight.requires_grad = False
        if given is None:
            self.reset_parameters()
        else:
            self._reset_adapter()
        self._register_hooks()

    def reset_parameters(self) -> None:
        """Draw the table and the adapter anew; the adapter's update is zero."""
        with redrawing(self):
            nn.Embedding.reset_parameters(self)
            self._reset_adapter()

    def _reset_adapter(self) -> None:
        if self._has_adapter():
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def _as_delta(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _was_resized(self) -> bool:
        """Tell whether the table has another number of rows than the adapter was made for."""
        weight, lora_A = self.weight, getattr(self, "lora_A", None)
        return lora_A is not None and weight.dim() == 2 and weight.shape[0] != lora_A.shape[1]

    def _fitted_factor(self) -> Tensor:
        """A with a column for each row of the table: new rows have none, and nothing is added."""
        return self._fitted(self.lora_A, self._as_delta(self.weight))

    def _fitted(self, lora_A: Tensor, target: Tensor) -> Tensor:
        new = target.shape[-1] - lora_A.shape[-1]
        is_table = type(target) in (Tensor, nn.Parameter) and target.dim() == 2
        return F.pad(lora_A, (0, new)) if new != 0 and is_table else lora_A

    def _merged_part(self, target: Tensor, record: MergeRecord) -> tuple[Tensor, MergeRecord]:
        """Return the rows that a table had when it was merged, and has since it was resized."""
        is_known = len(record.codes) < 2 and not record.of_shard
        if not is_known or not self._was_resized() or target.shape[0] != record.shape[0]:
            return target, record
        if target.shape[1] >= record.shape[1]:
            return target[:, : record.shape[1]], record
        return target, of_first_columns(target, record) or record

    def _obstacle(self) -> str | None:
        if not self.merged and self._was_resized():
            rows, made_for = self.weight.shape[0], self.lora_A.shape[1]
            return f"its table has {rows} rows, and its adapter was made for {made_for}"
        return super()._obstacle()

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Look up `x`, integer indices of any shape; returns (*x.shape, embedding_dim)."""
        if self.r > 0 and not self.merged:
            weight, lora_A, lora_B = self._look_up(x, "weight", "lora_A", "lora_B")
            rest = (
                *(lora_B, self.scaling, self.padding_idx, self.max_norm, self.norm_type),
                *(self.scale_grad_by_freq, self.sparse),
            )
            try:
                return functional.lora_embedding(x, weight, lora_A, *rest)
            except ValueError:
                if not self._was_resized():
                    raise
            return functional.lora_embedding(x, weight, self._fitted_factor(), *rest)
        notices.no_gradient(self)
        return nn.Embedding.forward(self, x)

    def _forward_in_script(self, x: Tensor) -> Tensor:
        y = F.embedding(
            x,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        if hasattr(self, "lora_A") and not self.merged:
            columns, by_freq = self.lora_A.t(), self.scale_grad_by_freq
            a = F.embedding(x, columns, self.padding_idx, None, 2.0, by_freq).to(y.dtype)
            y = y + F.linear(a * self.scaling, self.lora_B.to(y.dtype))
        return y
