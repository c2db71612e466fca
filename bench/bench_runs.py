"""The demo's whole training, epoch by epoch in turns: what a user waits for, data and evaluation included."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest

from bench.competitors import OURS, PLAIN
from bench.conftest import DEVICE
from bench.group import Group
from rwn_ext.paper import data
from rwn_ext.paper.demo import CONTENDERS, IMAGE_SIZE, NET
from rwn_ext.paper.progress import SilentWatcher
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.timing import interleaved
from rwn_ext.paper.training import Config, Run

EPOCHS = 10
ROWS = {PLAIN: CONTENDERS[PLAIN]} | {f"{OURS} {name}": c for name, c in CONTENDERS.items() if name != PLAIN}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_run(record, tmp_path_factory, row):
    record(measured(tmp_path_factory.getbasetemp()), row)


@lru_cache(maxsize=1)
def measured(folder: Path) -> Group:
    images = data.load(None, image_size=IMAGE_SIZE)
    schedule = replace(schedule_of(NET), epochs=EPOCHS, milestones=(EPOCHS - 2,))
    config = Config(net=NET, schedule=schedule, device=DEVICE, channels_last=True)
    epochs = {
        row: Run(replace(config, out=folder / f"run{i}", **choice), images).epochs(SilentWatcher())
        for i, (row, choice) in enumerate(ROWS.items())
    }
    case = {"images": f"digits {IMAGE_SIZE}x{IMAGE_SIZE}", "batch": schedule.batch_size, "epochs": EPOCHS}
    return Group("run", NET, case, interleaved({row: partial(next, e) for row, e in epochs.items()}, EPOCHS, warmup=0))
