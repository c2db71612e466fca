"""Sweeps: what a file says, that finished runs are not repeated, and that broken ones continue."""

import statistics

import pytest
from rich.console import Console

from rwn_ext.paper.__main__ import main
from rwn_ext.paper.sweep import Sweep
from rwn_ext.paper.training import LOG

SWEEP = """
[fixed]
net = "wrn-10-1"
image-size = 8
batch-size = 512
epochs = 1
part = 1
[grid]
frozen = ["random"]
seed = [0, 1]
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "small.toml").write_text(SWEEP)
    return tmp_path / "small.toml"


def test_sweep_runs_repeats_nothing_and_resumes(file, tmp_path, capsys):
    arguments = ["sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert main(arguments) == 0
    assert "best test accuracy" in capsys.readouterr().out
    sweep = Sweep.of_file(file, tmp_path / "out")
    best = [cell.records()[0]["test_accuracy"] for cell in sweep.cells]
    (row,) = sweep.rows()
    assert row["frozen"] == "random" and row["runs"] == 2
    assert row["mean"] == pytest.approx(statistics.fmean(best)) and row["spread"] == pytest.approx(
        statistics.stdev(best)
    )
    # A finished sweep starts nothing; a run whose log is a file behind its checkpoint writes it again.
    written = [(cell.folder / LOG).stat().st_mtime_ns for cell in sweep.cells]
    (sweep.cells[0].folder / LOG).unlink()
    assert main(arguments) == 0
    assert [cell.records()[0]["test_accuracy"] for cell in sweep.cells] == best
    assert (sweep.cells[1].folder / LOG).stat().st_mtime_ns == written[1]


def test_failed_runs_are_told_and_counted(file, tmp_path, capsys):
    file.write_text(SWEEP.replace("part = 1\n", "part = 4000\n").replace("[0, 1]", "[0]"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "failed, see" in capsys.readouterr().out.replace("\n", " ")
    (output,) = (tmp_path / "out").rglob("output.txt")
    assert "trainable=4000" in output.read_text()


def test_every_combination_and_the_epoch_budget(file, tmp_path):
    file.write_text('[fixed]\nepochs = 10\n[grid]\nnet = ["wrn-10-1", "alexnet"]\npart = [0.1, 1, 1.0]\n')
    sweep = Sweep.of_file(file, tmp_path, budget_epochs=3, data=tmp_path)
    assert len(sweep.cells) == len({cell.folder for cell in sweep.cells}) == 6
    assert {cell.epochs for cell in sweep.cells} == {3}
    assert "--part 1.0" in " ".join(sweep.cells[2].command()) and "--part 1 " in " ".join(sweep.cells[1].command())
    table = sweep.table()
    Console().print(table)
    assert table.row_count == 6 and [row["mean"] for row in sweep.rows()] == [None] * 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid", "no sweep that can be read"),
        ("[runs]\n", r"\[runs\] is unknown"),
        ('[fixed]\nnet = "alexnet"\n[grid]\nparts = [1]\n', "'parts' is unknown"),
        ('[fixed]\nnet = "alexnet"\n[grid]\npart = 1\n', "grid.part=1 is no list"),
        ("[grid]\npart = [1]\n", "no network is named"),
        ('[fixed]\nnet = "resnet"\n', "there is no network 'resnet'"),
    ],
    ids=lambda text: text.split("\n")[0],
)
def test_wrong_files_say_what_is_wrong(file, tmp_path, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Sweep.of_file(file, tmp_path, budget_epochs=1)
