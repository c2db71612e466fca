"""What this device's measured rates allow at best, the floor, and what the cost model predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.rates import Rates
from rwn_ext import PartialConv2d, costs, planner
from rwn_ext.partial_layer import PartialLayer


def convolution_floor(
    rate: Rates, input_size: Sequence[int], weight_size: Sequence[int], output_size: Sequence[int], learned: float,
    itemsize: int, *, input_gradient: bool = True,
) -> float:  # fmt: skip
    """Seconds for forward, grad_input and the weight gradient of `learned` filters, each at its bound.

    Each pass reads its inputs and writes its output once, or multiplies at full rate, whichever takes longer. Of the
    input only what the kernel reaches is read: of a 1x1 convolution with stride 2 a quarter.
    """
    x, w, y = map(math.prod, (input_size, weight_size, output_size))
    sides = zip(input_size[2:], output_size[2:], weight_size[2:], strict=False)
    reached = x * math.prod(min(1.0, size * kernel / whole) for whole, size, kernel in sides)
    flops, share = 2 * y * math.prod(weight_size[1:]), learned / weight_size[0]
    passes = [(reached + w + y, flops), *([(x + w + y, flops)] if input_gradient else [])]
    if learned:
        passes.append((reached + share * (y + w), share * flops))
    return sum(max(n * itemsize / rate.bytes_per_second, f / rate.flops_per_second) for n, f in passes)


def predicted(module: nn.Module, conv: nn.Conv2d, x: Tensor, rate: Rates) -> float:
    """Seconds by the cost model for `conv` at `x`, learned as `module` learns it: both passes and the planned gradient.

    Forward and grad_input are at their bounds. On a GPU the weight gradient's time is that of `rwn_ext.costs`. On a
    CPU, for which that has none, it is the bound of the filters that the planned algorithm computes: all by "full".
    """
    with torch.no_grad():
        sizes = tuple(x.shape), tuple(conv.weight.shape), tuple(conv(x).shape)

    def bound(filters: int) -> float:
        return convolution_floor(rate, *sizes, filters, x.element_size())

    if isinstance(module, nn.Conv2d):
        problem, algorithm = PartialConv2d.from_conv2d(conv, trainable=1.0).problem(x), "full"
    else:
        problem = module.problem(x)  # type: ignore[operator]
        algorithm = planner.plan(problem).algorithm
    if algorithm == "none":
        return bound(0)
    if x.is_cuda:
        return bound(0) + costs.PRICED[algorithm](problem).seconds
    return bound(problem.filters if algorithm == "full" else problem.learned)


def network_floor(model: nn.Module, images: Tensor, rate: Rates, itemsize: int) -> float:
    """Seconds for forward and backward of the layers of a network of which some filters are learned.

    Layers without a weight to multiply by read their input and write their output, in either direction. What is done
    between layers, by functions, and the optimizer's step count nothing, so the true floor lies a little higher.
    """
    total = 0.0
    below = False  # whether anything before this layer is learned, so that its input needs a gradient

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total, below
        x = inputs[0]
        if isinstance(module, (nn.Conv2d, nn.Linear, PartialLayer)):
            weight = tuple(module.weight.shape)
            learned = _learned(module)
            total += convolution_floor(
                rate, tuple(x.shape), weight, tuple(output.shape), learned, itemsize, input_gradient=below
            )
            below = below or learned > 0
        else:
            total += (1 + below) * (x.numel() + output.numel()) * itemsize / rate.bytes_per_second
            below = below or any(p.requires_grad for p in module.parameters())

    leaves = [m for m in model.modules() if isinstance(m, PartialLayer) or not list(m.children())]
    hooks = [leaf.register_forward_hook(look) for leaf in leaves]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return total


def _learned(layer: nn.Module) -> int:
    """How many filters or rows of its weight learn."""
    weight = getattr(layer, "weight_trainable", None) if isinstance(layer, PartialLayer) else layer.weight
    return len(weight) if weight is not None and weight.requires_grad else 0
