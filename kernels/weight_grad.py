"""The weight gradient of chosen filters in Triton: which operand keeps still, and the launches.

    grad_weight[k, c, r, s] = sum over n, p, q of
        grad_output[n, k, p, q] * input[n, c, p * stride + r * dilation - padding, q * ...]

* `stationary`: the input keeps still, the gradient of the few filters is gathered into a padded buffer and moved.
* `swapped`: the filters outnumber the input's channels (a stem): the gradient keeps still, the padded input is moved.
* `pointwise`: 1x1 filters: nothing moves, and of the input only the visited pixels are read, where they are.
* `depthwise`: one input channel a group: no product, a sum over pixels.

Grouped convolutions run as one product a group in the same launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import tiles
from .correlate import LAST_SUMS, ONLY_SPLIT, PARTIALS, correlate_kernel, sum_splits_kernel
from .depthwise import depthwise_kernel
from .halo import halo_gather_kernel

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 stood before this module was imported."""

PRECISIONS = ("tf32", "tf32x3", "ieee")
FAMILIES = ("stationary", "swapped", "pointwise", "depthwise")

Pair = tuple[int, int]


class Affine(NamedTuple):
    """A normalisation's scale and shift for each channel of the input, each (C,): it saw relu(x * scale + shift)."""

    scale: Tensor
    shift: Tensor


class Filters(NamedTuple):
    """The learned filters: their channels of grad_output, and the groups of the input given that they belong to.

    `runs` are (start, stop, start, stop, ...), ascending; `groups` counts those of the whole convolution.
    """

    runs: tuple[int, ...]
    out_channels: int
    groups: int = 1


def weight_grad(
    family: str,
    grad_output: Tensor,
    input: Tensor,
    filters: Filters,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    out: Tensor,
    bias: Tensor | None = None,
    affine: Affine | None = None,
    precision: str = "ieee",
    last_block: bool | None = None,
) -> Tensor:
    """Writes the gradient of the chosen filters into `out` (Kt, C per group, R, S), of any strides and dtype.

    Equals `torch.nn.grad.conv2d_weight(x, ...)[filters]`, x being `input`, with `affine` relu(input * scale + shift).
    `input` (N, C, H, W) holds the channels of the groups with a chosen filter; `grad_output` (N, K, P, Q) is whole.
    `bias` (Kt,), contiguous, receives the sums of the chosen filters' gradients over images and pixels, in the same
    launches; not every problem can, see `sums_bias`.
    Sums are float32 and taken in a fixed order. `precision` is that of float32 operands, see `PRECISIONS`.
    `last_block`: the tile that finishes last sums the splits, which spares a launch; None: where that pays.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if not (INTERPRETED or input.is_cuda):
        raise RuntimeError(
            f"Triton kernels cannot run on {input.device}: use a GPU, or set TRITON_INTERPRET=1 before Python starts"
        )
    geometry = _Geometry(kernel_size, stride, padding, dilation)
    if bias is not None and not sums_bias(family, geometry, input.shape[2:], grad_output.shape[2:]):
        raise ValueError(f"{family} cannot sum the bias of {geometry} with an input of {tuple(input.shape[2:])} pixels")
    with torch.cuda.device(input.device) if input.is_cuda else nullcontext():
        _launch(family, grad_output, input, filters, geometry, out, bias, affine, precision, last_block)
    return out


def sums_bias(family: str, geometry: Sequence[Pair], input_size: Sequence[int], output_size: Sequence[int]) -> bool:
    """Whether this family can sum the bias of a convolution of this geometry (filter size, stride, padding, dilation).

    `swapped` holds still what would have to be summed, and `stationary` needs a tap that meets every output pixel.
    """
    if family == "stationary":
        return _seeing_tap(_Geometry(*geometry), input_size, output_size) is not None
    return family in ("pointwise", "depthwise")


class _Geometry(NamedTuple):
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


def _seeing_tap(geometry: _Geometry, input_size: Sequence[int], output_size: Sequence[int]) -> Pair | None:
    """A tap (r, s) that meets a pixel of the input, none of its padding, for every pixel of the output."""
    found = []
    for taps, stride, pad, dilation, size, outputs in zip(*geometry, input_size, output_size, strict=True):
        tap = -(-pad // dilation)
        if tap >= taps or (outputs - 1) * stride + tap * dilation - pad >= size:
            return None
        found.append(tap)
    return found[0], found[1]


def _launch(
    family: str, grad_output: Tensor, input: Tensor, filters: Filters, geometry: _Geometry, out: Tensor,
    bias: Tensor | None, affine: Affine | None, precision: str, last_block: bool | None,
) -> None:  # fmt: skip
    if family == "depthwise":
        return _depthwise(grad_output, input, filters, geometry, out, bias, affine)
    correlation = _CORRELATIONS[family](grad_output, input, filters, geometry, out, affine)
    _correlate(correlation, out, bias, precision, last_block)


class _Slots(NamedTuple):
    """Where the learned filters sit among groups x depth columns; a tensor is None where a count says it all."""

    groups: int
    depth: int
    first: int  # the first filter's channel of grad_output
    valid: int  # filters in each group
    channels: Tensor | None  # (groups * depth,) channels of grad_output, -1 where a column only pads
    rows: Tensor | None  # (groups * depth,) rows of the result, likewise


# Writes a compact buffer, and zeroes the counters of the launch that follows.
Fill = Callable[[Tensor | None], None]


class _Correlation(NamedTuple):
    """The arguments of one `correlate_kernel`: what keeps still, what moves, where its results belong."""

    still: Tensor  # (N, groups * channels, H, W)
    readable: int  # of these channels and what lies behind them, as much may be read
    moved: Tensor  # pixels of `slots.depth` channels side by side
    fill: Fill | None  # to be called before `moved` is read; None where it is there already
    moved_start: int  # where tap (0, 0) of pixel (0, 0, 0) is
    moved_strides: tuple[int, int, int, int, int, int]  # n, h, w, r, s, group
    kernel_size: Pair
    slots: _Slots
    out_strides: Sequence[int]  # of a still channel, a moved channel, r, s
    affine: Affine | None
    bias_tap: Pair | None  # of which the sums over all pixels are those of all that moves


def _stationary(
    grad_output: Tensor, input: Tensor, filters: Filters, geometry: _Geometry, out: Tensor, affine: Affine | None,
) -> _Correlation:  # fmt: skip
    """G = grad_output with stride - 1 zeros between its pixels and zeros around them; tap (r, s) reads it reversed."""
    (r, s), (dh, dw), (pad_h, pad_w) = geometry.kernel_size, geometry.dilation, geometry.padding
    slots = _slots(filters, input.device)
    size = input.size(2) + (r - 1) * dh, input.size(3) + (s - 1) * dw
    border = (r - 1) * dh - pad_h, (s - 1) * dw - pad_w
    moved, fill = _gathered(grad_output, slots, border, size, geometry.stride, None)
    n, h, w = moved.stride()[:3]
    start = (r - 1) * dh * h + (s - 1) * dw * w
    out_strides, channels = (out.stride(1), out.stride(0), out.stride(2), out.stride(3)), out.size(1)
    return _Correlation(
        input, channels, moved, fill, start, (n, h, w, -dh * h, -dw * w, slots.depth), (r, s), slots, out_strides,
        affine, _seeing_tap(geometry, input.shape[2:], grad_output.shape[2:]),
    )  # fmt: skip


def _swapped(
    grad_output: Tensor, input: Tensor, filters: Filters, geometry: _Geometry, out: Tensor, affine: Affine | None,
) -> _Correlation:  # fmt: skip
    """The padded input, (N, H + 2 padding, W + 2 padding, C), moves over the gradient of the chosen filters."""
    (r, s), (dh, dw), (sh, sw) = geometry.kernel_size, geometry.dilation, geometry.stride
    p, q = grad_output.shape[2:]
    # Triton sees that a stride allows 16-byte loads if it is a multiple of 16.
    learned = _slots(filters, input.device, multiple=16)
    if learned.channels is None:
        still, readable = grad_output.narrow(1, learned.first, learned.valid), learned.valid
    else:
        chosen, gather = _gathered(grad_output, learned, (0, 0), (p, q), (1, 1), None)
        gather(None)
        still, readable = chosen.permute(0, 3, 1, 2).narrow(1, 0, learned.valid), learned.depth
    slots = _Slots(1, tiles.depth(input.size(1)), 0, input.size(1), None, None)
    size = (p - 1) * sh + (r - 1) * dh + 1, (q - 1) * sw + (s - 1) * dw + 1
    moved, fill = _gathered(input, slots, geometry.padding, size, (1, 1), affine)
    n, h, w = moved.stride()[:3]
    return _Correlation(
        still, readable, moved, fill, 0, (n, sh * h, sw * w, dh * h, dw * w, 0), (r, s), slots, out.stride(), None, None
    )


def _pointwise(
    grad_output: Tensor, input: Tensor, filters: Filters, geometry: _Geometry, out: Tensor, affine: Affine | None,
) -> _Correlation:  # fmt: skip
    """The gradient is read where it is, if a pixel's chosen filters can be loaded 16 bytes at a time."""
    visited = input[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    slots = _slots(filters, input.device)
    strides = grad_output.stride()
    units = (slots.first, slots.valid, strides[0], strides[2], strides[3])
    if slots.channels is None and strides[1] == 1 and all(size % 8 == 0 for size in units):
        moved, fill, start = grad_output, None, slots.first
        n, h, w = strides[0], strides[2], strides[3]
    else:
        size = grad_output.size(2), grad_output.size(3)
        moved, fill = _gathered(grad_output, slots, (0, 0), size, (1, 1), None)
        start, (n, h, w) = 0, moved.stride()[:3]
    out_strides = (out.stride(1), out.stride(0), 0, 0)
    return _Correlation(
        visited, out.size(1), moved, fill, start, (n, h, w, 0, 0, slots.depth), (1, 1), slots, out_strides, affine,
        (0, 0),
    )  # fmt: skip


_CORRELATIONS = {"stationary": _stationary, "swapped": _swapped, "pointwise": _pointwise}


def _gathered(
    source: Tensor, slots: _Slots, border: Pair, size: Pair, step: Pair, affine: Affine | None
) -> tuple[Tensor, Fill]:
    """(N, *size, groups * depth): the chosen channels of (N, C, H, W), `step` apart, behind a border of zeros.

    A buffer, and what fills it.
    """
    depth = slots.groups * slots.depth
    if slots.channels is None:
        # A pointer to the first channel shows its alignment, a number added to one would not.
        source = source.narrow(1, slots.first, slots.valid)
    out = torch.empty(source.size(0), *size, depth, dtype=source.dtype, device=source.device)
    return out, partial(_gather, source, out, slots, border, size, step, affine)


def _gather(
    source: Tensor, out: Tensor, slots: _Slots, border: Pair, size: Pair, step: Pair, affine: Affine | None,
    counters: Tensor | None,
) -> None:  # fmt: skip
    depth = out.size(3)
    positions, block_depth = out.numel() // depth, min(triton.next_power_of_2(depth), 64)
    block_positions = 1024 // block_depth
    scale, shift = affine or (source, source)
    halo_gather_kernel[(triton.cdiv(positions, block_positions), triton.cdiv(depth, block_depth))](
        source, out, _or(slots.channels, source), scale, shift, _or(counters, source),
        positions, size[0] * size[1], size[1], *border, source.size(2), source.size(3), slots.valid, depth,
        tiles.COUNTERS, *_nhwc(source),
        STEP_H=step[0], STEP_W=step[1], BLOCK_POSITIONS=block_positions, BLOCK_DEPTH=block_depth,
        POSITIONS_FASTEST=source.stride(1) != 1, HAS_INDEX=slots.channels is not None, PROLOGUE=affine is not None,
        BLOCK_COUNTERS=0 if counters is None else tiles.COUNTERS, num_warps=4, **_fusion(affine),
    )  # fmt: skip


def _correlate(
    correlation: _Correlation, out: Tensor, bias: Tensor | None, precision: str, last_block: bool | None
) -> None:
    still, slots = correlation.still, correlation.slots
    r, s = correlation.kernel_size
    batch, height, width = still.size(0), still.size(2), still.size(3)
    pixels, channels, columns = batch * height * width, still.size(1) // slots.groups, r * s * slots.depth
    multiprocessors, arch = _chip(still.device)
    operands = tiles.Operands(still.element_size(), still.stride(1) == 1, correlation.affine is not None)
    plan = tiles.cut(pixels, channels, columns, slots.groups, operands, multiprocessors=multiprocessors, arch=arch)
    shape, grid = plan.shape, tiles.grid(plan, channels, columns, slots.groups)
    if bias is not None and (shape.block_channels, shape.block_columns) == (32, 256):
        # Its sums beside the bias' do not fit into the registers of 4 warps.
        shape = shape._replace(num_warps=8)
    finish = ONLY_SPLIT if plan.splits == 1 else PARTIALS
    if last_block is None:
        last_block = tiles.sums_itself(plan, channels, columns, slots.groups, zeroed=correlation.fill is not None)
    if last_block and plan.splits > 1 and grid[0] * grid[1] * slots.groups <= tiles.COUNTERS:
        finish = LAST_SUMS
    counters = torch.empty(tiles.COUNTERS, dtype=torch.int32, device=out.device) if finish == LAST_SUMS else None
    if correlation.fill is not None:
        correlation.fill(counters)
    elif counters is not None:
        counters.zero_()
    partials, biases = out, 0 if bias is None else slots.groups * slots.depth
    if plan.splits > 1:
        size = plan.splits * (slots.groups * channels * columns + biases)
        partials = torch.empty(size, dtype=torch.float32, device=out.device)
    scale, shift = correlation.affine or (still, still)
    unit = min(slots.depth & -slots.depth, 8)
    tap, (moved_r, moved_s) = correlation.bias_tap or (0, 0), correlation.moved_strides[3:5]
    group_stride = 0 if slots.rows is not None else slots.valid * correlation.out_strides[1]
    out_strides = (*correlation.out_strides, group_stride)
    n, h, w = still.stride(0), still.stride(2), still.stride(3)
    # Not added where there is nothing to add, an odd number would hide the alignment.
    still_group = 0 if slots.groups == 1 else channels * still.stride(1)
    correlate_kernel[grid](
        still, correlation.moved, scale, shift, partials, _or(counters, still), out, _or(bias, out),
        _or(slots.rows, still),
        pixels, plan.split_pixels, height * width, width, channels, correlation.readable, plan.splits, slots.valid,
        n, h, w, still.stride(1), still_group,
        correlation.moved_start // unit, *(stride // unit for stride in correlation.moved_strides),
        (tap[0] * moved_r + tap[1] * moved_s) // unit,
        *out_strides, R=r, S=s, DEPTH=slots.depth, UNIT=unit, BLOCK_PIXELS=shape.block_pixels,
        BLOCK_CHANNELS=shape.block_channels, BLOCK_COLUMNS=shape.block_columns, DENSE_ROWS=h == w * width,
        STILL_ON_M=shape.still_on_m, PROLOGUE=correlation.affine is not None, HAS_ROWS=slots.rows is not None,
        HAS_BIAS=bias is not None, BLOCK_BIAS=min(triton.next_power_of_2(slots.depth), shape.block_columns),
        FINISH=finish, PRECISION=precision, INTERPRETED=INTERPRETED,
        num_warps=shape.num_warps, num_stages=shape.num_stages, **_fusion(correlation.affine),
        **_registers(operands, bias is not None, finish == LAST_SUMS),
    )  # fmt: skip
    if finish == PARTIALS:
        _sum_splits(partials, out, bias, plan.splits, channels, slots, correlation.kernel_size, out_strides)


def _sum_splits(
    partials: Tensor, out: Tensor, bias: Tensor | None, splits: int, channels: int, slots: _Slots, kernel_size: Pair,
    out_strides: Sequence[int],
) -> None:  # fmt: skip
    size = slots.groups * channels * kernel_size[0] * kernel_size[1] * slots.depth
    biases = partials.numel() // splits - size
    block_splits = min(triton.next_power_of_2(splits), 16)
    block = 1024 // block_splits
    sum_splits_kernel[(triton.cdiv(size + biases, block),)](
        partials, out, _or(bias, out), _or(slots.rows, out), size, biases, channels, splits, slots.valid, *out_strides,
        R=kernel_size[0], S=kernel_size[1], DEPTH=slots.depth, BLOCK_SPLITS=block_splits, BLOCK=block,
        HAS_ROWS=slots.rows is not None, HAS_BIAS=bias is not None, num_warps=4, **_fusion(None),
    )  # fmt: skip


def _depthwise(
    grad_output: Tensor, input: Tensor, filters: Filters, geometry: _Geometry, out: Tensor, bias: Tensor | None,
    affine: Affine | None,
) -> None:  # fmt: skip
    (r, s), (p, q) = geometry.kernel_size, grad_output.shape[2:]
    learned, pixels = out.size(0), grad_output.size(0) * p * q
    pairs = _channel_pairs(filters, input.device)
    if pairs is None:
        grad_output = grad_output.narrow(1, filters.runs[0], learned)
    taps = r * s + (bias is not None)
    block = tiles.cut_depthwise(pixels, learned, taps, multiprocessors=_chip(input.device)[0])
    partials = torch.empty(block.splits * learned * taps, dtype=torch.float32, device=input.device)
    scale, shift = affine or (input, input)
    fastest = input.stride(1) != 1
    grad_strides, input_strides = _nhwc(grad_output), _nhwc(input)
    unit = 1
    if pairs is None and grad_strides[3] == input_strides[3] == 1:
        unit = math.gcd(learned, 8, *grad_strides[:3], *input_strides[:3])
    in_units = [stride // unit for stride in grad_strides[:3]], [stride // unit for stride in input_strides[:3]]
    depthwise_kernel[
        (triton.cdiv(learned, block.block_channels), triton.cdiv(taps, tiles.TAPS), block.splits)
    ](
        grad_output, input, _or(pairs and pairs[0], input), _or(pairs and pairs[1], input), scale, shift, partials,
        pixels, block.split_pixels, p * q, q, learned // unit, input.size(2), input.size(3),
        *geometry.stride, *geometry.padding, *geometry.dilation, *in_units[0], grad_strides[3], *in_units[1],
        input_strides[3], R=r, S=s, UNIT=unit,
        BLOCK_TAPS=tiles.TAPS, BLOCK_PIXELS=block.block_pixels, BLOCK_CHANNELS=block.block_channels,
        PIXELS_FASTEST=fastest, HAS_INDEX=pairs is not None, PROLOGUE=affine is not None, HAS_BIAS=bias is not None,
        num_warps=4, **_fusion(affine),
    )  # fmt: skip
    slots = _Slots(1, 1, 0, 1, None, None)
    out_strides = (out.stride(0), 0, out.stride(2), out.stride(3), 0)
    _sum_splits(partials, out, bias, block.splits, learned, slots, (r, s), out_strides)


@lru_cache(maxsize=4096)
def _slots(filters: Filters, device: torch.device, multiple: int = 1) -> _Slots:
    by_group = _by_group(filters)
    groups, valid = len(by_group), max(len(members) for members in by_group)
    depth = triton.cdiv(tiles.depth(valid), multiple) * multiple
    if filters.groups == 1 and len(filters.runs) == 2:
        return _Slots(1, depth, filters.runs[0], valid, None, None)
    index = [k for members in by_group for k in (*members, *[-1] * (depth - len(members)))]
    if all(len(members) == valid for members in by_group):
        return _Slots(groups, depth, index[0], valid, _on(index, device), None)
    place = {k: row for row, k in enumerate(k for members in by_group for k in members)}
    rows = [place.get(k, -1) for k in index]
    return _Slots(groups, depth, index[0], valid, _on(index, device), _on(rows, device))


@lru_cache(maxsize=4096)
def _channel_pairs(filters: Filters, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The channels of grad_output and of input of each learned filter; None where both ascend one by one."""
    by_group = _by_group(filters)
    if len(filters.runs) == 2 and all(len(members) == 1 for members in by_group):
        return None
    seen = [channel for channel, members in enumerate(by_group) for _ in members]
    return _on([k for members in by_group for k in members], device), _on(seen, device)


def _by_group(filters: Filters) -> list[list[int]]:
    """The learned filters of each group that has any."""
    members: dict[int, list[int]] = {}
    for start, stop in zip(filters.runs[::2], filters.runs[1::2], strict=True):
        for k in range(start, stop):
            members.setdefault(k * filters.groups // filters.out_channels, []).append(k)
    return list(members.values())


def _on(values: list[int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _chip(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and architecture; those of an H100 for the interpreter."""
    if device.type != "cuda":
        return 132, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's pointer that is never read needs some tensor all the same."""
    return stand_in if tensor is None else tensor


def _nhwc(tensor: Tensor) -> tuple[int, int, int, int]:
    """Strides in the order of a kernel's arguments."""
    n, c, h, w = tensor.stride()
    return n, h, w, c


def _registers(operands: tiles.Operands, has_bias: bool, sums_itself: bool) -> dict[str, int]:
    """All that a thread can have where ptxas would put a few values into memory to let more programs share a
    multiprocessor than there are."""
    crowded = (
        has_bias or (operands.prologue and not operands.channels_last) or (sums_itself and operands.element_size == 4)
    )
    return {"maxnreg": 255} if crowded else {}


def _fusion(affine: Affine | None) -> dict[str, bool]:
    """A recomputed activation must equal the one of the forward pass bit for bit: no fused multiply-add there."""
    return {"enable_fp_fusion": affine is None}
