"""A whole training step of each of the paper's networks, by what is learned and by the way it is done.

The ratio to "all frozen" tells what is left to gain by a faster weight gradient.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.competitors import FROZEN, OURS, PLAIN, WAYS, with_convolutions
from bench.conftest import DEVICE, marks
from bench.group import Group
from rwn_ext.paper.networks import build
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.timing import interleaved
from rwn_ext.report import saved_for_backward

AGAIN, CHECKPOINTED, MEMSAVE = "nn.Conv2d again", "checkpointed nn.Conv2d", "memsave_torch, all frozen"
PARTS = (0.05, 0.1, 0.4, 1.0)
OTHERS = tuple(name for name in WAYS if name not in (PLAIN, OURS, FROZEN))
ROWS = (PLAIN, AGAIN, FROZEN, *(f"{OURS} p = {p}" for p in PARTS), *(f"{way} p = 0.1" for way in OTHERS), CHECKPOINTED)
if importlib.util.find_spec("memsave_torch"):
    ROWS += (MEMSAVE,)
COMPILED = (f"compiled {PLAIN}", f"compiled {OURS} p = 0.1", f"compiled {FROZEN}")
# (network, batch, rounds): WRN-16-4 is measured longest, its ratios are the ones we hold ourselves to on a CPU.
CPU_STEPS = (("wrn-16-4", 32, 41), ("densenet-bc-40-12", 16, 15), ("vgg19-bn", 16, 15), ("alexnet", 64, 15))
GPU_STEPS = tuple((net, 128, 41) for net in ("wrn-28-10", "wrn-28-4", "densenet-bc-100-12", "vgg19-bn", "alexnet"))
STEPS = GPU_STEPS if DEVICE == "cuda" else CPU_STEPS
# Compiling takes long, so it is done for one network.
WITH_COMPILED = STEPS[0][0]


def rows(net: str) -> tuple[str, ...]:
    return ROWS + (COMPILED if net == WITH_COMPILED else ())


@pytest.mark.parametrize(
    ("net", "batch", "wanted_rounds", "row"),
    [
        pytest.param(*case, row, marks=marks(case is STEPS[0], row in COMPILED))
        for case in STEPS
        for row in rows(case[0])
    ],
)
def test_step(record, rounds, request, net, batch, wanted_rounds, row):
    record(measured(net, batch, rounds(wanted_rounds), request.config.option.compiled), row)


@lru_cache(maxsize=1)
def measured(net: str, batch: int, rounds: int, compiled: bool) -> Group:
    images = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    steps = {row: Step(net, row, images, labels) for row in (rows(net) if compiled else ROWS)}
    kept = {row: step.kept_bytes() for row, step in steps.items() if not row.startswith("compiled")}
    case = {"batch": batch, "layout": "channels_last", "numbers": "bf16 autocast" if DEVICE == "cuda" else "float32"}
    return Group("step", net, case, interleaved(steps, rounds), (PLAIN, FROZEN), kept=kept)


class Step:
    """One step of SGD by the paper's schedule, on the network of a row."""

    def __init__(self, net: str, row: str, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.model = model_of(net, row).to(DEVICE, memory_format=torch.channels_last)
        self.learner = torch.compile(self.model) if row.startswith("compiled") else self.model
        self.images, self.labels = images, labels
        schedule = schedule_of(net)
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=1e-3,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
        )

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self._loss().backward()
        self.optimizer.step()

    def kept_bytes(self) -> int:
        with saved_for_backward(self.model) as saved:
            self._loss()
        return saved.bytes

    def _loss(self) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            return F.cross_entropy(self.learner(self.images), self.labels)


def model_of(net: str, row: str) -> nn.Module:
    """The network of a row; all start from the same weights."""
    row = row.removeprefix("compiled ")
    if row == FROZEN:
        return build(net, 10, 0.0, seed=0)
    way, _, part = row.partition(" p = ")
    if way == OURS:
        return build(net, 10, float(part), seed=0)
    model = build(net, 10, seed=0)
    if row == CHECKPOINTED:
        return checkpointed(model)
    if row == MEMSAVE:
        return memsave(model)
    return with_convolutions(model, WAYS[way], float(part)) if part else model


def memsave(model: nn.Module) -> nn.Module:
    """Its layers keep nothing that a frozen layer does not need; it knows whole layers only."""
    from memsave_torch.nn import convert_to_memory_saving

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    return convert_to_memory_saving(model)


def checkpointed(model: nn.Module) -> nn.Module:
    """Activations are recomputed in backward, unit by unit: the smallest modules that hold several convolutions."""

    def convolutions(module: nn.Module) -> int:
        return sum(isinstance(m, nn.Conv2d) for m in module.modules())

    for module in model.modules():
        if module is not model and convolutions(module) > 1 and all(convolutions(c) < 2 for c in module.children()):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model
