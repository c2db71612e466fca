"""Killed at any point, a run continues to the results of one that was not; a sweep is divided among processes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from rwn_ext.paper.__main__ import main
from rwn_ext.paper.training import CHECKPOINT, LOG

FLAGS = "--net wrn-10-1 --image-size 8 --batch-size 512 --epochs 3 --part 0.4 --device cpu".split()  # noqa: SIM905

# Each kills the process in its second epoch: amid a step, or amid a half-written checkpoint.
KILLERS = {
    "amid a step": """
step, done = training.Run.step, []
def killer(self, *arguments):
    done.append(1)
    if len(done) == 5:
        kill()
    return step(self, *arguments)
training.Run.step = killer
""",
    "amid writing": """
save, done = torch.save, []
def killer(state, path):
    save(state, path)
    done.append(1)
    if len(done) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        kill()
torch.save = killer
""",
}
DRIVER = """
import os, signal, sys, torch
from rwn_ext.paper import training
from rwn_ext.paper.__main__ import main
torch.set_num_threads(1)
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
{killer}
main(sys.argv[1:])
"""


def results(folder):
    """All that decides: the log but for its times, and the checkpoint."""
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log], state["model"], state["optimizer"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *FLAGS, "--out", str(out)]) == 0
    return results(out)


@pytest.mark.parametrize("where", KILLERS)
def test_a_killed_run_continues_to_the_same_results(tmp_path, uninterrupted, where):
    arguments = ["train", *FLAGS, "--out", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", DRIVER.format(killer=KILLERS[where]), *arguments])
    assert killed.returncode == -signal.SIGKILL
    before = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert 1 <= len(before) < 3
    assert main([*arguments, "--resume"]) == 0
    log, model, optimizer = results(tmp_path)
    expected_log, expected_model, expected_optimizer = uninterrupted
    assert log == expected_log
    assert model.keys() == expected_model.keys() and all(model[k].equal(expected_model[k]) for k in model)
    for number, state in expected_optimizer["state"].items():
        assert optimizer["state"][number]["momentum_buffer"].equal(state["momentum_buffer"])


def test_processes_of_torchrun_divide_a_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(
        '[fixed]\nnet = "wrn-10-1"\nimage-size = 8\nbatch-size = 512\nepochs = 1\ndevice = "cpu"\n'
        '[[grid]]\npart = [1]\nseed = [0]\n[[grid]]\nonly = ["nothing"]\nseed = [0]\n'
    )
    arguments = ["sweep", str(file), "--out", str(out)]
    command = [sys.executable, "-m", "rwn_ext.paper", *arguments]
    with subprocess.Popen(command, env=os.environ | {"RANK": "1"}, stdout=subprocess.PIPE) as second:
        monkeypatch.setenv("RANK", "0")
        assert main(arguments) == 0
        told = second.communicate()[0]
        assert second.returncode == 0 and told == b"", "the first alone shows how it goes"
    assert "best test accuracy" in capsys.readouterr().out
    outputs = [path.read_text() for path in out.glob("*/output.txt")]
    assert len(outputs) == 2 and all(text.count("of 1 epochs done") == 1 for text in outputs)
