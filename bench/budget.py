"""What is measured where time is short: the most important groups first, and none is begun when the time is up."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import pytest

# Every file has its turn; among groups of the same turn these come first, in this order.
FIRST = ("bench_steps.py", "bench_layers.py", "bench_runs.py", "bench_calls.py", "bench_scaling.py")
CONTENDER = ("row", "way")
"""The parameters of a case that name a contender of its group, not the group."""
LEFT_OUT = 6
"""Exit code: nothing failed, but there was no time for some cases. pytest's own end at 5."""
Group = tuple[Any, ...]


def group_of(item: pytest.Item) -> Group:
    """The group that a case is a contender of: all of it is measured when its first case runs."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    case = [(name, value) for name, value in values.items() if name not in CONTENDER]
    return item.path.name, item.name.partition("[")[0], *case


def by_importance(items: list[pytest.Item]) -> list[pytest.Item]:
    """Group by group, each file's in turn; within a file as they stand there, but p = 0.1 before other parts."""
    groups: dict[Group, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(group_of(item), []).append(item)
    ranks, turns = {name: rank for rank, name in enumerate(FIRST)}, Counter[str]()
    order = []
    for group in sorted(groups, key=lambda group: dict(group[2:]).get("part", 0.1) != 0.1):
        file = group[0]
        order.append((turns[file], ranks.get(file, len(FIRST)), group))
        turns[file] += 1
    return [item for *_, group in sorted(order, key=lambda place: place[:2]) for item in groups[group]]


class Budget:
    """A pytest plugin that begins no group after so many seconds of measuring; the first one it always begins."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends = math.inf
        self.begun: set[Group] = set()
        self.late: set[str] = set()
        self.unfinished: set[str] = set()

    @property
    def left_out(self) -> int:
        """How many cases there was no time for, until now: also where the session is interrupted."""
        return len(self.unfinished)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.seconds < math.inf:
            items[:] = by_importance(items)
        if not config.option.collectonly:
            self.unfinished = {item.nodeid for item in items if item.get_closest_marker("skip") is None}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        group = group_of(item)
        if not self.begun:
            self.ends = time.monotonic() + self.seconds
        elif group not in self.begun and time.monotonic() > self.ends:
            self.late.add(item.nodeid)
            pytest.skip("the time is up")
        self.begun.add(group)

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if item.nodeid not in self.late and (call.when == "call" or call.excinfo is not None):
            self.unfinished.discard(item.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and self.left_out:
            session.exitstatus = LEFT_OUT

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.left_out:
            terminalreporter.write_line(f"{self.left_out} cases are left out, the time is up")
