"""The matrix product that keeps the large operand still and moves the small one; the fixed-order sum of its splits.

    out[a, tap, b] = sum over pixels of still[pixel, a] * moved[pixel + tap, b]

`still` is read once, as a matrix (pixels x channels). `moved` is compact and holds its own zero border, so its address
is (place of the pixel) + (place of the tap), and no tap needs a mask. A program owns one tile of (a, (tap, b)) and one
run of pixels, a split. Partial sums are float32; where there are several splits, they are summed in ascending order.

With HAS_BIAS, also bias[b] = sum over pixels of moved[pixel + a tap that sees all of it, b]. Splits' sums of these lie
behind those of `out`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What becomes of a program's sums.
PARTIALS = tl.constexpr(0)  # another launch sums the splits
ONLY_SPLIT = tl.constexpr(1)  # they are the result
LAST_SUMS = tl.constexpr(2)  # the program that finishes last sums the splits


@triton.jit
def correlate_kernel(
    still_ptr, moved_ptr, scale_ptr, shift_ptr, partials_ptr, counters_ptr, out_ptr, bias_ptr, rows_ptr,
    pixels, split_pixels, image, width, channels, readable, splits, valid,
    still_n, still_h, still_w, still_c, still_g,
    moved_start, moved_n, moved_h, moved_w, moved_r, moved_s, moved_g, bias_tap,
    out_a, out_b, out_r, out_s, out_g,
    R: tl.constexpr, S: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    DENSE_ROWS: tl.constexpr, STILL_ON_M: tl.constexpr, PROLOGUE: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_BIAS: tl.constexpr, FINISH: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, channel blocks, groups * splits): neighbours share their pixels of `still` through L2.

    A pixel of `moved` holds DEPTH channels side by side, one of `still` `readable` ones: the `channels` that count, and
    behind them what makes their number one that can be loaded whole. The strides of `moved` count UNITs of elements,
    the width of its loads, which Triton cannot see in a number that is no multiple of 16. Offsets of pixels are 64 bits
    wide.
    """
    columns: tl.constexpr = R * S * DEPTH
    group = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    offs_a = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    offs_col = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    tap = offs_col // DEPTH
    place_of_column = ((tap // S) * moved_r + (tap % S) * moved_s) * UNIT + offs_col % DEPTH
    still_ptr += group.to(tl.int64) * still_g
    moved_ptr += (moved_start + group.to(tl.int64) * moved_g) * UNIT
    if PROLOGUE:
        scale = tl.load(scale_ptr + group * channels + offs_a, mask=offs_a < channels, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + group * channels + offs_a, mask=offs_a < channels, other=0.0).to(tl.float32)
    first = split * split_pixels

    # Elements of one split: those of the gradient as (groups, channels, columns), then those of the bias.
    groups = tl.num_programs(2) // splits
    size = groups.to(tl.int64) * channels * columns
    stride_split = size
    if HAS_BIAS:
        stride_split += groups * DEPTH
        # By one of the programs that share these pixels; before the product, which leaves no registers free.
        offs_b = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_BIAS)
        inside_bias = offs_b < tl.where(tl.program_id(1) == 0, DEPTH, 0)
        sums = _sum_moved(
            moved_ptr + bias_tap * UNIT, offs_b, inside_bias, first, tl.minimum(first + split_pixels, pixels), image,
            width, moved_n, moved_h, moved_w, DEPTH, UNIT, BLOCK_COLUMNS, BLOCK_BIAS,
        )  # fmt: skip
        if FINISH == ONLY_SPLIT:
            _store_bias(bias_ptr, sums, group * DEPTH + offs_b, inside_bias, rows_ptr, valid, DEPTH, HAS_ROWS)
        else:
            tl.store(partials_ptr + split * stride_split + size + group * DEPTH + offs_b, sums, mask=inside_bias)

    if STILL_ON_M:
        acc = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), tl.float32)
    else:
        acc = tl.zeros((BLOCK_COLUMNS, BLOCK_CHANNELS), tl.float32)
    for start in range(first, tl.minimum(first + split_pixels, pixels), BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        n = pixel // image
        within = pixel % image
        h = within // width
        w = within % width
        if DENSE_ROWS:
            place = n.to(tl.int64) * still_n + within.to(tl.int64) * still_w
        else:
            place = n.to(tl.int64) * still_n + h.to(tl.int64) * still_h + w.to(tl.int64) * still_w
        still = tl.load(
            still_ptr + place[:, None] + (offs_a.to(tl.int64) * still_c)[None, :],
            mask=(pixel < pixels)[:, None] & (offs_a < readable)[None, :],
            other=0.0,
        )
        place = n.to(tl.int64) * moved_n + h.to(tl.int64) * moved_h + w.to(tl.int64) * moved_w
        moved = tl.load(
            moved_ptr + (place * UNIT)[:, None] + place_of_column[None, :],
            mask=(pixel < pixels)[:, None] & (offs_col < columns)[None, :],
            other=0.0,
        )
        if PROLOGUE:
            # Rows behind the last pixel become relu(shift) here: harmless, `moved` is zero there.
            still = tl.maximum(still.to(tl.float32) * scale[None, :] + shift[None, :], 0.0).to(still.dtype)
        if INTERPRETED:
            # The interpreter multiplies the bit patterns of bfloat16.
            still, moved = still.to(tl.float32), moved.to(tl.float32)
        if STILL_ON_M:
            acc = tl.dot(tl.trans(still), moved, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(moved), still, acc, input_precision=PRECISION)

    if STILL_ON_M:
        a, col = offs_a[:, None], offs_col[None, :]
    else:
        a, col = offs_a[None, :], offs_col[:, None]
    inside = (a < channels) & (col < columns)
    if FINISH == ONLY_SPLIT:
        _store(
            out_ptr, acc, a, col, group, inside, rows_ptr, valid, out_a, out_b, out_r, out_s, out_g, S, DEPTH, HAS_ROWS
        )
    else:
        element = (group.to(tl.int64) * channels + a) * columns + col
        tl.store(partials_ptr + split * stride_split + element, acc, mask=inside)
    if FINISH == LAST_SUMS:
        tile = (group * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        # Every thread's partials are written before the count says so.
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == splits - 1:
            acc = tl.zeros_like(acc)
            for i in range(splits):
                acc += tl.load(partials_ptr + i * stride_split + element, mask=inside, other=0.0, cache_modifier=".cg")
            _store(
                out_ptr, acc, a, col, group, inside, rows_ptr, valid, out_a, out_b, out_r, out_s, out_g, S, DEPTH,
                HAS_ROWS,
            )  # fmt: skip
            if HAS_BIAS:
                sums = tl.zeros((BLOCK_BIAS,), tl.float32)
                for i in range(splits):
                    split_ptr = partials_ptr + i * stride_split + size
                    sums += tl.load(
                        split_ptr + group * DEPTH + offs_b, mask=inside_bias, other=0.0, cache_modifier=".cg"
                    )
                _store_bias(bias_ptr, sums, group * DEPTH + offs_b, inside_bias, rows_ptr, valid, DEPTH, HAS_ROWS)


@triton.jit
def _sum_moved(
    moved_ptr, offs_b, inside, first, last, image, width, moved_n, moved_h, moved_w,
    DEPTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_BIAS: tl.constexpr,
):  # fmt: skip
    """The sums of the channels `offs_b` that are `inside` over the pixels from `first` to `last`.

    In few steps of many loads: nothing hides how long one takes.
    """
    BLOCK_PIXELS: tl.constexpr = 4096 // BLOCK_BIAS
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_BIAS), tl.float32)
    if (tl.program_id(1) == 0) & (tl.program_id(0) * BLOCK_COLUMNS < DEPTH):
        for start in range(first, last, BLOCK_PIXELS):
            pixel = start + tl.arange(0, BLOCK_PIXELS)
            n = pixel // image
            h = pixel % image // width
            w = pixel % width
            place = n.to(tl.int64) * moved_n + h.to(tl.int64) * moved_h + w.to(tl.int64) * moved_w
            acc += tl.load(
                moved_ptr + (place * UNIT)[:, None] + offs_b[None, :],
                mask=(pixel < last)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def sum_splits_kernel(
    partials_ptr, out_ptr, bias_ptr, rows_ptr, size, biases, channels, splits, valid,
    out_a, out_b, out_r, out_s, out_g,
    R: tl.constexpr, S: tl.constexpr, DEPTH: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out = partials.sum(0), put in its place. A program owns BLOCK elements and sums BLOCK_SPLITS splits at a time.

    The last `biases` elements of a split belong to `bias`, the `size` before them to `out`.
    """
    columns: tl.constexpr = R * S * DEPTH
    elements = size
    if HAS_BIAS:
        elements = size + biases
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        part = tl.load(
            partials_ptr + split.to(tl.int64)[:, None] * elements + element[None, :],
            mask=(split < splits)[:, None] & (element < elements)[None, :],
            other=0.0,
        )
        acc += tl.sum(part, 0)
    a = element // columns
    _store(
        out_ptr, acc, a % channels, element % columns, a // channels, element < size, rows_ptr, valid, out_a, out_b,
        out_r, out_s, out_g, S, DEPTH, HAS_ROWS,
    )  # fmt: skip
    if HAS_BIAS:
        inside = (element >= size) & (element < elements)
        _store_bias(bias_ptr, acc, element - size, inside, rows_ptr, valid, DEPTH, HAS_ROWS)


@triton.jit
def _store_bias(
    bias_ptr, acc, column, inside, rows_ptr, valid, DEPTH: tl.constexpr, HAS_ROWS: tl.constexpr
):  # fmt: skip
    """Column (group, b) to its place in the contiguous bias; columns that only pad a group are dropped."""
    if HAS_ROWS:
        row = tl.load(rows_ptr + column, mask=inside, other=-1)
        inside = inside & (row >= 0)
    else:
        row = column // DEPTH * valid + column % DEPTH
        inside = inside & (column % DEPTH < valid)
    tl.store(bias_ptr + row, acc.to(bias_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store(
    out_ptr, acc, a, col, group, inside, rows_ptr, valid, out_a, out_b, out_r, out_s, out_g,
    S: tl.constexpr, DEPTH: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Element (group, a, (tap, b)) to its place in the gradient; columns that only pad a group are dropped."""
    tap, b = col // DEPTH, col % DEPTH
    if HAS_ROWS:
        row = tl.load(rows_ptr + group * DEPTH + b, mask=inside, other=-1)
        inside = inside & (row >= 0)
    else:
        row = b
        inside = inside & (b < valid)
    place = row.to(tl.int64) * out_b + a.to(tl.int64) * out_a + (tap // S) * out_r + (tap % S) * out_s
    tl.store(out_ptr + place + group.to(tl.int64) * out_g, acc.to(out_ptr.dtype.element_ty), mask=inside)
