"""The autograd Function of a lean block: norm - activation - dropout - convolutions, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwn_ext import ops
from rwn_ext.autograd import without_autocast
from rwn_ext.lean import bits
from rwn_ext.lean.activations import IDENTITY, RELU, Activation
from rwn_ext.lean.convs import PARTS, Conv
from rwn_ext.lean.dropout import drop, scale
from rwn_ext.lean.norms import BatchNorm, Norm
from rwn_ext.ops import Runs, run_length

# What is kept, by name: ("piece", i), ("norm", i), ("state", i), ("seen", channels), "mask", ..., ("conv", i, part).
Kept = Mapping[Any, Any]


class Block(NamedTuple):
    """The constants of one call."""

    norm: Norm
    activation: Activation
    dropout: float
    """The probability; 0.0 is none."""
    convs: tuple[Conv, ...]
    dtype: torch.dtype
    """Of the convolutions."""
    channels: tuple[int, ...]
    """Of each piece of the input."""
    sharers: tuple[int, ...]
    """For each piece, how many blocks read it and share the cost of keeping it."""
    gives_y: bool
    """y is an output too, after those of the convolutions."""
    y_is_kept: bool
    """Somebody else keeps y for backward, so that it costs nothing here."""
    overwrites: bool
    """Nobody else reads the piece, so that y may take its memory unless it is kept."""

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], list[Sequence[Any]]]:
        """The pieces; the norm's gamma, beta, running mean and variance; the parts of each convolution."""
        n = len(self.channels)
        convs = [values[i : i + PARTS] for i in range(n + 4, len(values), PARTS)]
        return values[:n], values[n : n + 4], convs


class Needs(NamedTuple):
    """Which gradients a call is asked for."""

    pieces: tuple[bool, ...]
    gamma: bool
    beta: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]

    @classmethod
    def of(cls, block: Block, needs_input_grad: Sequence[bool]) -> Needs:
        pieces, (gamma, beta, *_), convs = block.split(needs_input_grad)
        return cls(tuple(pieces), gamma, beta, tuple(conv[0] for conv in convs), tuple(conv[3] for conv in convs))

    @property
    def below(self) -> bool:
        """Any before the activation."""
        return self.gamma or self.beta or any(self.pieces)


