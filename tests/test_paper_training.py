"""The training program: schedules, exact resumption, what it refuses, what it writes."""

import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rwn_ext import PartialConv2d, subsets
from rwn_ext.paper import data
from rwn_ext.paper.__main__ import main
from rwn_ext.paper.comparison import compare
from rwn_ext.paper.magnitudes import magnitudes, means
from rwn_ext.paper.schedules import Schedule, schedule_of
from rwn_ext.paper.training import CHECKPOINT, LOG, Config, Run

ROOT = Path(__file__).parents[1]
SCHEDULE = Schedule(batch_size=16, weight_decay=5e-4, epochs=3, milestones=(2,), factor=0.2, lr=0.05)


class Watcher:
    """Raises KeyboardInterrupt at a batch, as Ctrl-C does."""

    def __init__(self, interrupt_at: tuple[int, int] | None = None) -> None:
        self.interrupt_at = interrupt_at

    def batch(self, done, total, epoch):
        assert 1 <= done <= total
        if (epoch, done) == self.interrupt_at:
            raise KeyboardInterrupt

    def epoch(self, record):
        pass


@pytest.fixture(scope="module")
def images() -> data.ImageSet:
    """72 training images of 4 classes that differ in brightness, in batches of 16 with a ragged last one."""
    generator = torch.Generator().manual_seed(0)

    def split(n):
        labels = torch.arange(n) % 4
        noise = torch.randint(0, 60, (n, 3, 16, 16), generator=generator)
        return data.Split((noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels)

    return data.ImageSet("bright", split(72), split(20), 4, (0.5,) * 3, (0.3,) * 3, flip=True, padding=2)


def config(tmp_path, **options) -> Config:
    return Config(**({"net": "wrn-10-1", "schedule": SCHEDULE, "part": 0.25, "out": tmp_path / "run"} | options))


def state_of(path: Path) -> dict:
    return torch.load(path / CHECKPOINT, weights_only=True)


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ("wrn-28-10", (128, 5e-4, 200, {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 199: 0.0008})),
        ("densenet-bc-100-12", (64, 1e-4, 300, {149: 0.1, 150: 0.01, 299: 0.001})),
        ("vgg19-bn", (128, 1e-4, 164, {80: 0.1, 81: 0.01, 122: 0.001})),
        ("alexnet", (128, 1e-4, 164, {80: 0.1, 81: 0.01, 122: 0.001})),
    ],
)
def test_schedules_are_the_papers(net, expected):
    schedule = schedule_of(net)
    batch, decay, epochs, rates = expected
    assert (schedule.batch_size, schedule.weight_decay, schedule.epochs) == (batch, decay, epochs)
    assert schedule.momentum == 0.9
    assert {epoch: schedule.lr_at(epoch) for epoch in rates} == pytest.approx(rates)


def test_run_learns_and_records(tmp_path, images):
    run = Run(config(tmp_path, schedule=replace(SCHEDULE, epochs=8, milestones=())), images)
    best = run.train(Watcher())
    log = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [record["epoch"] for record in log] == list(range(1, 9))
    assert best == max(record["test_accuracy"] for record in log) == log[-1]["best"] > 80
    assert log[-1]["train_loss"] < log[0]["train_loss"] / 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [CHECKPOINT, LOG]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "channels_last": True}, {"amp": "bf16"}], ids=str)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, images, options):
    whole = config(tmp_path / "whole", **options)
    Run(whole, images).train(Watcher())
    broken = config(tmp_path / "broken", **options)
    with pytest.raises(KeyboardInterrupt):
        Run(broken, images).train(Watcher(interrupt_at=(1, 3)))
    assert len(state_of(broken.out)["history"]) == 1
    torch.manual_seed(99)
    Run(broken, images, resume=True).train(Watcher())
    left, right = state_of(whole.out), state_of(broken.out)
    for record in (*left["history"], *right["history"]):
        del record["seconds"]
    assert_same(left["model"], right["model"])
    assert_same(left["optimizer"], right["optimizer"])
    assert left["history"] == right["history"]


