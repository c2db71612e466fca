"""Which algorithm computes the weight gradient of which problem, and why. Pure Python, no device needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

ALGORITHMS = {
    "none": "nothing is learned: no weight gradient, no saved input",
    "full": "the library's whole weight gradient, then the learned filters are selected",
    "gather": "the learned filters' grad_output is gathered and the library computes their weight gradient alone",
    "matmul": "1x1 filters: one skinny matrix product of grad_output and input",
    "unfold": "few filters: grad_output is unfolded, the input stays where it is, one matrix product",
}


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

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q), by the formula in torch.nn.Conv2d's documentation."""
        sizes = zip((self.height, self.width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        p, q = ((size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in sizes)
        return p, q

    def __str__(self) -> str:
        r, s = self.kernel_size
        return (
            f"{self.learned} of {self.filters} filters {r}x{s}, stride {self.stride}, padding {self.padding}, "
            f"dilation {self.dilation}, {self.groups} group(s), "
            f"input ({self.batch}, {self.channels}, {self.height}, {self.width}) "
            f"{'channels_last' if self.channels_last else 'contiguous'} on {self.device}"
        )


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
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise ValueError(f"{source}={algorithm!r} is unknown; choose auto, {', '.join(ALGORITHMS)}")
    return algorithm


@lru_cache(maxsize=4096)
def plan(problem: Problem, algorithm: str = "auto") -> Plan:
    """The algorithm for this problem: the forced one where it can run (ValueError where not), else the fastest known.

    A layer that learns nothing needs no algorithm, whatever is asked for.
    """
    if algorithm == "auto" or problem.learned == 0:
        return _heuristic(problem)
    obstacle = _obstacle(problem, algorithm)
    if obstacle:
        raise ValueError(f"algorithm={algorithm!r} cannot compute {problem}: {obstacle}; algorithm='auto' chooses one")
    return Plan(algorithm, "asked for")


def explain(problem: Problem, algorithm: str | None = None) -> str:
    """In words: what was picked for this problem and why, and what could not have been."""
    lines = [str(problem), f"  picked {plan(problem, requested(algorithm))}"]
    for name in ALGORITHMS:
        obstacle = _obstacle(problem, name)
        if obstacle:
            lines.append(f"  cannot be {name}: {obstacle}")
    return "\n".join(lines)


def _obstacle(p: Problem, algorithm: str) -> str | None:
    """Why this algorithm cannot compute this problem; None if it can."""
    if algorithm == "none":
        return "something is learned" if p.learned else None
    if algorithm in ("matmul", "unfold") and p.groups > 1:
        return f"it needs one group, the learned filters lie in {p.groups}"
    if algorithm == "matmul" and (p.kernel_size != (1, 1) or p.padding != (0, 0)):
        return "it needs 1x1 filters without padding"
    return None


# The CPU's limits were measured (bench/bench_layers.py; float32): unfolding wins for few filters on deep channels_last
# inputs; oneDNN computes filters in blocks of a vector register, so a block saved is a gain and less is none; and a few
# million multiply-adds take less time than a call of the library, of which "full" needs one less.
CPU_UNFOLD_COLUMNS = 60
CPU_UNFOLD_CHANNELS = 64
CPU_FILTER_BLOCK = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
CPU_CALL_MULTIPLY_ADDS = 4_000_000
# Not measured on a GPU: the share from which cuDNN's whole gradient is expected to win.
GPU_FULL_SHARE = 0.45


def _heuristic(p: Problem) -> Plan:
    r, s = p.kernel_size
    if p.learned == 0:
        return Plan("none", "no filter is learned")
    share = p.learned / p.filters
    if p.device != "cpu":
        if share >= GPU_FULL_SHARE:
            return Plan("full", f"{share:.0%} of the filters are learned")
        return Plan("gather", f"{share:.0%} of the filters are learned")
    blocks, all_blocks = (-(-count // p.groups // CPU_FILTER_BLOCK) for count in (p.learned, p.filters))
    if blocks == all_blocks:
        return Plan("full", f"the learned filters fill as many blocks of {CPU_FILTER_BLOCK} as all do, {blocks}")
    pixels = p.batch * p.output_size[0] * p.output_size[1]
    saved = (all_blocks - blocks) * CPU_FILTER_BLOCK * p.channels * r * s * pixels
    if saved < CPU_CALL_MULTIPLY_ADDS:
        return Plan("full", f"the {saved:,} multiply-adds of the fixed filters cost less than another call")
    if p.channels_last and not _obstacle(p, "matmul"):
        return Plan("matmul", "1x1 filters of channels_last tensors are a matrix product of what is there")
    if (
        p.channels_last
        and p.groups == 1
        and p.stride == (1, 1)
        and r * s > 1
        and r * s * p.learned <= CPU_UNFOLD_COLUMNS
        and p.channels >= CPU_UNFOLD_CHANNELS
    ):
        return Plan("unfold", f"R*S*Kt = {r * s * p.learned} columns against {p.channels} input channels")
    return Plan("gather", f"{share:.0%} of the filters are learned, too many to unfold or a shape that gains nothing")
