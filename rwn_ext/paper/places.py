"""Who works where: a folder is one run's at a time, on whatever machine; a GPU holds as many runs as fit."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

SPARED = 0.05
"""Of a GPU's free memory, what is never planned with."""


def claim(folder: Path) -> int | None:
    """A file descriptor that holds the folder, or None while another process does.

    The hold is a lock of the operating system on a file in the folder: it passes to the processes that inherit the
    descriptor and ends with the last of them, however it ends. So a run that outlives its killed sweep is not started
    a second time, and one that was killed itself is free at once. Machines that share the folder need a file system
    with locks, as NFS 4 and Lustre have them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "claim", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


class Place:
    """A device that runs share, and what they take of its memory.

    What a run takes is learned from the first of its kind, which has the place for itself until it has finished an
    epoch: what is free fell by that much. `free` tells the bytes free at the moment; without it, as on a CPU, there is
    always room.
    """

    def __init__(self, device: str | None = None, free: Callable[[], int] | None = None) -> None:
        self.device = device
        self._free = free
        self._needs: dict[Hashable, int] = {}
        self._inside: dict[Hashable, Hashable] = {}
        self._empty = self._lowest = 0

    @property
    def limited(self) -> bool:
        return self._free is not None

    def has_room(self, kind: Hashable) -> bool:
        """Whether one more run of this kind fits beside those inside."""
        if self._free is None or not self._inside:
            return True
        kinds = [*self._inside.values(), kind]
        if any(each not in self._needs for each in kinds):
            return False
        planned = sum(self._needs[each] for each in kinds)
        return planned <= (1 - SPARED) * self._empty and self._needs[kind] <= self._free()

    def enter(self, run: Hashable, kind: Hashable) -> None:
        if self._free is not None and not self._inside:
            self._empty = self._lowest = self._free()
        self._inside[run] = kind

    def watch(self, run: Hashable, *, has_peaked: bool) -> None:
        """Looks at the memory; to be called often. `has_peaked`: the run has finished an epoch since it entered."""
        if self._free is None:
            return
        self._lowest = min(self._lowest, self._free())
        kind = self._inside[run]
        if has_peaked and kind not in self._needs and len(self._inside) == 1:
            self._needs[kind] = self._empty - self._lowest

    def leave(self, run: Hashable) -> None:
        del self._inside[run]


def places(device: str | None) -> list[Place]:
    """The places of this process: every visible GPU, of torchrun's processes each its own; the CPU where there is none.

    `device` is that of the runs if they name one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        return [Place(device)]
    numbers = range(torch.cuda.device_count())
    if ":" in device:
        numbers = range(int(device.split(":")[1]), int(device.split(":")[1]) + 1)
    elif "LOCAL_RANK" in os.environ and numbers:
        own = int(os.environ["LOCAL_RANK"]) % len(numbers)
        numbers = range(own, own + 1)
    return [Place(f"cuda:{number}", _free_bytes(number)) for number in numbers]


def _free_bytes(number: int) -> Callable[[], int]:
    return lambda: torch.cuda.mem_get_info(number)[0]
