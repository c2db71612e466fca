"""The ways people learn a part of a convolution today, each as its best self, beside ours.

All take an nn.Conv2d and the number of filters to learn, the last ones, and compute what it computes. All but the plain
and the frozen ones and LoRA give the same weights a gradient; LoRA learns as many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

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

    def mask(weight: Tensor) -> None:
        weight.grad[:-learned].zero_()

    conv.weight.register_post_accumulate_grad_hook(mask)
    return conv


class SplitCat(nn.Module):
    """The learned filters are a Parameter of their own, concatenated to the fixed ones: the paper's own code."""

    def __init__(self, conv: nn.Conv2d, learned: int) -> None:
        super().__init__()
        fixed, own = conv.weight.detach().split([conv.out_channels - learned, learned])
        self.register_buffer("fixed", fixed.clone(memory_format=torch.preserve_format))
        self.learned = nn.Parameter(own.clone(memory_format=torch.preserve_format))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, self.stride, self.padding, groups=self.groups)

    def weight(self) -> Tensor:
        return torch.cat([self.fixed, self.learned])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A checkpoint is nn.Conv2d's."""
        destination[f"{prefix}weight"] = self.weight().detach().clone()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class _SlicedFunction(torch.autograd.Function):
    """Slices grad_output before asking aten for the weight gradient: what one writes in an afternoon.

    `whole` is a buffer into which the learned filters are copied. Under autocast the input is kept as it is multiplied.
    Groups are one, or as many as input channels and filters: of these the input is sliced, too.
    """

    @staticmethod
    def forward(ctx, x, whole, learned, bias, stride, padding, groups):
        whole[-len(learned) :].copy_(learned)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x)
        ctx.whole, ctx.learned, ctx.stride, ctx.padding, ctx.groups = whole, len(learned), stride, padding, groups
        return F.conv2d(x, whole, bias, stride, padding, groups=groups)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        weight = ctx.whole.to(x.dtype)
        grad_x = grad_learned = grad_bias = None
        rest = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0))
        if ctx.needs_input_grad[0]:
            mask = (True, False, False)
            grad_x = torch.ops.aten.convolution_backward(grad_output, x, weight, *rest, ctx.groups, mask)[0]
        if ctx.needs_input_grad[2]:
            mask = (False, True, False)
            own = grad_output[:, -ctx.learned :]
            seen, groups = (x, 1) if ctx.groups == 1 else (x[:, -ctx.learned :], ctx.learned)
            own_weight = weight[-ctx.learned :]
            grad_learned = torch.ops.aten.convolution_backward(own, seen, own_weight, *rest, groups, mask)[1]
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_x, None, grad_learned, grad_bias, None, None, None


class Sliced(SplitCat):
    """The sliced gradient as a module. Nothing is concatenated, and the whole weight is not kept for backward."""

    def __init__(self, conv: nn.Conv2d, learned: int) -> None:
        super().__init__(conv, learned)
        self.fixed = conv.weight.detach().clone(memory_format=torch.preserve_format)

    def forward(self, x: Tensor) -> Tensor:
        return _SlicedFunction.apply(x, self.fixed, self.learned, self.bias, self.stride, self.padding, self.groups)

    def weight(self) -> Tensor:
        self.fixed[-len(self.learned) :].copy_(self.learned.detach())
        return self.fixed


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
_DENSE_ONLY = (ConvLoRA,)


def rivals(name: str, names: Iterable[str]) -> list[str]:
    """Who among `names` does what our contender `name` does: the other ways, as compiled and with as much learned, and
    the plain one. None where `name` is not ours, or learns nothing."""
    parsed = {n: _NAME.fullmatch(n).groups() for n in names}  # type: ignore[union-attr]
    form, way, part = parsed[name]
    if OURS not in way:
        return []
    alike = [n for n, (f, w, p) in parsed.items() if f == form and w in OTHERS and p == part]
    return [n for n, (f, w, p) in parsed.items() if f == form and w == PLAIN and not p] + alike


_NAME = re.compile(r"(compiled |captured |)(.*?)( p = [\d.]+|)")


def part_of(row: str) -> float:
    """The fraction of each layer's filters that a network's row learns."""
    part = _NAME.fullmatch(row)[3]  # type: ignore[index]
    if part:
        return float(part.removeprefix(" p = "))
    return 0.0 if "frozen" in row else 1.0


def learned_gradient(module: nn.Module, learned: int) -> Tensor | None:
    """The gradient of the learned filters, wherever the way keeps it; None where it learns other weights."""
    if isinstance(module, ConvLoRA):
        return None
    for name in ("weight_trainable", "learned"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            return parameter.grad
    return module.weight.grad[-learned:]


def with_convolutions(model: nn.Module, way: Callable[[nn.Conv2d, int], nn.Module], part: float) -> nn.Module:
    """The model, its convolutions replaced by `way` with a fraction `part` of their filters learned.

    Depthwise ones stay as they are where the way has nothing for them.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and (child.groups == 1 or way not in _DENSE_ONLY):
                learned = count(child, part)
                setattr(parent, name, way(child, learned) if learned else child.requires_grad_(False))
    return model


def count(conv: nn.Conv2d, part: float) -> int:
    """How many filters a fraction is: as for `PartialConv2d`."""
    return int(conv.out_channels * part)


def _copy(conv: nn.Conv2d) -> nn.Conv2d:
    return PartialConv2d.from_conv2d(conv, trainable=1.0).to_conv2d()
