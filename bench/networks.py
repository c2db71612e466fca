"""The networks that are measured, each in the ways that a part of it can be learned, and one training step of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.competitors import CHECKPOINTED, FROZEN, FROZEN_PLAIN, LEAN, MEMSAVE, OURS, WAYS, with_convolutions
from bench.floors import network_floor
from bench.rates import Rates
from rwn_ext import convert
from rwn_ext.memory import measure_cpu, measure_cuda
from rwn_ext.paper.networks import build
from rwn_ext.paper.schedules import schedule_of
from rwn_ext.report import training_bytes
from tests.architectures import MobileNetV2, resnet18, resnet50

COMPILED_AS, CAPTURED_AS = "compiled ", "captured "
IMAGENET = {"resnet-18": resnet18, "resnet-50": resnet50, "mobilenet-v2": MobileNetV2}
MEMSAVE_IS_INSTALLED = importlib.util.find_spec("memsave_torch") is not None


def model_of(net: str, row: str) -> nn.Module:
    """The network of a row; all start from the same weights."""
    way, _, part = row.removeprefix(COMPILED_AS).partition(" p = ")
    if way in (OURS, LEAN, FROZEN):
        return _partial(net, 0.0 if way == FROZEN else float(part), lean=way == LEAN)
    model = _plain(net)
    if way == CHECKPOINTED:
        return checkpointed(model)
    if way == MEMSAVE:
        return memsave(model)
    if way == FROZEN_PLAIN:
        return with_convolutions(model, WAYS[way], 1.0)
    return with_convolutions(model, WAYS[way], float(part)) if part else model


def _plain(net: str) -> nn.Module:
    if net not in IMAGENET:
        return build(net, 10, seed=0)
    torch.manual_seed(0)
    return IMAGENET[net]()


def _partial(net: str, part: float, lean: bool) -> nn.Module:
    if net not in IMAGENET:
        return build(net, 10, part, seed=0, lean=lean)
    return convert(_plain(net), trainable=part, lean=lean)


def floors_of(steps: Mapping[str, Step], images: Tensor, rate: Rates, itemsize: int) -> dict[str, float]:
    """Seconds at the floor of these rows' steps. A lean model computes what the other does, but calls no layer."""
    floors = {row: network_floor(step.model, images, rate, itemsize) for row, step in steps.items() if LEAN not in row}
    return floors | {row: floors[row.replace(LEAN, OURS)] for row in steps if LEAN in row}


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


class Step:
    """One step of SGD by the paper's schedule, on the network of a row; on a CPU of fused SGD, its fastest."""

    def __init__(self, net: str, row: str, images: Tensor, labels: Tensor) -> None:
        self.device = images.device.type
        self.model = model_of(net, row).to(images.device, memory_format=torch.channels_last)
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        self.learner = torch.compile(self.model, mode=mode) if row.startswith(COMPILED_AS) else self.model
        self.images, self.labels = images, labels
        schedule = schedule_of("wrn" if net in IMAGENET else net)
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=1e-3,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            fused=self.device == "cpu",
        )

    def __call__(self, between=lambda: None) -> None:
        """`between` is called between forward and backward."""
        self.optimizer.zero_grad()
        loss = self._loss()
        between()
        loss.backward()
        self.optimizer.step()

    def memory(self) -> dict[str, int]:
        """Bytes live between forward and backward; at most, with all that lives between steps; of gradients and
        optimizer state. By the allocator: checkpointing, too, holds what it holds by other means than autograd's."""
        if not self.optimizer.state:
            self()
        state = [v for values in self.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
        lasting = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *state))
        training = training_bytes(self.model, self.optimizer)
        self.optimizer.zero_grad()
        kept, peak = (measure_cuda if self.device == "cuda" else measure_cpu)(self)
        return {"kept_bytes": kept, "peak_bytes": peak + lasting, "training_bytes": training}

    def _loss(self) -> Tensor:
        # A cache of casts must not outlive the capture that it was filled in.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False):
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
