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


class Room(NamedTuple):
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

    def has(self, learned: Tensor, fixed: Tensor) -> bool:
        """Whether these are the parts that lie here."""
        return self.learned.has(learned) and self.fixed.has(fixed)

    def is_of(self, learned: Tensor | None, fixed: Tensor) -> bool:
        """Whether these Parameters lie here and no other does."""
        if learned is None:
            return not self.shared and self.fixed.has(fixed)
        return self.shared and self.has(learned, fixed)


# By the identity of the fixed Parameter: weak references to tensors take longer, and keep torch from swapping them.
# While its room is there, a tensor that comes to have that identity lies elsewhere.
_ROOMS: dict[int, Room] = {}
# The keys of an owner's rooms.
_KEYS: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()


def make(owner: nn.Module, name: str, fixed: Tensor, start: int, count: int, learned: Tensor | None = None) -> None:
    """Moves a Parameter of what is fixed to memory with room for the whole, whose first or last part it is.

    So is `learned`, if it is a Parameter of the rest, `count` channels along axis 0 from `start` on. Without one,
    `whole` copies what is learned alone: copying what is fixed twice a step would be felt. Nothing is moved that lies
    there already, is shared between processes, or not on a CPU; nor where the parts are of two types or do not fit.
    `owner` has one room of this name, which ends with it.
    """
    keys = _KEYS.setdefault(owner, {})
    if keys.get(name, id(fixed)) != id(fixed):
        leave(owner, name)
    runs, room = (start, start + count), _ROOMS.get(id(fixed))
    fits = learned is None or (learned.dtype, *learned.shape) == (fixed.dtype, count, *fixed.shape[1:])
    learned = learned if learned is not None and _is_movable(learned) else None
    if room is not None and fits and room.runs == runs and room.is_of(learned, fixed):
        return
    _ROOMS.pop(id(fixed), None)
    if start not in (0, fixed.size(0)) or not _is_movable(fixed) or not fits:
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
    key = keys[name] = id(fixed)
    watch = weakref.ref(owner, lambda watch: _end(key, watch))
    _ROOMS[key] = Room(whole, _Place.of(own), _Place.of(others), runs, fixed.dtype, learned is not None, watch)


def leave(owner: nn.Module, name: str) -> None:
    """Forgets the room of this name; its Parameters stay where they are."""
    key = _KEYS.get(owner, {}).pop(name, None)
    if key in _ROOMS and _ROOMS[key].owner() is owner:
        del _ROOMS[key]


def _end(key: int, watch: weakref.ref[nn.Module], rooms: dict[int, Room] = _ROOMS) -> None:
    if key in rooms and rooms[key].owner is watch:
        del rooms[key]


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
        _ROOMS.pop(id(fixed), None)
        return None
    if not room.learned.has(learned):
        if room.shared or learned.shape != room.learned.shape or learned.dtype != dtype:
            return None
        room.learned.tensor.copy_(learned)
    return room.whole


def lasting(merged: Tensor, fixed: Tensor | None) -> Room | None:
    """The room of which `whole` gave this, if the learned Parameter lies there, too; else None.

    While the room has these parts, `merged` is what they are merged to, and costs nothing to keep.
    """
    if torch.compiler.is_compiling():
        return None
    room = _ROOMS.get(id(fixed))
    return room if room is not None and room.shared and room.whole is merged else None


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
