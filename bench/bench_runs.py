"""The demo's whole training, epoch by epoch in turns: what a user waits for, data and evaluation included."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from bench.competitors import OTHERS, OURS, PLAIN, SLICED, WAYS, rivals, with_convolutions
from bench.conftest import DEVICE
from bench.group import Group
from rwn_ext.paper import data, networks
from rwn_ext.paper.demo import CONTENDERS, IMAGE_SIZE, NET
from rwn_ext.paper.progress import SilentWatcher
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.timing import interleaved
from rwn_ext.paper.training import Config, Run

EPOCHS = 10
# Of the others the fastest: an epoch of each takes seconds.
KNOWN = [f"{way} p = 0.1" for way in (OTHERS if DEVICE == "cuda" else (SLICED,))]
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
    epochs = {row: run.epochs(SilentWatcher()) for row, run in runs.items()}
    case = {"images": f"digits {IMAGE_SIZE}x{IMAGE_SIZE}", "batch": schedule.batch_size, "epochs": EPOCHS}
    seconds = interleaved({row: partial(next, e) for row, e in epochs.items()}, EPOCHS, warmup=0)
    reached = {row: {"best_accuracy": run.best, "learned_weights": run.learned_weights} for row, run in runs.items()}
    return Group(
        "run", NET, case, seconds, rivals={row: others for row in ROWS if (others := rivals(row, ROWS))}, more=reached
    )


def run_of(row: str) -> type[Run]:
    """The demo's run, of a network whose convolutions are learned in the row's way."""
    if row not in KNOWN:
        return Run
    way, _, part = row.partition(" p = ")

    class KnownRun(Run):
        def network(self, *arguments: Any) -> networks.Network:
            return with_convolutions(super().network(*arguments), WAYS[way], float(part))  # type: ignore[return-value]

    return KnownRun
