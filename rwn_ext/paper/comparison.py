"""A run beside its twin in plain nn.Conv2d, of which everything is learned: how much time does learning less take?"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

from rich.console import Console

from rwn_ext.files import replacing
from rwn_ext.paper.progress import ProgressWatcher, bar
from rwn_ext.paper.timing import ratio
from rwn_ext.paper.training import CHECKPOINT, Run

PLAIN = "nn.Conv2d"


def compare(run: Run) -> None:
    """Trains the run and its twin, epoch by epoch in turn, prints the ratio and writes it to compare.json.

    The time of an epoch is its log's: training and evaluation, without loading. The ratio is the median over epochs of
    the ratio within an epoch, so that neither a drift of the machine nor what the first epoch compiles decides.
    """
    console = Console()
    runs = {"this run": run, PLAIN: twin(run)}
    with bar(console) as progress:
        epochs = [
            each.epochs(ProgressWatcher(progress, f"{name:9}", each.config.schedule.epochs))
            for name, each in runs.items()
        ]
        waiting = list(epochs)
        while waiting:
            waiting = [each for each in waiting if next(each, None) is not None]
    seconds = {name: [record["seconds"] for record in each.history] for name, each in runs.items()}
    result: dict[str, Any] = {
        "ratio": ratio(seconds, "this run", PLAIN),
        "seconds": {name: sum(times) for name, times in seconds.items()},
        "epoch_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "best": {name: each.best for name, each in runs.items()},
    }
    with replacing(run.config.out / "compare.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    own, plain = (result["epoch_seconds"][name] for name in runs)
    console.print(
        f"median epoch {own:.2f} s, of plain nn.Conv2d {plain:.2f} s: ratio {result['ratio']:.2f}; best test accuracy "
        f"{run.best:.2f} %, of plain nn.Conv2d {runs[PLAIN].best:.2f} %; log and checkpoint in {run.config.out}",
        highlight=False,
        soft_wrap=True,
    )


def twin(run: Run) -> Run:
    """The same run with every weight learned in nn.Conv2d; continued if it was begun."""
    config = replace(
        run.config, part=None, frozen="random", only=None, dim=0, select="last", bn=_learned(run.config.bn),
        out=run.config.out / "plain",
    )  # fmt: skip
    return Run(config, run.images, resume=(config.out / CHECKPOINT).exists())


def _learned(bn: str) -> str:
    return "none" if bn == "none" else "learned"