def test_a_checkpoint_does_not_say_how_the_optimizer_computes(tmp_path, images):
    first = Run(config(tmp_path), images)
    first.optimizer.param_groups[0]["fused"] = None  # of a run on a GPU
    first.save()
    assert Run(config(tmp_path), images, resume=True).optimizer.param_groups[0]["fused"] is True


def test_resuming_restores_the_subsets(tmp_path, images):
    first = Run(config(tmp_path), images)
    first.model.conv1.set_trainable_([0, 5])
    first.save()
    again = Run(config(tmp_path), images, resume=True)
    assert again.model.conv1.filters.indices == (0, 5)
    assert_same(again.model.state_dict(), first.model.state_dict())


def test_frozen_weights_stay_and_running_statistics_move(tmp_path, images):
    run = Run(config(tmp_path), images)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train(Watcher())
    after = run.model.state_dict()
    unit = run.model.block2[0].conv1
    fixed = unit.out_channels - len(unit.filters)
    assert_same(after["block2.0.conv1.weight"][:fixed], before["block2.0.conv1.weight"][:fixed])
    assert not torch.equal(after["block2.0.conv1.weight"][fixed:], before["block2.0.conv1.weight"][fixed:])
    assert not torch.equal(after["bn.running_mean"], before["bn.running_mean"])


def test_step_is_sgd_on_the_normalized_batch(tmp_path, images):
    run = Run(config(tmp_path, part=None), images)
    twin = Run(config(tmp_path, part=None), images).model
    batch, labels = images.train.images[:16], images.train.labels[:16]
    for group in run.optimizer.param_groups:
        group["lr"] = 0.05
    velocity = {name: 0.0 for name, _ in twin.named_parameters()}
    for _ in range(2):
        loss, _ = run.step(run.model, batch, labels)
        reference = nn.functional.cross_entropy(twin((batch / 255 - 0.5) / 0.3), labels)
        twin.zero_grad()
        reference.backward()
        torch.testing.assert_close(loss, reference.detach())
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                velocity[name] = 0.9 * velocity[name] + parameter.grad + 5e-4 * parameter
                parameter -= 0.05 * velocity[name]
    torch.testing.assert_close(dict(run.model.named_parameters()), dict(twin.named_parameters()), rtol=1e-4, atol=1e-5)


def test_adam_run_is_adam_and_resumes(tmp_path, images):
    options = {"optimizer": "adam", "schedule": replace(SCHEDULE, lr=0.01, epochs=2)}
    whole = Run(config(tmp_path / "whole", **options), images)
    whole.train(Watcher())
    assert isinstance(whole.optimizer, torch.optim.Adam)
    first = config(tmp_path / "broken", **options | {"schedule": replace(SCHEDULE, lr=0.01, epochs=1)})
    Run(first, images).train(Watcher())
    Run(config(tmp_path / "broken", **options), images, resume=True).train(Watcher())
    left, right = state_of(whole.config.out), state_of(first.out)
    assert_same(left["model"], right["model"])
    fresh = Run(config(tmp_path / "fresh", **options), images)
    fresh.save()
    resumed = Run(config(tmp_path / "fresh", **options), images, resume=True)
    resumed.train(Watcher())
    assert_same(resumed.model.state_dict(), left["model"])
    with pytest.raises(ValueError, match="optimizer='adam' there, 'sgd' here"):
        Run(config(tmp_path / "broken", schedule=replace(SCHEDULE, lr=0.01)), images, resume=True)


def test_run_begins_with_anothers_weights(tmp_path, images):
    first = Run(config(tmp_path / "first", part=None), images)
    first.train(Watcher())
    options = {"part": None, "only": "block2", "start": first.config.out, "seed": 5}
    second = Run(config(tmp_path / "second", **options), images)
    before = {key: value.clone() for key, value in second.model.state_dict().items()}
    assert_same(before, dict(first.model.state_dict()))
    second.train(Watcher())
    changed = {key for key, value in second.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed if "bn" not in key} == {"block2"}
    Run(config(tmp_path / "second", **options), images, resume=True)
    with pytest.raises(ValueError, match=r"start='.*' there, None here"):
        Run(config(tmp_path / "second", **options | {"start": None}), images, resume=True)
    state = state_of(first.config.out)
    state["model"]["fc.bias"] += 1
    torch.save(state, first.config.out / CHECKPOINT)
    with pytest.raises(ValueError, match="start="):
        Run(config(tmp_path / "second", **options), images, resume=True)
    with pytest.raises(ValueError, match="nowhere"):
        Run(config(tmp_path / "third", start=tmp_path / "nowhere"), images)


