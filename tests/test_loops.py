"""Training loops of other libraries: the examples with Lightning and accelerate learn, stop and go on."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from libraries import installed

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *arguments: str) -> None:
    """As a user runs it, but in this process, which has imported torch already."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # The libraries recommend workers for data loading and the like.
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def accuracy(line: str) -> float:
    return float(line.split("accuracy")[1].split("%")[0])


@pytest.mark.works_with("Lightning (`examples/with_lightning.py`)")
def test_lightning_trains_checkpoints_and_resumes(tmp_path, capsys):
    installed("sklearn")
    installed("lightning")
    common = ["--images", "600", "--accelerator", "cpu"]
    run_example("with_lightning.py", *common, "--epochs", "2", "--out", str(tmp_path))
    first = capsys.readouterr().out.splitlines()[-1]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["subsets"]["block1.0.conv1"][0] and "network.block1.0.conv1.weight" in state["state_dict"]
    run_example("with_lightning.py", *common, "--epochs", "4", "--out", str(tmp_path), "--resume")
    second = capsys.readouterr().out.splitlines()[-1]
    assert first.startswith("after 2 epochs") and second.startswith("after 4 epochs")
    assert accuracy(second) > 40


@pytest.mark.works_with("accelerate (`examples/with_accelerate.py`)")
def test_accelerate_trains_saves_its_state_and_resumes(tmp_path, capsys):
    installed("sklearn")
    installed("accelerate")
    whole, broken = (str(tmp_path / name) for name in ("whole", "broken"))
    run_example("with_accelerate.py", "--images", "600", "--epochs", "3", "--out", whole)
    lines = capsys.readouterr().out.splitlines()
    run_example("with_accelerate.py", "--images", "600", "--epochs", "2", "--out", broken)
    assert capsys.readouterr().out.splitlines() == lines[:2]
    run_example("with_accelerate.py", "--images", "600", "--epochs", "3", "--out", broken, "--resume")
    assert capsys.readouterr().out.splitlines() == lines[2:]
    assert accuracy(lines[-1]) > 40
