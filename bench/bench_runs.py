"""The demo's whole training, epoch by epoch in turns: what a user waits for, data and evaluation included."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.competitors import OTHERS, OURS, PLAIN, WAYS, rivals, with_convolutions
from bench.conftest import DEVICE
from bench.group import Group
from bench.oracle import NetworkOracle
from rwn_ext.paper import data, networks
from rwn_ext.paper.demo import CONTENDERS, IMAGE_SIZE, NET
from rwn_ext.paper.progress import SilentWatcher
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.timing import interleaved
from rwn_ext.paper.training import Config, Run

EPOCHS = 7
KNOWN = [f"{way} p = 0.1" for way in OTHERS]
ROWS: dict[str, dict[str, Any]] = {
    PLAIN: CONTENDERS[PLAIN],
    **{f"{OURS} {name}": choice for name, choice in CONTENDERS.items() if name != PLAIN},
    **{row: {} for row in KNOWN},
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_run(record, tmp_path_factory, row):
    record(measured(tmp_path_factory.getbasetemp()), row)


@lru_cache(maxsize=1)
def measured(folder: Path) -> Group:
    images = data.load(None, image_size=IMAGE_SIZE)
    schedule = replace(schedule_of(NET), epochs=EPOCHS, milestones=(EPOCHS - 2,))
    config = Config(net=NET, schedule=schedule, device=DEVICE, channels_last=True)
    runs = {
        row: run_of(row)(replace(config, out=folder / f"run{i}", **choice), images)
        for i, (row, choice) in enumerate(ROWS.items())
    }
    check(runs)
    epochs = {row: run.epochs(SilentWatcher()) for row, run in runs.items()}
    case = {"images": f"digits {IMAGE_SIZE}x{IMAGE_SIZE}", "batch": schedule.batch_size, "epochs": EPOCHS}
    seconds = interleaved({row: partial(next, e) for row, e in epochs.items()}, EPOCHS, warmup=0)
    reached = {row: {"best_accuracy": run.best, "learned_weights": run.learned_weights} for row, run in runs.items()}
    learning = [row for row, choice in ROWS.items() if choice.get("only") != "nothing"]
    return Group(
        "run", NET, case, seconds, rivals={row: others for row in learning if (others := rivals(row, ROWS))},
        more=reached,
    )  # fmt: skip


def check(runs: Mapping[str, Run]) -> None:
    """WrongResultError where a network computes something else than the plain one."""
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE), torch.randint(10, (32,), device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    oracle = NetworkOracle.of(runs[PLAIN].model, images, labels)
    for row, run in runs.items():
        choice = ROWS[row]
        part = 0 if choice.get("only") == "nothing" else choice.get("part")
        statistics = copy.deepcopy(list(run.model.buffers()))
        oracle.check(row, run.model, run.model, images, labels, part)
        for buffer, before in zip(run.model.buffers(), statistics, strict=True):
            buffer.copy_(before)


def run_of(row: str) -> type[Run]:
    """The demo's run, of a network whose convolutions are learned in the row's way."""
    if row not in KNOWN:
        return Run
    way, _, part = row.partition(" p = ")

    class KnownRun(Run):
        def network(self, *arguments: Any) -> networks.Network:
            return with_convolutions(super().network(*arguments), WAYS[way], float(part))  # type: ignore[return-value]

    return KnownRun