def test_checkpoints_of_before_the_later_choices_resume(tmp_path, images):
    Run(config(tmp_path, schedule=replace(SCHEDULE, epochs=1)), images).train(Watcher())
    path = tmp_path / "run" / CHECKPOINT
    state = torch.load(path, weights_only=True)
    for key in ("dim", "select", "gamma", "optimizer", "bn", "start"):
        del state["identity"][key]
    state["identity"]["learn_bn"] = True
    torch.save(state, path)
    assert len(Run(config(tmp_path), images, resume=True).history) == 1
    with pytest.raises(ValueError, match="dim=0 there, 1 here"):
        Run(config(tmp_path, dim=1), images, resume=True)
    state["identity"]["learn_bn"] = False
    torch.save(state, path)
    with pytest.raises(ValueError, match="bn='frozen' there, 'learned' here"):
        Run(config(tmp_path), images, resume=True)


def test_records_say_how_much_is_learned_and_how_large_it_is(tmp_path, images):
    run = Run(config(tmp_path), images)
    run.train(Watcher())
    assert {record["learned_weights"] for record in run.history} == {run.learned_weights}
    fixed, learned = [], []
    for module in run.model.modules():
        if isinstance(module, PartialConv2d):
            fixed.append(module.weight_frozen.detach().flatten(1).square().mean(1).sqrt())
            learned.append(module.weight_trainable.detach().flatten(1).square().mean(1).sqrt())
    last = run.history[-1]["magnitudes"]
    assert last["fixed"] == pytest.approx(torch.cat(fixed).mean().item(), rel=1e-5)
    assert last["learned"] == pytest.approx(torch.cat(learned).mean().item(), rel=1e-5)
    assert run.history[0]["magnitudes"]["fixed"] == last["fixed"]
    assert run.history[0]["magnitudes"]["learned"] != last["learned"]


@pytest.mark.parametrize("options", [{"part": None}, {"dim": 1}, {"dim": 2}, {"only": "block1", "part": None}], ids=str)
def test_magnitudes_of_every_kind_of_part(tmp_path, images, options):
    run = Run(config(tmp_path, **options), images)
    found = magnitudes(run.model.state_dict(), subsets(run.model))
    layer = found["block1.0.conv2"]
    sizes = {"fixed": len(layer["fixed"]), "learned": len(layer["learned"])}
    assert sizes == {"fixed": 16 if "dim" in options else 0, "learned": 16}
    other = found["block2.0.conv2"]
    assert len(other["learned"]) == (0 if options.get("only") else 32)
    weight = run.model.block1[0].conv2
    if options.get("dim") == 1:
        expected = weight.weight_trainable.detach().square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(layer["learned"], expected)
        torch.testing.assert_close(layer["fixed"], weight.weight[:, :12].detach().square().mean((1, 2, 3)).sqrt())
    elif options.get("dim") == 2:
        torch.testing.assert_close(layer["fixed"], weight.weight_frozen.square().mean((1, 2, 3)).sqrt())
    assert (means(found)["fixed"] is None) == (options == {"part": None})


def test_learning_rate_follows_the_schedule(tmp_path, images):
    run = Run(config(tmp_path), images)
    rates = [run.optimizer.param_groups[0]["lr"] for _ in run.epochs(Watcher())]
    assert rates == pytest.approx([0.05, 0.05, 0.01]) == [record["lr"] for record in run.history]


