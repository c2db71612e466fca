"""The ways people learn a part of a convolution today, each as its best self, beside ours.

All take an nn.Conv2d and the number of filters to learn, the last ones, and compute what it computes. All but the plain
and the frozen ones and LoRA give the same weights a gradient; LoRA learns as many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.group import PLAIN
from rwn_ext import PartialConv2d

OURS, LEAN, FROZEN = "rwn_ext", "rwn_ext lean", "all frozen (p = 0)"
FROZEN_PLAIN = "frozen nn.Conv2d"
SLICED, LORA = "sliced aten", "LoRA"
CHECKPOINTED, MEMSAVE = "checkpointed nn.Conv2d", "memsave_torch, all frozen"


def plain(conv: nn.Conv2d, learned: int) -> nn.Module:
    """Everything is learned."""
    return _copy(conv)


def masked(conv: nn.Conv2d, learned: int) -> nn.Module:
    """A hook zeroes the gradient of what is fixed, in place. Weight decay still shrinks it."""
    conv = _copy(conv)

    def mask(parameter: Tensor) -> None:
        parameter.grad[:-learned].zero_()

    for parameter in conv.parameters():
        parameter.register_post_accumulate_grad_hook(mask)
    return conv


class SplitCat(nn.Module):
    """The learned filters are a Parameter of their own, concatenated to the fixed ones: the paper's own code."""

    def __init__(self, conv: nn.Conv2d, learned: int) -> None:
        super().__init__()
        self.register_buffer("fixed", _clone(conv.weight[:-learned]))
        self.learned = nn.Parameter(_clone(conv.weight[-learned:]))
        self.register_buffer("fixed_bias", None if conv.bias is None else _clone(conv.bias[:-learned]))
        self.bias = None if conv.bias is None else nn.Parameter(_clone(conv.bias[-learned:]))
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, *self.wholes(), self.stride, self.padding, groups=self.groups)

    def wholes(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        bias = None if self.bias is None else torch.cat([self.fixed_bias, self.bias])
        return torch.cat([self.fixed, self.learned]), bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A checkpoint is nn.Conv2d's."""
        for name, whole in zip(("weight", "bias"), self.wholes(), strict=True):
            if whole is not None:
                destination[f"{prefix}{name}"] = whole.detach().clone()


class _SlicedFunction(torch.autograd.Function):
    """Slices grad_output before asking aten for the weight gradient: what one writes in an afternoon.

    `whole` and `whole_bias` are buffers into which what is learned is copied. Under autocast the input is kept as it is
    multiplied. Groups are one, or as many as input channels and filters: of these the input is sliced, too.
    """

    @staticmethod
    def forward(ctx, x, whole, learned, whole_bias, bias, stride, padding, groups):
        count = len(learned)
        whole[-count:].copy_(learned)
        if bias is not None:
            whole_bias[-count:].copy_(bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x)
        ctx.whole, ctx.count, ctx.stride, ctx.padding, ctx.groups = whole, count, stride, padding, groups
        return F.conv2d(x, whole, whole_bias, stride, padding, groups=groups)

    @staticmethod
    def backward(ctx, grad_output):
        (x,), count, backward = ctx.saved_tensors, ctx.count, torch.ops.aten.convolution_backward
        weight = ctx.whole.to(x.dtype)
        grad_x = grad_learned = grad_bias = None
        geometry = (ctx.stride, ctx.padding, (1, 1), False, (0, 0))
        if ctx.needs_input_grad[0]:
            grad_x = backward(grad_output, x, weight, None, *geometry, ctx.groups, (True, False, False))[0]
        if ctx.needs_input_grad[2]:
            own, (seen, groups) = grad_output[:, -count:], (x, 1) if ctx.groups == 1 else (x[:, -count:], count)
            has_bias = ctx.needs_input_grad[4]
            sizes, mask = [count] if has_bias else None, (False, True, has_bias)
            _, grad_learned, grad_bias = backward(own, seen, weight[-count:], sizes, *geometry, groups, mask)
        return grad_x, None, grad_learned, None, grad_bias, None, None, None


class Sliced(SplitCat):
    """The sliced gradient as a module. Nothing is concatenated, and the whole weight is not kept for backward."""

    def __init__(self, conv: nn.Conv2d, learned: int) -> None:
        super().__init__(conv, learned)
        self.fixed = _clone(conv.weight)
        self.fixed_bias = None if conv.bias is None else _clone(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _SlicedFunction.apply(
            x, self.fixed, self.learned, self.fixed_bias, self.bias, self.stride, self.padding, self.groups
        )

    def wholes(self) -> tuple[Tensor, Tensor | None]:
        """The buffers, brought up to date."""
        count = len(self.learned)
        self.fixed[-count:].copy_(self.learned.detach())
        if self.bias is not None:
            self.fixed_bias[-count:].copy_(self.bias.detach())
        return self.fixed, self.fixed_bias


class ConvLoRA(nn.Module):
    """A low-rank update beside a frozen convolution, as in peft: r filters of the layer's own shape, then 1x1 filters.

    The rank is the one that learns about as many weights as `learned` filters have. The update starts at zero.
    """

    def __init__(self, conv: nn.Conv2d, learned: int) -> None:
        super().__init__()
        per_filter = conv.weight[0].numel()
        rank = max(1, round(learned * per_filter / (per_filter + conv.out_channels)))
        self.frozen = _copy(conv).requires_grad_(False)
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        geometry = (conv.kernel_size, conv.stride, conv.padding)
        self.down = nn.Conv2d(conv.in_channels, rank, *geometry, bias=False, **like)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False, **like)
        nn.init.zeros_(self.up.weight)
        if conv.weight.is_contiguous(memory_format=torch.channels_last):
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def ours(conv: nn.Conv2d, learned: int) -> nn.Module:
    """`PartialConv2d`."""
    return PartialConv2d.from_conv2d(conv, trainable=learned)


def frozen(conv: nn.Conv2d, learned: int) -> nn.Module:
    """Nothing is learned, and no input kept: the ceiling of what a faster weight gradient can reach."""
    return PartialConv2d.from_conv2d(conv, trainable=0)


def frozen_plain(conv: nn.Conv2d, learned: int) -> nn.Module:
    """Likewise in plain PyTorch, which keeps the input."""
    return _copy(conv).requires_grad_(False)


WAYS: dict[str, Callable[[nn.Conv2d, int], nn.Module]] = {
    PLAIN: plain,
    "gradient mask": masked,
    "split + cat": SplitCat,
    SLICED: Sliced,
    LORA: ConvLoRA,
    OURS: ours,
    FROZEN: frozen,
    FROZEN_PLAIN: frozen_plain,
}
OTHERS = tuple(name for name in WAYS if name not in (PLAIN, OURS, FROZEN, FROZEN_PLAIN))
LAYER_WAYS = tuple(name for name in WAYS if name != FROZEN_PLAIN)
"""Those that take turns on a single layer: one of two that learn nothing is enough there."""
_DENSE_ONLY = (ConvLoRA,)


class Row(NamedTuple):
    """A contender's name, taken apart."""

    form: str
    """What is done to it as a whole: "compiled ", "captured " or nothing."""
    way: str
    again: str
    part: str
    """What is learned, " p = ..."; nothing where the way says it."""

    @classmethod
    def of(cls, name: str) -> Row:
        return cls(*re.fullmatch(r"(compiled |captured |)(.*?)( again|)( p = [\d.]+|)", name).groups())  # type: ignore[union-attr]


def rivals(name: str, names: Iterable[str]) -> list[str]:
    """Who among `names` does what our contender `name` does: the other ways, as compiled and with as much learned, and
    the plain one. None where `name` is not ours, or learns nothing."""
    own = Row.of(name)
    if OURS not in own.way:
        return []
    alike = {n: row for n in names if (row := Row.of(n)).form == own.form and not row.again}
    return [n for n, row in alike.items() if row.way == PLAIN and not row.part] + [
        n for n, row in alike.items() if row.way in OTHERS and row.part == own.part
    ]


def part_of(name: str) -> float:
    """The fraction of each layer's filters that a network's row learns."""
    part = Row.of(name).part
    if part:
        return float(part.removeprefix(" p = "))
    return 0.0 if "frozen" in name else 1.0


def learned_gradient(module: nn.Module, learned: int) -> Tensor | None:
    """The gradient of the learned filters, wherever the way keeps it; None where it learns other weights."""
    if isinstance(module, ConvLoRA):
        return None
    for name in ("weight_trainable", "learned"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            return parameter.grad
    grad = module.weight.grad
    return None if grad is None else grad[-learned:]


def learned_bias(module: nn.Module, learned: int) -> Tensor:
    """The gradient of the learned filters' bias."""
    return getattr(module, "bias_trainable" if hasattr(module, "bias_trainable") else "bias").grad[-learned:]


def with_convolutions(model: nn.Module, way: Callable[[nn.Conv2d, int], nn.Module], part: float) -> nn.Module:
    """The model, its convolutions replaced by `way` with a fraction `part` of their filters learned.

    Depthwise ones are fixed where the way has nothing for them.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d:
                learned = count(child, part) if child.groups == 1 or way not in _DENSE_ONLY else 0
                setattr(parent, name, way(child, learned) if learned else child.requires_grad_(False))
    return model


def count(conv: nn.Conv2d, part: float) -> int:
    """How many filters a fraction is: as for `PartialConv2d`."""
    return int(conv.out_channels * part)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format)


def _copy(conv: nn.Conv2d) -> nn.Conv2d:
    return PartialConv2d.from_conv2d(conv, trainable=1.0).to_conv2d()
