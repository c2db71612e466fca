"""What a model trains and costs: a table of its layers, the memory of a training step, bytes saved for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rwn_ext.backends import backends
from rwn_ext.describe import describe, table
from rwn_ext.memory import Memory, memory

__all__ = ["Memory", "Saved", "backends", "describe", "memory", "saved_for_backward", "table", "training_bytes"]


class Saved:
    """What autograd has saved for backward."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        """Each storage once, however many views of it are saved."""
        return sum(storage.nbytes() for storage in self._storages.values())


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
            saved._storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients present and of the optimizer's state, after a step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    storages = [tensor.untyped_storage() for tensor in (*gradients, *states)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
