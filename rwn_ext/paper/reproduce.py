"""A figure of the paper: its runs, what they cost, and page and picture of both beside the paper's numbers."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rwn_ext.files import replacing
from rwn_ext.paper import data
from rwn_ext.paper.costs import costs, machine
from rwn_ext.paper.drawing import drawn, page
from rwn_ext.paper.experiments import RESULTS
from rwn_ext.paper.marks import ensemble_marks, learned, mark
from rwn_ext.paper.presets import Preset
from rwn_ext.paper.progress import bar
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.sweep import Cell, Sweep, summary
from rwn_ext.paper.training import Run

PLAIN = "nn.Conv2d"
QUICK = {"seeds": 1, "budget_epochs": 2, "rounds": 3}


class Reproduction:
    """A figure ready to be made: the data found, every run known, nothing written.

    Figures with the same `out` share their runs. `machine_flags` are those choices of the runs that do not change what
    their numbers mean (device, amp, ...); `prepare` makes the `Run` of a run's choices, for measuring.
    """

    def __init__(
        self, preset: Preset, folder: Path | None, out: Path, *, prepare: Callable[[dict[str, Any], Path], Run],
        families: Sequence[str] = (), seeds: int = 1, budget_epochs: int | None = None, jobs: int | None = None,
        rounds: int = 9, machine_flags: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.preset, self.out, self.prepare, self.rounds = preset, out, prepare, rounds
        self.families = families
        self.data_name = data.load(folder).name
        on = "digits" if folder is None else "cifar"
        self.paper_epochs = {}
        cells = []
        whole = preset.choices(on, families, seeds)
        for choices, full in zip(preset.choices(on, families, seeds, budget_epochs), whole, strict=True):
            shared = dict(machine_flags or {}) | ({} if folder is None else {"data": str(folder)})
            prefix = self.data_name if preset.program == "train" else f"{preset.program}-{self.data_name}"
            folder_name = _name(prefix, choices | shared)
            cell = Cell(choices | shared, out / "runs" / folder_name, preset.program)
            cells.append(cell)
            self.paper_epochs[cell.folder] = full.get("epochs") or schedule_of(full["net"]).epochs
        varied = [key for key in dict.fromkeys(k for c in cells for k in c.choices) if key not in (machine_flags or {})]
        if jobs is None:
            jobs = max(1, torch.cuda.device_count()) if _on_gpu(machine_flags) else len(os.sched_getaffinity(0))
        self.sweep = Sweep(cells, [key for key in varied if key in ("net", *_grid_keys(preset))], jobs=jobs)

    def run(self) -> int:
        """Trains what is not trained, measures, draws; how many runs failed."""
        failed = self.sweep.run()
        if int(os.environ.get("RANK", 0)):
            return failed
        results: dict[str, Any] = {"figure": self.preset.name, "title": self.preset.title, "draw": self.preset.draw}
        results |= {"data": self.data_name, "machine": None, "rows": self.rows()}
        if self.rounds and self.preset.program in ("train", "ensemble"):
            self._measure(results)
        folder = self.out / "-".join([self.preset.name, *self.families])
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "results.json") as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        write(results, folder)
        Console().print(f"page: {folder / 'figure.md'}   picture: {folder / 'figure.png'}", highlight=False)
        return failed

    def rows(self) -> list[dict[str, Any]]:
        """For every combination but for the seed: accuracy, time, the paper's number and the difference."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.sweep.cells:
            groups.setdefault(_key(cell), []).append(cell)
        if self.preset.program == "train":
            return [self._row(cells) for cells in groups.values()]
        return [row for cells in groups.values() for row in self._experiment_rows(cells)]

    def _experiment_rows(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """A row for an ensemble, one for each task, one for each part that was transferred."""
        first, program = cells[0], self.preset.program
        found = [json.loads((cell.folder / RESULTS).read_text()) for cell in cells if cell.finished]
        base = {key: first.choices[key] for key in first.choices if key not in ("seed", "data", "device")}
        base |= {"learned": learned(first.choices), "epochs": first.epochs, "seconds": None, "magnitudes": None}
        base |= {"learned_weights": None, "paper": None, "difference": None}
        if program == "ensemble":
            row = base | summary([each["ensemble_accuracy"] for each in found])
            row["member"] = statistics.fmean(each["mean_member_accuracy"] for each in found) if found else None
            row["learned_weights"] = found[0]["rows"][0]["learned_weights"] if found else None
            row["stored_bytes"] = found[0]["stored_bytes"] if found else None
            row["seconds"] = _seconds([member for each in found for member in each["rows"]], len(found))
            row["paper_member"] = None
            marks = ensemble_marks(first.choices, self.paper_epochs[first.folder])
            if marks is not None and self.data_name == "cifar10":
                row |= {"paper_member": asdict(marks[0]), "paper": asdict(marks[1])}
                if found and marks[1].epochs == first.epochs:
                    row["difference"] = row["mean"] - marks[1].accuracy
            return [row]
        rows = []
        for i, branch in enumerate(found[0]["rows"] if found else ()):
            row = base | summary([each["rows"][i]["accuracy"] for each in found])
            row |= {"learned_weights": branch["learned_weights"], "stored_bytes": branch["stored_bytes"]}
            row["seconds"] = _seconds([each["rows"][i] for each in found], len(found))
            rows.append(row | {"task" if program == "tasks" else "learned": branch["name"]})
        return rows

    def _row(self, cells: list[Cell]) -> dict[str, Any]:
        first, done = cells[0], [cell for cell in cells if cell.finished]
        records = [cell.records()[: cell.epochs] for cell in done]
        row = {key: first.choices[key] for key in first.choices if key not in ("seed", "data", "device")}
        row |= {"learned": learned(first.choices), "epochs": first.epochs, **summary([cell.best() for cell in done])}
        row["seconds"] = statistics.fmean(sum(r["seconds"] for r in run) for run in records) if records else None
        for key in ("learned_weights", "magnitudes"):
            row[key] = records[0][-1].get(key) if records else None
        paper = mark(first.choices, self.paper_epochs[first.folder]) if self.data_name == "cifar10" else None
        if records and row["learned_weights"] is None:
            row["learned_weights"] = self.prepare(first.choices, self.out / "costs" / "counted").learned_weights
        row["paper"] = None if paper is None else asdict(paper)
        # After fewer epochs than the paper's the mark says how far it is, and a difference would say nothing.
        same = paper is not None and row["mean"] is not None and paper.epochs == first.epochs
        row["difference"] = row["mean"] - paper.accuracy if same else None  # type: ignore[union-attr]
        return row

    def _measure(self, results: dict[str, Any]) -> None:
        """Adds to each row what a step costs beside one that learns everything; what was measured before stays."""
        cache = self.out / "costs.json"
        known = json.loads(cache.read_text()) if cache.exists() else {}
        cells = {_key(cell): cell for cell in self.sweep.cells}
        with bar(Console()) as progress:
            for net in dict.fromkeys(cell.choices["net"] for cell in cells.values()):
                own = {key: cell for key, cell in cells.items() if cell.choices["net"] == net}
                if not all(f"{self.data_name} {key}" in known for key in own):
                    runs = {PLAIN: self.prepare(_plain(next(iter(own.values())).choices), self.out / "costs" / "plain")}
                    runs |= {
                        key: self.prepare(_alone(cell.choices), self.out / "costs" / str(i))
                        for i, (key, cell) in enumerate(own.items())
                    }
                    task = progress.add_task(f"step times, {net}", total=self.rounds)
                    found = costs(runs, PLAIN, self.rounds, lambda task=task: progress.advance(task))  # type: ignore[misc]
                    progress.remove_task(task)
                    where = machine(runs[PLAIN].device)
                    known |= {
                        f"{self.data_name} {key}": asdict(cost) | {"machine": where} for key, cost in found.items()
                    }
                    del runs
                    with replacing(cache) as path:
                        path.write_text(json.dumps(known, indent=1) + "\n")
        for row, key in zip(results["rows"], cells, strict=True):
            row |= known[f"{self.data_name} {key}"]
        results["machine"] = results["rows"][0]["machine"]


def write(results: dict[str, Any], folder: Path) -> None:
    """The page and the picture of a results file."""
    with replacing(folder / "figure.md") as path:
        path.write_text(page(results))
    with replacing(folder / "figure.png") as path:
        drawn(results).savefig(path, dpi=120, format="png")


def _grid_keys(preset: Preset) -> set[str]:
    return {key for grid in preset.grid for key in grid} | {"seed"}


def _on_gpu(machine_flags: Mapping[str, Any] | None) -> bool:
    device = (machine_flags or {}).get("device")
    return torch.cuda.is_available() if device is None else device.startswith("cuda")


def _name(data_name: str, choices: Mapping[str, Any]) -> str:
    """A folder's name that tells the run from every other, the same whichever figure it belongs to."""
    unsaid = {"net": choices["net"], "frozen": "random", "bn": "learned", "dim": 0}
    told = {k: v for k, v in choices.items() if k not in ("data", "device", "compile", "graph") and unsaid.get(k) != v}
    return "-".join([data_name, choices["net"], *(f"{key}={value}" for key, value in told.items())])


def _key(cell: Cell) -> str:
    """All choices of a run but its seed and where its data is."""
    return " ".join(f"{key}={value}" for key, value in cell.choices.items() if key not in ("seed", "data"))


def _plain(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The run that learns everything with plain `nn.Conv2d`."""
    fixing = ("part", "frozen", "only", "dim", "select", "bn")
    return {key: value for key, value in _alone(choices).items() if key not in fixing}


def _alone(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a member of an ensemble, as a run of its own."""
    return {key: value for key, value in choices.items() if key not in ("members", "start-epochs")}


def _seconds(rows: Sequence[Mapping[str, Any]], count: int) -> float | None:
    """Training time of these branches, for each of as many experiments."""
    times = [row["seconds"] for row in rows if "seconds" in row]
    return sum(times) / count if times else None
