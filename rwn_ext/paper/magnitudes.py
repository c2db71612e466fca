"""How large the learned and the fixed weights of a network are, filter by filter: the paper's weight magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KINDS = ("learned", "fixed")
Magnitudes = dict[str, dict[str, Tensor]]


def magnitudes(state: Mapping[str, Tensor], subsets: Mapping[str, Any]) -> Magnitudes:
    """The root mean square of each filter's learned and of each filter's fixed weights: {layer: {kind: (filters,)}}.

    Args:
        state: a state dict, as a run's checkpoint holds it under "model".
        subsets: what its PartialConv2d layers learn, as `rwn_ext.subsets` says it; other convolutions are learned.

    A filter with learned and fixed weights (input channels, rows or columns) counts in both. A kind that a layer has
    not is an empty tensor.
    """
    found = {}
    for key, value in state.items():
        layer, _, name = key.rpartition(".")
        if value.dim() != 4 or name not in ("weight", "weight_trainable"):
            continue
        if name == "weight_trainable":
            fixed = state.get(f"{layer}.weight_frozen", value.new_empty(0, 1, 1, 1))
            found[layer] = {"learned": _rms(value), "fixed": _rms(fixed)}
        elif layer in subsets:
            filters, inputs = subsets[layer]
            learned = torch.zeros(value.shape[:2], dtype=torch.bool, device=value.device)
            learned[torch.tensor(filters, dtype=torch.int64)[:, None], torch.tensor(inputs, dtype=torch.int64)] = True
            found[layer] = {"learned": _rms(value, learned), "fixed": _rms(value, ~learned)}
        else:
            found[layer] = {"learned": _rms(value), "fixed": value.new_empty(0)}
    return found


def means(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float | None]:
    """The mean over all filters of the network, for each kind; None where there is none."""
    together = {kind: torch.cat([layer[kind].float() for layer in found.values()]) for kind in KINDS}
    return {kind: values.mean().item() if len(values) else None for kind, values in together.items()}


def of_checkpoint(checkpoint: Mapping[str, Any]) -> Magnitudes:
    """Of what a run has saved, see `training.read_checkpoint`."""
    return magnitudes(checkpoint["model"], checkpoint["subsets"])


def _rms(weight: Tensor, counted: Tensor | None = None) -> Tensor:
    """Of each filter of a (K, C, R, S) weight that has any of the (K, C) that are counted."""
    squares = weight.detach().float().square().mean((2, 3))  # (K, C)
    if counted is None:
        return squares.mean(1).sqrt()
    count = counted.sum(1)
    return ((squares * counted).sum(1) / count.clamp(min=1)).sqrt()[count > 0]
