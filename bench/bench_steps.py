"""A whole training step of each of the paper's networks, by what is learned and by the way it is done.

"speed of all frozen" is the ceiling's time over the row's: what is left to gain by a faster weight gradient.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from bench.competitors import PLAIN, WAYS, with_convolutions
from bench.conftest import DEVICE
from rwn_ext.paper.networks import build
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.timing import interleaved

FROZEN = "all frozen (p = 0)"
OTHERS = tuple(name for name in WAYS if name not in (PLAIN, "rwn_ext"))
ROWS = (PLAIN, "nn.Conv2d again", FROZEN, *(f"rwn_ext p = {p}" for p in (0.05, 0.1, 0.4, 1.0)))
ROWS += tuple(f"{way} p = 0.1" for way in OTHERS)
# (network, batch, rounds): WRN-16-4 is measured longest, its ratios are the ones we hold ourselves to on a CPU.
CPU_STEPS = (("wrn-16-4", 32, 41), ("densenet-bc-40-12", 16, 9), ("vgg19-bn", 16, 9), ("alexnet", 64, 9))
GPU_STEPS = tuple((net, 128, 41) for net in ("wrn-28-10", "wrn-28-4", "densenet-bc-100-12", "vgg19-bn", "alexnet"))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("net", "batch", "rounds"), GPU_STEPS if DEVICE == "cuda" else CPU_STEPS)
def test_step(report, net, batch, rounds, row):
    group = f"{net}, batch {batch}, channels_last, {'bf16 autocast' if DEVICE == 'cuda' else 'float32'}: training step"
    report(group, measured(net, batch, rounds), row, {"of nn.Conv2d": PLAIN, "of all frozen": FROZEN})


@lru_cache(maxsize=1)
def measured(net: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by row and round."""
    images = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    return interleaved({row: step(net, row, images, labels) for row in ROWS}, rounds)


def step(net, row, images, labels):
    """One step of SGD by the paper's schedule, as a function without arguments."""
    model = model_of(net, row).to(DEVICE, memory_format=torch.channels_last)
    schedule = schedule_of(net)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-3,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return run


def model_of(net, row):
    """The network of a row; all start from the same weights."""
    if row == FROZEN:
        return build(net, 10, 0.0, seed=0)
    if row.startswith("rwn_ext"):
        return build(net, 10, float(row.rpartition(" ")[2]), seed=0)
    way = row.removesuffix(" p = 0.1")
    model = build(net, 10, seed=0)
    return model if way == row else with_convolutions(model, WAYS[way], 0.1)
