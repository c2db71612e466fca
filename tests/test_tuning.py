"""Measured plans: what is measured, what the cache file holds, what happens to one that is damaged."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import rwn_ext
from rwn_ext import PartialConv2d, ops, planner, tuning
from rwn_ext.planner import Problem, explain, plan

LAYER = Problem(4, 64, 8, 8, 64, 6, (3, 3), padding=(1, 1), channels_last=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path, without_cpu_kernel):
    """Nothing measured so far, a cache directory of its own, and no trace of it afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "READING", 1e-6)

    def forget():
        planner._tuning.measurements.clear()
        planner._tuning.loaded = False
        planner._forget()

    forget()
    yield forget
    forget()


@pytest.fixture
def measured_as(monkeypatch: pytest.MonkeyPatch):
    """Readings of the clock: each algorithm takes the seconds given here."""

    def set_times(times: dict[str, float]) -> list[Problem]:
        seen = []

        def measure(contenders, clock):
            seen.append(list(contenders))
            return {name: times[name] for name in contenders}

        monkeypatch.setattr(tuning, "timed", measure)
        return seen

    return set_times


TIMES = {"full": 4e-4, "gather": 2e-4, "unfold": 3e-4, "matmul": 1e-4}


def test_nothing_is_measured_unless_asked_for(measured_as):
    seen = measured_as(TIMES)
    assert plan(LAYER).algorithm == "unfold" and not seen
    assert not tuning.cache_file().exists()


