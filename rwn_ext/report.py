"""What a model trains and costs: a table of its layers, the memory of a training step, bytes saved for backward."""

from __future__ import annotations

import torch
from torch import nn

from rwn_ext.backends import backends
from rwn_ext.describe import describe, table
from rwn_ext.memory import Memory, memory
from rwn_ext.saved import Saved, saved_for_backward

__all__ = ["Memory", "Saved", "backends", "describe", "memory", "saved_for_backward", "table", "training_bytes"]


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients present and of the optimizer's state, after a step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    storages = [tensor.untyped_storage() for tensor in (*gradients, *states)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
