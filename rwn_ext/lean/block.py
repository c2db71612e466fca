"""A lean block as a function of modules: what it computes, when it is lean, and the plain way for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rwn_ext.autograd import without_autocast
from rwn_ext.lean import activations, norms
from rwn_ext.lean.activations import Activation
from rwn_ext.lean.convs import conv_of
from rwn_ext.lean.function import Block, BlockFunction


def block(
    pieces: Sequence[Tensor],
    norm: nn.Module | None = None,
    activation: nn.Module | str | None = None,
    dropout: nn.Module | None = None,
    convolutions: Sequence[nn.Module] = (),
    *,
    slope: float | None = None,
    give_y: bool = False,
    y_is_kept: bool = False,
    overwrites: bool = False,
    sharers: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Norm - activation - dropout - convolutions that keep less for backward, with the same bits as::

        z = torch.cat(pieces, 1)
        y = dropout(activation(norm(z)))                      # each of them as far as it is given
        return (*(conv(y) for conv in convolutions), *([y] if give_y else []))

    on a CPU, in outputs, gradients and running statistics. By batch statistics the pieces are kept, once however many
    blocks share them, and y is made again in backward; by running statistics one bit an element of y and the channels
    that learned weights see, or the pieces if that is less.

    After BatchNorm and ReLU alone, y is not even made again where each learned weight's gradient comes from a kernel
    that reads z through them: on a GPU, where the planner picks one. It takes `relu(z * scale + shift)`, in float32,
    rounded to z's type, for y and for the ReLU's mask. That is the forward pass's y but for a rounding or two, and so
    near to the ReLU's edge the mask may be the other one: as exact, but not the same bits.

    Modules: BatchNorm2d, SyncBatchNorm, GroupNorm; ReLU, ReLU6, LeakyReLU, SiLU, Hardswish; Dropout; PartialConv2d and
    Conv2d with zero padding. Any other, one with hooks, a SyncBatchNorm that trains over several processes, an input
    that is not (N, C, H, W), and a call that is compiled or needs no gradient go the plain way, the three lines above.

    Args:
        activation: a module, or relu, relu6, leaky_relu (with its `slope`), silu, hardswish.
        y_is_kept: y is kept for backward by somebody else, so that keeping it costs nothing.
        overwrites: nobody else reads the one piece, so that y may take its memory.
        sharers: for each piece, how many blocks read it (default: this one alone); decides what costs less.
    """
    modules = [m for m in (norm, activation, dropout, *convolutions) if isinstance(m, nn.Module)]
    function = activations.activation_of(activation, slope)
    lean = None
    if function is not None and not any(map(has_hooks, modules)) and _is_plain_image_batch(pieces):
        lean = _lean_call(pieces, norm, function, dropout, convolutions, give_y, y_is_kept, overwrites, sharers)
    if lean is None:
        act = activation if isinstance(activation, nn.Module) or function is None else function.forward
        return _plain(pieces, norm, act, dropout, convolutions, give_y)
    with without_autocast(pieces[0]):
        return BlockFunction.apply(*lean)


def _plain(
    pieces: Sequence[Tensor], norm: nn.Module | None, activation: Callable[[Tensor], Tensor], dropout: nn.Module | None,
    convolutions: Sequence[nn.Module], give_y: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)
    for function in (norm, activation, dropout):
        y = y if function is None else function(y)
    return (*(conv(y) for conv in convolutions), *([y] if give_y else []))


def _lean_call(
    pieces: Sequence[Tensor], norm: nn.Module | None, activation: Activation, dropout: nn.Module | None,
    convolutions: Sequence[nn.Module], give_y: bool, y_is_kept: bool, overwrites: bool,
    sharers: Sequence[int] | None,
) -> tuple[Block | Tensor | None, ...] | None:  # fmt: skip
    """The arguments of the autograd Function; None if this call is not for it."""
    first, channels = pieces[0], tuple(piece.size(1) for piece in pieces)
    # Of the size of y, without its values.
    stand_in = first if len(pieces) == 1 else first[:, :1].expand(-1, sum(channels), -1, -1)
    rate = _rate(dropout)
    calls = [call for conv in convolutions if (call := conv_of(conv, stand_in)) is not None]
    if rate is None or len(calls) < len(convolutions):
        return None
    begun = norms.begin(norm, stand_in)
    if begun is None:
        return None
    normalisation, parameters = begun
    dtype = calls[0][0].dtype if calls else first.dtype
    constants = Block(
        normalisation, activation, rate, tuple(conv for conv, _ in calls), dtype, channels,
        tuple(sharers or [1] * len(pieces)), give_y, y_is_kept, overwrites,
    )  # fmt: skip
    return constants, *pieces, *parameters, *(part for _, parts in calls for part in parts)


def _is_plain_image_batch(pieces: Sequence[Tensor]) -> bool:
    """Whether gradients are wanted of a call that runs as it is written, on (N, C, H, W) pieces of one kind."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return len({(p.dtype, p.device) for p in pieces}) == 1 and all(p.dim() == 4 and p.numel() for p in pieces)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in vars(module)
    )  # fmt: skip


def _rate(dropout: nn.Module | None) -> float | None:
    """The rate of this dropout in its present mode; None if it is none we know."""
    if dropout is None or type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.p == 1:
        return None
    return dropout.p if dropout.training else 0.0
