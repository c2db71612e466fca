"""What a weight gradient costs by each algorithm: bytes, operations and launches, and from these seconds.

The numbers of a chip are rates that a good kernel reaches, not those of its data sheet. Those of the libraries are a
model, not yet fitted to measurements. Pure Python, no device needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rwn_ext import cuda
from rwn_ext.kernels import tiles

if TYPE_CHECKING:
    from rwn_ext.planner import Problem


@dataclass(frozen=True)
class Chip:
    """A GPU: bytes a second of memory and of L2, operations a second by precision, seconds."""

    name: str
    multiprocessors: int
    arch: int
    bandwidth: float
    l2_bandwidth: float
    half: float
    tf32: float
    float32: float
    launch: float = 2.0e-6
    """Between the starts of two dependent kernels that do nothing."""
    library_call: float = 8.0e-6
    """Of the host's time, for a call of a library through torch."""
    triton_call: float = 8.0e-6
    """Of the host's time, for a launch of a Triton kernel."""
    cuda_call: float = 12.0e-6
    """Of the host's time, for a call of a compiled kernel: one launch, its plan looked up, its result allocated."""


# The H200's first two rates were measured; the others follow from data sheets in the same proportion. Nominal, all.
H200 = Chip("H200", 132, 90, 4.3e12, 7e12, 790e12, 380e12, 50e12)
H100 = replace(H200, name="H100", bandwidth=3.0e12, l2_bandwidth=5.5e12)
A100 = Chip("A100", 108, 80, 1.5e12, 4e12, 260e12, 130e12, 16e12)
B200 = Chip("B200", 148, 100, 7e12, 10e12, 1700e12, 850e12, 60e12)
CHIPS = (H200, H100, A100, B200)


def chip(name: str, multiprocessors: int, arch: int) -> Chip:
    """The chip of this name as torch gives it; an unknown one is an A100 of its size."""
    for known in CHIPS:
        if known.name in name:
            return replace(known, name=name, multiprocessors=multiprocessors, arch=arch)
    share = multiprocessors / A100.multiprocessors
    rates = {rate: getattr(A100, rate) * share for rate in ("bandwidth", "l2_bandwidth", "half", "tf32", "float32")}
    return replace(A100, name=name, multiprocessors=multiprocessors, arch=arch, **rates)


@dataclass(frozen=True)
class LibraryModel:
    """How cuDNN's weight gradient falls short of the chip. A guess until it is fitted on a device."""

    efficiency: float = 0.65
    """Of the chip's operations a second."""
    filter_tile: int = 64
    """It computes this many filters at a time."""
    rereads: float = 0.5
    """How much of the input each filter tap beyond the first reads again."""
    channel_tile: int = 4
    """It pads the input's channels to a multiple of this."""


LIBRARY = LibraryModel()
# Of the chip's memory and operation rates, what the Triton kernels are expected to reach.
TRITON_BANDWIDTH_SHARE = 0.85
TRITON_FLOPS_SHARE = 0.6


class Cost(NamedTuple):
    """Seconds predicted, bytes of memory traffic, multiply-adds times two, kernels launched."""

    seconds: float
    bytes: float
    flops: float
    launches: int


def floor(p: Problem) -> Cost:
    """What no kernel can go below: what the filters see of the input and the chosen part of grad_output read once, the
    result written."""
    traffic = _visited_bytes(p) + _gradient_bytes(p, p.learned) + _result_bytes(p, p.learned)
    flops = _flops(p, p.learned)
    return Cost(max(traffic / p.chip.bandwidth, flops / _rate(p)), traffic, flops, 1)


def full(p: Problem) -> Cost:
    """The library's gradient of all filters, then the learned ones of it."""
    return _library(p, p.filters, extra_bytes=2 * _result_bytes(p, p.learned), launches=2)


def gather(p: Problem) -> Cost:
    """The learned filters' grad_output copied, then the library's gradient of these."""
    copied = _gradient_bytes(p, p.learned, sectors=True) + _gradient_bytes(p, p.learned)
    return _library(p, p.learned, extra_bytes=copied, launches=2)


