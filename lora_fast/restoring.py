"""Taking a merge out of a weight again, also where somebody wrote to the weight meanwhile."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fast import functional, readers, reference, shapes, sharded, sums
from lora_fast.merge_state import MergeState
from lora_fast.merging import merge_again, merge_many, restore_, undo
from lora_fast.native import Merge
from lora_fast.record import Code, MergeRecord, are_same, some_of
from lora_fast.resizing import FitsResized
from lora_fast.torch_internals import has_memory, is_fake_tensor

_log = logging.getLogger("lora_fast.merge")

_Summand = Literal["nothing", "merged delta", "present delta"]


class RestoresWeight(FitsResized):
    """The part of a LoRA layer that restores its weight, bit for bit where nobody wrote to it."""

    def _was_converted(self) -> bool:
        """Tell whether the merged weight is of another kind now, or is no parameter any more.

        As by torchao's quantization, that of torch.ao, or `to_sparse()`. Then the merge is for
        good: the layer is moved, copied and saved as it is.
        """
        record, weight = self._merge_state.record, readers.stored_weight(self._weight_owner())
        if not self.merged or record is None:
            return False
        if weight is None or record.of_shard:
            return weight is None
        if weight.layout is not torch.strided:
            return True
        before = Tensor if record.original is None else type(record.original)
        now = Tensor if type(weight) is nn.Parameter else type(weight)
        return now is not before and not sharded.is_dtensor(weight) and not is_fake_tensor(weight)

    def _was_put_back(self, record: MergeRecord) -> bool:
        """Tell whether somebody has written the base weight over the merged one."""
        if record.spent or self._weight_version() == self._merge_state.version:
            return False
        weight = readers.stored_weight(self._weight_owner())
        if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
            return False
        part, its = self._merged_part(self._as_delta(weight.detach()), record)
        return self._added(part, its) == "nothing"

    def _added(self, shard: Tensor, record: MergeRecord) -> _Summand | None:
        """Tell what a weight that was written to is the base plus; None where nothing tells."""
        if _is_base(shard, record):
            return "nothing"
        if record.of_shard:
            return None
        has_others = self._has_adapter() and self._other_factors(record)
        is_other = has_others or self._one_scaling() not in (record.scaling, None)
        present = self._present_delta(shard) if is_other else None
        found = _summand(shard, record, present) if _is_like(shard, record) else None
        if found is None and has_others:
            return "present delta"  # the whole state is another's, as after DDP's broadcast
        return found

    def _restore(self, target: Tensor, record: MergeRecord | None) -> None:
        if record is None:  # someone set `merged` by hand: do what loralib does
            self._subtract(target)
        elif record.spent:
            weight = readers.stored_weight(self._weight_owner())
            if weight is None or not record.has_restored(sharded.local(weight)):
                self._restore_clone(target, record)
        elif sharded.is_dtensor(target) and not record.of_shard:  # sharded while merged
            whole = sharded.whole(target)
            self._restore(whole, record)
            target.copy_(sharded.like(whole, target))
        elif sharded.local(target).shape != record.shape:
            self._restore_resized(target, record)
        elif self._was_written(target, record):
            self._restore_changed(sharded.local(target), record)
            sharded.count_version(target)
            record.note_restored(sharded.local(target))  # for shallow copies, which share both
        else:
            restore_(target, record)

    def _restore_clone(self, target: Tensor, record: MergeRecord) -> None:
        """Restore a weight whose record has served on another: that of a clone of the layer."""
        shard, fresh = sharded.local(target), replace(record, spent=False)
        if shard.shape == record.shape and not self._was_written(target, fresh):
            self._restore(target, fresh)
            record.note_restored(shard)
        elif not _is_base(shard, record):
            _log.warning(
                "%s: a copy of the layer was unmerged, and this one's weight was written to; "
                "whether the adapter is in it cannot be told, and it is left as it is. Call "
                "train() before copying a layer or writing to a weight.",
                self._described(),
            )

    def _restore_resized(self, target: Tensor, record: MergeRecord) -> None:
        part, its = self._merged_part(target, record)
        if self._is_as_merged(target, record):
            restore_(part, its)
            record.note_restored(part)
            return
        if _is_base(part, its):
            return
        if not self._fits(target):
            raise RuntimeError(
                f"{self._described()}: the weight was given the shape {tuple(target.shape)}, by "
                "resizing or FSDP1, while the adapter was merged into one of "
                f"{tuple(record.shape)}, and the base weight cannot be restored; call train() "
                "first, and build a resized layer anew"
            )
        _log.warning(
            "%s: its weight and its adapter were resized while merged; the adapter is subtracted.",
            self._described(),
        )
        self._subtract(target)

    def _is_as_merged(self, target: Tensor, record: MergeRecord) -> bool:
        """Tell by its values whether a weight is as it was merged, as far as it is still there."""
        part, its = self._merged_part(target, record)
        if its is record or its.original is None or not _is_like(part, its):
            return is_as_merged(part, its)
        # Of fewer rows torch's product may have other bits.
        merged = (its.lora_A, its.lora_B, its.scaling)
        return sums.is_sum(part, its.original, *merged, **its.blocks())

    def _fits(self, target: Tensor) -> bool:
        """Tell whether the present factors, pruned with the weight say, make a delta for it."""
        factors: list[Any] = [getattr(self, name, None) for name in ("lora_A", "lora_B")]
        if any(type(t) not in (nn.Parameter, Tensor) for t in (target, *factors)):
            return False
        lora_A, lora_B = factors
        blocks = [self._blocks().get(name) for name in ("enable_lora", "out_splits")]
        try:
            shapes.delta("unmerge_", target, lora_A, lora_B, blocks[0], blocks[1])
        except ValueError:
            return False
        return True

    def _restore_changed(self, shard: Tensor, record: MergeRecord) -> None:
        added = self._added(shard, record)
        if added == "nothing":
            _log.debug("%s: the base weight was put back while merged", self._described())
            return
        told = self._merge_state.told_written  # as each state of it is made so, too
        self._note(told_written=True)
        _log.log(
            logging.DEBUG if told else logging.WARNING,
            "%s: its weight was written to while the adapter was merged into it; the adapter is "
            "subtracted from what is there now. Call train() before writing to a weight.",
            self._described(),
        )
        if added == "present delta":
            self._subtract(shard)
        else:
            factors = (record.lora_A.to(shard.device), record.lora_B.to(shard.device))
            functional.merge_(shard, *factors, -record.scaling, **record.blocks())

    def _present_delta(self, like: Tensor) -> Tensor | None:
        """Return the delta of the present factors, in fp32 or wider; None where they make none."""
        if not self._has_adapter():
            return None
        delta = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        try:
            self._subtract(delta)
        except (OverflowError, TypeError, ValueError):
            return None
        return delta.neg_()

    def _subtract(self, target: Tensor, scaling: float | None = None) -> None:
        """Take the delta of the present factors out of the weight."""
        scaling = self.scaling if scaling is None else scaling
        lora_A = self._fitted(self.lora_A, target)
        functional.merge_(target, lora_A, self.lora_B, -scaling, **self._blocks())

    def _was_written(self, target: Tensor, record: MergeRecord) -> bool:
        """Tell whether somebody wrote to the weight since the merge, so that nothing is lost."""
        if self._merge_state.version is None:
            return False
        if sharded.local(target).shape != record.shape:
            return True  # resized, perhaps to a view of itself
        is_counted = self._weight_version() != self._merge_state.version
        shard = sharded.local(target)
        # A copy would throw a write away that torch did not count, and a code would spoil it. Of a
        # shard the record may hold the factors of the whole.
        if not is_counted and record.of_shard:
            return False
        if not is_counted and record.original is None:
            return _shows_a_write(shard, record)
        if shard.is_meta:
            return False
        if shard.dtype != record.dtype or shard.device != record.lora_A.device:
            return True  # through `.data`
        factors = (record.lora_A, record.lora_B, record.scaling)
        if not is_counted and record.original is not None:
            return not sums.is_sum(shard, record.original, *factors, **record.blocks())
        if not is_as_merged(shard, record):
            return True
        # Every weight is the sum of itself and nothing: then only the factors can tell.
        adds_nothing = not record.of_shard and not (record.lora_A.any() and record.lora_B.any())
        return adds_nothing and self._other_factors(record)


def merge_layers(layers: Sequence[RestoresWeight]) -> list[str | None]:
    """Merge layers, and count them as merged: all, or after any error none.

    Args:
        layers: of weights of one device and dtype.

    Returns:
        For each None, or why it was not merged: a finite element would become infinite or NaN.

    Note:
        Where the way back fails too, for want of memory, say, a layer that is merged counts so.
    """
    requests = [Merge(*layer._merge_arguments(), **layer._blocks()) for layer in layers]
    try:
        merge_many(requests)
        for layer, request in zip(layers, requests, strict=True):
            if request.record is not None:
                layer._remember(True, request.record)
        return [
            reference.why_not_finite(it.weight, it.lora_A, it.lora_B) if it.record is None else None
            for it in requests
        ]
    except BaseException:
        pairs = zip(layers, requests, strict=True)
        merged = [(layer.__dict__, it.record) for layer, it in pairs if it.record is not None]
        for own, record in merged:
            own.update(merged=True, _merge_state=MergeState(record))
        try:
            undo(requests)
        finally:
            for own, record in merged:
                if record.spent:
                    own.update(merged=False, _merge_state=MergeState())
        raise


def settle(layer: RestoresWeight, target: Tensor, record: MergeRecord) -> None:
    """After an unmerge that was stopped: count a layer as unmerged if it has its base weight."""
    shard = sharded.local(target)
    if (record.spent and record.has_restored(shard)) or _is_base(shard, record):
        layer._remember(False, None)


def _is_like(shard: Tensor, record: MergeRecord) -> bool:
    """Tell whether a weight has the shape, dtype and device of the one that was merged."""
    mine = (shard.shape, shard.dtype, shard.device)
    return mine == (record.shape, record.dtype, record.lora_A.device) and has_memory(shard)


def _shows_a_write(shard: Tensor, record: MergeRecord) -> bool:
    """Tell whether one of some elements of a merged weight is another, as after `weight.data +=`.

    All would take as long as the merge, and be read after each.
    """
    if shard.is_meta or record.after is None or not _is_like(shard, record):
        return False
    return not are_same(some_of(shard), record.after)


def is_as_merged(shard: Tensor, record: MergeRecord) -> bool:
    """Tell by its values whether a weight is as the merge with this record has left it."""
    if not _is_like(shard, record):
        return False
    if record.after is not None and not are_same(some_of(shard), record.after):
        return False
    # Of a copy, which lies in memory as the weight did: elsewhere torch's product may round
    # otherwise.
    again = shard.clone() if record.original is None else record.original.clone()
    if record.original is None:
        restore_(again, replace(record, spent=False))
    return merge_again(again, record) is not None and are_same(again, shard)


def _is_base(shard: Tensor, record: MergeRecord) -> bool:
    """Tell whether a weight is the base again, as averages put it back after a validation.

    By the copy of it, or because merging it makes the code and the elements that the record holds.
    """
    if not _is_like(shard, record):
        return False
    if record.original is not None:
        return are_same(shard, record.original)
    merged = shard.clone()
    again = merge_again(merged, record)
    if again is None or record.after is None or not are_same(some_of(merged), record.after):
        return False
    mine, its = ([t for code in r.codes for t in _ordered(code)] for r in (record, again))
    return len(mine) == len(its) and all(map(are_same, mine, its))


def _summand(shard: Tensor, record: MergeRecord, present: Tensor | None) -> _Summand | None:
    """Tell what a weight is about the base plus, as averages of bases are not quite the base.

    By the elements that the record holds; None where these do not show the delta as all do, or the
    weight is not twice as near to one sum as to the next, or to the base as that is to zero.

    Args:
        shard: the weight as it is now, like the merged one.
        record: of the merge.
        present: the delta of the factors that are there now, if others.
    """
    delta = torch.zeros_like(shard, dtype=torch.promote_types(shard.dtype, torch.float32))
    factors = (record.lora_A.to(delta), record.lora_B.to(delta), record.scaling)
    functional.merge_(delta, *factors, **record.blocks())
    if record.original is not None:
        now, change, base = (t.to(delta) for t in (shard, delta, record.original))
    elif record.after is not None and _shows_all(some_of(delta), delta):
        now, change = some_of(shard).to(delta), some_of(delta)
        base = record.after.to(delta) - change
        present = None if present is None else some_of(present)
    else:
        return None
    added: dict[_Summand, Tensor] = {"nothing": now - base, "merged delta": now - base - change}
    if present is not None:
        added["present delta"] = now - base - present
    by_distance = sorted((float(torch.linalg.vector_norm(t)), name) for name, t in added.items())
    (least, nearest), (next_least, _) = by_distance[:2]
    if nearest == "nothing":  # or, beside a large delta, as small as the base
        next_least = min(next_least, float(torch.linalg.vector_norm(base)))
    return nearest if least < 0.5 * next_least else None


def _shows_all(some: Tensor, delta: Tensor) -> bool:
    """Tell whether some elements of a delta are as large as all are, and not few of them."""
    large = some.abs() > 0.1 * some.abs().max()
    size = float(torch.linalg.vector_norm(some)) * (delta.numel() / some.numel()) ** 0.5
    whole = float(torch.linalg.vector_norm(delta))
    return 5 * int(large.sum()) > some.numel() and 0.5 * whole <= size <= 2 * whole


def _ordered(code: Code) -> Code:
    """A code whose list is in the order of its indices: several threads write it in any."""
    order = code.overflow_index.argsort()
    return Code(code.code, code.overflow_index[order], code.overflow_value[order])
