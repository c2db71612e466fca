"""Experiments of several runs that share a start: ensembles, many tasks over one backbone, transfer of one part.

The start is a network as it was drawn from a seed, or trained for some epochs. Each run fixes most of it, learns its
own part, and is stored as a compact checkpoint; what is reported is computed by the networks that come out of those
files. Everything lies in one folder. Stopped and started again, an experiment continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rwn_ext import load_compact, save_compact
from rwn_ext.files import replacing
from rwn_ext.paper.data import ImageSet
from rwn_ext.paper.progress import train_with_progress
from rwn_ext.paper.training import CHECKPOINT, Config, Ranks, Run, read_checkpoint

RESULTS = "results.json"
ALL = "all"


@dataclass(frozen=True)
class Branch:
    """One run from the shared start."""

    name: str
    config: Config
    images: ImageSet


@dataclass(frozen=True)
class Outcome:
    """What a branch has learned, where it is stored, and what the stored network says of each test image."""

    row: dict[str, Any]
    probabilities: Tensor  # (images, classes)
    labels: Tensor  # (images,)


class Experiment:
    """A start and its branches, ready to go; `kind` says what is made of their outcomes.

    Raises ValueError for a choice that cannot be run, before anything is written.
    """

    def __init__(
        self, kind: str, start: Config, images: ImageSet, start_epochs: int, branches: list[Branch],
        summary: Callable[[list[Outcome], int], dict[str, Any]],
    ) -> None:  # fmt: skip
        if Ranks().size > 1:
            raise ValueError("an experiment runs in one process; start it without torchrun, once for each GPU")
        if start_epochs < 0:
            raise ValueError(f"start_epochs={start_epochs} is no number of epochs; 0 starts from random weights")
        self.kind, self.branches, self.start_epochs, self.summary = kind, branches, start_epochs, summary
        self.out = start.out
        schedule = replace(start.schedule, epochs=max(start_epochs, 1))
        self.start = _resumed(replace(start, out=self.out / "start", schedule=schedule), images)
        self.start_config, names = self.start.config, [branch.name for branch in branches]
        if len(set(names)) < len(names):
            raise ValueError(f"two of {', '.join(names)} are the same; give each one once")
        for branch in branches:
            _resumed(replace(branch.config, out=self.out / "unwritten"), branch.images)

    def run(self) -> None:
        """Trains what is left to train, prints the table, writes results.json."""
        if self.start_epochs:
            train_with_progress(self.start)
        else:
            self.start.save()
        base = read_checkpoint(self.start_config.out / CHECKPOINT)["model"]
        outcomes = [self._outcome(branch, base) for branch in self.branches]
        full = _bytes(base)
        results = {
            "experiment": self.kind, "net": self.start_config.net, "start_epochs": self.start_epochs,
            "rows": [outcome.row for outcome in outcomes], **self.summary(outcomes, full),
        }  # fmt: skip
        with replacing(self.out / RESULTS) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        _show(results, self.out)

    def _outcome(self, branch: Branch, base: dict[str, Tensor]) -> Outcome:
        folder = self.out / branch.name
        run = _resumed(replace(branch.config, out=folder, start=self.start_config.out), branch.images)
        train_with_progress(run)
        # Of a random start the seed says all; a trained one must be at hand when the file is loaded.
        random = {"seed": self.start_config.seed, "init": run.model.init}
        source: dict[str, Any] = {"base": base} if self.start_epochs else random
        path = folder / "learned.safetensors"
        save_compact(run.model, path, **source)
        full = _bytes(run.model.state_dict())
        # What is told is what the file holds: another network of the kind is filled from it.
        run.model = run.network(run.config.seed + 1)
        load_compact(run.model, path, base=source.get("base")).to(run.device)
        probabilities = run.probabilities()
        row = {
            "name": branch.name, "learned_weights": run.learned_weights, "stored_bytes": path.stat().st_size,
            "full_bytes": full, "accuracy": accuracy(probabilities, run.images.test.labels), "best": run.best,
            "seconds": sum(record["seconds"] for record in run.history),
        }  # fmt: skip
        return Outcome(row, probabilities.cpu(), run.images.test.labels.cpu())


def ensemble(config: Config, images: ImageSet, members: int, start_epochs: int) -> Experiment:
    """Networks from one start that differ in their seed: the order of images, and with select="random" what is learned.

    Its result is the accuracy of the mean of the members' softmax. Source: the paper's ensembles.
    """
    if members < 2:
        raise ValueError(f"members={members} make no ensemble; give 2 or more")
    branches = [Branch(f"member{i}", replace(config, seed=config.seed + i), images) for i in range(1, members + 1)]

    def summary(outcomes: list[Outcome], full: int) -> dict[str, Any]:
        mean = torch.stack([outcome.probabilities for outcome in outcomes]).mean(0)
        return {
            "mean_member_accuracy": sum(outcome.row["accuracy"] for outcome in outcomes) / members,
            "ensemble_accuracy": accuracy(mean, outcomes[0].labels),
            **_storage(outcomes, full if start_epochs else 0),
        }

    return Experiment("ensemble", _start_of(config), images, start_epochs, branches, summary)


def tasks(config: Config, images: list[ImageSet], start_epochs: int) -> Experiment:
    """Each image set is a task that learns its part of one backbone, random or trained on the first of them."""
    if len(images) < 2:
        raise ValueError("one task alone shares nothing; give --data several times, --split or --rotations")
    branches = [Branch(task.name, config, task) for task in images]

    def summary(outcomes: list[Outcome], full: int) -> dict[str, Any]:
        return _storage(outcomes, full if start_epochs else 0)

    return Experiment("tasks", _start_of(config), images[0], start_epochs, branches, summary)


def transfer(config: Config, source: ImageSet, target: ImageSet, parts: list[str], start_epochs: int) -> Experiment:
    """A network trained on `source` learns `target` by one of its parts at a time, a middle layer for example.

    A classifier for another number of classes is learned with every part. The part "all" is the whole network.
    """
    if start_epochs < 1:
        raise ValueError(f"start_epochs={start_epochs}: a network that was not trained has nothing to transfer")
    if source.train.images.shape[1:] != target.train.images.shape[1:]:
        raise ValueError(f"{source.name} and {target.name} have images of different sizes; give one --image-size")
    other = source.num_classes != target.num_classes
    branches = []
    for part in parts:
        only: str | None = part
        if part == ALL:
            only = None
        elif other and "fc" not in part.split("+"):
            only = "fc" if part == "nothing" else f"{part}+fc"
        # There is nothing to choose in these.
        filters = None if only in ("fc", "nothing") else config.part
        branches.append(Branch(part, replace(config, only=only, part=filters), target))

    def summary(outcomes: list[Outcome], full: int) -> dict[str, Any]:
        return {"source": source.name, "target": target.name, **_storage(outcomes, full)}

    return Experiment("transfer", _start_of(config), source, start_epochs, branches, summary)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (probabilities.argmax(1) == labels).double().mean().item()


def _start_of(config: Config) -> Config:
    """The same network, wholly learned; with the initial values that the branches' fixed parts are to have."""
    frozen = "random" if config.frozen == "zero" else config.frozen
    return replace(config, part=None, frozen=frozen, only=None, dim=0, select="last")