def stationary(p: Problem) -> Cost:
    """The input read once; the gathered gradient moved over it."""
    r, s = p.kernel_size
    depth = tiles.depth(_ceil(p.learned, p.groups))
    (dh, dw), pixels = p.dilation, p.batch * p.height * p.width
    positions = p.batch * (p.height + (r - 1) * dh) * (p.width + (s - 1) * dw)
    buffer = positions * depth * p.groups * p.element_size
    gathered = _gradient_bytes(p, p.learned, sectors=True) + buffer
    return _correlation(p, pixels, p.channels // p.groups, r * s * depth, _input_bytes(p), buffer, gathered, p.normed)


def swapped(p: Problem) -> Cost:
    """The chosen gradient read once; the padded input moved over it."""
    (r, s), (height, width) = p.kernel_size, p.output_size
    depth = tiles.depth(p.channels)
    buffer = p.batch * (p.height + 2 * p.padding[0]) * (p.width + 2 * p.padding[1]) * depth * p.element_size
    still = _gradient_bytes(p, p.learned, sectors=True)
    gathered = _input_bytes(p) + buffer
    return _correlation(p, p.batch * height * width, p.learned, r * s * depth, still, buffer, gathered, normed=False)


def pointwise(p: Problem) -> Cost:
    """The visited pixels of the input read once, and the gradient beside them, a copy unless it can stay in place."""
    height, width = p.output_size
    depth, pixels = tiles.depth(_ceil(p.learned, p.groups)), p.batch * height * width
    in_place = p.channels_last and p.groups == 1 and p.learned % 8 == 0 and p.filters % 8 == 0
    buffer = float(pixels * depth * p.groups * p.element_size)
    gathered = 0.0 if in_place else _gradient_bytes(p, p.learned, sectors=True) + buffer
    return _correlation(p, pixels, p.channels // p.groups, depth, _visited_bytes(p), buffer, gathered, p.normed)


def depthwise(p: Problem) -> Cost:
    """Both operands read once, the input's taps through L1."""
    r, s = p.kernel_size
    traffic = _input_bytes(p) + _gradient_bytes(p, p.learned, sectors=True)
    taps = _ceil(r * s, tiles.TAPS) * tiles.TAPS
    height, width = p.output_size
    flops = 2.0 * p.batch * height * width * p.learned * taps
    # Every multiply-add comes with a load from L1 and its address: an eighth of the plain rate.
    seconds = max(traffic / (TRITON_BANDWIDTH_SHARE * p.chip.bandwidth), 8 * flops / p.chip.float32)
    return _with_launches(p, Cost(seconds, traffic, flops, 2), triton=True)


def compiled(kernel: str, p: Problem) -> Cost:
    """A kernel of csrc/, as its own planner cuts up and prices the problem: one launch, reduction included."""
    plan = cuda.planned(p, kernel)
    seconds = max(1e-6 * plan.microseconds, floor(p).seconds + p.chip.launch)
    return Cost(max(seconds, p.chip.cuda_call), plan.bytes, plan.flops, 1)


Algorithms = dict[str, "Callable[[Problem], Cost]"]
LIBRARIES: Algorithms = {"full": full, "gather": gather}
# Of equals the first is taken: the one that is made for fewer problems.
TRITON: Algorithms = {"depthwise": depthwise, "pointwise": pointwise, "swapped": swapped, "stationary": stationary}
CUDA: Algorithms = {f"cuda_{kernel}": partial(compiled, kernel) for kernel in cuda.KERNELS}
KERNELS = {"triton": TRITON, "cuda": CUDA}
"""The kernels of this package by family, in the order of trust: Triton's were proven further."""
PRICED: Algorithms = LIBRARIES | TRITON | CUDA


def _library(p: Problem, filters: int, extra_bytes: float, launches: int) -> Cost:
    r, s = p.kernel_size
    tiled = _ceil(_ceil(filters, p.groups), LIBRARY.filter_tile) * LIBRARY.filter_tile * p.groups
    seen = p.channels // p.groups
    padded = _ceil(seen, LIBRARY.channel_tile) * LIBRARY.channel_tile / seen
    taps = max(1.0, r * s / (p.stride[0] * p.stride[1]))
    read = _input_bytes(p) * padded * (1 + LIBRARY.rereads * (taps - 1))
    traffic = extra_bytes + read + _gradient_bytes(p, filters) + _result_bytes(p, filters)
    flops = _flops(p, tiled) * padded
    if p.normed:
        # The activation is made before.
        made = 2 * _input_bytes(p)
        extra_bytes, traffic, launches = extra_bytes + made, traffic + made, launches + 1
    work = max((traffic - extra_bytes) / p.chip.bandwidth, flops / (LIBRARY.efficiency * _rate(p)))
    return _with_launches(p, Cost(work + extra_bytes / p.chip.bandwidth, traffic, flops, launches), triton=False)


def _correlation(
    p: Problem, pixels: int, channels: int, columns: int, still: float, moved: float, gathered: float, normed: bool
) -> Cost:
    """The product, behind a launch that gathers what moves, unless it stays in place and these are no bytes.

    `normed`: what keeps still passes through registers.
    """
    operands = tiles.Operands(p.element_size, p.channels_last, normed)
    plan = tiles.cut(
        pixels, channels, columns, p.groups, operands, multiprocessors=p.chip.multiprocessors, arch=p.chip.arch
    )
    column_blocks, channel_blocks, _ = tiles.grid(plan, channels, columns, p.groups)
    tile_columns, tile_channels = plan.shape.block_columns, plan.shape.block_channels
    flops = 2.0 * pixels * p.groups * column_blocks * tile_columns * channel_blocks * tile_channels
    through_l2 = pixels * p.groups * p.element_size * (channel_blocks * columns + column_blocks * channels)
    partials = 8.0 * plan.splits * p.groups * channels * columns
    reach = TRITON_BANDWIDTH_SHARE * p.chip.bandwidth
    product = max((still + moved) / reach, through_l2 / p.chip.l2_bandwidth, flops / (TRITON_FLOPS_SHARE * _rate(p)))
    seconds = gathered / reach + product + partials / p.chip.l2_bandwidth
    traffic = gathered + still + moved + partials + _result_bytes(p, p.learned)
    alone = plan.splits == 1 or tiles.sums_itself(plan, channels, columns, p.groups, zeroed=gathered > 0)
    launches = 1 + (gathered > 0) + (not alone)
    return _with_launches(p, Cost(seconds, traffic, flops, launches), triton=True)


def _with_launches(p: Problem, cost: Cost, *, triton: bool) -> Cost:
    """The device waits between kernels, or for the host if that takes longer."""
    host = cost.launches * (p.chip.triton_call if triton else p.chip.library_call)
    return cost._replace(seconds=max(cost.seconds + cost.launches * p.chip.launch, host))


def _flops(p: Problem, filters: int) -> float:
    (r, s), (height, width) = p.kernel_size, p.output_size
    return 2.0 * p.batch * height * width * filters * (p.channels // p.groups) * r * s


def _input_bytes(p: Problem) -> float:
    return float(p.batch * p.channels * p.height * p.width * p.element_size)


def _visited_bytes(p: Problem) -> float:
    """Of the input, what some filter tap sees; of a row of contiguous pixels, what shares 32 bytes with that, too."""
    rows, columns = (
        len({tap * dilation - pad + stride * i for i in range(outputs) for tap in range(taps)} & {*range(size)})
        for size, outputs, taps, stride, pad, dilation in zip(
            (p.height, p.width), p.output_size, p.kernel_size, p.stride, p.padding, p.dilation, strict=True
        )
    )
    if not p.channels_last:
        columns = min(p.width, columns * min(p.stride[1], 32 // p.element_size))
    return _input_bytes(p) * rows * columns / (p.height * p.width)


def _gradient_bytes(p: Problem, filters: int, *, sectors: bool = False) -> float:
    """Of these filters' grad_output; with `sectors`, as it is read out of the whole, 32 bytes at a time."""
    height, width = p.output_size
    size = filters * p.element_size
    if sectors and p.channels_last:
        size = min(_ceil(size, 32) * 32, p.filters * p.element_size)
    return float(p.batch * height * width * size)


def _result_bytes(p: Problem, filters: int) -> float:
    r, s = p.kernel_size
    return float(filters * (p.channels // p.groups) * r * s * p.element_size)


def _rate(p: Problem) -> float:
    if p.element_size == 2:
        return p.chip.half
    return {"tf32": p.chip.tf32, "tf32x3": p.chip.tf32 / 3}.get(p.precision, p.chip.float32)


def _ceil(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