def test_accuracy_is_that_of_evaluation_mode(tmp_path, images):
    run = Run(config(tmp_path), images)
    run.train(Watcher())
    model = run.model.eval()
    with torch.no_grad():
        predicted = model(data.normalize(images.test.images, images.mean, images.std)).argmax(1)
    assert run.history[-1]["test_accuracy"] == pytest.approx(100 * (predicted == images.test.labels).float().mean())


def test_diverging_run_stops_and_keeps_its_last_checkpoint(tmp_path, images):
    run = Run(config(tmp_path), images)
    run.train(Watcher())
    worse = config(tmp_path, schedule=replace(SCHEDULE, epochs=4))
    resumed = Run(worse, images, resume=True)
    resumed.model.fc.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="loss of epoch 4 is nan"):
        resumed.train(Watcher())
    assert len(state_of(worse.out)["history"]) == 3
    assert state_of(worse.out)["model"]["fc.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": "wrn-16-1"}, "net='wrn-10-1' there, 'wrn-16-1' here"),
        ({"part": 1}, "part=0.25 there, 1 here"),
        ({"seed": 7}, "seed=0 there, 7 here"),
        ({"schedule": replace(SCHEDULE, lr=0.1)}, "lr=0.05 there, 0.1 here"),
    ],
    ids=str,
)
def test_checkpoint_of_another_run_is_refused(tmp_path, images, change, message):
    run = Run(config(tmp_path), images)
    run.save()
    with pytest.raises(ValueError, match=message):
        Run(config(tmp_path, **change), images, resume=True)


def test_one_filter_is_not_all_of_them(tmp_path, images):
    run = Run(config(tmp_path, part=1), images)
    run.save()
    with pytest.raises(ValueError, match=r"part=1 there, 1\.0 here"):
        Run(config(tmp_path, part=1.0), images, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": [1]}, {"history": 3}, {"history": [3]}, {"history": [{}]}, {"optimizer": {}}, {"optimizer": 3},
        {"scaler": 3}, {"subsets": {"conv1": 3}}, {"subsets": {"conv9": ([0], [0])}}, {"model": {}},
    ],
    ids=str,
)  # fmt: skip
def test_checkpoints_that_hold_something_else_are_refused(tmp_path, images, change):
    run = Run(config(tmp_path, schedule=replace(SCHEDULE, epochs=1)), images)
    run.train(Watcher())
    path = run.config.out / CHECKPOINT
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ValueError, match="is no checkpoint of this"):
        Run(config(tmp_path), images, resume=True)


@pytest.mark.parametrize("what", ["no state", "another shape", "no momentum"])
def test_checkpoints_with_another_optimizer_are_refused(tmp_path, images, what):
    run = Run(config(tmp_path, schedule=replace(SCHEDULE, epochs=1)), images)
    run.train(Watcher())
    path = run.config.out / CHECKPOINT
    state = torch.load(path, weights_only=True)
    if what == "no state":
        state["optimizer"]["state"] = {}
    elif what == "another shape":
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    else:
        del state["optimizer"]["param_groups"][0]["momentum"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="is no checkpoint of this run"):
        Run(config(tmp_path), images, resume=True)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(Hostile()), "truncated"], ids=str)