def test_tune_plans_by_the_clock_and_keeps_it(measured_as, fresh, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(
        PartialConv2d(8, 64, 3, padding=1, trainable=6),
        nn.ReLU(),
        PartialConv2d(64, 64, 1, trainable=2),
        PartialConv2d(64, 4, 1, trainable=0),
    ).eval()
    x = torch.randn(2, 8, 5, 5)
    seen = measured_as(TIMES)
    before = model(x)
    times = planner.tune(model, x)
    assert torch.equal(model(x), before) and not model.training
    assert seen == [["full", "gather", "unfold"], ["full", "gather", "matmul", "unfold"]]
    first, second = model[0].problem(x), model[2].problem(model[0](x))
    assert list(times) == [first, second] and times[second] == TIMES
    assert plan(first).algorithm == "gather" and plan(second).algorithm == "matmul"
    assert "measured: 100.0 us" in explain(second) and "picked matmul" in explain(second)
    content = json.loads(tuning.cache_file().read_text())
    assert content["format"] == tuning.FORMAT and content["seconds"] == {"cpu": {str(p): times[p] for p in times}}
    # Another process does not look unless it is told to; then it does not measure again.
    fresh()
    assert plan(second).algorithm == "full"
    planner._forget()
    monkeypatch.setenv("RWN_EXT_TUNE", "1")
    assert plan(second).algorithm == "matmul" and len(seen) == 2


def test_the_environment_variable_measures_at_first_use(measured_as, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RWN_EXT_TUNE", "1")
    seen = measured_as(TIMES)
    layer = PartialConv2d(64, 64, 3, padding=1, trainable=6)
    for _ in range(2):
        layer(torch.randn(2, 64, 8, 8)).sum().backward()
    assert seen == [["full", "gather", "unfold"]]
    assert "picked gather (" in explain(layer.problem(torch.randn(2, 64, 8, 8)))


def test_a_plan_in_use_follows_a_measurement(measured_as):
    """Also the one that the operator remembers."""
    layer, x = PartialConv2d(64, 64, 3, padding=1, trainable=6), torch.randn(2, 64, 8, 8)
    layer(x).sum().backward()
    measured_as({"full": 1e-9, "gather": 1.0, "unfold": 1.0})
    planner.tune(layer, x)
    used = []
    full = ops._ALGORITHMS["full"]
    ops._ALGORITHMS["full"] = lambda *arguments: used.append("full") or full(*arguments)
    try:
        layer(x).sum().backward()
    finally:
        ops._ALGORITHMS["full"] = full
    assert used == ["full"]


def test_what_is_measured_is_really_run():
    times = planner.tune(PartialConv2d(4, 6, 3, trainable=[0, 3], groups=2), torch.randn(2, 4, 6, 6))
    ((problem, seconds),) = times.items()
    assert problem.groups == 2 and set(seconds) == {"full", "gather"}
    assert all(0 < value < 1 for value in seconds.values())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rehearsed_algorithms_compute_a_gradient_of_the_problem_s_shape(groups: int):
    problem = replace(LAYER, groups=groups, learned=6)
    for run in ops._rehearse(problem, ["full", "gather"]).values():
        assert run()[0].shape == (6, 64 // groups, 3, 3)


def test_the_clock_takes_turns_and_medians():
    now, order = [0.0], []
    costs = {"a": iter([9, 1, *[1, 3, 2, 50, 2, 2, 2]]), "b": iter([9, 1, *[5] * 7])}

    def contender(name):
        def run():
            order.append(name)
            now[0] += next(costs[name])

        return run

    times = tuning.timed({name: contender(name) for name in costs}, lambda: now[0])
    assert times == {"a": 2, "b": 5} and order == [*"aabb", *"ab" * 7]


def versions_of_yesterday(content: dict) -> str:
    content["versions"] = content["versions"] | {"torch": "1.0"}
    return json.dumps(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: "{", "Expecting"),
        (lambda content: "[]", "format"),
        (lambda content: json.dumps(content | {"format": 0}), "format 1"),
        (versions_of_yesterday, "'torch': '1.0'"),
        (lambda content: json.dumps(content | {"seconds": {"cpu": {"x": {"full": "fast"}}}}), "seconds"),
        (lambda content: json.dumps(content | {"seconds": {"cpu": {"x": {}}}}), "seconds"),
        (lambda content: b"\xff\xfe\x00", "utf-8"),
    ],
    ids=["cut off", "list", "old format", "versions", "no number", "empty", "bytes"],
)
def test_a_file_that_cannot_be_trusted_is_ignored_with_a_warning(damage, why, measured_as, fresh, monkeypatch):
    measured_as(TIMES)
    planner.tune(PartialConv2d(64, 64, 1, trainable=2), torch.randn(2, 64, 5, 5))
    damaged = damage(json.loads(tuning.cache_file().read_text()))
    tuning.cache_file().write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    fresh()
    monkeypatch.setenv("RWN_EXT_TUNE", "1")
    with pytest.warns(RuntimeWarning, match=f"plans.json are not used: .*{why}"):
        assert plan(LAYER).algorithm == "gather"
    # What was measured since stands in a sound file.
    fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(LAYER).algorithm == "gather"


def test_a_directory_that_cannot_be_written_costs_a_warning_only(measured_as, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured_as(TIMES)
    with pytest.warns(RuntimeWarning, match="not kept"):
        planner.tune(PartialConv2d(64, 64, 3, padding=1, trainable=2), torch.randn(2, 64, 5, 5))


def test_processes_add_to_the_file_and_leave_nothing_else():
    """Two that have not seen each other's measurements."""
    first, second = tuning.Measurements(), tuning.Measurements()
    first.load()
    second.load()
    first.add("cpu", "a", {"full": 1.0})
    first.save()
    second.add("cpu", "b", {"full": 2.0})
    second.save()
    found = tuning.Measurements()
    found.load()
    assert found.get("cpu", "a") == {"full": 1.0} and found.get("cpu", "b") == {"full": 2.0}
    assert found.get("cuda", "a") is None
    assert [file.name for file in tuning.cache_file().parent.iterdir()] == ["plans.json"]


def test_tune_refuses_nothing_of_a_plain_model():
    assert planner.tune(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 5, 5)) == {}
    assert rwn_ext.planner.tune is planner.tune
