"""Convolutions that learn some rows or columns of their kernels: the paper's slicing dimensions 2 and 3."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext import ops
from rwn_ext.modules import FROZEN
from rwn_ext.ops import Pair
from rwn_ext.subsets import choose


class SlicedConv2d(nn.Module):
    """A convolution with `conv`'s values that learns only the last rows (dim 2) or columns (dim 3) of each kernel.

    Equals, for dim 2, with Rt learned rows::

        weight = torch.cat([weight_frozen, weight_trainable], 2)      # (K, C / groups, R - Rt and Rt, S)
        F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    and only `weight_trainable` and the bias ever receive a gradient. A row's weight gradient is that of a convolution
    with kernels one row high, so it is computed for the learned rows alone; it needs the whole input, however. With
    frozen="zero" forward and both gradients cost what the learned rows cost.

    Args:
        dim: 2 for rows, 3 for columns.
        part: a fraction or a count of them; at least one is learned, as in the authors' experiments.
        frozen: as for `PartialConv2d`.

    The state dict holds the parts under their own names; `whole_weight()` is the convolution's weight.

    Raises ValueError for a wrong `dim`, `part` or `frozen` and for a padding mode other than zeros.
    """

    weight_frozen: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, conv: nn.Conv2d, dim: int, part: Any, frozen: str = "random") -> None:
        super().__init__()
        if dim not in (2, 3):
            raise ValueError(f"dim={dim} is neither 2 (rows of the kernel) nor 3 (columns)")
        if frozen not in FROZEN:
            raise ValueError(f"frozen={frozen!r} is unknown; choose one of {', '.join(FROZEN)}")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"padding={conv.padding!r} of mode {conv.padding_mode!r}: give numbers, of mode 'zeros'")
        self.dim, self.frozen = dim, frozen
        self.kernel_size, self.stride, self.groups = _pair(conv.kernel_size), _pair(conv.stride), conv.groups
        self.padding, self.dilation = _pair(conv.padding), _pair(conv.dilation)
        weight, size = conv.weight.detach(), conv.weight.size(dim)
        learned = choose(part, size, what="part")
        self.first = size - max(1, len(learned))
        fixed, taught = (part.clone() for part in weight.split([self.first, size - self.first], dim))
        self.weight_trainable = nn.Parameter(taught)
        self.weight_frozen = nn.Parameter(fixed, requires_grad=False) if self.first and frozen == "random" else None
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        else:
            dtype = input.dtype
        input, learned = input.to(dtype), self.weight_trainable.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        with torch.autocast(input.device.type, enabled=False):
            if self.weight_frozen is not None:
                fixed = self.weight_frozen.to(dtype)
                output = _SlicedFunction.apply(input, learned, fixed, self.dim, *geometry)
                return output if bias is None else output + bias[:, None, None]
            if self.first:
                input, padding = self._shifted(input)
                geometry = (self.stride, padding, self.dilation, self.groups)
            return F.conv2d(input, learned, bias, *geometry)

    def whole_weight(self) -> Tensor:
        """The weight (K, C / groups, R, S), zeros where this layer has them."""
        learned = self.weight_trainable.detach()
        shape = list(learned.shape)
        shape[self.dim] = self.first
        fixed = learned.new_zeros(shape) if self.weight_frozen is None else self.weight_frozen
        return torch.cat([fixed, learned], self.dim)

    def extra_repr(self) -> str:
        size = self.kernel_size[self.dim - 2]
        return f"kernel_size={self.kernel_size}, dim={self.dim}, trainable={size - self.first}/{size}"

    def _shifted(self, input: Tensor) -> tuple[Tensor, Pair]:
        """What the learned rows alone see, and the padding of the other axis that is left to the convolution."""
        axis = self.dim - 2
        before = self.padding[axis] - self.first * self.dilation[axis]
        border = (before, self.padding[axis])
        padding = (0, self.padding[1]) if axis == 0 else (self.padding[0], 0)
        return F.pad(input, (0, 0, *border) if axis == 0 else border), padding


class _SlicedFunction(torch.autograd.Function):
    """The convolution with the fixed and the learned slices together; the gradient of the latter alone."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, learned: Tensor, fixed: Tensor, dim: int, stride: Pair, padding: Pair, dilation: Pair,
        groups: int,
    ) -> Tensor:  # fmt: skip
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            learned if needs_input else None, fixed if needs_input else None, input if needs_weight else None
        )
        ctx.constants = dim, fixed.size(dim), tuple(learned.shape), input.shape[2:], stride, padding, dilation, groups
        return F.conv2d(input, torch.cat([fixed, learned], dim), None, stride, padding, dilation, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        learned, fixed, input = ctx.saved_tensors
        dim, first, shape, input_size, stride, padding, dilation, groups = ctx.constants
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = torch.cat([fixed, learned], dim)
            kernel = (weight.size(2), weight.size(3))
            grad_input = ops.conv2d_input_grad(
                grad_output, weight, input_size, kernel, stride, padding, dilation, groups
            )
        if ctx.needs_input_grad[1]:
            slices = [
                _slice_grad(grad_output, input, dim, first + i, shape, stride, padding, dilation, groups)
                for i in range(shape[dim])
            ]
            grad_weight = torch.cat(slices, dim)
        return grad_input, grad_weight, None, None, None, None, None, None


def _slice_grad(
    grad_output: Tensor, input: Tensor, dim: int, position: int, shape: tuple[int, ...], stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """The gradient of one row (dim 2) or column of all kernels, from the output that it makes of pixels, not padding.

    Output row p takes the input row `p * stride + position * dilation - padding` in through it: those p for which there
    is such a row are contiguous, so both tensors are views.
    """
    axis = dim - 2
    step, shift = stride[axis], position * dilation[axis] - padding[axis]
    start = max(0, -(shift // step))
    stop = min(grad_output.size(dim), (input.size(dim) - 1 - shift) // step + 1)
    kernel = (1, shape[3]) if axis == 0 else (shape[2], 1)
    if start >= stop:
        return grad_output.new_zeros(shape[0], shape[1], *kernel)
    grad = grad_output.narrow(dim, start, stop - start)
    seen = input.narrow(dim, start * step + shift, (stop - 1 - start) * step + 1)
    inner = (0, padding[1]) if axis == 0 else (padding[0], 0)
    return ops.conv2d_weight_grad(grad, seen, (0, shape[0]), kernel, stride, inner, dilation, groups)


def slice_(network: nn.Module, names: list[str], dim: int, part: Any, frozen: str) -> None:
    """Replaces, in place, these convolutions of the network by `SlicedConv2d`."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        try:
            sliced = SlicedConv2d(network.get_submodule(name), dim, part, frozen)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        setattr(network.get_submodule(owner), attribute, sliced)


def _pair(value: Any) -> Pair:
    return (int(value[0]), int(value[1]))