class BlockFunction(torch.autograd.Function):
    """`y = dropout(activation(norm(cat(pieces, 1))))` to `(*(conv(y) for conv in convs), y)`, y only if asked for.

    Kept for backward is either the input, from which backward makes y again to the bit, where its kernels do not do
    without (`_affine`); or, of y, the channels that learned weights see and one bit an element of the
    activation's derivative (`keeps_input` chooses). Dropout keeps one bit an element.
    """

    @staticmethod
    def forward(ctx: Any, block: Block, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        pieces, parameters, convs = block.split(tensors)
        needs = Needs.of(block, ctx.needs_input_grad[1:])
        normed, state = block.norm.forward(_joined(pieces), parameters)
        from_input = keeps_input(block, needs, pieces, normed)
        own = normed is not pieces[0]
        if block.overwrites and not own and not from_input:
            # Not the piece itself, which is an input: what autograd knows of that one does not hold for y.
            normed, own = normed.detach(), True
        y = block.activation.forward(normed, inplace=own)
        dropped = None
        if block.dropout:
            y, dropped = drop(y, block.dropout)
        outputs = [conv.forward(y.to(block.dtype), parts) for conv, parts in zip(block.convs, convs, strict=True)]

        ctx.set_materialize_grads(False)
        ctx.block, ctx.needs, ctx.y_size, ctx.y_dtype = block, needs, y.shape, y.dtype
        kept = _kept(block, needs, tensors, state, y, dropped, from_input)
        ctx.constants = {name: value for name, value in kept.items() if not torch.is_tensor(value)}
        ctx.names = [name for name in kept if name not in ctx.constants]
        ctx.save_for_backward(*(kept[name] for name in ctx.names))
        return (*outputs, y) if block.gives_y else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.constants | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if torch.is_grad_enabled() and ctx.needs.below and any(t.grad_fn is None for t in _seen_parts(kept)):
            raise RuntimeError(
                "this lean block kept too little of its activation for second derivatives; convert without lean=True"
            )
        with without_autocast(some):
            return None, *_gradients(ctx.block, ctx.needs, kept, ctx.y_size, ctx.y_dtype, grads)


def keeps_input(block: Block, needs: Needs, pieces: Sequence[Tensor], y: Tensor) -> bool:
    """Whether the input is kept for backward: where its gradient needs it, or where that costs less than the output."""
    if needs.below and (block.norm.keeps_input(needs.gamma) or block.activation.reads_input):
        return True
    return cost_of_input(block, pieces) < cost_of_output(block, needs, y)


def cost_of_input(block: Block, pieces: Sequence[Tensor]) -> float:
    """Bytes of the input, each piece shared by the blocks that read it."""
    return sum(piece.nbytes / sharers for piece, sharers in zip(pieces, block.sharers, strict=True))


def cost_of_output(block: Block, needs: Needs, y: Tensor) -> float:
    """Bytes of what backward needs of y."""
    seen = [] if block.y_is_kept else _seen(block, needs)
    channels = sum(y.size(1) if runs is None else run_length(runs) for runs in seen)
    mask = y.numel() / 8 if _keeps_mask(block, needs, y) else 0
    return mask + (y.numel() // y.size(1) * channels * block.dtype.itemsize if seen else 0)


def _seen(block: Block, needs: Needs) -> list[Runs | None]:
    """The channels of y that learned weights see, once each; None is all of them and stands for any others."""
    seen = [conv.seen for conv, learned in zip(block.convs, needs.weights, strict=True) if learned]
    return [None] if None in seen else list(dict.fromkeys(seen))


def _keeps_mask(block: Block, needs: Needs, y: Tensor) -> bool:
    """Whether the activation's derivative is kept beside y: not if the signs of a kept y say it."""
    kept = block.y_is_kept or (None in _seen(block, needs) and block.dtype == y.dtype)
    return needs.below and block.activation is not IDENTITY and (block.dropout > 0 or not kept)


def _kept(
    block: Block, needs: Needs, tensors: Sequence[Any], state: Sequence[Any], y: Tensor, dropped: Tensor | None,
    from_input: bool,
) -> dict[Any, Any]:  # fmt: skip
    """By name, what backward needs."""
    pieces, parameters, convs = block.split(tensors)
    seen = _seen(block, needs)
    kept: dict[Any, Any] = {}
    if not (seen or needs.below):
        return kept
    if from_input:
        kept |= {("piece", i): piece for i, piece in enumerate(pieces)}
    if block.y_is_kept and not (from_input and (block.dropout or block.activation.reads_input)):
        kept["seen", None] = y
    elif not from_input:
        kept |= {("seen", c): (y if c is None else ops.copy_channels(y, c)).to(block.dtype) for c in seen}
    if not from_input and _keeps_mask(block, needs, y):
        assert block.activation.passes is not None
        # Of y before dropout, where it differs: what was dropped has no gradient to mask.
        kept["mask"], kept["mask layout"] = bits.pack(block.activation.passes(y))
    if dropped is not None:
        kept["dropped"], kept["dropped layout"] = bits.pack(dropped)
    if from_input or needs.below:
        kept |= {("norm", i): parameter for i, parameter in enumerate(block.norm.kept(parameters))}
        kept |= {("state", i): value for i, value in enumerate(state)}
    if needs.below or any(conv.ordinary for conv in block.convs):
        kept |= {("conv", i, j): part for i, parts in enumerate(convs) for j, part in enumerate(parts[:3])}
    return {name: value for name, value in kept.items() if value is not None}


def _gradients(
    block: Block, needs: Needs, kept: Kept, y_size: torch.Size, y_dtype: torch.dtype, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of all tensors of `BlockFunction.apply`."""
    z = _joined([kept["piece", i] for i in range(len(block.channels))]) if ("piece", 0) in kept else None
    affine = _affine(block, needs, kept, z, grads)
    y, source = _activated(block, needs, kept, z) if affine is None else (z, None)
    grad, conv_grads = _conv_gradients(block, needs, kept, y, affine, y_size, y_dtype, grads)
    del y
    norm_grads: tuple[Tensor | None, ...] = (None, None, None)
    if needs.below and grad is not None:
        if block.dropout:
            grad = scale(grad, bits.unpack(kept["dropped"], kept["dropped layout"]), block.dropout)
        if "mask" in kept:
            assert block.activation.masked is not None
            grad = block.activation.masked(grad, bits.unpack(kept["mask"], kept["mask layout"]))
        elif affine is not None:
            assert z is not None
            grad = ops.affine_relu_backward(grad, z, *affine)
        elif block.activation is not IDENTITY:
            grad = block.activation.backward(grad, source)
        del source
        norm_grads = block.norm.backward(
            grad, z, [kept.get(("norm", i)) for i in range(4)], [kept.get(("state", i)) for i in range(4)],
            (any(needs.pieces), needs.gamma, needs.beta),
        )  # fmt: skip
    return (*_pieces(norm_grads[0], block, needs), *norm_grads[1:], None, None, *conv_grads)


def _affine(
    block: Block, needs: Needs, kept: Kept, z: Tensor | None, grads: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of the norm, if all learned weights' gradients are best computed from z, without y.

    They are where each is computed by a kernel that makes relu(z * scale + shift) of what it reads; the ReLU's gradient
    then follows the signs of the same expression. It rounds otherwise than the norm in the forward pass did.
    """
    if (
        z is None or block.activation is not RELU or block.dropout or ("seen", None) in kept
        or not isinstance(block.norm, BatchNorm) or torch.is_grad_enabled()
    ):  # fmt: skip
        return None
    learning = [
        (conv, grad)
        for conv, learned, grad in zip(block.convs, needs.weights, grads, strict=False)
        if learned and grad is not None
    ]
    if not learning or not all(conv.reads_normed(z, grad.size(1)) for conv, grad in learning):
        return None
    return block.norm.affine([kept.get(("norm", i)) for i in range(4)], [kept.get(("state", i)) for i in range(4)])


def _activated(block: Block, needs: Needs, kept: Kept, z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """y, and what the activation's derivative reads: kept, or made again from the input."""
    y = kept.get(("seen", None))
    if z is None or y is not None or not (any(needs.weights) or block.activation is not IDENTITY):
        return y, y
    normed = block.norm.again(z, [kept.get(("norm", i)) for i in range(4)], [kept.get(("state", i)) for i in range(4)])
    inplace = normed is not z and not block.activation.reads_input and not torch.is_grad_enabled()
    y = block.activation.forward(normed, inplace=inplace)
    source = normed if block.activation.reads_input else y
    if block.dropout:
        y = scale(y, bits.unpack(kept["dropped"], kept["dropped layout"]), block.dropout)
    return y, source


def _conv_gradients(
    block: Block, needs: Needs, kept: Kept, y: Tensor | None, affine: tuple[Tensor, Tensor] | None,
    y_size: torch.Size, y_dtype: torch.dtype, grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradients of y and of the convolutions' parts, last convolution first, as autograd adds them up.

    With `affine`, `y` is the z in y = relu(z * scale + shift).
    """
    grad_y = grads[-1] if block.gives_y else None
    conv_grads: list[Tensor | None] = []
    for i, conv in reversed(list(enumerate(block.convs))):
        grad, weight, bias = grads[i], None, None
        if grad is not None:
            parts = [kept.get(("conv", i, j)) for j in range(3)]
            seen = None
            if needs.weights[i]:
                seen = kept["seen", conv.seen] if y is None else conv.see(y)
            wanted = (needs.below, needs.weights[i], needs.biases[i])
            grad, weight, bias = conv.backward(grad, seen, parts, y_size, wanted, affine)
            if needs.below:
                assert grad is not None
                grad = grad.to(y_dtype)
                grad_y = grad if grad_y is None else _sum(grad_y, grad)
        conv_grads = [weight, None, None, bias, None, *conv_grads]
    return grad_y, conv_grads


def _sum(grad: Tensor, own: Tensor) -> Tensor:
    """`grad + own`, in the memory of `own` if nobody can see the difference."""
    if torch.is_grad_enabled() or own.stride() != grad.stride():
        return grad + own
    return own.add_(grad)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)


def _pieces(grad: Tensor | None, block: Block, needs: Needs) -> list[Tensor | None]:
    """The gradient of each piece, as torch.cat's backward cuts it."""
    if grad is None or len(block.channels) == 1:
        return [grad] * len(block.channels)
    cut = grad.split(block.channels, 1)
    return [piece if needed else None for piece, needed in zip(cut, needs.pieces, strict=True)]


def _seen_parts(kept: Kept) -> list[Tensor]:
    return [value for name, value in kept.items() if name[0] == "seen"]
