"""A folder of results, read: the JSON files that `make bench` and the demo wrote on one machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.competitors import OURS
from bench.group import PLAIN_GRADIENTS, Ratio


class ResultsError(ValueError):
    """A folder or file that holds no results, with the way out."""


@dataclass(frozen=True)
class Entry:
    """One contender of one group."""

    level: str
    subject: str
    case: dict[str, Any]
    contender: str
    median: float  # seconds
    iqr: float
    ratios: dict[str, Ratio]  # to other contenders of the group
    phases: dict[str, Ratio]  # "forward", "backward": to nn.Conv2d
    kept_bytes: int | None
    floor_share: float | None
    predicted: float | None  # seconds, by the cost model
    rivals: dict[str, Ratio]  # to those who do the same in another way; of our contenders
    facts: dict[str, Any]

    @property
    def group(self) -> tuple[str, str, str]:
        return self.level, self.subject, ", ".join(f"{key} {value}" for key, value in self.case.items())


@dataclass(frozen=True)
class Source:
    """A file of results: the commit of the code that was measured and the device's rates, where it says them."""

    name: str
    commit: dict[str, Any] | None
    rates: dict[str, float] | None
    left_out: int = 0
    """Cases that there was no time for."""


@dataclass(frozen=True)
class Results:
    """All entries of a folder, in the order of their files, and what they were measured on."""

    machine: dict[str, Any]
    sources: tuple[Source, ...]
    entries: tuple[Entry, ...]
    demo: dict[str, Any] | None
    memory: dict[str, Any] | None
    """What `python -m bench.memory` found."""
    paper: dict[str, dict[str, Any]]
    """The paper's figures by folder, as `python -m rwn_ext.paper reproduce` wrote them."""
    tests: tuple[dict[str, Any], ...]
    """What was tested before, by file."""

    def level(self, level: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.level == level]


def load(folder: Path) -> Results:
    """The results of a folder. Raises ResultsError where there are none or they cannot be read."""
    if not folder.is_dir():
        raise ResultsError(
            f"{folder} is no folder; give one that `make bench` wrote, such as bench/results/cpu-2-cores"
        )
    demo, memory = folder / "demo.json", folder / "memory.json"
    files = sorted(path for path in folder.glob("*.json") if path not in (demo, memory))
    contents = [(path, content) for path in files if "benchmarks" in (content := read(path))]
    if not contents:
        raise ResultsError(f"{folder} holds no results (*.json of pytest-benchmark); `make bench` makes them")
    machines = {json.dumps(content["machine_info"] | {"rates": None}, sort_keys=True) for _, content in contents}
    if len(machines) > 1:
        raise ResultsError(f"the files of {folder} are of different machines or versions; measure them together")
    entries = [_entry(path, raw) for path, content in contents for raw in content["benchmarks"]]
    others = {path: read(path) for path in (memory, demo) if path.exists()}
    _, newest = max(contents, key=lambda pair: pair[1]["datetime"])
    return Results(
        newest["machine_info"], tuple(_source(path, content) for path, content in [*contents, *others.items()]),
        tuple(entries), others.get(demo), others.get(memory),
        {path.parent.name: read(path) for path in sorted(folder.glob("paper/*/results.json"))},
        tuple(content["tests"] for _, content in contents if "tests" in content),
    )  # fmt: skip


def groups(entries: Iterable[Entry]) -> Iterator[tuple[tuple[str, str, str], list[Entry]]]:
    """Contenders of the same group together."""
    for key, members in groupby(entries, lambda entry: entry.group):
        yield key, list(members)


def read(path: Path) -> dict[str, Any]:
    """A results file's content. Raises ResultsError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read ({error}); remove it, or measure again") from None


def _source(path: Path, content: dict[str, Any]) -> Source:
    rates = content.get("machine_info", {}).get("rates")
    return Source(path.name, content.get("commit_info"), rates, content.get("left_out", 0))


def _entry(path: Path, raw: dict[str, Any]) -> Entry:
    known = ("level", "subject", "case", "contender", "stats")
    missing = [key for key in known if key not in raw]
    if missing:
        raise ResultsError(f"{path} is of another version ({', '.join(missing)} missing); measure again")
    ratios = {other: Ratio(*values) for other, values in raw.get("ratios", {}).items()}
    rivals = {other: Ratio(*values) for other, values in raw.get("rivals", {}).items()}
    if OURS in raw["contender"]:
        rivals = {name: ratios[name] for name in PLAIN_GRADIENTS if name in ratios} | rivals
    return Entry(
        raw["level"], raw["subject"], raw["case"], raw["contender"], raw["stats"]["median"], raw["stats"]["iqr"],
        ratios, {phase: Ratio(*values) for phase, values in raw.get("phases", {}).items()},
        raw.get("kept_bytes"), raw.get("floor_share"), raw.get("predicted_seconds"), rivals, raw,
    )  # fmt: skip
