"""What autograd saves for backward, counted as it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Saved:
    """What autograd has saved for backward."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        """By their addresses."""

    @property
    def bytes(self) -> int:
        """Each storage once, however many views of it are saved."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Counts what the forward pass inside the `with` keeps for backward, beside the model's parameters and buffers.

    Counted storages are kept alive until the block ends.
    """
    saved = Saved()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
