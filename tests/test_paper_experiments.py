"""Experiments of several runs: what is shared, what is stored, and that the stored networks say what is told."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("rich")

from rwn_ext import load_compact
from rwn_ext.paper import data, experiments, networks
from rwn_ext.paper.__main__ import main
from rwn_ext.paper.schedules import Schedule
from rwn_ext.paper.training import CHECKPOINT, Config, read_checkpoint

SCHEDULE = Schedule(batch_size=32, weight_decay=0.0, epochs=1, milestones=(), factor=1.0, lr=0.05)


def bright(name="bright", classes=4, seed=0) -> data.ImageSet:
    """Images whose class is their brightness."""
    generator = torch.Generator().manual_seed(seed)

    def split(n):
        labels = torch.arange(n) % classes
        noise = torch.randint(0, 60, (n, 3, 8, 8), generator=generator)
        return data.Split((noise + 60 * labels[:, None, None, None]).clamp(0, 255).to(torch.uint8), labels)

    return data.ImageSet(name, split(96), split(24), classes, (0.5,) * 3, (0.3,) * 3, flip=False, padding=0)


def config(tmp_path, **options) -> Config:
    return Config(**({"net": "wrn-10-1", "schedule": SCHEDULE, "part": 0.25, "out": tmp_path / "out"} | options))


def results(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / experiments.RESULTS).read_text())


def probabilities(network, images):
    with torch.no_grad():
        return network.eval()(data.normalize(images.test.images, images.mean, images.std)).softmax(1)


@pytest.mark.parametrize(
    ("start_epochs", "options"),
    [(0, {"select": "random"}), (0, {"frozen": "zero"}), (1, {"optimizer": "adam"}), (0, {"frozen": "signed"})],
    ids=str,
)
def test_ensemble_is_the_mean_of_what_its_files_hold(tmp_path, start_epochs, options):
    images = bright()
    if options.get("optimizer") == "adam":
        options = options | {"schedule": replace(SCHEDULE, lr=0.01)}
    experiments.ensemble(config(tmp_path, **options), images, 2, start_epochs).run()
    said, out = results(tmp_path), tmp_path / "out"
    start = read_checkpoint(out / "start" / CHECKPOINT)["model"]
    total, learned = 0, []
    for row in said["rows"]:
        # Whatever the network was: the seed or the start, and the file, make it.
        network = networks.build("wrn-10-1", 4, options.get("part", 0.25), seed=77)
        base = {"base": start} if start_epochs else {}
        path = out / row["name"] / "learned.safetensors"
        load_compact(network, path, **base)
        own = probabilities(network, images)
        assert row["accuracy"] == pytest.approx(experiments.accuracy(own, images.test.labels))
        assert row["stored_bytes"] == path.stat().st_size < row["full_bytes"]
        total = total + own / 2
        conv = network.block2[0].conv2
        learned.append(conv.filters.indices)
        if options.get("frozen") != "zero":
            fixed = torch.ones(32, dtype=torch.bool)
            fixed[list(conv.filters.indices)] = False
            assert torch.equal(conv.weight[fixed], start["block2.0.conv2.weight"][fixed])
    assert (learned[0] != learned[1]) == ("select" in options)
    assert said["ensemble_accuracy"] == pytest.approx(experiments.accuracy(total, images.test.labels))
    assert said["mean_member_accuracy"] == pytest.approx(sum(row["accuracy"] for row in said["rows"]) / 2)
    assert said["stored_bytes"] >= sum(row["stored_bytes"] for row in said["rows"])


def test_ensemble_continues_and_repeats_nothing(tmp_path, monkeypatch):
    images = bright()
    experiment = experiments.ensemble(config(tmp_path), images, 2, 1)
    outcome, asked = experiments.Experiment._outcome, []

    def interrupted(self, branch, base):
        asked.append(branch.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return outcome(self, branch, base)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiments.Experiment, "_outcome", interrupted)
        experiment.run()
    assert not (tmp_path / "out" / experiments.RESULTS).exists()
    checkpoint = tmp_path / "out" / "member1" / CHECKPOINT
    written = checkpoint.stat().st_mtime_ns
    experiments.ensemble(config(tmp_path), images, 2, 1).run()
    first = results(tmp_path)
    assert checkpoint.stat().st_mtime_ns == written and len(first["rows"]) == 2
    experiments.ensemble(config(tmp_path), images, 2, 1).run()
    assert results(tmp_path) == first


@pytest.mark.parametrize("start_epochs", [0, 1])
def test_tasks_share_their_backbone(tmp_path, start_epochs):
    sets = [bright("four"), bright("three", classes=3, seed=1)]
    experiments.tasks(config(tmp_path), sets, start_epochs).run()
    said, out = results(tmp_path), tmp_path / "out"
    start = read_checkpoint(out / "start" / CHECKPOINT)["model"]
    for row, images in zip(said["rows"], sets, strict=True):
        assert row["name"] == images.name
        state = read_checkpoint(out / images.name / CHECKPOINT)["model"]
        assert state["fc.weight"].shape == (images.num_classes, 64)
        assert torch.equal(state["block3.0.conv2.weight"][:48], start["block3.0.conv2.weight"][:48])
        network = networks.build("wrn-10-1", images.num_classes, seed=5)
        load_compact(network, out / images.name / "learned.safetensors", **({"base": start} if start_epochs else {}))
        torch.testing.assert_close(dict(network.state_dict()), dict(state), rtol=0, atol=0)
    backbone = sum(v.numel() * v.element_size() for v in start.values()) if start_epochs else 0
    assert said["stored_bytes"] == backbone + sum(row["stored_bytes"] for row in said["rows"])
    assert said["full_bytes"] > 2 * 300_000


def test_transfer_moves_one_part_at_a_time(tmp_path):
    source, target = bright("four"), bright("three", classes=3, seed=1)
    parts = ["block2", "nothing", "all"]
    experiments.transfer(config(tmp_path, part=None), source, target, parts, 1).run()
    said, out = results(tmp_path), tmp_path / "out"
    assert [row["name"] for row in said["rows"]] == parts and said["source"] == "four" and said["target"] == "three"
    start = read_checkpoint(out / "start" / CHECKPOINT)["model"]
    for part, moved in (("block2", {"block2", "fc"}), ("nothing", {"fc"}), ("all", None)):
        state = read_checkpoint(out / part / CHECKPOINT)["model"]
        changed = {key.split(".")[0] for key, v in state.items() if "bn" not in key and not _same(v, start[key])}
        assert changed == (moved or {"conv1", "block1", "block2", "block3", "fc"}), part


def _same(left, right):
    return left.shape == right.shape and torch.equal(left, right)


def test_sets_are_split_and_turned_into_tasks():
    images = bright(classes=5)
    first, second = data.split_classes(images, 2)
    assert (first.name, second.name, first.num_classes, second.num_classes) == ("bright-0-2", "bright-3-4", 3, 2)
    for task, offset in ((first, 0), (second, 3)):
        rows = (images.train.labels >= offset) & (images.train.labels < offset + task.num_classes)
        assert torch.equal(task.train.labels + offset, images.train.labels[rows])
        assert torch.equal(task.train.images, images.train.images[rows])
    turned = data.rotated(images, 1)
    assert turned.name == "bright-90deg" and torch.equal(turned.test.images[:, :, 0, 0], images.test.images[:, :, 0, 7])
    with pytest.raises(ValueError, match="split=3"):
        data.split_classes(images, 3)


FLAGS = ["--net", "wrn-10-1", "--epochs", "1", "--image-size", "8", "--batch-size", "512"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["ensemble", *FLAGS, "--part", "1", "--members", "2"],
        ["tasks", *FLAGS, "--part", "1", "--split", "2"],
        ["transfer", *FLAGS, "--parts", "block1", "--start-epochs", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_programs(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert "test accuracy" in capsys.readouterr().out
    (found,) = tmp_path.glob("runs/*/results.json")
    assert json.loads(found.read_text())["experiment"] == arguments[0]


def test_magnitudes_program_writes_every_filter(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *FLAGS, "--part", "0.25", "--out", str(out)]) == 0
    assert main(["magnitudes", str(out)]) == 0
    found = json.loads((out / "magnitudes.json").read_text())
    weight = read_checkpoint(out / CHECKPOINT)["model"]["block1.0.conv1.weight"]
    expected = weight.square().mean((1, 2, 3)).sqrt().tolist()
    layer = found["block1.0.conv1"]
    assert layer["fixed"] + layer["learned"] == pytest.approx(expected, abs=1e-6) and len(layer["learned"]) == 4
    assert main(["magnitudes", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ensemble", *FLAGS, "--part", "1", "--members", "1"], "members=1"),
        (["ensemble", *FLAGS, "--part", "1", "--start-epochs", "-1"], "start_epochs=-1"),
        (["tasks", *FLAGS, "--part", "1"], "one task alone"),
        (["tasks", *FLAGS, "--part", "1", "--split", "6"], "split=6"),
        (["tasks", *FLAGS, "--part", "99", "--split", "2"], "trainable=99"),
        (["transfer", *FLAGS, "--parts", "block9"], "block9"),
        (["transfer", *FLAGS, "--parts", "fc", "fc"], "the same"),
        (["transfer", *FLAGS, "--only", "fc"], "give --parts"),
        (["transfer", *FLAGS, "--start-epochs", "0"], "nothing to transfer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_programs_refuse_in_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []
