"""The functional forms of partially learned layers: argument rules, padding modes; autocast ends here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rwn_ext import ops, planner
from rwn_ext.autograd import (
    Layer,
    LinearLayer,
    PartialConv2dFunction,
    PartialLinearFunction,
    autocasts,
    merged_bias,
    merged_weight,
    without_autocast,
)
from rwn_ext.ops import Pair
from rwn_ext.partition import Partition


def partial_conv2d(
    input: Tensor,
    weight_trainable: Tensor | None,
    weight_frozen: Tensor | None = None,
    weight_frozen_inputs: Tensor | None = None,
    bias_trainable: Tensor | None = None,
    bias_frozen: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    padding_mode: str = "zeros",
    *,
    partition: Partition,
    algorithm: str | None = None,
) -> Tensor:
    """`F.conv2d` with a weight of which only the block `[filters][:, inputs]` ever receives a gradient.

    Equals, with filters, inputs and G = groups as the partition says::

        weight = torch.empty(K, C // G, R, S)
        weight[fixed_filters] = weight_frozen                            # (K - Kt, C / G, R, S)
        weight[filters][:, fixed_inputs] = weight_frozen_inputs          # (Kt, C / G - Ct, R, S)
        weight[filters][:, inputs] = weight_trainable                    # (Kt, Ct, R, S)
        F.conv2d(input, weight, bias, stride, padding, dilation, G)

    A part that would be empty is None. The bias (K,) is merged in the same way from `bias_trainable` and
    `bias_frozen`. `input` is (N, C, H, W) or (C, H, W). `algorithm` chooses how
    the weight gradient is computed (see `rwn_ext.planner`); by default RWN_EXT_ALGORITHM does, else the planner.

    Raises ValueError for an algorithm that is unknown or cannot compute this problem, RuntimeError for shapes and
    dtypes that F.conv2d refuses.
    """
    example = weight_frozen if weight_trainable is None else weight_trainable
    if example is None:
        raise ValueError("partial_conv2d needs weight_trainable, weight_frozen or both")
    layer = constants(partition, example.shape[2:], stride, padding, dilation, padding_mode, algorithm)
    weights, biases = (weight_trainable, weight_frozen, weight_frozen_inputs), (bias_trainable, bias_frozen)
    return convolved(input, weights, biases, layer, partition)


def convolved(
    input: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], layer: Layer,
    partition: Partition,
) -> Tensor:  # fmt: skip
    """`partial_conv2d` of these parts, its constants known."""
    trainable, frozen, frozen_inputs = weights
    example = frozen if trainable is None else trainable
    assert example is not None
    batched = _settled(input, layer, partition, example.dtype)
    learned = trainable is not None and trainable.requires_grad
    everything = learned and frozen is None and frozen_inputs is None
    with without_autocast(batched):
        if ops.transformed() or (everything and layer.algorithm in ("auto", "full")):
            output = _plain_conv2d(batched, weights, biases, layer)
        else:
            copied = layer.seen is not None and learned and torch.is_grad_enabled()
            seen = ops.copy_channels(batched, partition.seen) if copied else None
            output = PartialConv2dFunction.apply(batched, seen, *weights, *biases, layer)
    return output.squeeze(0) if input.dim() == 3 else output


def partial_linear(
    input: Tensor,
    weight_trainable: Tensor | None,
    weight_frozen: Tensor | None = None,
    weight_frozen_inputs: Tensor | None = None,
    bias_trainable: Tensor | None = None,
    bias_frozen: Tensor | None = None,
    *,
    partition: Partition,
) -> Tensor:
    """`F.linear` with a weight of which only the block `[filters][:, inputs]` ever receives a gradient.

    The (out_features, in_features) weight and the bias are merged from their parts as those of `partial_conv2d` are.
    `input` is (..., in_features). Raises RuntimeError for shapes and dtypes that F.linear refuses.
    """
    example = weight_frozen if weight_trainable is None else weight_trainable
    if example is None:
        raise ValueError("partial_linear needs weight_trainable, weight_frozen or both")
    features = partition.in_channels
    if input.dim() == 0 or input.size(-1) != features:
        raise RuntimeError(f"expected an input of shape (..., {features}), got {tuple(input.shape)}")
    input = _cast(input, example.dtype)
    layer = LinearLayer(partition.block.runs, partition.inputs.runs, partition.bias_filters.runs)
    weights, biases = (weight_trainable, weight_frozen, weight_frozen_inputs), (bias_trainable, bias_frozen)
    learned = weight_trainable is not None and weight_trainable.requires_grad
    with without_autocast(input):
        if ops.transformed() or (learned and weight_frozen is None and weight_frozen_inputs is None):
            return F.linear(input, *_plain_weights(input, weights, biases, layer))
        seen = None
        if learned and not partition.inputs.is_full and torch.is_grad_enabled():
            seen = ops.take(input, layer.inputs, -1).clone(memory_format=torch.contiguous_format)
        return PartialLinearFunction.apply(input, seen, *weights, *biases, layer)


def weight_grad_problem(
    input: Tensor,
    kernel_size: Pair,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    padding_mode: str = "zeros",
    *,
    partition: Partition,
) -> planner.Problem:
    """The weight gradient that `partial_conv2d` leaves to backward for these arguments, as the planner sees it."""
    batched, layer = settle(input, kernel_size, stride, padding, dilation, padding_mode, partition, input.dtype)
    return _problem(batched, layer, partition)


def settle(
    input: Tensor, kernel_size: Sequence[int], stride: int | Pair, padding: int | Pair | str, dilation: int | Pair,
    padding_mode: str, partition: Partition, dtype: torch.dtype,
) -> tuple[Tensor, Layer]:  # fmt: skip
    """The batched, padded, cast input of the convolution proper, and its constants."""
    layer = constants(partition, kernel_size, stride, padding, dilation, padding_mode, "auto")
    return _settled(input, layer, partition, dtype), layer


def _plain_conv2d(
    input: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], layer: Layer
) -> Tensor:
    """In operations that PyTorch differentiates in every way; nothing beats them where everything is learned."""
    weight, bias = _plain_weights(input, weights, biases, layer)
    return F.conv2d(input, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _plain_weights(
    input: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], layer: Layer | LinearLayer
) -> tuple[Tensor, Tensor | None]:
    """The whole weight and bias, in the input's type."""
    (weight_trainable, *weights_frozen), (bias_trainable, bias_frozen) = weights, biases
    weight = merged_weight((weight_trainable, *map(_constant, weights_frozen)), layer, input.dtype)
    return weight, merged_bias(bias_trainable, _constant(bias_frozen), layer, input.dtype)


def _constant(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach()


def constants(
    partition: Partition, kernel_size: Sequence[int], stride: int | Pair, padding: int | Pair | str,
    dilation: int | Pair, padding_mode: str, algorithm: str | None,
) -> Layer:  # fmt: skip
    """The constants of the call, looked up where nobody traces it."""
    make = _make_layer if torch.compiler.is_compiling() else _known_layer
    padding = padding if isinstance(padding, str) else _pair(padding)
    return make(
        partition, kernel_size, _pair(stride), padding, _pair(dilation), padding_mode, planner.requested(algorithm)
    )


def _pair(value: int | Sequence[int]) -> Pair:
    """One number for both, as F.conv2d takes it: alone or in a sequence."""
    if type(value) is tuple and len(value) == 2:  # a layer's own: to ask whether it is a Sequence takes longer
        return value
    if isinstance(value, Sequence):
        return (value[0], value[-1]) if len(value) in (1, 2) else _refuse(value)
    return value, value


def _refuse(value: Sequence[int]) -> Pair:
    raise RuntimeError(f"{tuple(value)} is neither one number nor a pair")


def _make_layer(
    partition: Partition, kernel_size: Sequence[int], stride: Pair, padding: Pair | str, dilation: Pair,
    padding_mode: str, algorithm: str,
) -> Layer:  # fmt: skip
    if len(kernel_size) != 2:
        raise RuntimeError(
            f"expected a weight of shape (K, C / groups, R, S), got filters of size {tuple(kernel_size)}"
        )
    if padding == "same":
        if stride != (1, 1):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        before, after = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding={padding!r} is no padding; give a number, a pair, 'same' or 'valid'")
        before = after = (0, 0)
    else:
        before = after = padding
    border = None
    if padding_mode != "zeros" or before != after:
        border, before = (before[1], after[1], before[0], after[0]), (0, 0)
    return Layer(
        partition.block.runs, partition.inputs.runs, partition.bias_filters.runs, (kernel_size[0], kernel_size[1]),
        stride, (before[0], before[1]), dilation, partition.groups, algorithm,
        seen=None if partition.seen == (0, partition.in_channels) else partition.seen,
        border=border, border_mode="constant" if padding_mode == "zeros" else padding_mode,
    )  # fmt: skip


_known_layer = lru_cache(maxsize=4096)(_make_layer)


def _settled(input: Tensor, layer: Layer, partition: Partition, dtype: torch.dtype) -> Tensor:
    """The batched, padded, cast input of the convolution proper."""
    dimensions, channels = input.dim(), partition.in_channels
    if dimensions not in (3, 4) or input.size(-3) != channels:
        raise RuntimeError(
            f"expected an input of shape (N, {channels}, H, W) or ({channels}, H, W), got {tuple(input.shape)}"
        )
    if layer.border is not None:
        input = F.pad(input, layer.border, mode=layer.border_mode)
    input = _cast(input.unsqueeze(0) if dimensions == 3 else input, dtype)
    if layer.algorithm != "auto":
        # Raises here, not in the middle of a backward pass, what cannot be computed as asked.
        planner.check(_problem(input, layer, partition), layer.algorithm)
    return input


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The type that autocast wants F.conv2d to compute in; None where it is off."""
    if not autocasts(input):
        return None
    return input.dtype if input.dtype == torch.float64 else torch.get_autocast_dtype(input.device.type)


def _cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in the type of the computation: autocast's where it is on, as for F.conv2d, else its own."""
    wanted = autocast_dtype(input)
    if wanted is None and input.dtype != dtype:
        raise RuntimeError(f"input type ({input.dtype}) and weight type ({dtype}) should be the same")
    dtype = wanted or dtype
    return input if input.dtype == dtype else input.to(dtype)


def _problem(input: Tensor, layer: Layer, partition: Partition) -> planner.Problem:
    return ops.problem(
        (input.size(0), ops.run_length(partition.seen), *input.shape[2:]), partition.filters.size, layer.filters,
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, input.device,
        ops.memory_format(input), input.dtype,
    )  # fmt: skip
