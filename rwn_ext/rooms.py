"""Rooms: memory on a CPU in which the fixed and the learned part of a weight or bias lie side by side, as the whole.

Merging the parts then copies nothing. A layer makes the room (`make`) whenever its Parameters change; whoever merges
asks for it (`whole`), twice a step, so that has to be quick.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

Runs = tuple[int, ...]


class _Place(NamedTuple):
    """Of one part in its room."""

    tensor: Tensor
    address: int
    """When the room was made: memory may be moved under a tensor."""
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        return cls(tensor, tensor.data_ptr(), tensor.shape, tensor.stride())

    def has(self, tensor: Tensor) -> bool:
        """Whether the numbers of this tensor are those that lie here, each where it is."""
        return tensor.data_ptr() == self.address and tensor.shape == self.shape and tensor.stride() == self.stride


class _Room(NamedTuple):
    whole: Tensor
    learned: _Place
    fixed: _Place
    runs: Runs
    """The learned part's places along axis 0."""
    dtype: torch.dtype
    shared: bool
    """Whether a Parameter of what is learned lies there, too: then nothing else may be copied over it."""
    owner: weakref.ref[Tensor]
    """The fixed Parameter; its end is that of the room."""


# By the identity of the fixed Parameter: a dictionary of weak references takes ten times as long.
_ROOMS: dict[int, _Room] = {}


def make(fixed: Tensor, start: int, count: int, learned: Tensor | None = None) -> None:
    """Moves a Parameter of what is fixed to memory with room for the whole, whose first or last part it is.

    So is `learned`, if it is a Parameter of the rest, `count` channels along axis 0 from `start` on. Without one,
    `whole` copies what is learned alone: copying what is fixed twice a step would be felt. Nothing happens to a
    Parameter that is shared between processes, not on a CPU, or lies there already.
    """
    runs, room = (start, start + count), _ROOMS.get(id(fixed))
    if room is not None and room.runs == runs and _holds(room, fixed, learned):
        return
    leave(fixed)
    if start not in (0, fixed.size(0)) or not _is_movable(fixed):
        return
    with torch.inference_mode(False), torch.no_grad():
        # Its own strides: those of 1x1 filters tell nothing of a memory format.
        whole = torch.empty_strided(
            (fixed.size(0) + count, *fixed.shape[1:]), fixed.stride(), dtype=fixed.dtype, device=fixed.device
        )
        others, own = _part(whole, 0 if start else count, fixed.size(0)), _part(whole, start, count)
        fixed.data = others.copy_(fixed)
        shared = (
            learned is not None and (learned.shape, learned.dtype) == (own.shape, own.dtype) and _is_movable(learned)
        )
        if learned is not None and shared:
            learned.data = own.copy_(learned)
    key, forget = id(fixed), _ROOMS.pop
    owner = weakref.ref(fixed, lambda _: forget(key, None))
    _ROOMS[key] = _Room(whole, _Place.of(own), _Place.of(others), runs, fixed.dtype, shared, owner)


def leave(fixed: Tensor) -> None:
    """Forgets the room of this Parameter, which with the learned one stays where it is."""
    _ROOMS.pop(id(fixed), None)


def whole(learned: Tensor, fixed: Tensor, runs: Runs, dtype: torch.dtype) -> Tensor | None:
    """These parts merged, in the memory that `make` gave, lent until the next call; None where there is none.

    Nor is there where the whole must be differentiable, or where a Parameter has been given other memory since.
    """
    room = _ROOMS.get(id(fixed))
    if room is None or room.runs != runs or room.dtype != dtype or not room.fixed.has(fixed):
        return None
    if learned.requires_grad and torch.is_grad_enabled():
        return None
    if not room.learned.has(learned):
        if room.shared or learned.shape != room.learned.shape or learned.dtype != dtype:
            return None
        room.learned.tensor.copy_(learned)
    return room.whole


def lasts(merged: Tensor, fixed: Tensor | None) -> bool:
    """Whether this is what `whole` gave for a fixed Parameter and the learned one that lies in its room, too.

    Then it holds at any later time what these hold, and costs nothing to keep.
    """
    if torch.compiler.is_compiling():
        return False
    room = _ROOMS.get(id(fixed))
    return room is not None and room.shared and room.whole is merged


def _holds(room: _Room, fixed: Tensor, learned: Tensor | None) -> bool:
    """Whether these Parameters lie in it, and no other does."""
    if not room.fixed.has(fixed):
        return False
    return not room.shared if learned is None else room.shared and room.learned.has(learned)


def _is_movable(parameter: Tensor) -> bool:
    """Whether its values, which nobody else's memory holds, may lie elsewhere, channel by channel."""
    return (
        type(parameter) is nn.Parameter and parameter.is_cpu and not parameter.is_shared()
        and not parameter.is_inference() and parameter.stride(0) == parameter[0].numel()
        and torch.empty_like(parameter, device="meta").stride() == parameter.stride()
        and parameter.untyped_storage().nbytes() == parameter.nbytes
    )  # fmt: skip


def _part(whole: Tensor, start: int, count: int) -> Tensor:
    """These channels in their memory, as if there were no other: saved as a storage of their own."""
    view = whole.narrow(0, start, count)
    return torch.from_dlpack(view.as_strided((view.numel(),), (1,))).as_strided(view.shape, view.stride())
