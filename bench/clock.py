"""The benchmarks' clock, and how interleaved measurements get into pytest-benchmark's tables and files.

Contenders of a group must take turns, or drift of the machine decides who wins; pytest-benchmark finishes one before it
starts the next. So a group is measured first, in turns, and each contender's rounds are replayed to pytest-benchmark:
its "work" sets this clock forward by what was measured.
"""

from __future__ import annotations

from rwn_ext.paper.timing import synchronized_clock

_advanced = 0.0


def clock() -> float:
    """Seconds; on a GPU, after everything asked of it is done."""
    return synchronized_clock() + _advanced


def replay(benchmark, seconds: list[float]) -> None:
    """Gives a contender's rounds, measured before, to pytest-benchmark."""
    rounds = iter(seconds)

    def advance() -> None:
        global _advanced
        _advanced += next(rounds)

    benchmark.pedantic(advance, rounds=len(seconds))
