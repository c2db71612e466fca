"""Depthwise: a filter sees one channel, so its gradient is a sum over pixels, R * S of them, of the chosen channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def depthwise_kernel(
    grad_ptr, input_ptr, grad_index_ptr, input_index_ptr, scale_ptr, shift_ptr, partials_ptr,
    pixels, split_pixels, image, width, learned_units, height_in, width_in,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    grad_n, grad_h, grad_w, grad_c, input_n, input_h, input_w, input_c,
    R: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_TAPS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    PIXELS_FASTEST: tl.constexpr, HAS_INDEX: tl.constexpr, PROLOGUE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (filter blocks, tap blocks, splits). Partials (splits, learned, R * S) are float32.

    With HAS_BIAS there is one more tap, which sees ones; behind the other sums of a split lie its, (learned,).

    A program walks its split's output pixels and keeps every (tap, pixel of the block, filter) sum apart until the end.
    Shifted reads of the input go through L1; a pixel outside the input counts as zero. The tile's fastest axis is the
    one that is contiguous in memory: channels, or pixels. The number of filters and the strides of pixels count UNITs,
    the width of the loads, which Triton cannot see in a number that is no multiple of 16.
    """
    learned = learned_units * UNIT
    taps: tl.constexpr = R * S
    tap = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)[:, None, None]
    if PIXELS_FASTEST:
        k = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :, None]
        offs_pixel = tl.arange(0, BLOCK_PIXELS)[None, None, :]
        acc = tl.zeros((BLOCK_TAPS, BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    else:
        k = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, None, :]
        offs_pixel = tl.arange(0, BLOCK_PIXELS)[None, :, None]
        acc = tl.zeros((BLOCK_TAPS, BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    if HAS_INDEX:
        grad_channel = tl.load(grad_index_ptr + k, mask=k < learned, other=0)
        input_channel = tl.load(input_index_ptr + k, mask=k < learned, other=0)
    else:
        grad_channel = k
        input_channel = k
    grad_ptr += grad_channel.to(tl.int64) * grad_c
    input_ptr += input_channel.to(tl.int64) * input_c
    if PROLOGUE:
        scale = tl.load(scale_ptr + input_channel, mask=k < learned, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + input_channel, mask=k < learned, other=0.0).to(tl.float32)

    start_split = tl.program_id(2) * split_pixels
    for start in range(start_split, tl.minimum(start_split + split_pixels, pixels), BLOCK_PIXELS):
        pixel = start + offs_pixel
        n = pixel // image
        p = pixel % image // width
        q = pixel % width
        inside = (pixel < pixels) & (k < learned)
        place = n.to(tl.int64) * grad_n + p.to(tl.int64) * grad_h + q.to(tl.int64) * grad_w
        grad = tl.load(grad_ptr + place * UNIT, mask=inside, other=0.0).to(tl.float32)
        h = p * stride_h - padding_h + (tap // S) * dilation_h
        w = q * stride_w - padding_w + (tap % S) * dilation_w
        inside = inside & (tap < taps) & (h >= 0) & (h < height_in) & (w >= 0) & (w < width_in)
        place = n.to(tl.int64) * input_n + h.to(tl.int64) * input_h + w.to(tl.int64) * input_w
        value = tl.load(input_ptr + place * UNIT, mask=inside, other=0.0)
        if PROLOGUE:
            rounded = tl.maximum(value.to(tl.float32) * scale + shift, 0.0).to(value.dtype)
            value = tl.where(inside, rounded, 0.0)
        value = value.to(tl.float32)
        if HAS_BIAS:
            value = tl.where(tap == taps, 1.0, value)
        # Fused also where the compiler, for the prologue's sake, may not.
        acc = tl.fma(tl.broadcast_to(grad, acc.shape), tl.broadcast_to(value, acc.shape), acc)

    if PIXELS_FASTEST:
        sums = tl.sum(acc, 2)
        k = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    else:
        sums = tl.sum(acc, 1)
        k = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    tap = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)[:, None]
    split = tl.program_id(2).to(tl.int64)
    if HAS_BIAS:
        element = split * learned * (taps + 1) + tl.where(tap < taps, k * taps + tap, learned * taps + k)
        tl.store(partials_ptr + element, sums, mask=(tap <= taps) & (k < learned))
    else:
        tl.store(partials_ptr + (split * learned + k) * taps + tap, sums, mask=(tap < taps) & (k < learned))
