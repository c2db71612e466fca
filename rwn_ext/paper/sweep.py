"""Sweeps: every combination of a small TOML file as a training run of its own, resumable, several at once."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rwn_ext.paper.progress import bar
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.training import CHECKPOINT, LOG

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a sweep may set: flags of the train program that take one value.
KEYS = (
    "net", "part", "frozen", "only", "bn", "dropout", "epochs", "batch-size", "lr", "momentum", "weight-decay",
    "factor", "seed", "image-size", "amp", "device", "data",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: the choices that make it and the folder it writes to."""

    choices: dict[str, Any]
    folder: Path

    @property
    def epochs(self) -> int:
        return self.choices.get("epochs") or schedule_of(self.choices["net"]).epochs

    def records(self) -> list[dict[str, Any]]:
        """One for each finished epoch."""
        log = self.folder / LOG
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def command(self) -> list[str]:
        flags = [part for key, value in self.choices.items() for part in (f"--{key}", str(value))]
        resume = ["--resume"] if (self.folder / CHECKPOINT).exists() else []
        return [sys.executable, "-m", "rwn_ext.paper", "train", *flags, "--out", str(self.folder), *resume]


class Sweep:
    """The runs of a TOML file, ready to go.

    `[fixed]` holds what all runs share and `[grid]` lists of what varies, under the names of the train program's flags;
    every combination is a run::

        [fixed]
        net = "wrn-10-2"
        image-size = 16
        [grid]
        part = [1.0, 0.4, 0.1, 1]      # a fraction has a decimal point, a count has none
        frozen = ["random", "zero"]
        seed = [0, 1, 2]

    `budget_epochs` shortens runs to at most that many epochs. Each run is a process of its own that writes whole files
    only, so the sweep may be stopped at any point; started again it continues. Raises ValueError for a file that says
    something else.
    """

    def __init__(
        self, file: Path, out: Path, *, jobs: int = 1, budget_epochs: int | None = None, data: Path | None = None
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs} runs nothing; give 1 or more")
        if budget_epochs is not None and budget_epochs < 1:
            raise ValueError(f"budget_epochs={budget_epochs} trains nothing; give 1 or more")
        fixed, grid = _read(file)
        if data is not None:
            fixed["data"] = str(data)
        self.varied, self.jobs, self.out = list(grid), jobs, out
        self.cells = []
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            choices = fixed | varied
            if budget_epochs is not None:
                choices["epochs"] = min(budget_epochs, choices.get("epochs") or schedule_of(choices["net"]).epochs)
            name = "-".join(f"{key}={value}" for key, value in varied.items()) or "run"
            self.cells.append(Cell(choices, out / name))

    def run(self) -> int:
        """Runs what is not finished, shows how it goes, prints the table; how many runs failed."""
        console, waiting = Console(), [cell for cell in self.cells if len(cell.records()) < cell.epochs]
        running: dict[subprocess.Popen[bytes], Cell] = {}
        failed: list[Cell] = []
        total = sum(cell.epochs for cell in self.cells)
        with bar(console) as progress:
            task = progress.add_task("epochs", total=total)
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        cell = waiting.pop(0)
                        running[_start(cell)] = cell
                    time.sleep(0.2)
                    for process in [process for process in running if process.poll() is not None]:
                        cell = running.pop(process)
                        if process.returncode:
                            failed.append(cell)
                        console.print(f"{cell.folder.name}: {_outcome(cell, process.returncode)}", soft_wrap=True)
                    progress.update(task, completed=sum(len(cell.records()) for cell in self.cells))
            finally:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()
        console.print(self.table())
        return len(failed)

    def rows(self) -> list[dict[str, Any]]:
        """For each combination but for the seed: seeds finished, mean and spread of their best test accuracy."""
        groups: dict[tuple[Any, ...], list[float]] = {}
        keys = [key for key in self.varied if key != "seed"]
        for cell in self.cells:
            group = groups.setdefault(tuple(str(cell.choices[key]) for key in keys), [])
            records = cell.records()
            if len(records) >= cell.epochs:
                group.append(max(record["test_accuracy"] for record in records))
        return [
            dict(zip(keys, group, strict=True))
            | {"runs": len(best), "mean": statistics.fmean(best) if best else None}
            | {"spread": statistics.stdev(best) if len(best) > 1 else None}
            for group, best in groups.items()
        ]

    def table(self) -> Table:
        table = Table(title="best test accuracy, % (mean and standard deviation over seeds)", box=SIMPLE_HEAD)
        rows = self.rows()
        for key in rows[0]:
            table.add_column(key, justify="right")
        for row in rows:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
        return table


def _read(file: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} is no sweep that can be read: {error}") from None
    unknown = set(content) - {"fixed", "grid"}
    if unknown:
        raise ValueError(f"{file}: [{sorted(unknown)[0]}] is unknown; a sweep has the tables [fixed] and [grid]")
    fixed, grid = content.get("fixed", {}), content.get("grid", {})
    for key in (*fixed, *grid):
        if key not in KEYS or (key in fixed and key in grid):
            raise ValueError(f"{file}: {key!r} is unknown or given twice; choose from {', '.join(KEYS)}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{file}: grid.{key}={values!r} is no list of choices")
    if "net" not in (*fixed, *grid):
        raise ValueError(f"{file}: no network is named; give net, such as 'wrn-28-10'")
    return fixed, grid


def _start(cell: Cell) -> subprocess.Popen[bytes]:
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "output.txt").open("ab") as output:
        return subprocess.Popen(cell.command(), stdout=output, stderr=subprocess.STDOUT)


def _outcome(cell: Cell, code: int) -> str:
    if code:
        return f"failed, see {cell.folder / 'output.txt'}"
    return f"best test accuracy {max(record['test_accuracy'] for record in cell.records()):.2f} %"
