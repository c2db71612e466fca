"""How time and kept memory grow: with the learned fraction, batch, image size, channels, depth; bytes DDP sends.

One axis at a time, from one middling layer (depth: from a narrow network). Beside each time stands the cost model's.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from bench import wire
from bench.competitors import CHECKPOINTED, FROZEN, LAYER_WAYS, LEAN, LORA, MEMSAVE, OTHERS, OURS, PLAIN, WAYS, rivals
from bench.conftest import DEVICE, DTYPE, marks
from bench.floors import convolution_floor, predicted
from bench.group import Group
from bench.networks import MEMSAVE_IS_INSTALLED, Step, floors_of, model_of
from bench.oracle import LayerOracle, NetworkOracle
from bench.rates import rates
from bench.turns import Effort, in_turns
from rwn_ext.report import saved_for_backward

EFFORT = Effort(5, least=15, most=15) if DEVICE == "cuda" else Effort(0.8, least=7, most=15)
BASE = {"p": 0.1, "batch": 32, "image": 16, "channels": 64}
GPU_BASE = {"p": 0.1, "batch": 128, "image": 32, "channels": 128}
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
AXES = {
    "p": FRACTIONS,
    "batch": (4, 8, 16, 32, 64),
    "image": (4, 8, 16, 32),
    "channels": (16, 32, 64, 128),
}
GPU_AXES = {
    "p": (0.01, *FRACTIONS),
    "batch": (8, 32, 128, 512),
    "image": (8, 16, 32, 64),
    "channels": (32, 64, 128, 256, 512),
}
POINTS = [(axis, value) for axis, values in (GPU_AXES if DEVICE == "cuda" else AXES).items() for value in values]
QUICK = [("p", 0.05), ("p", 0.4)]
DEPTHS, DEPTH_EFFORT = (10, 16, 22), Effort(3, least=7)
NET_ROWS = (
    PLAIN, *(f"{way} p = 0.1" for way in (*OTHERS, OURS, LEAN)), FROZEN, CHECKPOINTED,
    *([MEMSAVE] if MEMSAVE_IS_INSTALLED else []),
)  # fmt: skip
PROCESSES, WIRE_PARTS = 4, (0.0, 0.05, 0.1, 0.4, 1.0)


def points(values, rows, quick=()):
    return [pytest.param(*value, row, marks=marks(value in quick, compiled=False)) for value in values for row in rows]


@pytest.mark.parametrize(("axis", "value", "row"), points(POINTS, LAYER_WAYS, QUICK))
def test_layer(record, effort, axis, value, row):
    record(layer(axis, value, effort(EFFORT)), row)


@pytest.mark.parametrize(("depth", "row"), points([(depth,) for depth in DEPTHS], NET_ROWS))
def test_depth(record, effort, depth, row):
    record(network(depth, effort(DEPTH_EFFORT)), row)


@pytest.mark.slow
@pytest.mark.parametrize("part", WIRE_PARTS)
@pytest.mark.parametrize("processes", range(2, PROCESSES + 1))
def test_bytes_on_the_wire(benchmark, processes, part):
    """What each of several processes sends in a step; beside it the gradients' bytes, and what a ring would send."""
    benchmark.group = f"scaling: bytes sent in a step, {wire.NET}"
    gradients = wire.gradient_bytes(part)
    benchmark.extra_info.update(
        level="scaling", subject="DDP", case={"net": wire.NET, "processes": processes, "p": part}, contender=OURS,
        sent_bytes=sent(PROCESSES)[processes, part], gradient_bytes=gradients,
        ring_bytes=2 * (processes - 1) / processes * gradients,
    )  # fmt: skip
    benchmark.pedantic(lambda: None)


sent = lru_cache(lambda processes: wire.sent(processes, WIRE_PARTS))


@lru_cache(maxsize=1)
def layer(axis: str, value: float, effort: Effort) -> Group:
    torch.manual_seed(0)
    case = (GPU_BASE if DEVICE == "cuda" else BASE) | {axis: value}
    n, size, channels = case["batch"], case["image"], case["channels"]
    learned = max(1, int(channels * case["p"]))
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    conv = conv.to(DEVICE, DTYPE, memory_format=torch.channels_last)
    x = torch.randn(n, channels, size, size, device=DEVICE, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    cotangent = torch.randn_like(x)
    modules = {row: WAYS[row](conv, learned) for row in LAYER_WAYS}
    oracle, kept = LayerOracle(conv, x, cotangent), {}
    for row, module in modules.items():
        oracle.check(row, module, 0 if row == FROZEN else learned)
        with saved_for_backward(module) as saved:
            module(x)
        kept[row] = saved.bytes

    def run(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(cotangent)

    seconds = in_turns({row: lambda m=module: run(m) for row, module in modules.items()}, effort)
    sizes = (tuple(x.shape), tuple(conv.weight.shape), tuple(cotangent.shape))
    chosen = {PLAIN: channels, FROZEN: 0}
    floor = {
        row: convolution_floor(rates(DEVICE, DTYPE), *sizes, chosen.get(row, learned), DTYPE.itemsize)
        for row in modules
        if row != LORA
    }
    return Group(
        "scaling", axis, case, seconds, kept=kept, floor=floor,
        predicted={row: predicted(modules[row], conv, x, rates(DEVICE, DTYPE)) for row in (PLAIN, OURS, FROZEN)},
        rivals={row: others for row in modules if (others := rivals(row, modules))},
    )  # fmt: skip


@lru_cache(maxsize=1)
def network(depth: int, effort: Effort) -> Group:
    batch = 128 if DEVICE == "cuda" else 8
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    name = f"wrn-{depth}-2"
    oracle = NetworkOracle.of(model_of(name, PLAIN).to(DEVICE), images, labels)
    steps = {row: Step(name, row, images, labels) for row in NET_ROWS}
    for row, step in steps.items():
        oracle.check(row, step.model, step.learner, images, labels)
    seconds = in_turns(steps, effort)
    memory = {row: step.memory() for row, step in steps.items()}
    bounded = {row: step for row, step in steps.items() if OURS in row or row in (PLAIN, FROZEN)}
    bounds = floors_of(bounded, images, rates(DEVICE, DTYPE), DTYPE.itemsize)
    return Group(
        "scaling", "depth", {"net": "wrn-depth-2", "batch": batch, "depth": depth}, seconds,
        floor=bounds, predicted=bounds, more=memory,
        rivals={row: others for row in NET_ROWS if (others := rivals(row, NET_ROWS))},
    )  # fmt: skip
