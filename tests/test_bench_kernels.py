"""The kernels' benchmark: its cases, what it checks before it times, how an interrupted run continues."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import bench_kernels, gate, growing, machine
from bench.bench_kernels import FAILED, UNFINISHED, Case, Way, exact, run, selection, summary
from bench.growing import GrowingResults
from bench.layers import Layer
from bench.page import page
from bench.rates import Rates
from bench.results import ResultsError, load
from rwn_ext import cpu, ops

CASES = [
    Case("3x3", Layer(2, 64, 6, 64, 3), 4, 0.0625, numbers="float32"),
    Case("1x1 s2", Layer(3, 5, 7, 6, 1, 2), 6, 1.0, "contiguous", "float32"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """A device of known rates, no long look at the processor, no tests within the test."""
    for module in (machine, bench_kernels):
        monkeypatch.setattr(module, "rates", lambda device, dtype: Rates(1e10, 1e11))
    found = {"machine": "m", "system": "s", "python_version": "3", "cpu": {"brand_raw": "some CPU"}}
    monkeypatch.setattr(growing, "pytest_benchmark_generate_machine_info", lambda: found)
    monkeypatch.setattr(bench_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(gate, "failing_tests", lambda device: None)


def results(folder: Path, earlier: Path | None = None) -> GrowingResults:
    return GrowingResults(folder / "kernels.json", "cpu", torch.float32, earlier)


def test_every_layer_of_the_table_is_measured_in_every_way():
    full, default = selection(full=True, device="cuda"), selection(device="cuda")
    assert len(full) == len(set(full)) == 396 and len(default) == 33
    assert {(case.layout, case.numbers) for case in default} == {("channels_last", "bf16")}
    assert {case.part for case in default} == {0.01, 0.1, 0.5}
    assert len({case.name for case in default if case.compiled}) == 3 and not default[0].compiled
    curve = Counter(case.name for case in selection(curve=True, device="cuda"))
    assert len(curve) == 6 and max(curve.values()) == 14


@pytest.mark.parametrize("layer", [Layer(20, 3, 7, 5, 3), Layer(2, 3, 9, 4, 7, 2), Layer(3, 4, 8, 6, 1, 2)], ids=str)
def test_the_reference_is_torch_s_gradient(layer: Layer):
    case = Case("any", layer, 2, numbers="float32")
    grad_output, x = case.operands()
    shape, (_, stride, padding, _) = (layer.k, layer.c, layer.r, layer.r), case.geometry
    whole = torch.nn.grad.conv2d_weight(x.double(), shape, grad_output.double(), stride, padding)
    torch.testing.assert_close(exact(case, grad_output, x), whole[-2:])


def test_cases_are_measured_once_and_read_by_the_report(tmp_path, monkeypatch: pytest.MonkeyPatch):
    assert run(CASES, results(tmp_path), rounds=3) == []
    found = load(tmp_path)
    names = {e.subject: {f.contender for f in found.entries if f.subject == e.subject} for e in found.entries}
    plain = {"full wgrad", "gather + wgrad", "sliced wgrad", "rwn_ext"} | ({"direct"} if cpu.native else set())
    assert names == {"3x3": plain | {"unfold"}, "1x1 s2": plain | {"matmul", "unfold"}}
    ours = next(e for e in found.entries if (e.subject, e.contender) == ("3x3", "rwn_ext"))
    moved = 4 * (2 * 64 * 36 + 2 * 36 * 4 + 4 * 64 * 9)
    floor = max(moved / 1e10, 2 * (2 * 36) * 4 * 64 * 9 / 1e11)
    assert ours.floor_share == pytest.approx(floor / ours.median)
    assert ours.facts["bytes_per_second"] == pytest.approx(moved / ours.median)
    assert set(ours.ratios) == {"full wgrad", "gather + wgrad", "sliced wgrad"}
    assert "## Weight gradients alone" in page(found)
    text = summary(json.loads((tmp_path / "kernels.json").read_text()))
    assert "4/64 channels_last float32" in text and ours.facts["algorithm"] in text
    # Neither the same command nor one that starts from these results measures again.
    monkeypatch.setattr(bench_kernels, "measured", lambda *_: pytest.fail("measured again"))
    assert run(CASES, results(tmp_path)) == []
    continued = results(tmp_path / "other", tmp_path / "kernels.json")
    assert run(CASES, continued) == [] and len(continued.content["benchmarks"]) == len(found.entries)


def test_what_takes_longer_than_pytorch_is_said(tmp_path):
    results(tmp_path).add(*bench_kernels.measured(CASES[0], 9))
    content = json.loads((tmp_path / "kernels.json").read_text())
    for entry in content["benchmarks"]:
        entry["ratios"] = {"full wgrad": [0.5, 0.4, 0.6], "gather + wgrad": [1.5, 1.2, 1.8]}
    (tmp_path / "kernels.json").write_text(json.dumps(content))
    text = page(load(tmp_path))
    assert "rwn_ext, gather + wgrad | 1.50 [1.20, 1.80] |" in text and "rwn_ext, full wgrad" not in text


def test_a_budget_leaves_cases_for_the_next_run(tmp_path):
    assert run(CASES, results(tmp_path), rounds=3, budget=0) == CASES[1:]
    assert run(CASES, results(tmp_path), rounds=3) == []
    assert {entry.subject for entry in load(tmp_path).entries} == {"3x3", "1x1 s2"}


def test_the_command_says_what_is_left_and_what_failed(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bench_kernels, "selection", lambda full, curve: CASES)
    monkeypatch.setattr(bench_kernels, "ROUNDS", 3)
    assert bench_kernels.main([str(tmp_path), "--budget", "0"]) == UNFINISHED
    assert "1 cases are not measured" in capsys.readouterr().out
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["left_out"] == 1 and content["tests"] == {"files": list(gate.files("cpu")), "outcome": "passed"}
    right = ops.conv2d_weight_grad
    monkeypatch.setattr(ops, "conv2d_weight_grad", lambda *arguments: 1.001 * right(*arguments))
    assert bench_kernels.main([str(tmp_path)]) == FAILED
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["left_out"] == 0
    ours = {"matmul", "unfold", "rwn_ext"} | ({"direct"} if cpu.native else set())
    assert {f["contender"] for f in content["failures"]} == ours
    # What is wrong has no time; what PyTorch does has.
    timed = {e["contender"] for e in content["benchmarks"] if e["subject"] == "1x1 s2"}
    assert timed == {"full wgrad", "gather + wgrad", "sliced wgrad"}
    output = capsys.readouterr().out
    assert "FAILED 1x1 s2" in output and "rwn_ext is off by 0.00" in output


def test_nothing_is_measured_while_the_tests_are_red(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bench_kernels, "selection", lambda full, curve: CASES[:1])
    monkeypatch.setattr(bench_kernels, "ROUNDS", 3)
    monkeypatch.setattr(gate, "failing_tests", lambda device: f"red on {device}")
    assert bench_kernels.main([str(tmp_path)]) == FAILED and not list(tmp_path.iterdir())
    assert "red on cpu\nthe tests above fail, so nothing is measured" in capsys.readouterr().err
    for option, outcome in (("--tested", "said to have passed"), ("--just-tested", "passed")):
        assert bench_kernels.main([str(tmp_path / outcome), option]) == 0
        assert json.loads((tmp_path / outcome / "kernels.json").read_text())["tests"]["outcome"] == outcome


def test_contenders_follow_each_other_in_ever_new_orders(monkeypatch: pytest.MonkeyPatch):
    called: list[Way] = []

    def timer(way: Way, operands) -> Callable[[], float]:
        return lambda: called.append(way) or 1.0

    monkeypatch.setattr(bench_kernels, "wall_timer", timer)
    names = list(bench_kernels.measured(CASES[0], 12).facts)
    turns = [tuple(called[i : i + len(names)]) for i in range(0, len(called), len(names))]
    assert len(turns) == 12 and {len(set(turn)) for turn in turns} == {len(names)}
    # Were the order only rotated, each would have the same predecessor throughout.
    before = {way: {turn[i - 1] for turn in turns for i in range(1, len(turn)) if turn[i] is way} for way in turns[0]}
    assert min(map(len, before.values())) > 1


def test_results_of_another_machine_are_not_continued(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    run(CASES[:1], results(tmp_path), rounds=3)
    other = {"machine": "other", "system": "s", "python_version": "3", "cpu": {}}
    monkeypatch.setattr(growing, "pytest_benchmark_generate_machine_info", lambda: other)
    with pytest.raises(ResultsError, match=r"kernels\.json cannot be continued: its machine_info"):
        results(tmp_path)
    assert bench_kernels.main([str(tmp_path)]) == 2
    assert "give another folder" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_last_state(tmp_path, monkeypatch: pytest.MonkeyPatch):
    run(CASES[:1], results(tmp_path), rounds=3)
    before = (tmp_path / "kernels.json").read_text()

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(CASES[1:], results(tmp_path), rounds=3)
    assert (tmp_path / "kernels.json").read_text() == before


def test_the_curve_times_one_way_alone(tmp_path):
    run([replace(CASES[0], only=("gather + wgrad",))], results(tmp_path), rounds=3)
    assert [entry.contender for entry in load(tmp_path).entries] == ["gather + wgrad"]
