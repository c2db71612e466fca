"""The functional form of a partially learned convolution: argument rules, padding modes; autocast ends here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwn_ext import ops, planner
from rwn_ext.autograd import Layer, PartialConv2dFunction, without_autocast
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
    batched, layer = _settle(
        input, (example.size(2), example.size(3)), stride, padding, dilation, padding_mode, partition, algorithm,
        example.dtype,
    )  # fmt: skip
    learned = weight_trainable is not None and weight_trainable.requires_grad
    everything = learned and weight_frozen is None and weight_frozen_inputs is None
    if everything and layer.algorithm in ("auto", "full") and (bias_trainable is None or bias_frozen is None):
        # An ordinary convolution, for which nothing beats the ordinary way.
        bias = bias_frozen if bias_trainable is None else bias_trainable
        output = F.conv2d(batched, example, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        seen = _seen_copy(batched, partition) if learned and torch.is_grad_enabled() else None
        with without_autocast(batched.device.type):
            output = PartialConv2dFunction.apply(
                batched, seen, weight_trainable, weight_frozen, weight_frozen_inputs, bias_trainable, bias_frozen, layer
            )
    return output.squeeze(0) if input.dim() == 3 else output


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
    batched, layer = _settle(
        input, kernel_size, stride, padding, dilation, padding_mode, partition, "auto", input.dtype
    )
    return _problem(batched, layer, partition)


def _settle(
    input: Tensor, kernel_size: Pair, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair,
    padding_mode: str, partition: Partition, algorithm: str | None, dtype: torch.dtype,
) -> tuple[Tensor, Layer]:  # fmt: skip
    """The batched, padded, cast input of the convolution proper, and its constants."""
    in_channels = partition.in_channels
    if input.dim() not in (3, 4) or input.size(-3) != in_channels:
        raise RuntimeError(
            f"expected an input of shape (N, {in_channels}, H, W) or ({in_channels}, H, W), got {tuple(input.shape)}"
        )
    stride, dilation = _pair(stride), _pair(dilation)
    input, padding = _padded(input, kernel_size, stride, padding, dilation, padding_mode)
    input = _cast(input.unsqueeze(0) if input.dim() == 3 else input, dtype)
    layer = Layer(
        partition.block.runs, partition.inputs.runs, partition.bias_filters.runs, kernel_size, stride, padding,
        dilation, partition.groups, input.dtype, planner.requested(algorithm),
    )  # fmt: skip
    if layer.algorithm != "auto":
        # Raises here, not in the middle of a backward pass, what cannot be computed as asked.
        planner.plan(_problem(input, layer, partition), layer.algorithm)
    return input, layer


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padded(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: int | Pair | str, dilation: Pair, padding_mode: str
) -> tuple[Tensor, Pair]:
    """The input, padded as far as the convolution itself cannot, and the padding left to the convolution."""
    if padding == "same":
        if stride != (1, 1):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        before, after = [t // 2 for t in totals], [t - t // 2 for t in totals]
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"padding={padding!r} is no padding; give a number, a pair, 'same' or 'valid'")
    else:
        before = after = list(_pair(0 if isinstance(padding, str) else padding))
    if padding_mode == "zeros" and before == after:
        return input, (before[0], before[1])
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return F.pad(input, (before[1], after[1], before[0], after[0]), mode=mode), (0, 0)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The type that autocast wants F.conv2d to compute in; None where it is off."""
    device_type = input.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return input.dtype if input.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
    return None


def _cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in the type of the computation: autocast's where it is on, as for F.conv2d, else its own."""
    wanted = autocast_dtype(input)
    if wanted is None and input.dtype != dtype:
        raise RuntimeError(f"input type ({input.dtype}) and weight type ({dtype}) should be the same")
    return input.to(wanted or dtype)


def _seen_copy(input: Tensor, partition: Partition) -> Tensor | None:
    """A compact copy of the channels that the learned weights see; None where they see the whole input."""
    whole = partition.seen == (0, partition.in_channels)
    return None if whole else ops.copy_channels(input, partition.seen)


def _problem(input: Tensor, layer: Layer, partition: Partition) -> planner.Problem:
    return ops.problem(
        (input.size(0), ops.run_length(partition.seen), *input.shape[2:]), partition.filters.size, layer.filters,
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, input.device.type,
        ops.memory_format(input),
    )  # fmt: skip
