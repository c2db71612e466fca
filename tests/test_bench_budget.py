"""Benchmarks that have little time: what comes first, what is left out, and that it is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.budget import FIRST, LEFT_OUT

ROOT = Path(__file__).parents[1]
CONFTEST = """
from bench.budget import Budget

def pytest_configure(config):
    config.pluginmanager.register(Budget({seconds}))
"""
# Either file measures, as benchmarks do, all contenders of a group when its first is asked for.
STEPS = """
import time
from functools import lru_cache
import pytest

measured = lru_cache(maxsize=1)(lambda name: print("\\nmeasured", name) or time.sleep(0.5))

@pytest.mark.parametrize("name, row", [(name, row) for name in ("large", "small") for row in ("plain", "ours")])
def test_step(name, row):
    measured(name)

@pytest.mark.skip
def test_of_something_else():
    pass
"""
LAYERS = """
from functools import lru_cache
import pytest

measured = lru_cache(maxsize=1)(lambda part: print("\\nmeasured", part))

@pytest.mark.parametrize("part, way", [(part, way) for part in (0.01, 0.1, 0.5) for way in ("plain", "ours")])
def test_layer(part, way):
    measured(part)
    assert way == "plain" or part != {wrong}
"""


@pytest.fixture
def bench(tmp_path: Path):
    def run(seconds: str, wrong: str = "None") -> tuple[int, list[str], str]:
        (tmp_path / "conftest.py").write_text(CONFTEST.format(seconds=seconds))
        (tmp_path / "bench_layers.py").write_text(LAYERS.format(wrong=wrong))
        (tmp_path / "bench_steps.py").write_text(STEPS)
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
        files = [tmp_path / "bench_layers.py", tmp_path / "bench_steps.py"]
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
        measured = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("measured ")]
        return done.returncode, measured, done.stdout

    return run


def test_with_time_for_all_cases_stay_where_they_are(bench):
    code, measured, output = bench("float('inf')")
    assert (code, measured) == (0, ["0.01", "0.1", "0.5", "large", "small"]) and "left out" not in output


def test_the_most_important_groups_come_first(bench):
    assert bench("60")[:2] == (0, ["large", "0.1", "small", "0.01", "0.5"])


def test_no_group_is_begun_when_the_time_is_up_but_the_one_begun_is_whole(bench):
    code, measured, output = bench("0.2")
    assert (code, measured) == (LEFT_OUT, ["large"])
    assert "8 cases are left out, the time is up" in output and "2 passed, 9 skipped" in output


def test_what_failed_is_not_left_out(bench):
    code, measured, output = bench("60", wrong="0.1")
    assert code == 1 and len(measured) == 5 and "1 failed" in output and "left out" not in output


def test_every_file_of_the_order_exists():
    assert all((ROOT / "bench" / name).exists() for name in FIRST)
