"""Poolings that keep no input for backward: of a maximum only its place in the window, of an average nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext.lean.block import has_hooks
from rwn_ext.ops import Pair, memory_format

aten = torch.ops.aten


def pool(x: Tensor, module: nn.Module) -> Tensor:
    """`module(x)`, lean where it is an nn.MaxPool2d or nn.AvgPool2d."""
    if not has_hooks(module) and type(module) is nn.MaxPool2d and not module.return_indices:
        return max_pool2d(x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    if not has_hooks(module) and type(module) is nn.AvgPool2d:
        return avg_pool2d(
            x, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            module.divisor_override,
        )  # fmt: skip
    return module(x)


def max_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """`F.max_pool2d` that keeps one byte an output: the place of the maximum in its window.

    Windows of more than 256 places, inputs that are not (N, C, H, W) and compiled calls are left to F.max_pool2d.
    """
    window = _pair(kernel_size)
    if not _is_lean(x) or window[0] * window[1] > 256:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    geometry = (window, _pair(stride) if stride else window, _pair(padding), _pair(dilation), ceil_mode)
    return _MaxPool2d.apply(x, geometry)


def avg_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """`F.avg_pool2d` that keeps nothing."""
    if not _is_lean(x):
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    window = _pair(kernel_size)
    steps = _pair(stride) if stride else window
    return _AvgPool2d.apply(x, (window, steps, _pair(padding), ceil_mode, count_include_pad, divisor_override))


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: tuple[Pair, Pair, Pair, Pair, bool]) -> Tensor:
        output, places = aten.max_pool2d_with_indices(x, *geometry)
        ctx.save_for_backward(_to_window(places, geometry, x.size(3)))
        ctx.like, ctx.geometry = (x.shape, memory_format(x)), geometry
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (in_window,) = ctx.saved_tensors
        places = _to_plane(in_window, ctx.geometry, ctx.like[0][3])
        return _input_gradient(aten.max_pool2d_with_indices_backward, grad, ctx.like, *ctx.geometry, places), None


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.like, ctx.geometry = (x.shape, memory_format(x)), geometry
        return aten.avg_pool2d(x, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _input_gradient(aten.avg_pool2d_backward, grad, ctx.like, *ctx.geometry), None


def _input_gradient(
    backward: Any, grad: Tensor, like: tuple[torch.Size, torch.memory_format], *arguments: Any
) -> Tensor:
    """`backward(grad, input, *arguments)` of an input that only lends its size and layout."""
    out = torch.empty(like[0], dtype=grad.dtype, device=grad.device, memory_format=like[1])
    if torch.is_grad_enabled():
        return backward(grad, out, *arguments)
    return backward.grad_input(grad, out, *arguments, grad_input=out)


def _to_window(places: Tensor, geometry: tuple[Pair, Pair, Pair, Pair, bool], width: int) -> Tensor:
    """Places in the (H, W) plane of the input to places in each output's window, of one byte."""
    (_, columns), *_, (dilation_h, dilation_w), _ = geometry
    if _fits(geometry, width):
        return places.sub(_corners(places, geometry, width)).byte()
    top, left = _top_left(places, geometry)
    row = places.div(width, rounding_mode="floor").sub_(top).div_(dilation_h, rounding_mode="floor")
    return row.mul_(columns).add_(places.remainder(width).sub_(left).div_(dilation_w, rounding_mode="floor")).byte()


def _to_plane(in_window: Tensor, geometry: tuple[Pair, Pair, Pair, Pair, bool], width: int) -> Tensor:
    """The way back."""
    (_, columns), *_, (dilation_h, dilation_w), _ = geometry
    if _fits(geometry, width):
        return in_window.long().add_(_corners(in_window, geometry, width))
    top, left = _top_left(in_window, geometry)
    in_window = in_window.long()
    row = in_window.div(columns, rounding_mode="floor").mul_(dilation_h).add_(top)
    return row.mul_(width).add_(in_window.remainder(columns).mul_(dilation_w).add_(left))


def _fits(geometry: tuple[Pair, Pair, Pair, Pair, bool], width: int) -> bool:
    """Whether a byte holds the distance in the plane from a window's corner to any of its places.

    Then that is its place in the window, without a division.
    """
    (rows, columns), *_, (dilation_h, dilation_w), _ = geometry
    return (rows - 1) * dilation_h * width + (columns - 1) * dilation_w < 256


def _corners(pooled: Tensor, geometry: tuple[Pair, Pair, Pair, Pair, bool], width: int) -> Tensor:
    """The place in the plane at which the window of each output begins: before or beside it, in the padding."""
    top, left = _top_left(pooled, geometry)
    return top * width + left  # (P, Q)


def _top_left(pooled: Tensor, geometry: tuple[Pair, Pair, Pair, Pair, bool]) -> tuple[Tensor, Tensor]:
    """Row (P, 1) and column (Q) at which the window of each output begins, negative in the padding."""
    _, stride, padding, *_ = geometry
    top = torch.arange(pooled.size(2), device=pooled.device) * stride[0] - padding[0]
    left = torch.arange(pooled.size(3), device=pooled.device) * stride[1] - padding[1]
    return top[:, None], left


def _is_lean(x: Tensor) -> bool:
    return x.dim() == 4 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
