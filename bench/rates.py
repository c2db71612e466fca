"""What this very device can do: how fast it copies and multiplies, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from rwn_ext.paper.timing import synchronized_clock


@dataclass(frozen=True)
class Rates:
    """Bytes read and written a second by a large copy; multiply-adds, times two, a second by product or convolution."""

    bytes_per_second: float
    flops_per_second: float


@lru_cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """The best of several runs, of a copy much larger than the caches and of what is bound by its arithmetic.

    A matrix product and a convolution are computed by different libraries, of which either may be the faster.
    """
    megabytes, size, batch = (512, 8192, 128) if device == "cuda" else (128, 1024, 4)
    source = torch.randn(megabytes * 2**20 // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    images = torch.randn(batch, 256, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    filters = torch.randn(256, 256, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        product = 2 * size**3 / _least_seconds(lambda: a @ b)
        convolution = (
            2 * images.numel() * filters[0].numel() / _least_seconds(lambda: F.conv2d(images, filters, padding=1))
        )
    return Rates(2 * source.nbytes / _least_seconds(lambda: target.copy_(source)), max(product, convolution))


def _least_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        started = synchronized_clock()
        work()
        times.append(synchronized_clock() - started)
    return min(times)
