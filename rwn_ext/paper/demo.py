"""The demo: one network on handwritten digits, learned wholly and in ever smaller parts, and what that saves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rwn_ext.paper import data
from rwn_ext.paper.costs import Cost, costs, machine
from rwn_ext.paper.progress import ProgressWatcher, bar
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.training import CHECKPOINT, Config, Run

NET, IMAGE_SIZE = "wrn-16-2", 16
PLAIN = "nn.Conv2d"
CONTENDERS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "p = 0.4": {"part": 0.4},
    "p = 0.1": {"part": 0.1},
    "1 filter": {"part": 1},
    "BN only": {"only": "nothing"},
}


@dataclass
class Row(Cost):
    """What one contender learned, cost and reached."""

    name: str
    best_accuracy: float


class Demo:
    """The five trainings, ready to go, and what is made of them."""

    def __init__(self, out: Path, epochs: int, rounds: int, device: str) -> None:
        if rounds < 1:
            raise ValueError(f"rounds={rounds} measures nothing; give 1 or more")
        self.out, self.rounds = out, rounds
        images = data.load(None, image_size=IMAGE_SIZE)
        milestones = (epochs - 2,) if epochs > 2 else ()
        schedule = replace(schedule_of(NET), epochs=epochs, milestones=milestones)
        config = Config(net=NET, schedule=schedule, device=device, channels_last=True)
        self.runs = {}
        for name, choice in CONTENDERS.items():
            folder = out / "".join(c for c in name.lower() if c.isalnum())
            (folder / CHECKPOINT).unlink(missing_ok=True)
            self.runs[name] = Run(replace(config, out=folder, **choice), images)

    def show(self) -> None:
        """Trains, measures, and ends with the table, the picture and where they are."""
        console = Console()
        with bar(console) as progress:
            best = {name: self._train(name, run, progress) for name, run in self.runs.items()}
            rows = self._measure(best, progress)
        self.out.mkdir(parents=True, exist_ok=True)
        schedule = self.runs[PLAIN].config.schedule
        results = {
            "machine": machine(self.runs[PLAIN].device),
            "net": NET,
            "image_size": IMAGE_SIZE,
            "batch_size": schedule.batch_size,
            "epochs": schedule.epochs,
            "rounds": self.rounds,
            "rows": [asdict(row) for row in rows],
        }
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (self.out / "table.md").write_text(markdown(results))
        drawn(results).savefig(self.out / "demo.png", dpi=120)
        console.print(_table(rows))
        console.print(f"picture: {self.out / 'demo.png'}   numbers: {self.out / 'results.json'}", highlight=False)

    def _train(self, name: str, run: Run, progress: Progress) -> float:
        watcher = ProgressWatcher(progress, f"{name:9}", run.config.schedule.epochs)
        best = run.train(watcher)
        progress.remove_task(watcher.task)
        return best

    def _measure(self, best: dict[str, float], progress: Progress) -> list[Row]:
        task = progress.add_task("timing", total=self.rounds)
        found = costs(self.runs, PLAIN, self.rounds, after_round=lambda: progress.advance(task))
        progress.remove_task(task)
        return [Row(**asdict(cost), name=name, best_accuracy=best[name]) for name, cost in found.items()]


HEADER = (
    "learned",
    "weights learned",
    "median step",
    "to nn.Conv2d",
    "gradients + optimizer",
    "saved for backward",
    "best test accuracy",
)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.learned_weights:,}",
        f"{row.step_ms:.0f} ms" if row.step_ms >= 10 else f"{row.step_ms:.2f} ms",
        f"{row.step_ratio:.2f}",
        f"{row.training_bytes / 1e6:.2f} MB",
        f"{row.saved_bytes / 1e6:.1f} MB",
        f"{row.best_accuracy:.1f} %",
    )


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{NET} on handwritten digits: what learning less saves", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, title in enumerate(HEADER):
        table.add_column(title.replace(" ", "\n"), justify="right" if i else "left")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file, for a README."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *(_cells(Row(**row)) for row in results["rows"])]
    caption = (
        f"{results['net']}, digits at {results['image_size']}x{results['image_size']}, batch {results['batch_size']}, "
        f"{results['epochs']} epochs; {results['machine']}"
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}\n"


def drawn(results: dict[str, Any]) -> Figure:
    """Accuracy and relative step time against what is learned."""
    rows = [Row(**row) for row in reversed(results["rows"])]
    labels = [f"{row.name}\n{row.learned_weights:,}" for row in rows]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    accuracy, time = figure.subplots(1, 2)
    accuracy.plot(labels, [row.best_accuracy for row in rows], "o-", color="tab:blue")
    accuracy.set(title="Best test accuracy (%)", xlabel="learned (weights)", ylim=(0, 102))
    time.bar(labels, [row.step_ratio for row in rows], color="tab:orange")
    time.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    time.set(title="Step time relative to nn.Conv2d", xlabel="learned (weights)")
    for axes in (accuracy, time):
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        f"{results['net']} on handwritten digits, {results['epochs']} epochs ({results['machine']})", size=10
    )
    return figure
