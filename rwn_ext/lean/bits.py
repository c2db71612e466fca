"""Boolean masks at one bit an element."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwn_ext.ops import memory_format

# Eight bytes of 0 or 1, read as one integer, times GATHER have their bits side by side in the top byte. An eightfold
# byte and SPREAD keeps bit i of it in byte 7 - i or i, by the machine's byte order; both ways use the same one.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101
_SPREAD = 0x8040201008040201 - (1 << 64)  # as a signed integer


class Layout(NamedTuple):
    """What `unpack` needs to know of the mask that `pack` was given."""

    shape: torch.Size
    memory_format: torch.memory_format


def pack(mask: Tensor) -> tuple[Tensor, Layout]:
    """The bits of a bool mask, (numel / 8) bytes rounded up, in the order of its memory."""
    layout = Layout(mask.shape, memory_format(mask))
    flat = _in_memory_order(mask, layout.memory_format)
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.uint8).view(torch.int64)
    return words.mul(_GATHER).bitwise_right_shift_(56).to(torch.uint8), layout


def unpack(bits: Tensor, layout: Layout) -> Tensor:
    """The bool mask of these bits."""
    words = bits.to(torch.int64).mul_(_REPEAT).bitwise_and_(_SPREAD)
    flat = words.view(torch.uint8).ne(0)[: layout.shape.numel()]
    if layout.memory_format == torch.channels_last:
        n, c, h, w = layout.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(layout.shape)


def _in_memory_order(mask: Tensor, layout: torch.memory_format) -> Tensor:
    if layout == torch.channels_last:
        return mask.permute(0, 2, 3, 1).reshape(-1)
    return mask.reshape(-1)
