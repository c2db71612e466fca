"""The activations a lean block knows, and what each needs of the forward pass for its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A pointwise function, with the derivative torch's autograd uses for it."""

    forward: Callable[..., Tensor]
    """(pre) -> y; (pre, inplace=True) may write into its argument."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """(grad_y, source) -> grad_pre; `source` is y, or pre where `reads_input`."""
    passes: Callable[[Tensor], Tensor] | None = None
    """(y) -> the bool mask that says all of the derivative, if one bit an element can."""
    masked: Callable[[Tensor, Tensor], Tensor] | None = None
    """(grad_y, mask) -> grad_pre."""
    reads_input: bool = False


def _same(x: Tensor, inplace: bool = False) -> Tensor:
    return x


def _zero_outside(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, grad, 0)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, x)
    sigmoid = x.sigmoid()  # as autograd does for second derivatives
    return grad * sigmoid * (1 + x * (1 - sigmoid))


IDENTITY = Activation(_same, lambda grad, y: grad, lambda y: torch.empty(0), lambda grad, mask: grad)
RELU = Activation(F.relu, lambda grad, y: aten.threshold_backward(grad, y, 0), lambda y: ~(y <= 0), _zero_outside)
RELU6 = Activation(
    F.relu6, lambda grad, y: aten.hardtanh_backward(grad, y, 0.0, 6.0), lambda y: ~((y <= 0) | (y >= 6)), _zero_outside
)
SILU = Activation(F.silu, _silu_backward, reads_input=True)
HARDSWISH = Activation(F.hardswish, aten.hardswish_backward, reads_input=True)


def leaky_relu(slope: float) -> Activation:
    """LeakyReLU with a slope of 0 or more: the sign of y is then that of its input."""
    return Activation(
        lambda x, inplace=False: F.leaky_relu(x, slope, inplace),
        lambda grad, y: aten.leaky_relu_backward(grad, y, slope, False),
        lambda y: y > 0,
        lambda grad, mask: torch.where(mask, grad, grad * slope),
    )


def activation_of(what: nn.Module | str | None, slope: float | None = None) -> Activation | None:
    """What this module or function name computes, if it is one of these; None given: nothing."""
    if what is None:
        return IDENTITY
    if isinstance(what, str):
        return leaky_relu(slope) if slope is not None else _NAMES.get(what)
    if type(what) is nn.LeakyReLU:
        return leaky_relu(what.negative_slope) if what.negative_slope >= 0 else None
    return _MODULES.get(type(what))


_MODULES: dict[type[nn.Module], Activation] = {
    nn.Identity: IDENTITY,
    nn.ReLU: RELU,
    nn.ReLU6: RELU6,
    nn.SiLU: SILU,
    nn.Hardswish: HARDSWISH,
}
_NAMES = {"relu": RELU, "relu6": RELU6, "silu": SILU, "hardswish": HARDSWISH}