def test_damaged_and_hostile_checkpoints_are_refused(tmp_path, images, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(config(tmp_path), images)
    run.save()
    path = run.config.out / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-200] if content == "truncated" else content)
    with pytest.raises(ValueError, match="no checkpoint that can be read") as refusal:
        Run(config(tmp_path), images, resume=True)
    assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--net", "resnet-18"], "there is no network 'resnet-18'"),
        (["--net", "wrn-11-1"], "depth 6n + 4"),
        (["--net", "wrn-10-1", "--data", "nowhere"], "nowhere: is no folder"),
        (["--net", "wrn-10-1", "--only", "nothing", "--bn", "frozen"], "nothing of wrn-10-1 to learn"),
        (["--net", "wrn-10-1", "--part", "40"], "conv1: trainable=40"),
        (["--net", "wrn-10-1", "--part", "1.5"], "1.5"),
        (["--net", "wrn-10-1", "--only", "block7"], "only='block7'"),
        (["--net", "wrn-10-1", "--epochs", "0"], "epochs=0"),
        (["--net", "wrn-10-1", "--batch-size", "0"], "batch_size=0"),
        (["--net", "wrn-10-1", "--lr", "nan"], "lr=nan"),
        (["--net", "wrn-10-1", "--resume"], "nothing to resume"),
        (["--net", "wrn-10-1", "--image-size", "4"], "image_size=4"),
        (["--net", "alexnet", "--image-size", "16"], "alexnet cannot take 16x16 images"),
        (["--net", "wrn-10-1", "--device", "tpu"], "tpu"),
        (["--net", "wrn-10-1", "--device", "meta"], "device='meta'"),
        (["--net", "wrn-10-1", "--seed", "99999999999999"], "seed=99999999999999"),
        (["--net", "wrn-10-1", "--out", "/dev/null/x"], "no folder that can be written to"),
        (["--net", "wrn-10-1", "--dim", "1"], "dim=1 needs"),
        (["--net", "wrn-10-1", "--start", "nowhere"], "no checkpoint"),
        (["--net", "wrn-10-1", "--only", "nothing", "--part", "0.1"], "only='nothing' has no convolution"),
        (["--net", "wrn-10-1", "--only", "fc", "--part", "1"], "only='fc' has no convolution"),
        (["--net", "wrn-99999999999999994-1"], "there is no network"),
        (["--net", "wrn-10-1", "--data", "x" * 300], "cannot be read"),
        pytest.param(
            ["--net", "wrn-10-1", "--device", "cuda"], "no usable GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "_".join(value[1:]),
)  # fmt: skip
def test_program_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "--net", "vgg19", "--part", "half"]], ids=str)
def test_program_shows_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: python -m rwn_ext.paper" in capsys.readouterr().err


def test_demo_refuses_a_folder_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_program_says_in_one_line_what_stops_it_on_the_way(tmp_path, capsys):
    assert main(["train", *QUICK, "--lr", "1e30", "--epochs", "2", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("failed: the loss of epoch") and error.count("\n") == 1


@pytest.mark.parametrize(("epoch", "way_on"), [(0, "start again"), (1, "--resume continues")])
def test_program_interrupted_says_the_way_on(tmp_path, monkeypatch, capsys, epoch, way_on):
    def interrupt(self, done, total, running):
        if running == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr("rwn_ext.paper.progress.ProgressWatcher.batch", interrupt)
    assert main(["train", *QUICK, "--epochs", "2", "--out", str(tmp_path / "run")]) == 130
    assert way_on in capsys.readouterr().err


QUICK = ["--net", "wrn-10-1", "--part", "1", "--epochs", "1", "--image-size", "8", "--batch-size", "512"]


def test_program_trains_resumes_and_will_not_overwrite(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK]) == 0
    out = tmp_path / "runs" / "digits-wrn-10-1-part1-random-seed0"
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, LOG]
    assert main(["train", *QUICK]) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert main(["train", *QUICK, "--epochs", "2", "--resume"]) == 0
    assert len((out / LOG).read_text().splitlines()) == 2
    assert "best test accuracy" in capsys.readouterr().out


def test_program_reads_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = data.LAYOUTS["cifar-10-batches-bin"]
    small = replace(layout, train=dict.fromkeys(layout.train, 8), test={"test_batch.bin": 8})
    monkeypatch.setitem(data.LAYOUTS, "cifar-10-batches-bin", small)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*small.train, *small.test):
        torch.randint(0, 10, (8, 3073), dtype=torch.uint8).numpy().tofile(folder / name)
    assert main(["train", "--net", "wrn-10-1", "--data", str(folder), "--epochs", "1", "--channels-last"]) == 0


