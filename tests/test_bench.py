"""The benchmarks' report says what the results say, names what loses, flags what became slower; the README agrees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import readme, report
from bench.group import PLAIN, Group, ratio
from bench.results import ResultsError, load

ROOT = Path(__file__).parents[1]
MACHINE = {
    "device": "some CPU", "threads": 2, "python_version": "3.11", "torch": "2.13", "dtype": "float32",
    "rates": {"bytes_per_second": 2e10, "flops_per_second": 1e11},
}  # fmt: skip


def written(folder: Path, seconds: dict[str, list[float]], **machine: object) -> Path:
    """A results folder with one group of these rounds."""
    group = Group("layer", "a layer", {"p": 0.1}, seconds, (PLAIN,), {"forward": seconds}, {"rwn_ext": 2_000_000})
    benchmarks = [group.facts(name) | {"stats": {"median": 0.001, "iqr": 0.0001, "rounds": 9}} for name in seconds]
    content = {
        "machine_info": MACHINE | machine, "commit_info": {"id": "c" * 40, "time": "", "dirty": False},
        "benchmarks": benchmarks, "datetime": "2026-01-01",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(content))
    return folder


def steady(value: float) -> list[float]:
    return [value * (1 + 0.001 * i) for i in range(9)]


def test_a_ratio_is_taken_within_rounds_and_its_interval_holds_most_of_them():
    drifting = {PLAIN: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]}
    drifting["rwn_ext"] = [0.5 * value for value in drifting[PLAIN]]
    assert ratio(drifting, "rwn_ext", PLAIN) == (0.5, 0.5, 0.5)
    drifting["rwn_ext"][0] = 100.0
    drifting["rwn_ext"][8] = 0.1
    # Of nine rounds, the second lowest and the second highest bound the median with 96 % confidence.
    assert ratio(drifting, "rwn_ext", PLAIN) == (0.5, 0.5, 0.5)


def test_page_marks_what_loses(tmp_path):
    folder = written(tmp_path / "new", {PLAIN: steady(1.0), "rwn_ext": steady(1.2), "sliced aten": steady(1.3)})
    page = report.page(load(folder))
    assert "* layer, a layer, p 0.1: rwn_ext takes 1.20 [1.20, 1.20] of nn.Conv2d's time" in page
    assert "**rwn_ext** (loses)" in page and "sliced aten takes" not in page
    assert "| 2.00 |" in page and "20 GB/s" in page and "cccccccccc" in page
    winning = written(tmp_path / "winning", {PLAIN: steady(1.0), "rwn_ext": steady(0.8)})
    assert "Nowhere" in report.page(load(winning))


def test_report_writes_the_page_and_its_pictures(tmp_path, capsys):
    folder = written(tmp_path / "new", {PLAIN: steady(1.0), "rwn_ext": steady(0.9)})
    assert report.main([str(folder)]) == 0
    assert (folder / "report.md").read_text().startswith("# Benchmarks: some CPU")
    assert readme.fingerprint(folder / "layers.png") == load(folder).fingerprint


@pytest.mark.parametrize(("now", "lines"), [(0.7, 1), (0.52, 0), (0.4, 0)])
def test_a_regression_is_more_than_five_percent_beyond_noise(tmp_path, capsys, now: float, lines: int):
    old = written(tmp_path / "old", {PLAIN: steady(1.0), "rwn_ext": steady(0.5)})
    new = written(tmp_path / "new", {PLAIN: steady(3.0), "rwn_ext": steady(3 * now)})
    assert report.main([str(new), "--against", str(old)]) == lines
    assert ("0.50 [0.50, 0.50] -> 0.70 [0.70, 0.70]" in capsys.readouterr().out) == bool(lines)


def test_noise_is_no_regression(tmp_path):
    noisy = [0.4, 0.9, 0.5, 0.8, 0.5, 0.7, 0.9, 0.4, 0.7]
    old = written(tmp_path / "old", {PLAIN: steady(1.0), "rwn_ext": steady(0.5)})
    new = written(tmp_path / "new", {PLAIN: steady(1.0), "rwn_ext": noisy})
    assert report.regressions(load(new), load(old)) == []


def test_folders_that_hold_no_results_are_named(tmp_path, capsys):
    assert report.main([str(tmp_path / "missing")]) == 2
    assert "missing is no folder" in capsys.readouterr().err
    with pytest.raises(ResultsError, match="holds no results"):
        load(tmp_path)
    folder = written(tmp_path / "mixed", {PLAIN: steady(1.0)})
    (folder / "bench.json").rename(folder / "older.json")
    with pytest.raises(ResultsError, match="different machines"):
        load(written(folder, {PLAIN: steady(1.0)}, torch="2.11"))
    (folder / "older.json").write_text("{")
    with pytest.raises(ResultsError, match=r"older\.json cannot be read"):
        load(folder)


def test_readme_says_what_the_results_say(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_nothing_is_measured_while_the_tests_are_red(tmp_path):
    wrong = "from rwn_ext import ops; right = ops.conv2d_weight_grad\n"
    wrong += "ops.conv2d_weight_grad = lambda *args, **kwargs: 2 * right(*args, **kwargs)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_PLUGINS": "wrong"}
    command = [sys.executable, "-m", "pytest", "bench/bench_calls.py", "--quick", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "so nothing is measured" in done.stdout + done.stderr and "median ms" not in done.stdout
