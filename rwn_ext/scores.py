"""How much each filter of a plain layer matters: its own norm, or that of its gradient on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def magnitudes(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The L2 norm of every filter, by layer: {layer: (K,)}."""
    return {name: _norms(layer.weight.detach()) for name, layer in layers.items()}  # type: ignore[union-attr, operator]


def gradient_norms_of(
    model: nn.Module, layers: Mapping[str, Any], loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """The L2 norm of the gradient of every filter of these plain layers of `model`, summed over the batches.

    Leaves `model` with gradients of these weights alone.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_()
        layer.weight.grad = torch.zeros_like(layer.weight)
    for batch in batches:
        loss(model, batch).backward()
    return {name: _norms(layer.weight.grad) for name, layer in layers.items()}


def _norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)
