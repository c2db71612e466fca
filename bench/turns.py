"""Contenders take turns for as long as their group may take, and often enough for an honest interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rwn_ext.paper.timing import interleaved, synchronized_clock

FEWEST = 6
"""Of fewer rounds no two order statistics bound the median with 95 % confidence."""


class Effort(NamedTuple):
    """How long a group may be measured: rounds that fit into `seconds`, but at least and at most so many."""

    seconds: float
    least: int = 9
    most: int = 41

    def rounds(self, seconds_of_one: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / seconds_of_one)))


def in_turns(contenders: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Seconds of each contender, round by round. One round before tells how long one takes."""
    started = synchronized_clock()
    for run in contenders.values():
        run()
    return interleaved(contenders, effort.rounds(synchronized_clock() - started), warmup=0)
