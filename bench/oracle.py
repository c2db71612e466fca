"""What every contender must compute, from plain torch in float64: nothing wrong is timed."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.competitors import LORA, learned_bias, learned_gradient, part_of
from bench.layers import tolerance

LOSS_TOLERANCE, NETWORK_TOLERANCE = 1e-4, 0.3
"""Relative, of a loss and of the gradients of a whole network in float32. Activations that rounding takes across zero,
and norms over few pixels, change a plain network's gradients by some percent, those of few filters by a tenth; a wrong
one is off by about 1."""


class WrongResultError(AssertionError):
    """A contender computes something else."""


class LayerOracle:
    """Output and gradients of a convolution at `x`, for the cotangent of its output."""

    def __init__(self, conv: nn.Conv2d, x: Tensor, cotangent: Tensor) -> None:
        exact, exact_x = copy.deepcopy(conv).double().requires_grad_(), x.detach().double().requires_grad_()
        output = exact(exact_x)
        output.backward(cotangent.double())
        self.x, self.cotangent = x, cotangent
        self.output, self.grad_input, self.grad_weight = output.detach(), exact_x.grad, exact.weight.grad
        self.grad_bias = None if exact.bias is None else exact.bias.grad
        self.allowed = tolerance(torch.finfo(x.dtype).eps, output.numel() // output.size(1))

    def check(self, name: str, module: nn.Module, learned: int) -> None:
        """WrongResultError where the module computes something else; `learned` of its last filters learn."""
        self.x.grad = None
        module.zero_grad()
        output = module(self.x)
        output.backward(self.cotangent)
        close(f"output of {name}", output, self.output, self.allowed)
        close(f"grad_input of {name}", self.x.grad, self.grad_input, self.allowed)
        layer = getattr(module, "_orig_mod", module)
        gradient = learned_gradient(layer, learned) if learned else None
        if gradient is not None:
            close(f"grad_weight of {name}", gradient, self.grad_weight[-learned:], self.allowed)
            if self.grad_bias is not None:
                close(f"grad_bias of {name}", learned_bias(layer, learned), self.grad_bias[-learned:], self.allowed)


class NetworkOracle(NamedTuple):
    """The loss of a plain network and the gradients of its convolutions' weights, by name. Dropout is left out."""

    loss: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, plain: nn.Module, images: Tensor, labels: Tensor) -> NetworkOracle:
        exact = without_dropout(copy.deepcopy(plain).double())
        loss = F.cross_entropy(exact(images.double()), labels)
        loss.backward()
        convolutions = {name: m for name, m in exact.named_modules() if isinstance(m, nn.Conv2d)}
        return cls(loss.detach(), {name: m.weight.grad for name, m in convolutions.items()})

    def check(
        self, name: str, model: nn.Module, learner: nn.Module, images: Tensor, labels: Tensor,
        part: float | None = None,
    ) -> None:  # fmt: skip
        """WrongResultError where `learner`, which is `model` or calls it, computes something else in float32.

        Of each convolution the last filters must have gradients: a fraction or, as an int, a count `part` of them, by
        default the fraction that a row of this name learns.
        """
        part = part_of(name) if part is None else part
        without_dropout(model)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            loss = F.cross_entropy(learner(images), labels)
            loss.backward()
        close(f"loss of {name}", loss, self.loss, LOSS_TOLERANCE)
        for layer, expected in self.gradients.items():
            module, learned = model.get_submodule(layer), part if isinstance(part, int) else int(len(expected) * part)
            if learned and LORA not in name:
                gradient = learned_gradient(module, learned)
                close(f"grad_weight of {layer} of {name}", gradient, expected[-learned:], NETWORK_TOLERANCE)
        model.zero_grad()
        model.train()


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode but for dropout, whose random numbers differ between number formats."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def close(what: str, actual: Tensor | None, expected: Tensor | None, allowed: float) -> None:
    assert expected is not None
    if actual is None or actual.shape != expected.shape:
        raise WrongResultError(f"there is no {what}, or another: {actual if actual is None else tuple(actual.shape)}")
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    # Not "greater": NaN is wrong too.
    if not error <= allowed:
        raise WrongResultError(f"{what} is off by {error:.3g}, more than {allowed:.3g}")
