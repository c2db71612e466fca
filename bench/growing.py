"""A results file that grows case by case: whoever is interrupted continues, and what was measured is never lost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info

from bench.group import Group
from bench.machine import commit, described
from bench.results import ResultsError, read
from rwn_ext.files import replacing


class GrowingResults:
    """The file at `path`, in the form that `bench.results` reads. Each `add` replaces it at once or not at all.

    What an `earlier` file of the same machine and commit holds counts as measured. ResultsError for one of another.
    """

    def __init__(self, path: Path, device: str, dtype: Any, earlier: Path | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "machine_info": described(pytest_benchmark_generate_machine_info(), device, dtype),
            "commit_info": commit(),
            "benchmarks": [],
            "failures": [],
        }
        for file in dict.fromkeys((path, *([earlier] if earlier else []))):
            if file.exists():
                self._continue(file, read(file))

    def has(self, subject: str, case: Mapping[str, Any]) -> bool:
        """Whether this case was measured, or failed, before."""
        known = self.content["benchmarks"] + self.content["failures"]
        return any(entry["subject"] == subject and entry["case"] == case for entry in known)

    def add(self, group: Group | None, facts: Mapping[str, Mapping[str, Any]], failures: list[dict[str, Any]]) -> None:
        """A measured case: its contenders with further `facts` of each, and what failed."""
        if group is not None:
            self.content["benchmarks"] += [
                group.facts(name) | dict(facts.get(name, {})) | {"stats": _stats(seconds)}
                for name, seconds in group.seconds.items()
            ]
        self.content["failures"] += failures
        self.content["datetime"] = datetime.now(timezone.utc).isoformat()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            part.write_text(json.dumps(self.content, indent=1) + "\n")

    def _continue(self, file: Path, old: dict[str, Any]) -> None:
        for what, kept in (("machine_info", {"rates": None}), ("commit_info", {"time": None})):
            mine, theirs = self.content[what] | kept, old.get(what, {}) | kept
            if mine != theirs:
                raise ResultsError(
                    f"{file} cannot be continued: its {what} is {theirs}, here it is {mine}; give another folder"
                )
        self.content["machine_info"]["rates"] = old["machine_info"]["rates"]
        for kind in ("benchmarks", "failures"):
            self.content[kind] += [entry for entry in old[kind] if entry not in self.content[kind]]


def _stats(seconds: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median": median, "iqr": high - low, "rounds": len(seconds)}
