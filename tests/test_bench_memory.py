"""The memory benchmark's results file grows row by row, and the README's tables are made of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import memory, readme
from rwn_ext.paper.networks import build

NAMES = ["wrn-28-4, p=.1, batch statistics", "vgg19-bn, p=.1, batch statistics", "resnet-101, input"]


def found(name: str, share: float = 0.5) -> dict:
    plain, lean = ({way: {"kept": size, "peak": 2 * size} for way in ("process", "allocator")} for size in (8e9, 4e9))
    lean["process"] = {"kept": 8e9 * share, "peak": 1}
    return memory.row(name, plain, lean)


def test_rows_of_the_same_commit_stay_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, commit = tmp_path / "new" / "memory.json", {"id": "a" * 40, "time": "", "dirty": False}
    monkeypatch.setattr(memory, "commit", lambda: commit)
    for name in reversed(NAMES):
        memory.add(found(name, 0.4), file)
    memory.add(found(NAMES[1]), file)
    content = json.loads(file.read_text())
    assert [row["case"] for row in content["cases"]] == NAMES  # in the order of the cases
    assert [row["process"] for row in content["cases"]] == [0.4, 0.5, 0.4]
    assert content["commit_info"] == commit and content["machine_info"]["torch"] == torch.__version__
    assert list(file.parent.iterdir()) == [file]
    commit = commit | {"id": "b" * 40}
    memory.add(found(NAMES[0]), file)
    assert [row["case"] for row in json.loads(file.read_text())["cases"]] == NAMES[:1]


def test_a_peak_is_compared_with_a_peak():
    peak = next(name for name, case in memory.CASES.items() if case.metric == "peak")
    assert found(peak)["process"] == 0.0 and found(peak)["plain MB"] == 16000 and found(NAMES[0])["plain MB"] == 8000


def test_the_readme_has_a_table_of_targets_and_one_of_what_others_published():
    content = {"text": "Of plain nn.", "cases": [found(name) for name in NAMES]}
    text = readme.filled("<!-- results: memory -->\nold\n<!-- end -->", SimpleNamespace(memory=content))
    assert "old" not in text and "Of plain nn." in text
    assert f"| {NAMES[0]} | 0.52 | 0.500 | 0.500 |" in text and f"| {NAMES[2]} | 0.67 | 0.500 | 0.500 |" in text
    assert "arXiv 2404.12406" in text


@pytest.mark.parametrize("metric", ["kept", "peak"])
def test_lean_takes_less_in_a_process_as_by_the_allocator(metric: str):
    case = memory.Case(lambda: build("wrn-10-2", 10, dropout=0.3), (16, 3, 32, 32), 0.52, {"trainable": 0.1})
    plain, lean = (memory.measured(case, contender) for contender in ("plain", "lean"))
    assert lean["allocator"][metric] < 0.8 * plain["allocator"][metric]
    assert plain["allocator"]["kept"] < plain["allocator"]["peak"]


def test_learning_by_the_input_alone_needs_no_optimizer():
    case = memory.Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), (2, 3, 4, 4), 1.0, {"trainable": 0})
    measured = memory.measured(replace(case, input_gradient=True), "lean")
    assert measured["allocator"]["peak"] >= measured["allocator"]["kept"] >= 0
