"""Which algorithm computes the weight gradient of which problem, and why. No device needed.

On a CPU the choice follows measured limits, on a GPU predicted times (rwn_ext.costs). RWN_EXT_TUNE=1, or `tune`,
measures instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rwn_ext import costs, cpu, cuda, tuning
from rwn_ext.costs import Chip

ALGORITHMS = {
    "none": "nothing is learned: no weight gradient, no saved input",
    "full": "the library's whole weight gradient, then the learned filters are selected",
    "gather": "the learned filters' grad_output is gathered and the library computes their weight gradient alone",
    "matmul": "1x1 filters: one skinny matrix product of grad_output and input",
    "unfold": "few filters: grad_output is unfolded, the input stays where it is, one matrix product",
    "direct": "CPU: blocks of the input stay in the cache, the learned filters' grad_output is moved over them",
    "stationary": "Triton: the input is read once where it is, the gathered grad_output is moved over it",
    "swapped": "Triton, more filters than input channels: grad_output is read once, the padded input is moved over it",
    "pointwise": "Triton, 1x1 filters: the visited pixels of the input are read once where they are",
    "depthwise": "Triton, one input channel a group: a sum over pixels of the learned filters' channels alone",
    "cuda_wgmma": "CUDA, Hopper: as stationary, in one launch, by TMA and wgmma",
    "cuda_mma": "CUDA, 16-bit types: as stationary, in one launch, by mma.sync",
    "cuda_ffma": "CUDA, any type: as stationary, in one launch, in float32 arithmetic",
    "cuda_depthwise": "CUDA, one input channel a group: a sum over pixels in one launch",
}
TRITON_IS_INSTALLED = find_spec("triton") is not None
READERS = frozenset({*costs.TRITON, *costs.CUDA})
"""Those that compute relu(input * scale + shift) while they read it; for the others it is made first."""
FAMILIES = {family: tuple(kernels) for family, kernels in costs.KERNELS.items()}
"""Names that stand for the best of several algorithms that share a way to compute."""


@dataclass(frozen=True)
class Problem:
    """One weight gradient. Channels and groups are those of the part of the input that the learned weights see."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    learned: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    device: str = "cpu"
    channels_last: bool = False
    dtype: str = "float32"
    precision: str = "ieee"
    """Of float32 on a GPU: "tf32", "tf32x3" or "ieee"."""
    normed: bool = False
    """The input is given as what a normalisation with a ReLU made it of."""
    chip: Chip = costs.H200
    """The GPU; a nominal one where there is none."""

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q), by the formula in torch.nn.Conv2d's documentation."""
        sizes = zip((self.height, self.width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        p, q = ((size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in sizes)
        return p, q

    @property
    def element_size(self) -> int:
        """Bytes."""
        return {"bfloat16": 2, "float16": 2, "float64": 8}.get(self.dtype, 4)

    def __str__(self) -> str:
        r, s = self.kernel_size
        precision = f" as {self.precision}" if self.device == "cuda" and self.dtype == "float32" else ""
        return (
            f"{self.learned} of {self.filters} filters {r}x{s}, stride {self.stride}, padding {self.padding}, "
            f"dilation {self.dilation}, {self.groups} group(s), "
            f"input ({self.batch}, {self.channels}, {self.height}, {self.width}) {self.dtype}{precision} "
            f"{'channels_last' if self.channels_last else 'contiguous'}{', before norm and ReLU,' * self.normed} "
            f"on {self.place}"
        )

    @property
    def place(self) -> str:
        """What computes it."""
        return self.chip.name if self.device == "cuda" else self.device


@dataclass(frozen=True)
class Plan:
    """The algorithm chosen and the reason in words."""

    algorithm: str
    reason: str

    def __str__(self) -> str:
        return f"{self.algorithm} ({ALGORITHMS[self.algorithm]}): {self.reason}"


def requested(algorithm: str | None) -> str:
    """What the call asks for, else what RWN_EXT_ALGORITHM asks for, else "auto"; ValueError for an unknown name."""
    source = "algorithm"
    if algorithm is None:
        algorithm, source = os.environ.get("RWN_EXT_ALGORITHM", "auto"), "RWN_EXT_ALGORITHM"
    if algorithm != "auto" and algorithm not in ALGORITHMS and algorithm not in FAMILIES:
        raise ValueError(f"{source}={algorithm!r} is unknown; choose auto, {', '.join([*ALGORITHMS, *FAMILIES])}")
    return algorithm


@lru_cache(maxsize=4096)
def plan(problem: Problem, algorithm: str = "auto") -> Plan:
    """The algorithm for this problem: the forced one where it can run (ValueError where not), else the fastest known.

    A layer that learns nothing needs no algorithm, whatever is asked for.
    """
    if problem.learned == 0:
        return Plan("none", "no filter is learned")
    if algorithm == "auto":
        times = _measured(problem)
        return _fastest(times) if times else _predicted(problem)
    check(problem, algorithm)
    if algorithm not in FAMILIES:
        return Plan(algorithm, "asked for")
    possible = [name for name in FAMILIES[algorithm] if not _obstacle(problem, name)]
    best = min(possible, key=lambda name: costs.PRICED[name](problem)[:2])
    return Plan(best, f"{algorithm} was asked for, of its kernels this is predicted to be the fastest")


def check(problem: Problem, algorithm: str) -> None:
    """ValueError, saying why, where this algorithm cannot compute this problem. Compilers trace it."""
    if algorithm == "auto" or problem.learned == 0:
        return
    obstacles: list[str] = []
    for name in FAMILIES.get(algorithm, (algorithm,)):
        obstacle = _obstacle(problem, name)
        if obstacle is None:
            return
        if obstacle not in obstacles:
            obstacles.append(obstacle)
    raise ValueError(
        f"algorithm={algorithm!r} cannot compute {problem}: {', '.join(obstacles)}; algorithm='auto' chooses one"
    )


def explain(problem: Problem, algorithm: str | None = None) -> str:
    """In words: what was picked for this problem and why, what each algorithm is predicted to take, what cannot be.

    On a GPU, times are predicted from a chip's rates (rwn_ext.costs), and "measured" is said where they were measured.
    The floor is what reading once what the filters see takes, or computing at the chip's rate, whichever is longer.
    """
    lines = [str(problem), f"  picked {plan(problem, requested(algorithm))}"]
    if problem.learned:
        lines += _priced(problem)
    for name in ALGORITHMS:
        obstacle = _obstacle(problem, name)
        if obstacle:
            lines.append(f"  cannot be {name}: {obstacle}")
    return "\n".join(lines)


def tune(model: nn.Module, example: Tensor) -> dict[Problem, tuning.Times]:
    """Measures every algorithm for the weight gradients of `model` at inputs like `example`, and plans by it from then.

    The model runs once, in evaluation mode and without gradients, to see its layers' inputs. Returns seconds by problem
    and algorithm; they are also kept in a file (`rwn_ext.tuning.cache_file`), which processes with RWN_EXT_TUNE=1 use.
    """
    found = {problem: None for problem in problems(model, example).values() if problem.learned}
    times = {problem: _measure(problem) for problem in found}
    _tuning.measurements.save()
    _forget()
    return times


def problems(model: nn.Module, example: Tensor) -> dict[Any, Problem]:
    """The weight gradient of each partly learned convolution of `model` at an input like `example`."""
    found: dict[Any, Problem] = {}

    def look(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found[module] = module.problem(args[0] if args else kwargs["input"])

    layers = [module for module in model.modules() if callable(getattr(module, "problem", None))]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return found


@dataclass
class _Tuning:
    """How problems are measured, and what was."""

    measurements: tuning.Measurements = field(default_factory=tuning.Measurements)
    loaded: bool = False
    rehearse: Callable[[Problem, list[str]], Mapping[str, Callable[[], Any]]] | None = None
    forget: Callable[[], None] = lambda: None


_tuning = _Tuning()


def connect(
    rehearse: Callable[[Problem, list[str]], Mapping[str, Callable[[], Any]]], forget: Callable[[], None]
) -> None:
    """Told by what computes: how to run algorithms on operands of a problem's shape, and how to drop plans it keeps."""
    _tuning.rehearse, _tuning.forget = rehearse, forget


def _measured(p: Problem) -> tuning.Times | None:
    """Times of this problem: known ones, or measured now if RWN_EXT_TUNE=1."""
    if os.environ.get("RWN_EXT_TUNE") == "1" and not _tuning.loaded:
        _tuning.measurements.load()
        _tuning.loaded = True
    times = _tuning.measurements.get(p.place, str(p))
    if times or os.environ.get("RWN_EXT_TUNE") != "1" or not _can_measure(p):
        return times
    times = _measure(p)
    _tuning.measurements.save()
    return times


def _measure(p: Problem) -> tuning.Times:
    assert _tuning.rehearse is not None
    contenders = _tuning.rehearse(p, candidates(p))
    times = tuning.timed(contenders, tuning.device_clock(p.device))
    _tuning.measurements.add(p.place, str(p), times)
    return times


def _can_measure(p: Problem) -> bool:
    """Not while a CUDA graph is captured: measuring waits for the device."""
    return p.device != "cuda" or (torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing())


def _forget() -> None:
    plan.cache_clear()
    _tuning.forget()


def candidates(p: Problem) -> list[str]:
    """The algorithms that can compute this problem at a speed worth measuring: Triton's interpreter has none."""
    names = [name for name in ALGORITHMS if not _obstacle(p, name)]
    return [name for name in names if p.device == "cuda" or name not in costs.TRITON]


def _fastest(times: tuning.Times) -> Plan:
    best = min(times, key=lambda name: times[name])
    return Plan(best, f"measured, {_microseconds(times[best])}")


def _obstacle(p: Problem, algorithm: str) -> str | None:
    """Why this algorithm cannot compute this problem; None if it can."""
    if algorithm == "none":
        return "something is learned" if p.learned else None
    if algorithm in costs.TRITON and _triton_obstacle(p):
        return _triton_obstacle(p)
    if algorithm in costs.CUDA:
        return cuda.obstacle(p, algorithm.removeprefix("cuda_"))
    if algorithm == "direct":
        return cpu.obstacle(p)
    if algorithm in ("matmul", "unfold", "swapped") and p.groups > 1:
        return f"it needs one group, the learned filters lie in {p.groups}"
    if algorithm in ("matmul", "pointwise") and (p.kernel_size != (1, 1) or p.padding != (0, 0)):
        return "it needs 1x1 filters without padding"
    if algorithm == "depthwise" and p.channels != p.groups:
        return f"it needs one input channel a group, there are {p.channels // p.groups}"
    return None


def can_run_triton(device: str, arch: int, dtype: str) -> bool:
    """Whether the Triton kernels can compute on this kind of device, a GPU of sm_`arch`, in this type."""
    return _machine_obstacle(device, arch, dtype) is None


def _machine_obstacle(device: str, arch: int, dtype: str) -> str | None:
    if not TRITON_IS_INSTALLED:
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return "Triton kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts"
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"Triton kernels compute in float32 and shorter, not in {dtype}"
    if device == "cuda" and arch < 80:
        return f"Triton kernels need sm_80 or newer, this is sm_{arch}"
    return None


def _triton_obstacle(p: Problem) -> str | None:
    """Why no Triton kernel can compute this problem."""
    obstacle = _machine_obstacle(p.device, p.chip.arch, p.dtype)
    if obstacle:
        return obstacle
    r, s = p.kernel_size
    positions = p.batch * (p.height + r * p.dilation[0]) * (p.width + s * p.dilation[1])
    if max(positions, p.channels * r * s * (p.learned + 8 * p.groups)) >= 2**31:
        return "it counts pixels and weights in 32 bits"
    return None


# The CPU's limits were measured (bench/bench_kernels.py, bench/bench_layers.py; float32). The compiled kernel wins
# wherever it can be used and has more than one tap: it computes channels 16 or 32 at a time, and of fewer than 8 its
# sums are of nothing but for a part, which few filters of 3x3 can bear. With one tap it wins while it waits for
# memory, as a matrix product so narrow is not shared among threads, and where there are so few pixels that the
# preparations of a product are felt; with AVX-512 up to as many filters as were measured, and oneDNN is faster than the
# product, too (on AMD's Zen 5, where MKL uses AVX2). Of depthwise filters it wins unless it must copy many channels of
# contiguous pixels; with large kernels even then. Without it, unfolding wins for few filters on deep channels_last
# inputs; oneDNN computes filters in blocks of a vector register, so a block saved is a gain and less is none; and a few
# million multiply-adds take less time than a call of the library, of which "full" needs one less.
CPU_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"
CPU_DIRECT_CHANNELS = 8
CPU_DIRECT_SHALLOW_TAPS, CPU_DIRECT_SHALLOW_FILTERS = 9, 6 if CPU_WIDE else 3
CPU_DIRECT_POINTWISE_FILTERS = 192 if CPU_WIDE else 24
CPU_DIRECT_POINTWISE_PIXELS = 1024
CPU_DIRECT_DEPTHWISE_CHANNELS, CPU_DIRECT_DEPTHWISE_INPUTS, CPU_DIRECT_DEPTHWISE_TAPS = 16, 128 * 1024, 9
# Unfolded columns: while they are no more than this many for each input channel, the copy costs less than it spares.
CPU_UNFOLD_COLUMNS_PER_CHANNEL = 2
CPU_UNFOLD_CHANNELS = 64
CPU_FILTER_BLOCK = 16 if CPU_WIDE else 8
CPU_CALL_MULTIPLY_ADDS = 4_000_000
# A prediction is not exact: a kernel of this package is taken where it is predicted to need this share of the library's
# time; a CUDA kernel, where it needs this share of a Triton kernel's too. No prediction was compared with a device yet.
KERNEL_MARGIN = 0.9
# The families that are taken without being asked for, in this order. CUDA kernels have not run on a device yet: they
# wait until someone asks for them, or measures.
UNASKED = ("triton",)


def _predicted(p: Problem) -> Plan:
    return _by_cost(p) if p.device != "cpu" else _by_measured_limits(p)


def _by_cost(p: Problem) -> Plan:
    best, least = _cheapest(p, costs.LIBRARIES)
    for family in UNASKED:
        possible = {name: cost for name, cost in costs.KERNELS[family].items() if not _obstacle(p, name)}
        if possible:
            name, seconds = _cheapest(p, possible)
            if seconds <= KERNEL_MARGIN * least:
                best, least = name, seconds
    return Plan(best, f"predicted to be the fastest, {_microseconds(least)}")


def _cheapest(p: Problem, algorithms: costs.Algorithms) -> tuple[str, float]:
    """The name and the predicted seconds of the fastest."""
    seconds = {name: cost(p).seconds for name, cost in algorithms.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return best, seconds[best]


def _by_measured_limits(p: Problem) -> Plan:
    r, s = p.kernel_size
    pixels = p.batch * p.output_size[0] * p.output_size[1]
    if p.channels == p.groups > 1 and not _obstacle(p, "direct"):
        if p.channels_last or r * s > CPU_DIRECT_DEPTHWISE_TAPS:
            return Plan("direct", f"{r * s} taps of one channel each are little work for a call of the library")
        inputs = p.batch * p.channels * p.height * p.width
        if p.channels <= CPU_DIRECT_DEPTHWISE_CHANNELS or inputs <= CPU_DIRECT_DEPTHWISE_INPUTS:
            return Plan(
                "direct", f"{inputs:,} inputs are copied pixel by pixel in less than a call of the library takes"
            )
    if p.learned < p.filters and not _obstacle(p, "direct"):
        if r * s == 1 and p.channels_last and p.learned <= CPU_DIRECT_POINTWISE_FILTERS:
            return Plan("direct", f"no more than {CPU_DIRECT_POINTWISE_FILTERS} filters of 1x1, each pixel read once")
        if r * s == 1 and p.channels_last and pixels <= CPU_DIRECT_POINTWISE_PIXELS:
            return Plan("direct", f"{pixels:,} pixels do not repay the preparations of a matrix product")
        if r * s > 1 and p.channels >= CPU_DIRECT_CHANNELS:
            return Plan("direct", f"{r * s} taps of {p.channels} channels repay the copy of a block")
        if 1 < r * s <= CPU_DIRECT_SHALLOW_TAPS and p.learned <= CPU_DIRECT_SHALLOW_FILTERS:
            return Plan("direct", f"{p.learned} filters of {p.channels} channels take less than the library's block")
    blocks, all_blocks = (-(-count // p.groups // CPU_FILTER_BLOCK) for count in (p.learned, p.filters))
    if blocks == all_blocks:
        return Plan("full", f"the learned filters fill as many blocks of {CPU_FILTER_BLOCK} as all do, {blocks}")
    saved = (all_blocks - blocks) * CPU_FILTER_BLOCK * p.channels * r * s * pixels
    if saved < CPU_CALL_MULTIPLY_ADDS:
        return Plan("full", f"the {saved:,} multiply-adds of the fixed filters cost less than another call")
    if p.channels_last and not (CPU_WIDE and p.dtype == "float32") and not _obstacle(p, "matmul"):
        return Plan("matmul", "1x1 filters of channels_last tensors are a matrix product of what is there")
    if (
        p.channels_last
        and p.groups == 1
        and p.stride == (1, 1)
        and r * s > 1
        and r * s * p.learned <= CPU_UNFOLD_COLUMNS_PER_CHANNEL * p.channels
        and p.channels >= CPU_UNFOLD_CHANNELS
    ):
        return Plan("unfold", f"R*S*Kt = {r * s * p.learned} columns against {p.channels} input channels")
    share = p.learned / p.filters
    return Plan("gather", f"{share:.0%} of the filters are learned, too many to unfold or a shape that gains nothing")


def _priced(p: Problem) -> list[str]:
    """Floor, predictions and measurements of explain."""
    times = _measured(p) or {}
    measured = [f"  {name} measured: {_microseconds(seconds)}" for name, seconds in times.items()]
    floor = costs.floor(p)
    if p.device != "cuda":
        return [f"  at least {_megabytes(floor.bytes)} are read and written; no times are predicted here", *measured]
    lines = [f"  floor {_microseconds(floor.seconds)}, {_megabytes(floor.bytes)} at the rates of {p.chip.name}"]
    for name, cost in costs.PRICED.items():
        if not _obstacle(p, name):
            priced = cost(p)
            lines.append(
                f"  {name} predicted: {_microseconds(priced.seconds)}, {_megabytes(priced.bytes)}, "
                f"{priced.launches} launches"
            )
    return lines + measured


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
