"""The small operand of a weight gradient, gathered once: chosen channels, side by side, with their border made real."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halo_gather_kernel(
    source_ptr, out_ptr, index_ptr, scale_ptr, shift_ptr, counters_ptr,
    positions, image, width, top, left, source_height, source_width, valid, depth, counters,
    source_n, source_h, source_w, source_c,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    POSITIONS_FASTEST: tl.constexpr, HAS_INDEX: tl.constexpr, PROLOGUE: tl.constexpr, BLOCK_COUNTERS: tl.constexpr,
):  # fmt: skip
    """out[n, i, j, k] = source[n, channel k, (i - top) / STEP_H, (j - left) / STEP_W], zero where no such pixel is.

    Grid (position blocks, depth blocks). Every element of `out` (N, height, width, depth) is written, those that only
    pad the depth with zero. The tile's faster axis is the one that is contiguous in the source. The first program also
    zeroes the counters of a launch that follows.
    """
    if POSITIONS_FASTEST:
        position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[None, :]
        k = tl.program_id(1) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)[:, None]
    else:
        position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[:, None]
        k = tl.program_id(1) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)[None, :]
    if HAS_INDEX:
        channel = tl.load(index_ptr + k, mask=k < depth, other=-1)
        chosen = channel >= 0
    else:
        channel = k
        chosen = k < valid
    n = position // image
    within = position % image
    row = within // width - top
    col = within % width - left
    inside = (row >= 0) & (col >= 0) & (row % STEP_H == 0) & (col % STEP_W == 0)
    row = row // STEP_H
    col = col // STEP_W
    inside = inside & (row < source_height) & (col < source_width) & (position < positions) & chosen
    place = n.to(tl.int64) * source_n + row.to(tl.int64) * source_h + col.to(tl.int64) * source_w
    value = tl.load(source_ptr + place + channel.to(tl.int64) * source_c, mask=inside, other=0.0)
    if PROLOGUE:
        scale = tl.load(scale_ptr + channel, mask=chosen, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + channel, mask=chosen, other=0.0).to(tl.float32)
        value = tl.where(inside, tl.maximum(value.to(tl.float32) * scale + shift, 0.0), 0.0).to(value.dtype)
    tl.store(out_ptr + position.to(tl.int64) * depth + k, value, mask=(position < positions) & (k < depth))
    if BLOCK_COUNTERS > 0:  # noqa: SIM102  the compiler decides this, the program the other
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            for start in range(0, counters, BLOCK_COUNTERS):
                offs = start + tl.arange(0, BLOCK_COUNTERS)
                tl.store(counters_ptr + offs, tl.zeros((BLOCK_COUNTERS,), tl.int32), mask=offs < counters)
