"""Convolutions whose fixed filters are zero, at their true cost: what is zero or constant is not computed per pixel.

One layer computes its learned filters alone and fills the rest with zeros. Within a model that `fold` has marked, the
rest is not even filled in: a `Compact` travels between the layers, made of the channels that vary over the image and
one number for each other channel. Norms, activations and poolings of a constant are computed once, and a convolution
takes the constants in as one small map that all images share.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.utils._pytree import tree_map

from rwn_ext import ops
from rwn_ext.autograd import Layer
from rwn_ext.functional import settle
from rwn_ext.ops import Pair, Runs
from rwn_ext.partition import Partition
from rwn_ext.subsets import Subset


def conv2d(
    input: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    padding_mode: str,
    *,
    partition: Partition,
    dtype: torch.dtype,
) -> Any:
    """`partial_conv2d` where all that is not learned is zero: `weight` (Kt, Ct, R, S) and `bias` are the learned parts.

    Equal to the dense convolution with zeros wherever the input is finite. Forward and both gradients cost what the
    learned filters alone cost. `input` is a Tensor or a Compact; inside a `fold`ed model the result is a Compact.
    """
    batched, layer = settle(input, kernel_size, stride, padding, dilation, padding_mode, partition, dtype)
    # The biases of filters that are computed, and the values of those that are not.
    own, rest = bias, None
    if bias is not None and partition.bias_filters != partition.block:
        whole = spread(bias, partition.bias_filters, 0)
        own, rest = (_take(whole, subset.runs, 0) for subset in (partition.block, partition.block.complement))
    if weight is None:
        varying = _no_channels(batched, layer)
    elif partition.groups > 1:
        varying = _by_group_class(dense(batched), weight, own, partition, layer)
    elif isinstance(batched, Compact) and partition.inputs.is_full:
        varying = _convolve(batched, weight, own, layer.stride, layer.padding, layer.dilation)
    else:
        seen = dense(batched) if partition.inputs.is_full else ops.copy_channels(dense(batched), partition.seen)
        varying = _library_conv2d(seen, weight, own, layer.stride, layer.padding, layer.dilation)
    output = Compact(varying, partition.block, rest)
    if _folding.depth and not torch.compiler.is_compiling() and input.dim() == 4 and not partition.block.is_full:
        return output
    return output.dense() if input.dim() == 4 else output.dense().squeeze(0)


def linear(input: Any, weight: Tensor | None, bias: Tensor | None, *, partition: Partition) -> Tensor:
    """`partial_linear` where all that is not learned is zero: `weight` (Kt, Ct) and `bias` are the learned parts."""
    input = dense(input)
    if input.dim() == 0 or input.size(-1) != partition.in_channels:
        raise RuntimeError(f"expected an input of shape (..., {partition.in_channels}), got {tuple(input.shape)}")
    learned = input[..., :0] if weight is None else F.linear(ops.take(input, partition.inputs.runs, -1), weight)
    output = spread(learned, partition.block, input.dim() - 1)
    return output if bias is None else output + spread(bias, partition.bias_filters, 0).to(output.dtype)


def fold(model: nn.Module) -> nn.Module:
    """Lets constant channels travel between the layers of `model` as single numbers. Returns the model, marked.

    Inside its forward pass a convolution with zeroed filters (`PartialConv2d(..., frozen="zero")`) passes a `Compact`
    on. BatchNorm, activations, poolings, sums, concatenations and convolutions compute with its varying channels and
    with its constants; whatever else is done with it (dropout while training, say) gets the whole tensor. The model
    takes and returns ordinary tensors, its results and gradients stay those of the whole network up to rounding, and so
    do BatchNorm's running statistics. Hooks on inner modules see the Compact; its `dense()` is the tensor.
    Under torch.compile the model computes with whole tensors.
    """
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end, always_call=True)
    return model


class Compact:
    """An (N, C, H, W) activation of which only `channels` vary over batch and image; each other one is one number.

    `varying` is (N, len(channels), H, W); `rest` holds the other channels' values in order, None for zeros.
    Torch functions that know it keep it compact, all others get the whole tensor, and so do operators. It is no
    torch.Tensor, but what changes it in place, changes it for all who hold it.
    """

    __slots__ = ("channels", "rest", "varying")

    def __init__(self, varying: Tensor, channels: Subset, rest: Tensor | None) -> None:
        self.varying, self.channels = varying, channels
        self.rest = None if rest is None else rest.to(varying.dtype)

    def dense(self) -> Tensor:
        """The whole (N, C, H, W) tensor."""
        whole = spread(self.varying, self.channels, 1)
        return whole if self.rest is None else whole + self._rest_vector()[:, None, None]

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is None and args and isinstance(args[0], Compact) and _in_place(func.__name__):
            return func(args[0]._become(args[0].dense()).varying, *tree_map(dense, args[1:]), **tree_map(dense, kwargs))
        result = handler(*args, **kwargs) if handler else None
        return func(*tree_map(dense, args), **tree_map(dense, kwargs)) if result is None else result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        whole = self.dense()
        return getattr(self._become(whole).varying if _in_place(name) else whole, name)

    @property
    def shape(self) -> torch.Size:
        n, _, *image = self.varying.shape
        return torch.Size([n, self.channels.size, *image])

    @property
    def dtype(self) -> torch.dtype:
        return self.varying.dtype

    @property
    def device(self) -> torch.device:
        return self.varying.device

    @property
    def is_cuda(self) -> bool:
        return self.varying.is_cuda

    def dim(self) -> int:
        return self.varying.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Compact:
        return Compact(self.varying.to(*args, **kwargs), self.channels, self.rest)

    def mean(self, dim: Any = None, keepdim: bool = False) -> Tensor:
        if keepdim or not isinstance(dim, (tuple, list)) or sorted(d % 4 for d in dim) != [2, 3]:
            return self.dense().mean(dim, keepdim)
        means = spread(self.varying.mean((2, 3)), self.channels, 1)
        return means if self.rest is None else means + self._rest_vector()

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, Compact) or self.channels != other.channels or self.shape != other.shape:
            return self.dense() + dense(other)
        rests = [rest for rest in (self.rest, other.rest) if rest is not None]
        return Compact(self.varying + other.varying, self.channels, sum(rests) if rests else None)  # type: ignore[arg-type]

    def __radd__(self, other: Any) -> Any:
        return other + self.dense()

    def _become(self, value: Tensor | Compact) -> Compact:
        """Takes this value, for all who hold it."""
        if not isinstance(value, Compact):
            value = Compact(value, Subset.full(value.size(1)), None)
        self.varying, self.channels, self.rest = value.varying, value.channels, value.rest
        return self

    def _rest_vector(self) -> Tensor:
        """The constants in a (C,) vector, zeros where channels vary."""
        assert self.rest is not None
        return spread(self.rest, self.channels.complement, 0)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _add_operators() -> None:
    """Python looks for these in the class alone."""

    def of_whole(function: Callable) -> Callable:
        return lambda *operands: function(*map(dense, operands))

    def reflected(function: Callable) -> Callable:
        return lambda right, left: function(dense(left), dense(right))

    def in_place(function: Callable) -> Callable:
        return lambda left, right: left._become(function(left, right))

    arithmetic = ("sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
    for name in (*arithmetic, "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "getitem"):
        setattr(Compact, f"__{name}__", of_whole(getattr(operator, name)))
    for name in arithmetic:
        setattr(Compact, f"__r{name}__", reflected(getattr(operator, name)))
    for name in ("add", *arithmetic):
        setattr(Compact, f"__i{name}__", in_place(getattr(operator, name)))
    for function in (len, iter):
        setattr(Compact, f"__{function.__name__}__", of_whole(function))


_add_operators()


def dense(value: Any) -> Any:
    """A Compact as the whole tensor; anything else as it is."""
    return value.dense() if isinstance(value, Compact) else value


def spread(values: Tensor, channels: Subset, axis: int) -> Tensor:
    """A tensor that holds `values` at these channels along `axis` and zeros at the others."""
    if channels.is_full:
        return values
    if len(channels.runs) <= 2:
        start, stop = channels.runs or (0, 0)
        return F.pad(values, (0, 0) * (values.dim() - 1 - axis) + (start, channels.size - stop))
    shape = [*values.shape]
    shape[axis] = channels.size
    whole = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=ops.memory_format(values))
    return whole.zero_().index_copy_(axis, ops._index(channels.runs, values.device), values)


class _Folding(threading.local):
    """How many folded models this thread is in the forward pass of."""

    depth = 0


_folding = _Folding()


def _begin(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _folding.depth += 1


def _end(module: nn.Module, args: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return output
    _folding.depth -= 1
    return tree_map(dense, output)


def _no_channels(input: Tensor | Compact, layer: Layer) -> Tensor:
    """The (N, 0, P, Q) output of no filter. It hangs on the input, whose gradient is then zero and not missing."""
    height, width = (
        (input.size(2 + i) + 2 * layer.padding[i] - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1)
        // layer.stride[i]
        + 1
        for i in (0, 1)
    )
    empty = (input.varying if isinstance(input, Compact) else input)[:, :0]
    if isinstance(input, Compact) and input.rest is not None:
        empty = empty + input.rest[:0, None, None]
    return F.pad(empty, (0, width - input.size(3), 0, height - input.size(2)))


def _by_group_class(
    input: Tensor, weight: Tensor, bias: Tensor | None, partition: Partition, layer: Layer
) -> Tensor:  # fmt: skip
    """The learned filters of a grouped convolution, one call for all groups that hold equally many of them."""
    classes = ops.group_classes(partition.block.runs, partition.block.size, partition.groups)
    seen = ops.copy_channels(input, partition.seen)
    parts = []
    for members in classes:
        own = _take(seen, tuple(edge * len(partition.inputs) for edge in members.groups), 1)
        biases = None if bias is None else _take(bias, members.rows, 0)
        groups = ops.run_length(members.groups)
        filters = _take(weight, members.rows, 0)
        parts.append(_library_conv2d(own, filters, biases, layer.stride, layer.padding, layer.dilation, groups))
    if len(parts) == 1:
        return parts[0]
    order = [row for members in classes for row in ops.run_indices(members.rows)]
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts, 1)[:, places]


def _convolve(
    input: Compact, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:  # fmt: skip
    """An ungrouped convolution: the varying channels per pixel; the constant ones as one map, the same for all images.

    The map is the convolution of an image of ones with the filter that sums the constants' weights, so that zeros
    padded around the image count as they must.
    """
    if input.channels.is_empty or input.rest is not None:
        others = _take(weight, input.channels.complement.runs, 1)
        constants = others.new_zeros(others.size(1)) if input.rest is None else input.rest.to(others.dtype)
        summed = torch.tensordot(others, constants, ([1], [0]))[:, None]  # (K, 1, R, S)
        ones = constants.new_ones(1, 1, *input.shape[2:])
        shared = F.conv2d(ones, summed, bias, stride, padding, dilation)  # (1, K, P, Q)
        if input.channels.is_empty:
            return spread(_resized(input.varying, shared), Subset.empty(weight.size(0)), 1) + shared
        bias = None
    own = _take(weight, input.channels.runs, 1)
    output = _library_conv2d(input.varying, own, bias, stride, padding, dilation)
    return output if input.rest is None else output + shared.contiguous(memory_format=ops.memory_format(output))


def _library_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int = 1
) -> Tensor:
    """`F.conv2d`, spared what its backward cannot do (see `ops.visited` and `ops.misreads`)."""
    kernel_size = (weight.size(2), weight.size(3))
    if ops.misreads(input, kernel_size, _pair(stride)):
        exact = None if bias is None else bias.float()
        return _library_conv2d(input.float(), weight.float(), exact, stride, padding, dilation, groups).to(input.dtype)
    if not isinstance(padding, str):
        input, stride = ops.visited(input, kernel_size, _pair(stride), _pair(padding), groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _resized(empty: Tensor, like: Tensor) -> Tensor:
    """(N, 0, H, W) -> (N, 0, P, Q)."""
    return F.pad(empty, (0, like.size(3) - empty.size(3), 0, like.size(2) - empty.size(2)))


def _conv2d(
    input: Any, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:  # fmt: skip
    if groups > 1:
        return None
    return _convolve(input, weight, bias, stride, padding, dilation)


def _batch_norm(
    input: Any, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Compact:  # fmt: skip
    """Of a constant channel, batch statistics make `bias` and running statistics make another constant."""
    own, others = input.channels.runs, input.channels.complement.runs
    values = input.varying
    if own:
        # Copies: autograd keeps them, and would not allow a change of the others beside them.
        statistics = [None if b is None else _take(b, own, 0).clone() for b in (running_mean, running_var)]
        mean, var = statistics
        values = F.batch_norm(values, mean, var, _taken(weight, own), _taken(bias, own), training, momentum, eps)
        if training:
            _put_back(statistics, (running_mean, running_var), own)
    constants = values.new_zeros(ops.run_length(others)) if input.rest is None else input.rest
    mean, var, gamma, beta = (_taken(vector, others) for vector in (running_mean, running_var, weight, bias))
    if training:
        if mean is not None and var is not None:
            moved = torch.lerp(mean, constants.to(mean.dtype), momentum), var * (1 - momentum)
            _put_back(moved, (running_mean, running_var), others)
        if not own:
            # As in the whole network, gamma and what made the constants then have a gradient, of zeros.
            for unseen in (gamma, input.rest):
                if unseen is not None and unseen.requires_grad:
                    beta = 0 * unseen if beta is None else beta + 0 * unseen
        return Compact(values, input.channels, beta)
    assert mean is not None and var is not None
    rest = (constants - mean) * torch.rsqrt(var + eps)
    rest = rest if gamma is None else rest * gamma
    return Compact(values, input.channels, rest if beta is None else rest + beta)


def _taken(vector: Tensor | None, runs: Runs) -> Tensor | None:
    return None if vector is None else _take(vector, runs, 0)


def _take(tensor: Tensor, runs: Runs, axis: int) -> Tensor:
    """`ops.take`, also of no channels."""
    return ops.take(tensor, runs, axis) if runs else tensor.narrow(axis, 0, 0)


@torch.no_grad()
def _put_back(parts: Sequence[Tensor | None], buffers: Sequence[Tensor | None], runs: Runs) -> None:
    """Writes these values of the channels `runs` into the buffers."""
    for part, buffer in zip(parts, buffers, strict=True):
        if part is None or buffer is None or not runs:
            continue
        if len(runs) == 2:
            ops.take(buffer, runs, 0).copy_(part)
        else:
            buffer.index_copy_(0, ops._index(runs, buffer.device), part)


def _pointwise(function: Callable) -> Callable:
    """For a function of each element alone that maps zero to zero."""

    def handler(input: Any, *args: Any, **kwargs: Any) -> Compact:
        values = function(input.varying, *args, **kwargs)
        # Not in place: they may be a part of BatchNorm's bias.
        inplace = kwargs.pop("inplace", False)
        rest = None if input.rest is None else function(input.rest, *args, **kwargs)
        if inplace:
            input.rest = rest
        return Compact(values, input.channels, rest)

    return handler


def _pooling(function: Callable) -> Callable:
    """For a function of each channel alone that maps a constant image to that constant."""

    def handler(input: Any, *args: Any, **kwargs: Any) -> Compact | None:
        if input.channels.is_empty:
            return None
        return Compact(function(input.varying, *args, **kwargs), input.channels, input.rest)

    return handler


def _avg_pool(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Compact | None:  # fmt: skip
    if divisor_override is not None or any(padding if isinstance(padding, (tuple, list)) else (padding,)):
        return None
    return _pooling(F.avg_pool2d)(input, kernel_size, stride, ceil_mode=ceil_mode)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return input + other if alpha == 1 else None


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Compact | None:
    return None if training and p > 0 else input


def _pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Compact | None:
    if len(pad) > 4 or (mode == "constant" and (value or input.rest is not None)):
        return None
    # Of no channels the size alone counts, and other modes refuse them.
    mode = "constant" if input.channels.is_empty else mode
    return Compact(F.pad(input.varying, pad, mode, value), input.channels, input.rest)


def _cat(tensors: Sequence[Tensor | Compact], dim: int = 0) -> Compact | None:
    if dim not in (1, -3) or any(tensor.dim() != 4 for tensor in tensors):
        return None
    pieces = [t if isinstance(t, Compact) else Compact(t, Subset.full(t.size(1)), None) for t in tensors]
    channels, size = [], 0
    for piece in pieces:
        channels += [size + index for index in piece.channels.indices]
        size += piece.channels.size
    rest = None
    if any(piece.rest is not None for piece in pieces):
        zeros = (piece.varying.new_zeros(len(piece.channels.complement)) for piece in pieces)
        rest = torch.cat([z if p.rest is None else p.rest for p, z in zip(pieces, zeros, strict=True)])
    varying = torch.cat([piece.varying for piece in pieces], 1)
    return Compact(varying, Subset.from_indices(size, channels), rest)


_HANDLERS: dict[Callable, Callable] = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    F.pad: _pad,
    torch.cat: _cat,
    torch.add: _add,
    torch.mean: Compact.mean,
    torch.max_pool2d: _pooling(F.max_pool2d),
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _pooling(F.adaptive_avg_pool2d),
    F.adaptive_max_pool2d: _pooling(F.adaptive_max_pool2d),
}
_POINTWISE = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.hardswish, F.mish, torch.tanh,
)  # fmt: skip
_HANDLERS.update({function: _pointwise(function) for function in _POINTWISE})
