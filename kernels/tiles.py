"""How the work of a correlation is cut into tiles and splits. Plain Python: needs neither Triton nor a device.

The shipped tile shapes are finite (`SHAPES`), so that each can be compiled and checked ahead of time.
"""

from __future__ import annotations

from typing import NamedTuple

CHANNEL_BLOCKS = (32, 64, 128)
COLUMN_BLOCKS = (16, 32, 64, 128, 256)
DEPTHS = (1, 2, 4)
"""Channels that the small operand holds side by side; above these, multiples of 8, which 16-byte loads need."""

# A split shorter than this spends its time on its partial sums.
SPLIT_PIXELS = 512
# Tiles wanted for each multiprocessor, so that one loads while another computes.
TILES_PER_SM = 2
# The program that finishes last reads the splits' sums one after another: that is worth a launch while they are few.
LAST_BLOCK_SPLITS = 4
COUNTERS = 1024
"""Tiles that programs which sum for themselves can count; the splits of more are summed by a launch of their own."""
# Partial sums may take this much even where the still operand is small.
WORKSPACE_BYTES = 1 << 20


class Shape(NamedTuple):
    """One shipped configuration of `correlate_kernel`."""

    block_pixels: int
    block_channels: int
    block_columns: int
    num_warps: int
    num_stages: int
    still_on_m: bool


class Operands(NamedTuple):
    """What the choice of a configuration needs to know of the still operand."""

    element_size: int
    channels_last: bool = True
    prologue: bool = False


class Tiles(NamedTuple):
    """A shape, and how it covers the problem: split i owns pixels [i * split_pixels, (i + 1) * split_pixels)."""

    shape: Shape
    splits: int
    split_pixels: int


def depth(learned: int) -> int:
    """How many channels the small operand holds side by side, of which `learned` are real."""
    return next((d for d in DEPTHS if learned <= d), _ceil(learned, 8) * 8)


def shape(block_channels: int, block_columns: int, operands: Operands, arch: int) -> Shape:
    """The shipped configuration of a tile of this size on `sm_{arch}`.

    16-bit operands: from sm_90 on the still channels are the rows of the tensor core's tile, unless a prologue passes
    them through registers; on sm_80 they are the side that it can load without a detour. float32: a side of 32 keeps
    wgmma out, which would want the operand transposed, copied 4 bytes at a time.
    """
    tile = block_channels * block_columns
    if operands.element_size == 4:
        # Sums of plain multiply-adds, beside what a prologue of contiguous images holds, need the registers of 8 warps.
        full = operands.prologue and not operands.channels_last and (block_channels, block_columns) == (64, 32)
        return Shape(32, block_channels, block_columns, 8 if full else 4, 3, block_columns > 32)
    on_m = not operands.prologue if arch >= 90 else not operands.channels_last
    # Exceptions that keep every value in a register (checked ahead of time).
    if block_columns == 64 and block_channels >= 64 and (arch >= 100 or (arch < 90 and operands.prologue)):
        on_m = False
    wide = tile >= 128 * 128 or (arch < 90 and operands.prologue and block_columns == 256)
    return Shape(64, block_channels, block_columns, 8 if wide else 4, 3, on_m)


def shipped(operands: Operands, arch: int) -> list[Shape]:
    """Every configuration that `cut` can choose."""
    return [
        shape(a, b, operands, arch)
        for a in CHANNEL_BLOCKS
        for b in COLUMN_BLOCKS
        if b <= _widest(a, operands.element_size) and not (operands.element_size == 4 and a == 128)
    ]


def _widest(block_channels: int, element_size: int) -> int:
    """The widest column block beside this channel block: sums must fit into registers, operands in shared memory."""
    if element_size == 4:
        return 128 if block_channels == 32 else 32
    return 128 if block_channels == 128 else 256


def cut(
    pixels: int,
    channels: int,
    columns: int,
    groups: int,
    operands: Operands,
    *,
    multiprocessors: int,
    arch: int,
) -> Tiles:
    """Tiles for `groups` products (channels x pixels) times (pixels x columns)."""
    element_size = operands.element_size
    block_channels, block_columns = _blocks(channels, columns, element_size)
    chosen = shape(block_channels, block_columns, operands, arch)
    blocks = groups * _ceil(channels, block_channels) * _ceil(columns, block_columns)
    partials = 4 * groups * channels * columns
    most = max(WORKSPACE_BYTES, element_size * groups * pixels * channels // 4) // partials
    splits = max(1, min(TILES_PER_SM * multiprocessors // blocks, pixels // SPLIT_PIXELS, most, 65535 // groups))
    split_pixels = _ceil(pixels, splits * chosen.block_pixels) * chosen.block_pixels
    return Tiles(chosen, _ceil(pixels, split_pixels), split_pixels)


def _blocks(channels: int, columns: int, element_size: int) -> tuple[int, int]:
    """One column block if it can be, so that `still` is loaded once; then the channel block that pads least."""
    if channels <= 32 or (element_size == 4 and columns > 32):
        block_channels = 32
    elif element_size == 4 or columns > 128 or _ceil(channels, 128) * 128 > _ceil(channels, 64) * 64:
        block_channels = 64
    else:
        block_channels = 128
    fitting = [block for block in COLUMN_BLOCKS if block <= _widest(block_channels, element_size)]
    single = [block for block in fitting if block >= columns]
    return block_channels, min(single or fitting[-2:], key=lambda block: (_ceil(columns, block) * block, -block))


def _ceil(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def grid(tiles: Tiles, channels: int, columns: int, groups: int) -> tuple[int, int, int]:
    """Programs of `correlate_kernel`: column blocks, channel blocks, groups * splits."""
    shape = tiles.shape
    return _ceil(columns, shape.block_columns), _ceil(channels, shape.block_channels), groups * tiles.splits


def sums_itself(tiles: Tiles, channels: int, columns: int, groups: int, *, zeroed: bool) -> bool:
    """Whether several splits are best summed by the programs that finish last, not by another launch.

    `zeroed`: a launch before them can zero their counters, which would else need one.
    """
    x, y, _ = grid(tiles, channels, columns, groups)
    return 1 < tiles.splits <= LAST_BLOCK_SPLITS and zeroed and x * y * groups <= COUNTERS


TAPS = 16
"""Taps of a depthwise filter whose sums a program keeps at once."""


class DepthwiseTiles(NamedTuple):
    block_pixels: int
    block_channels: int
    splits: int
    split_pixels: int


def cut_depthwise(pixels: int, learned: int, taps: int, *, multiprocessors: int) -> DepthwiseTiles:
    """Tiles of 16 taps x 512 (pixel, filter) pairs, long in filters where there are many."""
    block_channels = next((b for b in (8, 16) if learned <= b), 32)
    block_pixels = 512 // block_channels
    blocks = _ceil(learned, block_channels) * _ceil(taps, TAPS)
    splits = max(1, min(4 * TILES_PER_SM * multiprocessors // blocks, pixels // SPLIT_PIXELS, 65535))
    split_pixels = _ceil(pixels, splits * block_pixels) * block_pixels
    return DepthwiseTiles(block_pixels, block_channels, _ceil(pixels, split_pixels), split_pixels)
