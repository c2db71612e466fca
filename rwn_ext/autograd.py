"""The autograd Functions of partially learned layers: what is saved, which gradient is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwn_ext import ops, rooms
from rwn_ext.ops import Pair, Runs


class Layer(NamedTuple):
    """What all calls of one layer have in common."""

    filters: Runs  # learned, of the weight's K; () where the learned block is empty
    inputs: Runs  # learned, of the weight's C / groups
    bias: Runs  # learned, of the bias's K
    kernel_size: Pair
    stride: Pair
    padding: Pair  # zeros that the convolution itself adds
    dilation: Pair
    groups: int
    algorithm: str
    seen: Runs | None = None  # the input channels that the learned weights see; None where they see all
    border: tuple[int, ...] | None = None  # what F.pad adds before
    border_mode: str = "constant"


class LinearLayer(NamedTuple):
    """Likewise of a linear layer."""

    filters: Runs  # learned, of the weight's rows; () where the learned block is empty
    inputs: Runs  # learned, of the weight's columns
    bias: Runs  # learned, of the bias


class PartialConv2dFunction(torch.autograd.Function):
    """`F.conv2d(input, W, b)` with W and b merged from learned and fixed parts, for a numeric padding.

    Kept for backward: the parameters the weight is merged from, if the input needs a gradient; `seen`, if the learned
    weights need one. `seen` is a compact copy of the channels that the learned weights see, or None where that is the
    input itself; it is an argument, not made in here, so that double backward reaches it. The merged weight is made
    again in backward, unless it is there at all times. All is computed in the input's type.
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
        weights = (weight_trainable, weight_frozen, weight_frozen_inputs)
        _keep(ctx, input, seen, weights)
        ctx.layer, ctx.input_size = layer, input.shape[2:]
        weight = merged_weight(weights, layer, input.dtype, "forward")
        ctx.room = rooms.lasting(weight, weight_frozen) if ctx.needs_input_grad[0] else None
        return convolve(input, weight, (bias_trainable, bias_frozen), layer)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs_input, _, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
        *weights, seen = ctx.saved_tensors
        merged, room = None, ctx.room
        # Not what hooks made of the saved parts, nor for double backward.
        if room is not None and not torch.is_grad_enabled() and room.has(weights[0], weights[1]):
            merged = room.whole
        with without_autocast(grad_output):
            grad_input, grad_weight, grad_bias = gradients(
                grad_output, weights, seen, ctx.layer, ctx.input_size, ctx.weight_dtype,
                (needs_input, needs_weight, needs_bias), weight=merged,
            )  # fmt: skip
        return grad_input, None, grad_weight, None, None, grad_bias, None, None


class PartialLinearFunction(torch.autograd.Function):
    """`F.linear(input, W, b)` with W and b merged from learned and fixed parts.

    What is kept is as in `PartialConv2dFunction`, but the weight is always made again; `seen` is a compact copy of the
    learned columns' input features, or None where they are all.
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
        layer: LinearLayer,
    ) -> Tensor:
        weights = (weight_trainable, weight_frozen, weight_frozen_inputs)
        _keep(ctx, input, seen, weights)
        ctx.layer = layer
        weight = merged_weight(weights, layer, input.dtype, "forward")
        return F.linear(input, weight, merged_bias(bias_trainable, bias_frozen, layer, input.dtype, "forward"))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs_input, _, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
        *weights, seen = ctx.saved_tensors
        layer, grad_input, grad_weight, grad_bias = ctx.layer, None, None, None
        with without_autocast(grad_output):
            if needs_input:
                grad_input = grad_output @ merged_weight(weights, layer, grad_output.dtype, "backward")
            if needs_weight:
                rows = _matrix(ops.take(grad_output, layer.filters, -1))  # (M, Kt)
                grad_weight = (rows.t() @ _matrix(seen)).to(ctx.weight_dtype)
            if needs_bias:
                grad_bias = _matrix(ops.take(grad_output, layer.bias, -1)).sum(0)
        return grad_input, None, grad_weight, None, None, grad_bias, None, None


def _matrix(tensor: Tensor) -> Tensor:
    """(..., C) -> (M, C)."""
    return tensor.reshape(-1, tensor.size(-1))


def _keep(ctx: Any, input: Tensor, seen: Tensor | None, weights: Sequence[Tensor | None]) -> None:
    """Saves for backward what the gradients that are asked for need."""
    needs_input, _, needs_weight, *_ = ctx.needs_input_grad
    kept = (input if seen is None else seen) if needs_weight else None
    ctx.save_for_backward(*(weights if needs_input else (None, None, None)), kept)
    ctx.weight_dtype = None if weights[0] is None else weights[0].dtype


def convolve(input: Tensor, weight: Tensor, biases: Sequence[Tensor | None], layer: Layer) -> Tensor:
    """The convolution with this weight and the bias merged from these parts, in the input's type."""
    return torch.convolution(
        input, weight,
        merged_bias(biases[0], biases[1], layer, input.dtype, "forward"), layer.stride, layer.padding,
        layer.dilation, False, (0, 0), layer.groups,
    )  # fmt: skip


def gradients(
    grad_output: Tensor, weights: Sequence[Tensor | None], seen: Tensor | None, layer: Layer, input_size: Any,
    weight_dtype: torch.dtype | None, needs: tuple[bool, bool, bool],
    affine: tuple[Tensor | None, Tensor | None] = (None, None), weight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients that `needs` asks for: of the input, the learned weights (in their type), the learned biases.

    With `affine`, a scale and a shift, the convolution saw `ops.affine_relu` of `seen`. `weight` is that of `weights`
    merged, where it is at hand.
    """
    grad_input = grad_weight = grad_bias = None
    needs_input, needs_weight, needs_bias = needs
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    how = (layer.algorithm, weight_dtype, needs_bias and layer.bias == layer.filters, *affine)
    if needs_input:
        if weight is None:
            weight = merged_weight(weights, layer, grad_output.dtype, "backward")
        if needs_weight and layer.seen is None:
            assert seen is not None
            grad_input, grad_weight, grad_bias = ops.conv2d_grads(
                grad_output, seen, weight, layer.filters, *geometry, *how
            )
        else:
            grad_input = ops.conv2d_input_grad(grad_output, weight, input_size, *geometry)
    if needs_weight and grad_weight is None:
        assert seen is not None
        grad_weight, grad_bias = ops.conv2d_weight_grads(grad_output, seen, layer.filters, *geometry, *how)
    if needs_bias and grad_bias is None:
        grad_bias = ops.take(grad_output, layer.bias, 1).sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias


def merged_weight(
    parts: Sequence[Tensor | None], layer: Layer | LinearLayer, dtype: torch.dtype, stage: str | None = None
) -> Tensor:
    """The whole weight."""
    return ops.merge_block(parts, layer.filters, layer.inputs, dtype, stage=stage)


def merged_bias(
    trainable: Tensor | None,
    frozen: Tensor | None,
    layer: Layer | LinearLayer,
    dtype: torch.dtype,
    stage: str | None = None,
) -> Tensor | None:
    """The whole bias, None where there is none."""
    if trainable is None and frozen is None:
        return None
    return ops.merge(trainable, frozen, layer.bias, 0, dtype, stage=stage)


_NOTHING: AbstractContextManager[Any] = nullcontext()


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for this tensor's kind of device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: the types of one convolution are settled before it."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else _NOTHING
