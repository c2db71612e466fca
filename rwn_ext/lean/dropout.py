"""Dropout that can be repeated from one bit an element, call for call torch's."""

from __future__ import annotations

import torch
from torch import Tensor


def drop(y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """`F.dropout(y, p)` from the same random numbers, and the bool mask of what it kept."""
    if y.device.type == "cpu":
        noise = torch.empty_like(y).bernoulli_(1 - p)
        kept = noise != 0
        return y * noise.div_(1 - p), kept
    return torch.native_dropout(y, p, True)


def scale(tensor: Tensor, kept: Tensor, p: float) -> Tensor:
    """`tensor` where kept, scaled as dropout does, else 0: the same dropout again, and its gradient."""
    if tensor.device.type == "cpu":
        return tensor * kept.to(tensor.dtype).div_(1 - p)
    return torch.ops.aten.native_dropout_backward(tensor, kept, 1 / (1 - p))
