"""What a benchmark measures: a group of contenders that took turns, and how they compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PLAIN = "nn.Conv2d"
WHOLE, GATHERED, SLICED_GRADIENT = "full wgrad", "gather + wgrad", "sliced wgrad"
COMPILED_SLICE = "compiled sliced wgrad"
PLAIN_GRADIENTS = (WHOLE, GATHERED, SLICED_GRADIENT, COMPILED_SLICE)
"""PyTorch's own ways to a weight gradient of some filters."""
Rounds = Mapping[str, list[float]]  # seconds by contender, round by round


@dataclass(frozen=True)
class Group:
    """One measured problem. Contenders are rows of one table; all ratios are within rounds."""

    level: str
    subject: str
    case: dict[str, Any]
    seconds: Rounds
    against: tuple[str, ...] = (PLAIN,)
    """The contenders that the others are compared with."""
    phases: Mapping[str, Rounds] = field(default_factory=dict)
    """Parts of `seconds` by name, such as "forward"."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Bytes kept for backward."""
    peak: Mapping[str, int] = field(default_factory=dict)
    """Bytes of GPU memory at the highest."""
    floor: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the device's measured rates allow at best."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Seconds by the cost model."""
    rivals: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By one of our contenders, who does the same in another way."""
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further facts by contender."""

    @property
    def title(self) -> str:
        return f"{self.subject}, {', '.join(f'{key} {value}' for key, value in self.case.items())}"

    def facts(self, name: str) -> dict[str, Any]:
        """All that a results file says of one contender, beside its times."""
        facts: dict[str, Any] = {"level": self.level, "subject": self.subject, "case": self.case, "contender": name}
        facts["ratios"] = {other: list(ratio(self.seconds, name, other)) for other in self.against}
        if self.phases:
            facts["phases"] = {phase: list(ratio(rounds, name, PLAIN)) for phase, rounds in self.phases.items()}
        if name in self.kept:
            facts["kept_bytes"] = self.kept[name]
        if name in self.peak:
            facts["peak_bytes"] = self.peak[name]
        if name in self.floor:
            facts["floor_share"] = self.floor[name] / statistics.median(self.seconds[name])
        if name in self.predicted:
            facts["predicted_seconds"] = self.predicted[name]
        if name in self.rivals:
            facts["rivals"] = {other: list(ratio(self.seconds, name, other)) for other in self.rivals[name]}
        return facts | dict(self.more.get(name, {}))


class Ratio(NamedTuple):
    """The median over rounds of one contender's time relative to another's, and its 95 % confidence interval."""

    median: float
    low: float
    high: float


def ratio(seconds: Rounds, name: str, reference: str) -> Ratio:
    """Distribution-free: the interval's ends are order statistics, found from the binomial distribution."""
    quotients = sorted(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))
    n, below, rank = len(quotients), 0, 0
    # As many are left out at either end as are the wrong side of the median with at most 2.5 % probability.
    while (below := below + math.comb(n, rank)) < 0.025 * 2**n:
        rank += 1
    rank = max(rank, 1) - 1
    return Ratio(statistics.median(quotients), quotients[rank], quotients[-1 - rank])
