"""How a run shows itself: a progress bar that lives for an epoch, a line that stays, a table of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rwn_ext.files import replacing
from rwn_ext.paper.magnitudes import KINDS, Magnitudes
from rwn_ext.paper.training import Run


def bar(console: Console) -> Progress:
    """A progress bar; on anything but a terminal it stays silent."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class ProgressWatcher:
    """Shows a run's batches as a bar and its epochs as lines."""

    def __init__(self, progress: Progress, name: str, epochs: int) -> None:
        self.progress, self.name, self.epochs = progress, name, epochs
        self.task = progress.add_task(name)

    def batch(self, done: int, total: int, epoch: int) -> None:
        self.progress.update(
            self.task, description=f"{self.name} epoch {epoch + 1}/{self.epochs}", completed=done, total=total
        )

    def epoch(self, record: dict[str, Any]) -> None:
        self.progress.console.print(
            f"{self.name}  epoch {record['epoch']}/{self.epochs}  loss {record['train_loss']:.4f}  "
            f"train {record['train_accuracy']:.2f} %  test {record['test_accuracy']:.2f} %  "
            f"best {record['best']:.2f} %  {record['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


class SilentWatcher:
    """For the processes that are not the first."""

    def batch(self, done: int, total: int, epoch: int) -> None: ...

    def epoch(self, record: dict[str, Any]) -> None: ...


def train_with_progress(run: Run) -> None:
    """Trains the run, showing how it goes, and says where its files are."""
    console = Console()
    config = run.config
    if not run.ranks.first:
        run.train(SilentWatcher())
        return
    learned = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    console.print(
        f"{config.net} on {run.images.name}, {run.device}: {learned:,} of {total:,} parameters learned; "
        f"{len(run.history)} of {config.schedule.epochs} epochs done",
        highlight=False,
        soft_wrap=True,
    )
    with bar(console) as progress:
        best = run.train(ProgressWatcher(progress, config.net, config.schedule.epochs))
    console.print(
        f"best test accuracy {best:.2f} %; log and checkpoint in {config.out}", highlight=False, soft_wrap=True
    )


def show_magnitudes(found: Magnitudes, path: Path) -> None:
    """Prints a table of the layers' means and writes every filter's value: {layer: {kind: [...]}} in JSON."""
    table = Table(title="root mean square of filters (mean)", box=SIMPLE_HEAD)
    for column in ("layer", *KINDS):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, kinds in found.items():
        table.add_row(layer, *(f"{kinds[kind].mean().item():.4f}" if len(kinds[kind]) else "" for kind in KINDS))
    Console().print(table)
    values = {
        layer: {kind: [round(value, 6) for value in kinds[kind].tolist()] for kind in KINDS}
        for layer, kinds in found.items()
    }
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(values) + "\n")
