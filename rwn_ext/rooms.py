"""Rooms: memory on a CPU in which the fixed and the learned part of a weight or bias lie side by side, as the whole.

Merging the parts then copies nothing. A layer makes the room (`make`) whenever its Parameters change; whoever merges
asks for it (`whole`), at every call of the layer, so that has to be quick.
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
    owner: weakref.ref[nn.Module]
    """Its end is that of the room."""


# By the identity of the fixed Parameter: weak references to tensors take longer, and keep torch from swapping them.
# Should another tensor come to have that identity, it lies elsewhere.
_ROOMS: dict[int, _Room] = {}


def make(owner: nn.Module, fixed: Tensor, start: int, count: int, learned: Tensor | None = None) -> None:
    """Moves a Parameter of what is fixed to memory with room for the whole, whose first or last part it is.

    So is `learned`, if it is a Parameter of the rest, `count` channels along axis 0 from `start` on. Without one,
    `whole` copies what is learned alone: copying what is fixed twice a step would be felt. Nothing happens to a
    Parameter that is shared between processes, not on a CPU, of another type than `learned`, or lies there already.
    The room is there as long as its owner.
    """
    if learned is not None and (learned.dtype, *learned.shape) != (fixed.dtype, count, *fixed.shape[1:]):
        leave(fixed)
        return
    runs, room = (start, start + count), _ROOMS.get(id(fixed))
    learned = learned if learned is not None and _is_movable(learned) else None
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
        if learned is not None:
            learned.data = own.copy_(learned)
    key, forget, shared = id(fixed), _ROOMS.pop, learned is not None
    watch = weakref.ref(owner, lambda _: forget(key, None))
    _ROOMS[key] = _Room(whole, _Place.of(own), _Place.of(others), runs, fixed.dtype, shared, watch)


def leave(fixed: Tensor) -> None:
    """Forgets the room of this Parameter, which with the learned one stays where it is."""
    _ROOMS.pop(id(fixed), None)


def whole(learned: Tensor, fixed: Tensor, runs: Runs, dtype: torch.dtype) -> Tensor | None:
    """These parts merged, in the memory that `make` gave, lent until the next call; None where there is none.

    Nor is there where the whole must be differentiable or may be saved for that, or where a Parameter has been given
    other memory since.
    """
    room = _ROOMS.get(id(fixed))
    if room is None or room.runs != runs or room.dtype != dtype:
        return None
    if torch.is_grad_enabled() and (learned.requires_grad or not room.shared):
        return None
    if not room.fixed.has(fixed):
        leave(fixed)
        return None
    if not room.learned.has(learned):
        if room.shared or learned.shape != room.learned.shape or learned.dtype != dtype:
            return None
        room.learned.tensor.copy_(learned)
    return room.whole


def lasts(merged: Tensor, fixed: Tensor | None) -> bool:
    """Whether this is what `whole` gave for a fixed Parameter and the learned one that lies in its room, too.

    Then it holds what these hold until they are given other memory, and costs nothing to keep.
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
