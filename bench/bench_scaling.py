"""How time and kept memory grow: with the learned fraction, batch, image size, channels, depth; bytes DDP reduces.

One axis at a time, from one middling layer (depth: from a narrow network).
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.competitors import FROZEN, OURS, PLAIN, SLICED, WAYS
from bench.conftest import DEVICE, DTYPE, marks
from bench.group import Group
from rwn_ext.paper.networks import build
from rwn_ext.paper.timing import interleaved
from rwn_ext.report import saved_for_backward

ROUNDS = 15
BASE = {"p": 0.1, "batch": 32, "image": 16, "channels": 64}
GPU_BASE = {"p": 0.1, "batch": 128, "image": 32, "channels": 128}
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
AXES = {
    "p": FRACTIONS,
    "batch": (4, 8, 16, 32, 64),
    "image": (4, 8, 16, 32),
    "channels": (16, 32, 64, 128, 256),
}
GPU_AXES = {
    "p": (0.01, *FRACTIONS),
    "batch": (8, 32, 128, 512),
    "image": (8, 16, 32, 64),
    "channels": (32, 64, 128, 256, 512),
}
POINTS = [(axis, value) for axis, values in (GPU_AXES if DEVICE == "cuda" else AXES).items() for value in values]
QUICK = [("p", 0.05), ("p", 0.4)]
LAYER_ROWS = (PLAIN, SLICED, OURS, FROZEN)
DEPTHS = (10, 16, 22, 28)
NET_ROWS = (PLAIN, OURS, FROZEN)


def points(values, rows, quick=()):
    return [pytest.param(*value, row, marks=marks(value in quick, compiled=False)) for value in values for row in rows]


@pytest.mark.parametrize(("axis", "value", "row"), points(POINTS, LAYER_ROWS, QUICK))
def test_layer(record, rounds, axis, value, row):
    record(layer(axis, value, rounds(ROUNDS)), row)


@pytest.mark.parametrize(("depth", "row"), points([(depth,) for depth in DEPTHS], NET_ROWS))
def test_depth(record, rounds, depth, row):
    record(network(depth, rounds(9)), row)


@pytest.mark.parametrize("part", (0.0, *FRACTIONS))
def test_reduced_bytes(benchmark, part):
    """Bytes of gradients that DistributedDataParallel hands to all-reduce in a step, counted in its hook."""
    benchmark.group = "scaling: bytes all-reduced a step, wrn-28-4"
    reduced, full = (reduced_bytes(build("wrn-28-4", 10, p, seed=0)) for p in (part, None))
    benchmark.extra_info.update(
        level="scaling", subject="DDP", case={"net": "wrn-28-4", "p": part}, contender=OURS,
        reduced_bytes=reduced, reduced_bytes_plain=full,
    )  # fmt: skip
    benchmark.pedantic(lambda: None)


@lru_cache(maxsize=1)
def layer(axis: str, value: float, rounds: int) -> Group:
    torch.manual_seed(0)
    case = (GPU_BASE if DEVICE == "cuda" else BASE) | {axis: value}
    n, size, channels = case["batch"], case["image"], case["channels"]
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    conv = conv.to(DEVICE, DTYPE, memory_format=torch.channels_last)
    x = torch.randn(n, channels, size, size, device=DEVICE, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    cotangent = torch.randn_like(x)
    modules = {row: WAYS[row](conv, max(1, int(channels * case["p"]))) for row in LAYER_ROWS}

    def run(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(cotangent)

    kept = {row: kept_bytes(module, x) for row, module in modules.items()}
    seconds = interleaved({row: lambda m=module: run(m) for row, module in modules.items()}, rounds)
    return Group("scaling", axis, case, seconds, kept=kept)


@lru_cache(maxsize=1)
def network(depth: int, rounds: int) -> Group:
    batch = 128 if DEVICE == "cuda" else 32
    x = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    parts = {PLAIN: None, OURS: 0.1, FROZEN: 0.0}
    models = {row: build(f"wrn-{depth}-2", 10, part, seed=0) for row, part in parts.items()}
    models = {row: model.to(DEVICE, memory_format=torch.channels_last) for row, model in models.items()}

    def run(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    kept = {row: kept_bytes(model, x) for row, model in models.items()}
    seconds = interleaved({row: lambda m=model: run(m) for row, model in models.items()}, rounds)
    return Group("scaling", "depth", {"net": "wrn-depth-2", "batch": batch, "depth": depth}, seconds, kept=kept)


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    with saved_for_backward(module) as saved:
        module(x)
    return saved.bytes


def reduced_bytes(model: nn.Module) -> int:
    """Of one backward pass, in a group of one process: what each process sends does not depend on their number."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    total = 0

    # Unannotated: DDP compares annotations with types, and here they are strings.
    def count(_, bucket):
        nonlocal total
        total += bucket.buffer().nbytes
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    learner = DistributedDataParallel(model)
    learner.register_comm_hook(None, count)
    learner(torch.randn(1, 3, 32, 32)).sum().backward()
    return total