def test_compiled_run_trains_like_an_eager_one(tmp_path, images):
    histories = []
    for name, compiled in (("eager", False), ("compiled", True)):
        run = Run(
            config(tmp_path / name, compile=compiled, schedule=replace(SCHEDULE, epochs=1, batch_size=36)), images
        )
        run.train(Watcher())
        histories.append(run.history[0]["train_loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def without_seconds(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "channels_last": True, "part": None}], ids=str)
def test_steps_to_be_captured_train_like_others(tmp_path, images, options):
    """On a CPU, where nothing is captured: the same numbers from the same draws, over a change of the rate."""
    runs = [Run(config(tmp_path / str(graph), graph=graph, **options), images) for graph in (False, True)]
    for run in runs:
        run.train(Watcher())
    assert without_seconds(runs[0].history) == without_seconds(runs[1].history)
    assert_same(runs[0].model.state_dict(), runs[1].model.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, {"part": None}, {"amp": "bf16", "channels_last": True}, {"optimizer": "adam"}, {"dim": 2}], ids=str
)
def test_captured_steps_train_like_others(tmp_path, images, options):
    schedule = replace(SCHEDULE, lr=0.001 if "optimizer" in options else 0.05)
    options = options | {"device": "cuda", "schedule": schedule}
    runs = [Run(config(tmp_path / str(graph), graph=graph, **options), images) for graph in (False, True)]
    for run in runs:
        run.train(Watcher())
    assert runs[1]._captured_learn.graph is not None
    for plain, captured in zip(runs[0].history, runs[1].history, strict=True):
        assert plain["train_loss"] == pytest.approx(captured["train_loss"], rel=0.05)
    for plain, captured in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(plain, captured, rtol=0.05, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_epoch_keeps_the_gpu_busy(tmp_path):
    """At least 90 % of an epoch in kernels, of a network whose kernels are longer than a launch."""
    generator = torch.Generator().manual_seed(0)
    split = data.Split(
        torch.randint(0, 256, (6400, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(6400) % 10
    )
    cifar = data.ImageSet("noise", split, split, 10, (0.5,) * 3, (0.3,) * 3, flip=True, padding=4)
    run = Run(
        Config("wrn-28-4", replace(schedule_of("wrn-28-4"), epochs=3), 0.1, amp="bf16", channels_last=True, graph=True,
               device="cuda", out=tmp_path / "run"), cifar,
    )  # fmt: skip
    epochs = run.epochs(Watcher())
    next(epochs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = -time.perf_counter()
        loss, _ = run._train_epoch(run.model, 1, run.config.schedule.lr_at(1), Watcher())
        torch.cuda.synchronize()
        seconds += time.perf_counter()
    kernels = sum(event.device_time_total for event in profile.key_averages()) / 1e6
    assert kernels >= 0.9 * seconds and loss > 0


def test_graph_refuses_what_it_cannot_hold(tmp_path, images):
    with pytest.raises(ValueError, match="loss scaling"):
        Run(config(tmp_path, graph=True, amp="fp16"), images)


def test_comparison_trains_the_plain_twin_beside(tmp_path, images, capsys):
    run = Run(config(tmp_path, bn="frozen"), images)
    compare(run)
    result = json.loads((tmp_path / "run" / "compare.json").read_text())
    plain = state_of(tmp_path / "run" / "plain")
    assert plain["identity"]["part"] is None and plain["identity"]["bn"] == "learned" and not plain["subsets"]
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(run.history, plain["history"], strict=True))
    assert len(ratios) == 3 and result["ratio"] == ratios[1]
    assert f"ratio {ratios[1]:.2f}" in capsys.readouterr().out
    alone = Run(config(tmp_path / "alone", bn="frozen"), images)
    alone.train(Watcher())
    assert without_seconds(alone.history) == without_seconds(run.history)
    again = Run(config(tmp_path, bn="frozen"), images, resume=True)
    compare(again)
    assert json.loads((tmp_path / "run" / "compare.json").read_text()) == result


WORKER = """
import os, signal, sys
import torch
import torch.distributed as dist
from rwn_ext.paper.__main__ import main
from rwn_ext.paper.training import Run

def alike(self):
    for name, value in self.model.named_parameters():
        first = value.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), f"rank {self.ranks.rank} differs in {name}"

evaluate = Run._evaluate
Run._evaluate = lambda self: (alike(self), evaluate(self))[1]
steps, kill_at = 0, os.environ.get("KILL_RANK_1_AT_STEP")

def step(self, *arguments):
    global steps
    steps += 1
    if str(steps) == kill_at and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, *arguments)

take_step, Run.step = Run.step, step
sys.exit(main(sys.argv[1:]))
"""


def torchrun(folder: Path, *arguments: str, kill_at_step: int | None = None) -> subprocess.CompletedProcess:
    """Two processes on one machine, whose parameters are alike after every epoch; the second may be killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if kill_at_step is not None:
        environment["KILL_RANK_1_AT_STEP"] = str(kill_at_step)
    (folder / "worker.py").write_text(WORKER)
    return subprocess.run(
        [*command, "worker.py", "train", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip


def log_of(folder: Path) -> list[dict]:
    """Without the times."""
    records = map(json.loads, (folder / LOG).read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.works_with("torchrun: a run of which a process was killed resumes bit for bit (on a CPU)")
def test_two_processes_of_which_one_is_killed_resume_bit_for_bit(tmp_path):
    """An epoch has three steps; the second process dies in the middle of the second epoch."""
    arguments = [*QUICK, "--device", "cpu", "--epochs", "2"]
    whole = torchrun(tmp_path, *arguments, "--out", "whole")
    assert whole.returncode == 0 and whole.stdout.count("best test accuracy") == 1, whole.stdout
    killed = torchrun(tmp_path, *arguments, "--out", "killed", kill_at_step=5)
    assert killed.returncode != 0 and "SIGKILL" in killed.stdout, killed.stdout
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")[:1]
    assert len(state_of(tmp_path / "killed")["history"]) == 1
    resumed = torchrun(tmp_path, *arguments, "--out", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stdout
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole") and len(log_of(tmp_path / "whole")) == 2
    left, right = (state_of(tmp_path / name) for name in ("killed", "whole"))
    assert_same(left["model"], right["model"])
    assert_same(left["optimizer"], right["optimizer"])


@pytest.mark.parametrize("when", ["half a checkpoint", "before the log"])
def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path, images, when, monkeypatch):
    """It never comes to clean up: an exception that nothing handles stands for the kill."""
    Run(config(tmp_path / "whole"), images).train(Watcher())
    broken = Run(config(tmp_path / "broken"), images)
    epochs = broken.epochs(Watcher())
    next(epochs)
    save = torch.save

    def save_half(state, path):
        save(state, path)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        raise KeyboardInterrupt

    def write_no_log(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "half a checkpoint":
            patch.setattr(torch, "save", save_half)
        else:
            patch.setattr(Run, "_write_log", write_no_log)
        with pytest.raises(KeyboardInterrupt):
            next(epochs)
    assert len(log_of(tmp_path / "broken" / "run")) == 1
    assert len(state_of(tmp_path / "broken" / "run")["history"]) == (1 if when == "half a checkpoint" else 2)
    Run(config(tmp_path / "broken"), images, resume=True).train(Watcher())
    left, right = tmp_path / "broken" / "run", tmp_path / "whole" / "run"
    assert log_of(left) == log_of(right) and sorted(p.name for p in left.iterdir()) == [CHECKPOINT, LOG]
    assert_same(state_of(left)["model"], state_of(right)["model"])


def test_version_and_help_need_no_extra(tmp_path):
    """The help must work where only torch is installed."""
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'sklearn', 'numpy'): sys.modules[name] = None\n"
        "import runpy; sys.argv = ['paper', '--help']; runpy.run_module('rwn_ext.paper', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and "demo" in done.stdout


def test_images_too_large_for_the_device_stay_where_they_are(tmp_path, images, monkeypatch):
    """As on a GPU whose memory is too small: rows are moved batch by batch, and the numbers are the same."""
    run = Run(config(tmp_path / "all"), images)
    run.train(Watcher())
    moved = []
    monkeypatch.setattr("rwn_ext.paper.training._fits", lambda images, device: False)
    monkeypatch.setattr(data.Split, "to", lambda self, device: moved.append(self))
    lean = Run(config(tmp_path / "rows"), images)
    lean.train(Watcher())
    assert not moved and lean.images.train is images.train
    assert without_seconds(run.history) == without_seconds(lean.history)
