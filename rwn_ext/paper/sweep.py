"""Sweeps: every combination of a small TOML file as a training run of its own, resumable, several at once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from rwn_ext.paper.experiments import RESULTS
from rwn_ext.paper.places import Place, claim, places
from rwn_ext.paper.progress import bar
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.training import CHECKPOINT, LOG

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a sweep may set: flags of the train program that take one value, and those that are there or not (true, false).
KEYS = (
    "net", "part", "frozen", "only", "bn", "dropout", "epochs", "batch-size", "lr", "momentum", "weight-decay",
    "factor", "seed", "image-size", "amp", "device", "data", "channels-last", "compile", "graph", "dim", "select",
    "gamma", "optimizer", "start",
)  # fmt: skip
FAILED = "failed"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: the choices that make it and the folder it writes to."""

    choices: dict[str, Any]
    folder: Path
    program: str = "train"
    """Or ensemble, tasks, transfer: an experiment of several runs, finished when its results are there."""

    @property
    def epochs(self) -> int:
        return self.choices.get("epochs") or schedule_of(self.choices["net"]).epochs

    @property
    def finished(self) -> bool:
        return self.epochs_done >= self.epochs

    @property
    def epochs_done(self) -> int:
        if self.program == "train":
            return len(self.records())
        return self.epochs if (self.folder / RESULTS).exists() else 0

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides how much memory it takes, but for how much is learned."""
        keys = ("net", "batch-size", "image-size", "amp", "channels-last", "compile", "graph", "data")
        return tuple(self.choices.get(key) for key in keys)

    def records(self) -> list[dict[str, Any]]:
        """One for each finished epoch."""
        log = self.folder / LOG
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def best(self) -> float:
        """The highest test accuracy over the epochs, in percent: what the paper reports; of an ensemble that of the
        ensemble, of other experiments the mean."""
        if self.program != "train":
            results = json.loads((self.folder / RESULTS).read_text())
            return results.get("ensemble_accuracy") or statistics.fmean(row["accuracy"] for row in results["rows"])
        return max(record["test_accuracy"] for record in self.records())

    def command(self, device: str | None = None) -> list[str]:
        choices = self.choices if device is None else self.choices | {"device": device}
        resume = ["--resume"] if self.program == "train" and (self.folder / CHECKPOINT).exists() else []
        return [
            sys.executable, "-m", "rwn_ext.paper", self.program, *flags(choices), "--out", str(self.folder), *resume
        ]  # fmt: skip


def flags(choices: Mapping[str, Any]) -> list[str]:
    """The choices as the train program's command line."""
    words = []
    for key, value in choices.items():
        if value is not False:
            words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def combinations(fixed: Mapping[str, Any], grids: Sequence[Mapping[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    """What each run of the grids chooses, in their order; the last list of a grid varies fastest."""
    for grid in grids:
        for values in itertools.product(*grid.values()):
            yield {**fixed, **dict(zip(grid, values, strict=True))}


class Sweep:
    """Runs ready to go, each a process of its own that writes whole files only.

    A sweep may be stopped at any point, killed too; started again it continues. Several sweeps of the same folder, on
    one machine or on many that share it, divide the runs among them, and so do the processes that torchrun starts. Up
    to `jobs` runs go at once; on a GPU those that fit, the kinds of which are learned from the first of each (see
    `Place`).
    """

    def __init__(self, cells: Sequence[Cell], varied: Sequence[str], *, jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs} runs nothing; give 1 or more")
        self.cells, self.jobs = list({cell.folder: cell for cell in cells}.values()), jobs
        self.varied = list(dict.fromkeys(varied))

    @classmethod
    def of_file(
        cls, file: Path, out: Path, *, jobs: int = 1, budget_epochs: int | None = None, data: Path | None = None
    ) -> Sweep:
        """The sweep of a TOML file.

        `[fixed]` holds what all runs share and `[grid]` lists of what varies, under the names of the train program's
        flags; every combination is a run. `[[grid]]` may be there several times::

            [fixed]
            net = "wrn-10-2"
            image-size = 16
            [[grid]]
            part = [0.4, 0.1, 1]           # a fraction has a decimal point, a count has none
            frozen = ["random", "zero"]
            seed = [0, 1, 2]
            [[grid]]
            only = ["nothing"]
            seed = [0, 1, 2]

        `budget_epochs` shortens runs to at most that many epochs. Raises ValueError for a file that says something
        else.
        """
        fixed, grids = _read(file)
        if data is not None:
            fixed["data"] = str(data)
        cells = []
        for grid in grids:
            for choices in combinations(fixed, [grid]):
                name = "-".join(f"{key}={choices[key]}" for key in grid) or "run"
                cells.append(Cell(shortened(choices, budget_epochs), out / name))
        return cls(cells, [key for grid in grids for key in grid], jobs=jobs)

    def run(self) -> int:
        """Runs what is not finished, shows how it goes, prints the table; how many runs failed."""
        first = int(os.environ.get("RANK", 0)) == 0
        console = Console(quiet=not first)
        failures = _Sweeper(self, console).run()
        console.print(self.table())
        return failures

    def rows(self) -> list[dict[str, Any]]:
        """For each combination but for the seed: seeds finished, mean and spread of their best test accuracy."""
        keys = [key for key in self.varied if key != "seed"]
        groups: dict[tuple[str, ...], list[float]] = {}
        for cell in self.cells:
            group = groups.setdefault(tuple(str(cell.choices.get(key, "")) for key in keys), [])
            if cell.finished:
                group.append(cell.best())
        return [dict(zip(keys, group, strict=True)) | summary(best) for group, best in groups.items()]

    def named(self, folder: Any) -> Cell | None:
        """The run that writes to this folder."""
        return next((cell for cell in self.cells if folder is not None and cell.folder == Path(folder)), None)

    def table(self) -> Table:
        table = Table(title="best test accuracy, % (mean and standard deviation over seeds)", box=SIMPLE_HEAD)
        rows = self.rows()
        for key in rows[0]:
            table.add_column(key, justify="right")
        for row in rows:
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
        return table


def summary(best: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of the runs of a row, None where there are too few."""
    mean = statistics.fmean(best) if best else None
    return {"runs": len(best), "mean": mean, "spread": statistics.stdev(best) if len(best) > 1 else None}


def shortened(choices: Mapping[str, Any], budget_epochs: int | None) -> dict[str, Any]:
    """The choices with at most that many epochs, also of a shared start."""
    if budget_epochs is None:
        return dict(choices)
    if budget_epochs < 1:
        raise ValueError(f"budget_epochs={budget_epochs} trains nothing; give 1 or more")
    whole = {"epochs": schedule_of(choices["net"]).epochs} | dict(choices)
    return whole | {key: min(budget_epochs, whole[key]) for key in ("epochs", "start-epochs") if key in whole}


@dataclass(frozen=True, eq=False)
class _Job:
    """A run under way."""

    cell: Cell
    process: subprocess.Popen[bytes]
    place: Place
    claim: int
    epochs_before: int
    task: TaskID


class _Sweeper:
    """This process's share in a sweep."""

    def __init__(self, sweep: Sweep, console: Console) -> None:
        self.sweep, self.console = sweep, console
        devices = {cell.choices.get("device") for cell in sweep.cells}
        self.places = places(devices.pop()) if len(devices) == 1 else [Place()]
        # What learns most goes first: where it fits, the others of its kind fit.
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cells = sorted(sweep.cells, key=_learned, reverse=True) if self.places[0].limited else sweep.cells
        # Each process of torchrun begins elsewhere, and helps out once its share is done.
        self.waiting = [cell for i in range(size) for cell in cells[(rank + i) % size :: size] if not cell.finished]
        self.failed_before = {cell.folder: _failure(cell) for cell in sweep.cells}
        self.jobs: list[_Job] = []
        self.failed = 0

    def run(self) -> int:
        with bar(self.console) as progress, _terminated_as_interrupted():
            total = progress.add_task("all epochs", total=sum(cell.epochs for cell in self.sweep.cells))
            try:
                while self.waiting or self.jobs:
                    self.waiting = [cell for cell in self.waiting if not (cell.finished or self._is_hopeless(cell))]
                    while len(self.jobs) < self.sweep.jobs and self._start_one(progress):
                        pass
                    time.sleep(0.2)
                    for job in list(self.jobs):
                        self._look_after(job, progress)
                    progress.update(total, completed=sum(cell.epochs_done for cell in self.sweep.cells))
            finally:
                for job in self.jobs:
                    job.process.terminate()
                for job in self.jobs:
                    job.process.wait()
        return self.failed

    def _is_hopeless(self, cell: Cell) -> bool:
        """Whether it, or the run whose weights it begins with, has failed since this process began."""
        start = self.sweep.named(cell.choices.get("start"))
        failed = _failure(cell) not in (None, self.failed_before.get(cell.folder))
        return failed or (start is not None and self._is_hopeless(start))

    def _has_start(self, cell: Cell) -> bool:
        """Whether the run whose weights it begins with, if that is one of the sweep, is finished."""
        start = self.sweep.named(cell.choices.get("start"))
        return start is None or start.finished

    def _start_one(self, progress: Progress) -> bool:
        """Starts the first run that nobody else has and some place has room for."""
        for cell in self.waiting:
            if not self._has_start(cell):
                continue
            place = next((place for place in self.places if place.has_room(cell.kind)), None)
            held = claim(cell.folder) if place is not None else None
            if place is None or held is None:
                continue
            self.waiting.remove(cell)
            if cell.finished or self._is_hopeless(cell):
                os.close(held)
                return True
            (cell.folder / FAILED).unlink(missing_ok=True)
            with (cell.folder / "output.txt").open("ab") as output:
                process = subprocess.Popen(
                    cell.command(place.device), stdout=output, stderr=subprocess.STDOUT, pass_fds=[held],
                    env=_environment(place.device, self.sweep.jobs),
                )  # fmt: skip
            task = progress.add_task(cell.folder.name, total=cell.epochs)
            job = _Job(cell, process, place, held, cell.epochs_done, task)
            place.enter(job, cell.kind)
            self.jobs.append(job)
            return True
        return False

    def _look_after(self, job: _Job, progress: Progress) -> None:
        done, code = job.cell.epochs_done, job.process.poll()
        job.place.watch(job, has_peaked=done > job.epochs_before)
        if code is None:
            best = f"  best {job.cell.best():.2f} %" if done else ""
            progress.update(job.task, completed=done, description=job.cell.folder.name + best)
            return
        self.jobs.remove(job)
        job.place.leave(job)
        progress.remove_task(job.task)
        if code:
            self.failed += 1
            (job.cell.folder / FAILED).write_text(f"exit code {code}\n")
        os.close(job.claim)
        outcome = (
            f"failed, see {job.cell.folder / 'output.txt'}" if code else f"best test accuracy {job.cell.best():.2f} %"
        )
        self.console.print(f"{job.cell.folder.name}: {outcome}", soft_wrap=True)


def _learned(cell: Cell) -> float:
    """Larger for a run that learns more: all, then fractions, then counts of filters, then single parts."""
    part = cell.choices.get("part")
    if part is None:
        return -1.0 if cell.choices.get("only") else 1.0
    return part if isinstance(part, float) else part / 1e6


def _failure(cell: Cell) -> int | None:
    """When the run failed last."""
    try:
        return (cell.folder / FAILED).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _environment(device: str | None, jobs: int) -> dict[str, str]:
    """A run is no process of torchrun's, and shares the cores with the others."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_"))
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    }
    if device == "cpu":
        own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    return own


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, too, ends the runs that were started here."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(file: Path) -> tuple[dict[str, Any], list[dict[str, list[Any]]]]:
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} is no sweep that can be read: {error}") from None
    unknown = set(content) - {"fixed", "grid"}
    if unknown:
        raise ValueError(f"{file}: [{sorted(unknown)[0]}] is unknown; a sweep has the tables [fixed] and [grid]")
    fixed, grids = content.get("fixed", {}), content.get("grid", {})
    grids = grids if isinstance(grids, list) else [grids]
    for grid in grids:
        for key in (*fixed, *grid):
            if key not in KEYS or (key in fixed and key in grid):
                raise ValueError(f"{file}: {key!r} is unknown or given twice; choose from {', '.join(KEYS)}")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{file}: grid.{key}={values!r} is no list of choices")
        if "net" not in (*fixed, *grid):
            raise ValueError(f"{file}: no network is named; give net, such as 'wrn-28-10'")
    for choices in combinations(fixed, grids):
        schedule_of(choices["net"])
    return fixed, grids
