"""The convolutions of a lean block as plain functions: forward, and gradients from an input that was made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext import ops, planner
from rwn_ext.autograd import Layer, convolve, gradients, merged_weight
from rwn_ext.functional import autocast_dtype
from rwn_ext.modules import PartialConv2d
from rwn_ext.ops import Pair, Runs, memory_format
from rwn_ext.partition import BIAS_PARTS, WEIGHT_PARTS
from rwn_ext.subsets import run_length

# The parameters of a convolution, in PartialConv2d's order: three parts of the weight, two of the bias.
Parts = Sequence[Tensor | None]
PARTS = len(WEIGHT_PARTS) + len(BIAS_PARTS)


class Conv(NamedTuple):
    """The constants of one convolution."""

    layer: Layer
    seen: Runs | None
    """The channels of the input that learned weights see; None: all of them."""
    dtype: torch.dtype
    """Of the computation."""
    weight_dtype: torch.dtype | None
    """Of the learned weight."""
    ordinary: bool
    """All of the weight, the first part, is learned: the calls of nn.Conv2d."""

    def forward(self, y: Tensor, parts: Parts) -> Tensor:
        if not self.ordinary:
            weight = merged_weight(parts[:3], self.layer, y.dtype, "forward")
            return convolve(y, weight, parts[3:], self.layer)
        weight, bias = parts[0], parts[4] if parts[3] is None else parts[3]
        assert weight is not None
        weight, bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        return F.conv2d(y, weight, bias, self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups)

    def backward(
        self, grad: Tensor, seen: Tensor | None, parts: Parts, input_size: Sequence[int], needs: Sequence[bool],
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of the input, the learned weight and the learned bias that `needs` asks for.

        `seen` is what `see` makes of the input; the weight's gradient needs it. With `affine`, a scale and a shift of
        all its channels, it is what `see` makes of the x in `ops.affine_relu(x, *affine)`: see `reads_normed`.
        """
        if not self.ordinary:
            scale, shift = affine or (None, None)
            if affine and self.seen is not None:
                scale, shift = (ops.take(vector, self.seen, 0) for vector in affine)
            return gradients(
                grad, parts[:3], seen, self.layer, input_size[2:], self.weight_dtype, (needs[0], needs[1], needs[2]),
                (scale, shift),
            )  # fmt: skip
        assert parts[0] is not None
        weight = parts[0].to(self.dtype)
        return torch.ops.aten.convolution_backward(
            grad, seen, weight, [weight.size(0)] if needs[2] else None, self.layer.stride, self.layer.padding,
            self.layer.dilation, False, (0, 0), self.layer.groups, list(needs),
        )  # fmt: skip

    def reads_normed(self, x: Tensor, out_channels: int) -> bool:
        """Whether the weight's gradient is best computed from the x in `ops.affine_relu(x, ...)`, by its own kernel."""
        if self.ordinary or x.dtype != self.dtype:
            return False
        seen = x if self.seen is None else x[:, : run_length(self.seen)]
        layer = self.layer
        return ops.reads_normed(
            seen, memory_format(x), out_channels, layer.filters, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, layer.algorithm,
        )  # fmt: skip

    def see(self, y: Tensor) -> Tensor:
        """What the weight's gradient needs of the input, in its type; compact, so that the rest can go."""
        y = y if self.seen is None else ops.copy_channels(y, self.seen)
        return y.to(self.dtype)


def conv_of(module: nn.Module, y: Tensor) -> tuple[Conv, Parts] | None:
    """The convolution that this module does to an input like `y`; None if it does anything else."""
    padding = _padding(module)
    if padding is None:
        return None
    assert isinstance(module, (nn.Conv2d, PartialConv2d))
    kernel_size, stride, dilation = ((v[0], v[-1]) for v in (module.kernel_size, module.stride, module.dilation))
    if isinstance(module, PartialConv2d):
        parts: Parts = [getattr(module, name) for name in WEIGHT_PARTS + BIAS_PARTS]
        p = module.partition
        filters, inputs, bias, seen = p.block.runs, p.inputs.runs, p.bias_filters.runs, p.seen
        algorithm = planner.requested(module.algorithm)
    else:
        learned = module.weight.requires_grad
        parts = [module.weight, None, None, module.bias, None]
        if not learned:
            parts = [None, module.weight, None, module.bias, None]
        filters, inputs = (0, module.out_channels) if learned else (), (0, module.weight.size(1))
        bias, seen, algorithm = (0, module.out_channels), (0, module.in_channels), "auto"
    like = parts[1] if parts[0] is None else parts[0]
    dtype = autocast_dtype(y)
    if y.size(1) != module.in_channels or (dtype is None and like.dtype != y.dtype):
        return None  # the module itself says best what is wrong
    if algorithm != "auto":
        planner.check(module.problem(y), algorithm)  # raises now what cannot be computed as asked
    learns = parts[0] is not None and parts[0].requires_grad
    everything = learns and parts[1] is None and parts[2] is None
    ordinary = everything and algorithm in ("auto", "full") and (parts[3] is None or parts[4] is None)
    whole = ordinary or seen == (0, module.in_channels)
    seen = None if whole else seen
    layer = Layer(filters, inputs, bias, kernel_size, stride, padding, dilation, module.groups, algorithm, seen=seen)
    weight_dtype = None if parts[0] is None else parts[0].dtype
    return Conv(layer, seen, dtype or y.dtype, weight_dtype, ordinary), parts


def can_be_taken(module: nn.Module) -> bool:
    """Whether `conv_of` knows this module, whatever its input."""
    return _padding(module) is not None


def _padding(module: nn.Module) -> Pair | None:
    """The zeros on either side, if that is all the padding there is."""
    if type(module) not in (nn.Conv2d, PartialConv2d) or module.padding_mode != "zeros":
        return None
    if type(module) is PartialConv2d and module.frozen == "zero":
        return None  # it has a cheaper way of its own
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)
    return module.padding[0], module.padding[-1]
