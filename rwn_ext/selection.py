"""How much each filter would matter if it were learned: the scores that choose filters between epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from rwn_ext.convert import restore
from rwn_ext.partial_layer import PartialLayer
from rwn_ext.scores import gradient_norms_of


def gradient_norms(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """The L2 norm of every filter's gradient, learned or not, summed over a few batches: {layer: (K,)}.

    Equals, for each convolution and each partly learned layer of the model by name::

        loss(model, batch).backward()                     # with all of the weight learned, for each of the batches
        conv.weight.grad.flatten(1).norm(dim=1)

    `model` stays as it is (values, gradients, running statistics, subsets): a copy of it computes. The copy costs what
    dense training costs, so take few batches. Choosing by it between epochs is what NEq (Bragagnolo et al. 2022) and
    TraDy (2025) do::

        norms = gradient_norms(model, loss, batches)
        set_subsets_(model, {name: (norm.topk(8).indices, None) for name, norm in norms.items()}, optimizer=optimizer)
    """
    dense = restore(copy.deepcopy(model))
    partial = {name for name, module in model.named_modules() if isinstance(module, PartialLayer)}
    kinds = (nn.Conv2d, nn.Conv1d)
    convs = {name: layer for name, layer in dense.named_modules() if name in partial or isinstance(layer, kinds)}
    # Of a plain convolution too, but only if it is not computed from something else.
    convs = {name: conv for name, conv in convs.items() if name in partial or "weight" in conv._parameters}
    return gradient_norms_of(dense, convs, loss, batches)
