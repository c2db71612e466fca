"""Forward and backward of one layer: ours against the other ways to learn a part of it.

The layers are those of the papers and of common networks; small ones on a CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import nn

from bench.competitors import PLAIN, WAYS, learned_gradient
from bench.conftest import DEVICE
from rwn_ext.paper.timing import interleaved


class Layer(NamedTuple):
    """Batch, input channels, image size, filters, filter size, stride."""

    n: int
    c: int
    size: int
    k: int
    r: int
    stride: int = 1


GPU_LAYERS = {
    "wrn-28-10 stage 1": Layer(128, 160, 32, 160, 3),
    "wrn-28-10 stage 2": Layer(128, 320, 16, 320, 3),
    "wrn-28-10 stage 3": Layer(128, 640, 8, 640, 3),
    "wrn-28-4 stage 1": Layer(128, 64, 32, 64, 3),
    "resnet-50 l1 3x3": Layer(256, 64, 56, 64, 3),
    "resnet-50 l1 1x1": Layer(256, 256, 56, 64, 1),
    "resnet-50 l3 3x3": Layer(256, 256, 14, 256, 3),
    "stem 7x7 s2": Layer(256, 3, 224, 64, 7, 2),
    "vgg-16 conv3_3": Layer(64, 256, 56, 256, 3),
    "vgg-16 conv1_2": Layer(64, 64, 224, 64, 3),
    "densenet-121 b3 1x1": Layer(256, 768, 14, 128, 1),
}
CPU_LAYERS = {
    "wrn-16-4 stage 1": Layer(32, 64, 32, 64, 3),
    "wrn-16-4 stage 2": Layer(32, 128, 16, 128, 3),
    "wrn-16-4 stage 3": Layer(32, 256, 8, 256, 3),
    "wrn-16-4 s2": Layer(32, 64, 32, 128, 3, 2),
    "resnet-50 l3 3x3": Layer(8, 256, 14, 256, 3),
    "stem 7x7 s2": Layer(4, 3, 112, 64, 7, 2),
    "densenet-121 b3 1x1": Layer(8, 768, 14, 128, 1),
}
LAYERS = GPU_LAYERS if DEVICE == "cuda" else CPU_LAYERS
PARTS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0) if DEVICE == "cuda" else (0.05, 0.1, 0.4, 1.0)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ROUNDS = 41 if DEVICE == "cuda" else 15


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(report, name, part, way):
    layer = LAYERS[name]
    learned = max(1, int(layer.k * part))
    group = f"{name} {tuple(layer)}: {learned} of {layer.k} filters learned, forward + backward"
    report(group, measured(layer, learned), way, {"of nn.Conv2d": PLAIN, "of sliced aten": "sliced aten"})


@lru_cache(maxsize=1)
def measured(layer: Layer, learned: int) -> dict[str, list[float]]:
    """Seconds by way and round, after all ways have been found to compute the same."""
    torch.manual_seed(0)
    conv = nn.Conv2d(layer.c, layer.k, layer.r, layer.stride, padding=layer.r // 2, bias=False)
    conv = conv.to(DEVICE, DTYPE, memory_format=torch.channels_last)
    x = torch.randn(layer.n, layer.c, layer.size, layer.size, device=DEVICE, dtype=DTYPE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    modules = {name: way(conv, learned) for name, way in WAYS.items()}
    cotangent = torch.randn_like(conv(x))
    results = {}
    for name, module in modules.items():
        x.grad = None
        module(x).backward(cotangent)
        results[name] = (x.grad, learned_gradient(module, learned))
    for name, gradients in results.items():
        for ours, reference in zip(gradients, results[PLAIN], strict=True):
            error = (ours - reference).float().norm() / reference.float().norm()
            assert error < 16 * torch.finfo(DTYPE).eps, f"{name} is off by {error}"

    def run(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(cotangent)

    return interleaved({name: lambda m=module: run(m) for name, module in modules.items()}, ROUNDS)
