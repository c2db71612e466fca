"""The layers that are measured: those of the papers and of common networks; small ones on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


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


def tolerance(rounding: float, summands: int) -> float:
    """The relative error we allow: two roundings to the number format, and those of a running float32 sum."""
    return 2 * rounding + torch.finfo(torch.float32).eps * summands**0.5
