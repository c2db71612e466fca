"""The paper's own numbers, from numbers.toml: what a row of ours is compared with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from rwn_ext.paper.schedules import schedule_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Mark:
    """A number of the paper: accuracy in percent, after how many epochs, and where it stands."""

    accuracy: float
    epochs: int
    read_off: bool
    """Read off a plot, good to about one point."""
    source: str


def learned(choices: Mapping[str, Any]) -> str | int | float:
    """What a run learns, in one word: "all", a fraction, a number of filters, or a part of the network."""
    part, only = choices.get("part"), choices.get("only")
    if only is not None:
        return only
    # 1.0 is all, 1 is one filter
    return "all" if part is None or (isinstance(part, float) and part == 1.0) else part


def mark(choices: Mapping[str, Any], epochs: int) -> Mark | None:
    """The paper's number for a run on CIFAR-10 that its protocol trains for that many epochs; None if it has none."""
    row = _rows("table").get(_key(choices, epochs))
    column = 1 if choices.get("frozen") == "zero" else 0
    compared = {"net", "part", "only", "frozen", "bn", "dim", "seed", "data", "epochs", *_MACHINE}
    if row is None or column >= len(row.values) or not _paper_like(choices, compared):
        return None
    return _mark(row, column)


def ensemble_marks(choices: Mapping[str, Any], epochs: int) -> tuple[Mark, Mark] | None:
    """The paper's numbers for the mean member of an ensemble and for the ensemble."""
    row = _rows("ensemble").get(_key(choices, epochs))
    compared = {"net", "part", "only", "bn", "dim", "seed", "data", "epochs", "members", "start-epochs", *_MACHINE}
    if row is None or not _paper_like(choices, compared):
        return None
    return _mark(row, 0), _mark(row, 1)


# Choices that do not change what the numbers of a run mean.
_MACHINE = ("device", "amp", "channels-last", "compile", "graph")


def _paper_like(choices: Mapping[str, Any], compared: set[str]) -> bool:
    """Whether everything that the tables do not tell is as in the paper."""
    schedule = schedule_of(choices["net"])
    own = {"optimizer": "sgd", "select": "last", "gamma": "ones", "lr": schedule.lr, "momentum": schedule.momentum}
    own |= {"batch-size": schedule.batch_size, "weight-decay": schedule.weight_decay, "factor": schedule.factor}
    other = {key: value for key, value in choices.items() if key not in compared}
    frozen = choices.get("frozen", "random") in ("random", "zero")
    return frozen and all(key in own and own[key] == value for key, value in other.items())


@dataclass(frozen=True)
class _Row:
    values: tuple[float | str, ...]
    epochs: int
    source: str


def _key(choices: Mapping[str, Any], epochs: int) -> tuple[Any, ...]:
    # repr: 1 filter and 1.0 are equal to Python
    return choices["net"], epochs, choices.get("bn", "learned"), choices.get("dim"), repr(learned(choices))


@cache
def _rows(kind: str) -> dict[tuple[Any, ...], _Row]:
    tables = tomllib.loads((files("rwn_ext.paper") / "numbers.toml").read_text())[kind]
    rows = {}
    for table in tables:
        for what, *values in table["rows"]:
            key = (table["net"], table["epochs"], table.get("bn", "learned"), table.get("dim"), repr(what))
            rows[key] = _Row(tuple(values), table["epochs"], table["source"])
    return rows


def _mark(row: _Row, column: int) -> Mark:
    value = row.values[column]
    return Mark(float(str(value).lstrip("~")), row.epochs, isinstance(value, str), row.source)
