"""Training steps that are timed: who takes part on a GPU, and what is compared before."""

from __future__ import annotations

import re

import pytest
import torch

from bench import bench_steps, networks
from bench.bench_steps import AGAIN, GPU_NETS, KNOWN, LEANS, Net, check_replay, measured, rows
from bench.competitors import CHECKPOINTED, FROZEN, FROZEN_PLAIN, OTHERS, OURS, PLAIN
from bench.networks import CAPTURED_AS, Step
from bench.oracle import WrongResultError
from bench.rates import Rates
from bench.turns import FEWEST, Effort
from rwn_ext.paper.networks import build

SMALL = Net("wrn-10-1", 2, Effort(0, FEWEST, FEWEST), 8, (0.1,))
SMALL_ROWS = {PLAIN, FROZEN, FROZEN_PLAIN, f"{OURS} p = 0.1", *LEANS, *KNOWN}


def test_a_gpu_meets_everybody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_steps, "DEVICE", "cuda")
    for net in GPU_NETS:
        found = rows(net)
        assert len(set(found)) == len(found) and {PLAIN, AGAIN, FROZEN, CAPTURED_AS + PLAIN} < set(found)
        assert {f"{way} p = 0.1" for way in OTHERS} < set(found)
        assert (CHECKPOINTED in found) == (net.name != "alexnet")


class Replay:
    """As a captured step that computes `factor` of the gradients."""

    def __init__(self, step: Step, factor: float) -> None:
        self.step, self.factor = step, factor

    def __call__(self) -> None:
        self.step()
        for parameter in self.step.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factor


@pytest.mark.parametrize("row", [PLAIN, FROZEN, f"{OURS} p = 0.1"])
def test_a_replay_has_the_gradients_of_the_eager_step(row: str, monkeypatch: pytest.MonkeyPatch):
    part = {PLAIN: None, FROZEN: 0.0}.get(row, 0.1)
    monkeypatch.setattr(networks, "model_of", lambda net, row: build(net, 10, part, seed=0, dropout=0.3))
    step = Step("wrn-10-1", row, torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    # Large steps, whose gradients differ from each other.
    step.optimizer.param_groups[0]["lr"] = 1.0
    check_replay(row, Replay(step, 1.0))
    for factor in (1.2, float("nan")):
        with pytest.raises(WrongResultError, match=f"gradient of .* of {re.escape(row)}"):
            check_replay(row, Replay(step, factor))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The rows that are to fail, of a device of known rates."""
    found: set[str] = set()
    right = bench_steps.checked

    def checked(net, row, *rest):
        if row in found:
            raise RuntimeError(f"no {row}")
        return right(net, row, *rest)

    monkeypatch.setattr(bench_steps, "checked", checked)
    monkeypatch.setattr(bench_steps, "rates", lambda device, dtype: Rates(1e10, 1e11))
    return found


def test_who_fails_does_not_keep_others_from_being_measured(broken: set[str]):
    broken |= {f"{OURS} p = 0.1", "sliced aten p = 0.1"}
    group, failures = measured.__wrapped__(SMALL, SMALL.effort, False)
    assert failures == {row: f"RuntimeError: no {row}" for row in broken}
    assert set(group.seconds) == SMALL_ROWS - broken and all(group.facts(row) for row in group.seconds)
    assert "sliced aten p = 0.1" not in group.rivals[LEANS[0]]


def test_nothing_is_timed_without_what_all_are_compared_with(broken: set[str]):
    broken.add(FROZEN)
    group, failures = measured.__wrapped__(SMALL, SMALL.effort, False)
    assert group is None and set(failures) == SMALL_ROWS
    assert failures[FROZEN] == f"RuntimeError: no {FROZEN}" and f"compared with {FROZEN}" in failures[PLAIN]


def test_every_network_can_be_compiled():
    """One of them where --compiled asks for some, on a CPU."""
    (parameters,) = bench_steps.test_step.pytestmark
    marks = {case.values: {mark.name for mark in case.marks} for case in parameters.args[1]}
    compiled = {values: names for values, names in marks.items() if values[1].startswith("compiled ")}
    assert {name for name, _ in compiled} == set(bench_steps.NETS)
    assert all(("compiled" in names) == (name in bench_steps.WITH_COMPILED) for (name, _), names in compiled.items())
    assert all(("all_compiled" in names) != ("compiled" in names) for names in compiled.values())
    assert not any({"compiled", "all_compiled"} & marks[values] for values in marks.keys() - compiled.keys())
