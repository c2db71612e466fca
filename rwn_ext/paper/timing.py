"""Fair timing on a noisy machine: contenders take turns, round by round, in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronized_clock() -> float:
    """Seconds, after everything asked of the GPU so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Runs every contender once a round, each time in another order; the seconds that each took, round by round.

    Drift of the machine then hits all alike, and so does what a contender leaves in the caches for the next one. A
    ratio of two contenders is best taken within rounds (`ratio`).
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(warmup):
            run()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            started = synchronized_clock()
            contenders[name]()
            seconds[name].append(synchronized_clock() - started)
        after_round()
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> float:
    """The median over the rounds of `name`'s time relative to `reference`'s."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))
