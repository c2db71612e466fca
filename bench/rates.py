"""What this very device can do: copy bandwidth and matrix-product rate, measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import lru_cache

import torch

from rwn_ext.paper.timing import synchronized_clock


@dataclass(frozen=True)
class Rates:
    """Bytes read and written a second by a large copy; multiply-adds, times two, a second of a large product."""

    bytes_per_second: float
    flops_per_second: float


@lru_cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """Medians of several runs, on a copy much larger than the caches and a product bound by its arithmetic."""
    megabytes, size = (512, 8192) if device == "cuda" else (128, 1024)
    source = torch.randn(megabytes * 2**20 // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return Rates(
        2 * source.nbytes / _median_seconds(lambda: target.copy_(source)),
        2 * size**3 / _median_seconds(lambda: a @ b),
    )


def _median_seconds(work) -> float:
    times = []
    for _ in range(12):
        started = synchronized_clock()
        work()
        times.append(synchronized_clock() - started)
    return statistics.median(times[2:])
