"""The autograd Function of a partially learned convolution: what is saved, which gradient is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwn_ext import ops
from rwn_ext.ops import Pair, Runs


class Layer(NamedTuple):
    """The constants of one call."""

    filters: Runs  # learned, of the weight's K; () where the learned block is empty
    inputs: Runs  # learned, of the weight's C / groups
    bias: Runs  # learned, of the bias's K
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    dtype: torch.dtype  # of the computation; parameters are cast to it
    algorithm: str


class PartialConv2dFunction(torch.autograd.Function):
    """`F.conv2d(input, W, b)` with W and b merged from learned and fixed parts, for a numeric padding.

    Kept for backward: the parameters the weight is merged from, if the input needs a gradient; `seen`, if the learned
    weights need one. `seen` is a compact copy of the channels that the learned weights see, or None where that is the
    input itself; it is an argument, not made in here, so that double backward reaches it. The merged weight is made
    again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        seen: Tensor | None,
        weight_trainable: Tensor | None,
        weight_frozen: Tensor | None,
        weight_frozen_inputs: Tensor | None,
        bias_trainable: Tensor | None,
        bias_frozen: Tensor | None,
        layer: Layer,
    ) -> Tensor:
        needs_input, _, needs_weight = ctx.needs_input_grad[:3]
        weights = (weight_trainable, weight_frozen, weight_frozen_inputs)
        seen = input if seen is None else seen
        ctx.save_for_backward(*(weights if needs_input else (None, None, None)), seen if needs_weight else None)
        ctx.layer, ctx.input_size = layer, input.shape[2:]
        return convolve(input, weights, (bias_trainable, bias_frozen), layer)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *weights, seen = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 2, 5))
        with without_autocast(grad_output.device.type):
            grad_input, grad_weight, grad_bias = gradients(grad_output, weights, seen, ctx.layer, ctx.input_size, needs)
        return grad_input, None, grad_weight, None, None, grad_bias, None, None


def convolve(input: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], layer: Layer) -> Tensor:
    """The convolution with the weight and bias merged from these parts."""
    return torch.convolution(
        input, _weight(weights, layer, "forward"), _bias(*biases, layer),
        layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups,
    )  # fmt: skip


def gradients(
    grad_output: Tensor, weights: Sequence[Tensor | None], seen: Tensor | None, layer: Layer, input_size: Any,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Those gradients of the input, the learned weights and the learned biases that `needs` asks for."""
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        grad_input = _grad_input(grad_output, _weight(weights, layer, "backward"), layer, input_size)
    if needs[1]:
        assert seen is not None
        grad_weight = ops.conv2d_weight_grad(
            grad_output, seen, layer.filters, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.algorithm,
        )  # fmt: skip
    if needs[2]:
        grad_bias = ops.take(grad_output, layer.bias, 1).sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off: the types of one convolution are settled before it."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _weight(parts: Sequence[Tensor | None], layer: Layer, stage: str) -> Tensor:
    return ops.merge_block(parts, layer.filters, layer.inputs, layer.dtype, stage=stage)


def _bias(trainable: Tensor | None, frozen: Tensor | None, layer: Layer) -> Tensor | None:
    if trainable is None and frozen is None:
        return None
    return ops.merge(trainable, frozen, layer.bias, 0, layer.dtype, stage="forward")


def _grad_input(grad_output: Tensor, weight: Tensor, layer: Layer, input_size: Any) -> Tensor:
    """The transposed convolution: `aten.convolution_backward` would want the input, or make a full-size dummy of it."""
    output_padding = [
        input_size[i]
        - (grad_output.size(2 + i) - 1) * layer.stride[i]
        + 2 * layer.padding[i]
        - layer.dilation[i] * (layer.kernel_size[i] - 1)
        - 1
        for i in (0, 1)
    ]
    return torch.convolution(
        grad_output, weight, None, layer.stride, layer.padding, layer.dilation, True, output_padding, layer.groups
    )
