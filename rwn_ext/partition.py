"""How the weight and bias of one layer split into a learned and a fixed part, and merge again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rwn_ext import ops
from rwn_ext.ops import Runs
from rwn_ext.subsets import Subset

WEIGHT_PARTS = ("weight_trainable", "weight_frozen", "weight_frozen_inputs")
BIAS_PARTS = ("bias_trainable", "bias_frozen")
# The parts of what torch calls a layer's weight and its bias.
PARTS = {"weight": WEIGHT_PARTS, "bias": BIAS_PARTS}


@dataclass(frozen=True)
class Partition:
    """What a layer learns: filters (weight axis 0), input channels (axis 1, counted within a group), biases."""

    filters: Subset
    inputs: Subset
    bias_filters: Subset
    groups: int = 1
    block: Subset = field(init=False)
    """The filters of which any weight is learned."""
    seen: Runs = field(init=False)
    """The input channels that learned weights see: all that their gradient needs of the input."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} is no count of groups; it must be 1 or more")
        block = Subset.empty(self.filters.size) if self.inputs.is_empty else self.filters
        seen = ops.seen_channels(self.in_channels, self.filters.size, self.groups, block.runs, self.inputs.runs)
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "seen", seen)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.filters, self.inputs, self.bias_filters, self.groups))

    @cached_property
    def in_channels(self) -> int:
        return self.inputs.size * self.groups

    def split_weight(self, weight: Tensor) -> dict[str, Tensor | None]:
        """Copies of the parts of a weight by name, in its memory format; None for a part that would be empty."""
        learned = _part(weight, self.block, 0)
        parts = (
            _part(learned, self.inputs, 1),
            _part(weight, self.block.complement, 0),
            _part(learned, self.inputs.complement, 1),
        )
        layout = ops.memory_format(weight)
        copies = [None if part is None else part.clone(memory_format=layout) for part in parts]
        return dict(zip(WEIGHT_PARTS, copies, strict=True))

    def split_bias(self, bias: Tensor | None) -> dict[str, Tensor | None]:
        """Likewise of a bias."""
        parts = (_part(bias, self.bias_filters, 0), _part(bias, self.bias_filters.complement, 0))
        return dict(zip(BIAS_PARTS, [None if part is None else part.clone() for part in parts], strict=True))

    def merge_weight(self, parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """The whole weight of which these are the WEIGHT_PARTS; always a copy."""
        return _copy(ops.merge_block(parts, self.block.runs, self.inputs.runs, dtype), parts)

    def merge_bias(self, parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        """The whole bias of which these are the BIAS_PARTS; None without one, else always a copy."""
        if all(part is None for part in parts):
            return None
        trainable, frozen = parts
        return _copy(ops.merge(trainable, frozen, self.bias_filters.runs, 0, dtype), parts)


def _copy(whole: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
    """`whole`, copied if it is the only part there is."""
    return whole.clone() if any(whole is part for part in parts) else whole


def _part(whole: Tensor | None, subset: Subset, axis: int) -> Tensor | None:
    return None if whole is None or subset.is_empty else ops.take(whole, subset.runs, axis)
