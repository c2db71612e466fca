"""Which filters or input channels are learned: fraction / count / indices / mask -> a sorted index set."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

POLICIES = ("last", "first", "random", "magnitude")


@dataclass(frozen=True)
class Subset:
    """A set of channels out of `size`, kept as sorted, disjoint, maximal runs `(start, stop, start, stop, ...)`.

    Runs are what the operators take: plain integers that every tracer treats as constants, two of them for a
    contiguous subset however long it is.
    """

    size: int
    runs: tuple[int, ...]

    @classmethod
    def from_indices(cls, size: int, indices: Sequence[int]) -> Subset:
        """The subset with these ascending, distinct indices."""
        runs: list[int] = []
        for index in indices:
            if runs and runs[-1] == index:
                runs[-1] = index + 1
            else:
                runs += [index, index + 1]
        return cls(size, tuple(runs))

    @classmethod
    def full(cls, size: int) -> Subset:
        return cls(size, (0, size))

    @classmethod
    def empty(cls, size: int) -> Subset:
        return cls(size, ())

    @cached_property
    def indices(self) -> tuple[int, ...]:
        return run_indices(self.runs)

    @cached_property
    def complement(self) -> Subset:
        edges = (0, *self.runs, self.size)
        gaps = [pair for pair in zip(edges[::2], edges[1::2], strict=True) if pair[0] < pair[1]]
        return Subset(self.size, tuple(edge for gap in gaps for edge in gap))

    def __len__(self) -> int:
        return run_length(self.runs)

    @property
    def is_empty(self) -> bool:
        return not self.runs

    @property
    def is_full(self) -> bool:
        return len(self) == self.size


def run_length(runs: Sequence[int]) -> int:
    """How many channels the runs hold."""
    return sum(runs[1::2]) - sum(runs[::2])


def run_indices(runs: Sequence[int]) -> tuple[int, ...]:
    """The channels of the runs, ascending."""
    return tuple(i for start, stop in zip(runs[::2], runs[1::2], strict=True) for i in range(start, stop))


def choose(
    trainable: Any,
    size: int,
    *,
    what: str = "trainable",
    policy: str = "last",
    weight: Tensor | None = None,
    axis: int = 0,
    seed: int | torch.Generator | None = None,
) -> Subset:
    """The subset of `size` channels that `trainable` means.

    * float: a fraction; `int(size * fraction)` channels, as in the paper's code, so 0.0 is none and 1.0 is all.
    * int: that many channels.
    * integers (sequence, range or tensor): these channels, in any order, each once.
    * bools (sequence or tensor of length `size`): a mask.

    Which channels a fraction or a count takes is the policy: `last` (the paper's), `first`, `random` (from `seed`; from
    torch's global generator without one) or `magnitude` (largest L2 norm of `weight` along `axis`).

    Raises TypeError for a wrong kind and ValueError for a wrong value, naming it; `what` is the argument's name.
    """
    if policy not in POLICIES:
        raise ValueError(f"select={policy!r} is not a selection policy; choose one of {', '.join(POLICIES)}")
    if getattr(trainable, "ndim", None) == 0:
        trainable = trainable.item()  # an array of one number, no axis
    if trainable is None or isinstance(trainable, (bool, str, bytes, bytearray, Mapping)):
        raise TypeError(
            f"{what}={trainable!r} is no choice of channels; "
            "give a fraction (0.0 none, 1.0 all), a count, indices or a mask"
        )
    if isinstance(trainable, numbers.Integral):
        return _pick(_checked_count(int(trainable), size, what), size, policy, weight, axis, seed)
    if isinstance(trainable, numbers.Real):
        return _pick(_fraction_count(float(trainable), size, what), size, policy, weight, axis, seed)
    values = _as_list(trainable, what)
    # An array without elements says by its dtype alone that it is a mask.
    maybe_mask = bool(values) or "bool" in str(getattr(trainable, "dtype", ""))
    return Subset.from_indices(size, _checked_indices(values, size, what, maybe_mask))


def parse(text: str) -> int | float:
    """A number from a command line: `1` is a count, `1.0` a fraction."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a count (like 1) nor a fraction (like 0.1 or 1.0)") from None


def _checked_count(count: int, size: int, what: str) -> int:
    if not 0 <= count <= size:
        raise ValueError(f"{what}={count} is not a count of 0..{size} channels; a fraction needs a decimal point")
    return count


def _fraction_count(fraction: float, size: int, what: str) -> int:
    if math.isnan(fraction) or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{what}={fraction} is not a fraction between 0.0 and 1.0; a count must be an int")
    return int(size * fraction)


def _pick(
    count: int, size: int, policy: str, weight: Tensor | None, axis: int, seed: int | torch.Generator | None
) -> Subset:
    if count == 0:
        return Subset.empty(size)
    if policy == "last":
        return Subset(size, (size - count, size))
    if policy == "first":
        return Subset(size, (0, count))
    if policy == "random":
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        chosen = torch.randperm(size, generator=generator, device="cpu")[:count]
    else:
        chosen = _norms(weight, axis).argsort(descending=True, stable=True)[:count]
    return Subset.from_indices(size, sorted(chosen.tolist()))


def _norms(weight: Tensor | None, axis: int) -> Tensor:
    if weight is None:
        raise ValueError("select='magnitude' needs the weight whose norms it compares")
    if weight.device.type == "meta":
        raise ValueError("select='magnitude' needs weights that hold values, not the meta device: load first")
    return weight.detach().to("cpu", torch.float64).transpose(0, axis).flatten(1).norm(dim=1)


def _as_list(values: Any, what: str) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    try:
        return list(values)
    except TypeError:
        raise TypeError(
            f"{what}={values!r} is no choice of channels; give a fraction, a count, indices or a mask"
        ) from None


def _checked_indices(values: list[Any], size: int, what: str, maybe_mask: bool) -> list[int]:
    if maybe_mask and all(isinstance(value, bool) for value in values):
        if len(values) != size:
            raise ValueError(f"{what} is a mask of {len(values)} values for {size} channels")
        return [i for i, learned in enumerate(values) if learned]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(
                f"{what} holds {value!r}, which is no channel index; use integers, or a mask of bools alone"
            )
    ordered = sorted(int(value) for value in values)
    for value in ordered:
        if not 0 <= value < size:
            raise ValueError(f"{what} holds index {value}, outside 0..{size - 1}")
    for left, right in pairwise(ordered):
        if left == right:
            raise ValueError(f"{what} holds index {left} twice")
    return ordered
