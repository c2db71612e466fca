"""Figures of the paper: its numbers, the presets, and pages that compare ours with them only where both are alike."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from rwn_ext.paper import marks, presets, reproduce
from rwn_ext.paper.__main__ import _parser, _prepared, main
from rwn_ext.paper.experiments import RESULTS
from rwn_ext.paper.marks import learned, mark
from rwn_ext.paper.presets import preset
from rwn_ext.paper.reproduce import Reproduction
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.sweep import flags
from rwn_ext.paper.training import LOG


def run_of(choices, out):
    return _prepared(_parser().parse_args(["train", *flags(choices), "--out", str(out)]))


def pretend(reproduction, accuracy):
    """Logs of finished runs, the last epoch the best but one; results of finished experiments."""
    for cell in reproduction.sweep.cells:
        cell.folder.mkdir(parents=True, exist_ok=True)
        best = accuracy(cell.choices)
        if cell.program != "train":
            names = {"ensemble": ["member1", "member2"], "tasks": ["upright", "turned"], "transfer": ["conv1", "all"]}
            rows = [
                {"name": name, "learned_weights": 1000, "stored_bytes": 5000, "accuracy": best, "seconds": 3.0}
                for name in names[cell.program]
            ]
            results = {"rows": rows, "stored_bytes": 10_000} | (
                {"ensemble_accuracy": best, "mean_member_accuracy": best - 3}
            )
            (cell.folder / RESULTS).write_text(json.dumps(results))
        records = [
            {"epoch": i + 1, "test_accuracy": best - abs(cell.epochs - 2 - i), "seconds": 2.0, "learned_weights": 1000}
            | {"magnitudes": {"learned": 0.2, "fixed": 0.1}}
            for i in range(cell.epochs)
        ]
        (cell.folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_papers_numbers():
    """Some of them, typed here a second time."""
    for choices, epochs, accuracy, read_off in (
        ({"net": "wrn-28-10", "part": 0.1, "frozen": "zero"}, 200, 91.53, False),
        ({"net": "wrn-28-10", "part": 1}, 200, 69.17, False),
        ({"net": "wrn-28-10", "part": 1.0}, 200, 96.10, False),
        ({"net": "densenet-bc-100-12", "part": 0.07, "frozen": "zero"}, 300, 30.90, False),
        ({"net": "vgg19-bn", "part": 0.07, "frozen": "zero"}, 164, 77, True),
        ({"net": "wrn-28-4", "only": "nothing"}, 10, 30.5, True),
        ({"net": "densenet-bc-100-12", "part": 0.1, "bn": "frozen"}, 10, 61.7, True),
        ({"net": "densenet-bc-100-12", "part": 0.1, "frozen": "zero", "dim": 1}, 1, 13.52, False),
    ):
        found = mark(choices | {"seed": 3, "device": "cuda", "graph": True}, epochs)
        assert (found.accuracy, found.epochs, found.read_off) == (accuracy, epochs, read_off)
    assert len(marks._rows("table")) == 4 * 7 + 10 + 11 + 6 + 6 + 3 + 3 + 1 + 1
    single, together = marks.ensemble_marks({"net": "densenet-bc-100-12", "only": "fc"}, 1)
    assert (single.accuracy, together.accuracy) == (68.5, 70.25)


@pytest.mark.parametrize(
    "other",
    [{"lr": 0.05}, {"frozen": "he"}, {"bn": "frozen"}, {"optimizer": "adam"}, {"only": "conv1"}, {"net": "wrn-28-4"}],
    ids=str,
)
def test_no_number_for_what_the_paper_did_not_do(other):
    alike = {"net": "wrn-28-10", "part": 0.1, "lr": 0.1, "batch-size": 128}
    assert mark(alike, 200).accuracy == 94.12
    assert mark(alike | other, 200) is None and mark(alike, 10) is None


@pytest.mark.parametrize("name", presets.names())
def test_every_run_of_a_preset_can_be_made(name, tmp_path):
    figure = preset(name)
    for choices in figure.choices("cifar", figure.families, 1):
        options = _parser().parse_args([figure.program, *flags(choices)])
        assert learned({"part": options.part, "only": options.only}) == learned(choices)
    # weights and magnitudes show the runs of fractional
    built = figure.program == "train" and name not in ("weights", "magnitudes")
    for choices in figure.choices("digits", (), 1) if built else ():
        assert run_of(choices, tmp_path / "run").learned_weights > 0
    assert len(figure.choices("cifar", figure.families, 2)) == 2 * len(figure.choices("cifar", figure.families, 1))


def test_the_figures_show_every_number_of_the_paper():
    shown = set()
    for name in presets.names():
        for choices in (
            preset(name).choices("cifar", preset(name).families, 1) if preset(name).program == "train" else ()
        ):
            epochs = choices.get("epochs") or schedule_of(choices["net"]).epochs
            if mark(choices, epochs):
                shown.add(marks._key(choices, epochs))
    assert shown == marks._rows("table").keys()
    ensembles = preset("ensembles").choices("cifar", (), 1)
    adam = preset("ensembles-adam").choices("cifar", (), 1)
    assert not any(marks.ensemble_marks(choices, choices["epochs"]) for choices in adam)
    assert {marks._key(choices, choices["epochs"]) for choices in ensembles} == marks._rows("ensemble").keys()


def test_an_ensemble_beside_the_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.data, "load", lambda folder: SimpleNamespace(name="cifar10"))
    figure = Reproduction(preset("ensembles"), tmp_path, tmp_path, prepare=None, rounds=0, jobs=1)
    pretend(figure, lambda choices: 72.0)
    assert figure.run() == 0
    page = (tmp_path / "ensembles" / "figure.md").read_text()
    assert "| fc | fixed as trained | 69.00 | 68.50 | 72.00 | 1 | 70.25 | +1.75 | 1,000 | 0.010 | 6 |" in page


def test_a_page_beside_the_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.data, "load", lambda folder: SimpleNamespace(name="cifar10"))
    ten = Reproduction(preset("ten-epochs"), tmp_path, tmp_path, prepare=None, rounds=0, seeds=2, jobs=1)
    pretend(ten, lambda choices: 70.0 + 2 * choices["seed"])
    assert ten.run() == 0
    rows = {(row["learned"], row.get("frozen", "random")): row for row in ten.rows()}
    tenth = rows[0.1, "zero"]
    assert (tenth["mean"], tenth["runs"], tenth["seconds"]) == (71, 2, 20)
    assert tenth["spread"] == pytest.approx(2**0.5) and tenth["paper"]["accuracy"] == 63
    assert tenth["difference"] == pytest.approx(8)
    page = (tmp_path / "ten-epochs" / "figure.md").read_text()
    assert "| 0.1 | zeroed | 71.00 ± 1.41 | 2 | ~63.00 | +8.00 | 1,000 |" in page
    apart = [abs(row["difference"]) for row in rows.values() if row["paper"]]
    assert f"Mean absolute difference to the paper: {sum(apart) / 14:.2f} points over 14 rows." in page
    Image.open(tmp_path / "ten-epochs" / "figure.png").verify()


def test_shorter_runs_keep_the_mark_without_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.data, "load", lambda folder: SimpleNamespace(name="cifar10"))
    short = Reproduction(preset("fractional"), tmp_path, tmp_path, prepare=None, rounds=0, budget_epochs=3, jobs=1)
    pretend(short, lambda choices: 50.0)
    rows = {(row["learned"], row.get("frozen", "random")): row for row in short.rows()}
    assert rows[0.1, "random"]["paper"]["accuracy"] == 94.12 and rows[0.1, "random"]["difference"] is None
    assert rows["nothing", "random"]["paper"] is None


@pytest.mark.parametrize("name", presets.names())
def test_other_data_have_no_marks_and_costs_stand_beside(name, tmp_path):
    rounds = 1 if name in ("bn", "ensembles") else 0
    figure = Reproduction(preset(name), None, tmp_path, prepare=run_of, rounds=rounds, jobs=1)
    pretend(figure, lambda choices: 90.0)
    assert figure.run() == 0
    results = json.loads((tmp_path / name / "results.json").read_text())
    assert all(row["paper"] is None and row["difference"] is None for row in results["rows"])
    page = (tmp_path / name / "figure.md").read_text()
    assert "paper" not in page and "90.00" in page
    Image.open(tmp_path / name / "figure.png").verify()
    if rounds:
        tenth = results["rows"][0]
        assert tenth["step_ratio"] > 0 and 0 < tenth["training_bytes"] < results["rows"][-1]["training_bytes"]
        assert "step, of nn.Conv2d's" in page
        # What was measured stays.
        costs = (tmp_path / "costs.json").read_text()
        assert figure.run() == 0 and (tmp_path / "costs.json").read_text() == costs


def test_figures_share_their_runs(tmp_path):
    folders = [
        {cell.folder for cell in Reproduction(preset(name), None, tmp_path, prepare=None, jobs=1).sweep.cells}
        for name in ("fractional", "weights", "magnitudes")
    ]
    assert folders[0] == folders[1] and folders[2] < folders[0]
    bf16 = Reproduction(preset("weights"), None, tmp_path, prepare=None, jobs=1, machine_flags={"amp": "bf16"})
    assert not folders[0] & {cell.folder for cell in bf16.sweep.cells}
    captured = Reproduction(preset("weights"), None, tmp_path, prepare=None, jobs=1, machine_flags={"graph": True})
    assert folders[0] == {cell.folder for cell in captured.sweep.cells}
    assert all("--graph" in cell.command() for cell in captured.sweep.cells)


def test_list_and_wrong_choices(capsys, tmp_path):
    assert main(["reproduce", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in presets.names()) and "densenet" in listed
    for arguments, message in (
        (["fractions"], "there is no figure 'fractions'; choose from bn,"),
        (["bn", "--family", "vgg"], "family='vgg' is not in bn; choose from wrn, densenet"),
        (["bn", "--seeds", "0"], "seeds=0 trains nothing"),
        (["bn", "--jobs", "0"], "jobs=0 runs nothing"),
        (["bn", "--budget-epochs", "0"], "budget_epochs=0 trains nothing"),
    ):
        assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