def _resumed(config: Config, images: ImageSet) -> Run:
    return Run(config, images, resume=(config.out / CHECKPOINT).exists())


def _bytes(state: dict[str, Any]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _storage(outcomes: list[Outcome], backbone: int) -> dict[str, Any]:
    """Bytes on disk of all the compact files and of a trained backbone, and of as many whole networks."""
    stored = backbone + sum(outcome.row["stored_bytes"] for outcome in outcomes)
    return {"stored_bytes": stored, "full_bytes": sum(outcome.row["full_bytes"] for outcome in outcomes)}


def _show(results: dict[str, Any], out: Path) -> None:
    console = Console()
    table = Table(title=f"{results['experiment']} of {results['net']}", box=SIMPLE_HEAD)
    for column in ("", "weights learned", "stored", "test accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for row in results["rows"]:
        stored = f"{row['stored_bytes'] / 1e6:.2f} MB"
        table.add_row(row["name"], f"{row['learned_weights']:,}", stored, f"{row['accuracy']:.2f} %")
    console.print(table)
    if "ensemble_accuracy" in results:
        gain = results["ensemble_accuracy"] - results["mean_member_accuracy"]
        text = f"mean of the softmax {results['ensemble_accuracy']:.2f} %, {gain:+.2f} to the mean member; "
    else:
        text = ""
    ratio = results["full_bytes"] / results["stored_bytes"]
    text += (
        f"{results['stored_bytes'] / 1e6:.2f} MB stored, {results['full_bytes'] / 1e6:.2f} MB as "
        f"{len(results['rows'])} whole networks ({ratio:.1f} times as much)"
    )
    console.print(f"{text}\nresults in {out / RESULTS}", highlight=False, soft_wrap=True)
