"""How near a step comes to the one with nothing but the rest learned, on a CPU: few contenders, many rounds.

The shares are of a few percent, which the rounds that bench_steps has time for do not tell from noise. Where in memory
a network happens to lie is worth a percent or two to it, so all are built anew several times. `make ceiling`.
"""

from __future__ import annotations

import statistics
from functools import lru_cache

import pytest
import torch

from bench.competitors import FROZEN, FROZEN_PLAIN, OURS, PLAIN
from bench.conftest import DEVICE
from bench.group import Group
from bench.networks import Step, model_of
from bench.oracle import NetworkOracle
from bench.turns import Effort, in_turns

BATCHES = {"wrn-16-4": 32, "densenet-bc-40-12": 32, "vgg19-bn": 16}
ROWS = (FROZEN, FROZEN_PLAIN, *(f"{OURS} p = {part}" for part in (0.05, 0.1)))
BUILDS = 2 * len(ROWS)
"""Each row is built at each place in the order twice."""
EFFORT = Effort(0, least=9, most=9)
"""Of each build; their median counts as one round, as turns of one build share what its place is worth."""


@pytest.mark.ceiling
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU, bench_steps has the rounds and captures the steps")
@pytest.mark.parametrize(("name", "row"), [(name, row) for name in BATCHES for row in ROWS])
def test_ceiling(record, effort, name, row):
    record(measured(name, effort(EFFORT)), row)


@lru_cache(maxsize=1)
def measured(name: str, effort: Effort) -> Group:
    batch = BATCHES[name]
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))
    oracle = NetworkOracle.of(model_of(name, PLAIN), images, labels)
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    steps: dict[str, Step] = {}
    for build in range(BUILDS):
        first = build % len(ROWS)
        steps.clear()
        steps |= {row: Step(name, row, images, labels) for row in ROWS[first:] + ROWS[:first]}
        for row, step in steps.items():
            oracle.check(row, step.model, step.learner, images, labels)
        for row, times in in_turns(steps, effort).items():
            seconds[row].append(statistics.median(times))
    case = {"batch": batch, "image": 32, "layout": "channels_last", "numbers": "float32"}
    return Group("ceiling", name, case, seconds, against=(FROZEN,))
