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
from rwn_ext import convert
from rwn_ext.paper.networks import build
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.paper.timing import interleaved
from rwn_ext.report import saved_for_backward
from tests.architectures import resnet18, resnet50

AGAIN, CHECKPOINTED, MEMSAVE = "nn.Conv2d again", "checkpointed nn.Conv2d", "memsave_torch, all frozen"
PARTS = (0.05, 0.1, 0.4, 1.0)
OTHERS = tuple(name for name in WAYS if name not in (PLAIN, OURS, FROZEN))
ROWS = (PLAIN, AGAIN, FROZEN, *(f"{OURS} p = {p}" for p in PARTS), *(f"{way} p = 0.1" for way in OTHERS), CHECKPOINTED)
if importlib.util.find_spec("memsave_torch"):
    ROWS += (MEMSAVE,)
COMPILED = (f"compiled {PLAIN}", f"compiled {OURS} p = 0.1", f"compiled {FROZEN}")
COMPILED_AS, CAPTURED_AS = "compiled ", "captured "
if DEVICE == "cuda":
    # Eager steps, where the host may be what is waited for, and the same steps captured in CUDA graphs.
    ROWS = (PLAIN, AGAIN, FROZEN, *(f"{OURS} p = {p}" for p in (0.01, *PARTS)))
    ROWS += tuple(CAPTURED_AS + row for row in (PLAIN, FROZEN, *(f"{OURS} p = {p}" for p in (0.01, 0.05, 0.1))))
    COMPILED += (f"{COMPILED_AS}{OURS} p = 0.05",)
# (network, batch, rounds): WRN-16-4 is measured longest, its ratios are the ones we hold ourselves to on a CPU.
CPU_STEPS = (("wrn-16-4", 32, 41), ("densenet-bc-40-12", 16, 15), ("vgg19-bn", 16, 15), ("alexnet", 64, 15))
GPU_STEPS = tuple(
    (net, 128, 15)
    for net in ("wrn-28-10", "wrn-28-4", "densenet-bc-100-12", "vgg19-bn", "alexnet", "resnet-18", "resnet-50")
)
IMAGENET = {"resnet-18": resnet18, "resnet-50": resnet50}
STEPS = GPU_STEPS if DEVICE == "cuda" else CPU_STEPS
# Compiling takes long, so a CPU does it for one network.
WITH_COMPILED = [net for net, *_ in STEPS] if DEVICE == "cuda" else [STEPS[0][0]]


def rows(net: str) -> tuple[str, ...]:
    return ROWS + (COMPILED if net in WITH_COMPILED else ())


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
    size = 224 if net in IMAGENET else 32
    images = torch.randn(batch, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    steps: dict[str, Step | Captured] = {}
    kept, peak = {}, {}
    for row in rows(net) if compiled else ROWS:
        if row.startswith(CAPTURED_AS):
            steps[row] = Captured(Step(net, row.removeprefix(CAPTURED_AS), images, labels))
            continue
        before = allocated_bytes()
        steps[row] = step = Step(net, row, images, labels)
        if not row.startswith(COMPILED_AS):
            kept[row] = step.kept_bytes()
            if DEVICE == "cuda":
                peak[row] = step.peak_bytes(before)
    case = {"batch": batch, "layout": "channels_last", "numbers": "bf16 autocast" if DEVICE == "cuda" else "float32"}
    return Group("step", net, case, interleaved(steps, rounds), (PLAIN, FROZEN), kept=kept, peak=peak)


def allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


class Step:
    """One step of SGD by the paper's schedule, on the network of a row."""

    def __init__(self, net: str, row: str, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.model = model_of(net, row).to(DEVICE, memory_format=torch.channels_last)
        mode = "reduce-overhead" if DEVICE == "cuda" else "default"
        self.learner = torch.compile(self.model, mode=mode) if row.startswith(COMPILED_AS) else self.model
        self.images, self.labels = images, labels
        schedule = schedule_of("wrn" if net in IMAGENET else net)
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

    def peak_bytes(self, before: int) -> int:
        """GPU memory at its highest in a step, this model's parameters and the optimizer's state included."""
        self()
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated() - before

    def _loss(self) -> torch.Tensor:
        # A cache of casts must not outlive the capture that it was filled in.
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda", cache_enabled=False):
            return F.cross_entropy(self.learner(self.images), self.labels)


class Captured:
    """A step captured in a CUDA graph. All graphs share the memory of what lives within a step."""

    pool: tuple[int, int] | None = None

    def __init__(self, step: Step) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        step.optimizer.zero_grad()
        Captured.pool = Captured.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.graph, pool=Captured.pool):
            step()

    def __call__(self) -> None:
        self.graph.replay()


def model_of(net: str, row: str) -> nn.Module:
    """The network of a row; all start from the same weights."""
    row = row.removeprefix(COMPILED_AS)
    if net in IMAGENET:
        torch.manual_seed(0)
        part = 0.0 if row == FROZEN else float(row.partition(" p = ")[2] or -1)
        model = IMAGENET[net]()
        return model if part < 0 else convert(model, trainable=part)
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
