"""Forward and backward of one layer: ours against the other ways to learn a part of it.

The layers are those of the papers and of common networks; small ones on a CPU.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from bench.competitors import FROZEN, LORA, OURS, PLAIN, SLICED, WAYS, learned_gradient
from bench.conftest import DEVICE, DTYPE, marks
from bench.group import Group
from bench.layers import CPU_LAYERS, GPU_LAYERS, tolerance
from bench.rates import convolution_floor, rates
from rwn_ext.paper.timing import interleaved, synchronized_clock
from rwn_ext.report import saved_for_backward

LAYERS = GPU_LAYERS if DEVICE == "cuda" else CPU_LAYERS
PARTS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0) if DEVICE == "cuda" else (0.05, 0.1, 0.4, 1.0)
ROUNDS = 41 if DEVICE == "cuda" else 15
# Compiling takes long, so it is done for a few.
COMPILED = {f"compiled {way}": way for way in (PLAIN, OURS)}
CASES = [(name, part) for name in LAYERS for part in PARTS]
QUICK = [("wrn-16-4 stage 2", 0.1), ("wrn-28-10 stage 2", 0.1)]
WITH_COMPILED = QUICK


def rows(name: str, part: float) -> tuple[str, ...]:
    return (*WAYS, *(COMPILED if (name, part) in WITH_COMPILED else ()))


@pytest.mark.parametrize(
    ("name", "part", "way"),
    [pytest.param(*case, way, marks=marks(case in QUICK, way in COMPILED)) for case in CASES for way in rows(*case)],
)
def test_layer(record, rounds, request, name, part, way):
    compiled = request.config.option.compiled
    record(measured(name, part, rounds(ROUNDS), compiled), way)


@lru_cache(maxsize=1)
def measured(name: str, part: float, rounds: int, compiled: bool) -> Group:
    """All ways in turn, after they have been found to compute what they should."""
    torch.manual_seed(0)
    layer, dtype = LAYERS[name], DTYPE
    learned = max(1, int(layer.k * part))
    conv = nn.Conv2d(layer.c, layer.k, layer.r, layer.stride, padding=layer.r // 2, bias=False)
    conv = conv.to(DEVICE, dtype, memory_format=torch.channels_last)
    x = torch.randn(layer.n, layer.c, layer.size, layer.size, device=DEVICE, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    modules: dict[str, nn.Module] = {}
    for way in rows(name, part) if compiled else WAYS:
        module = WAYS[COMPILED.get(way, way)](conv, learned)
        modules[way] = torch.compile(module) if way in COMPILED else module  # type: ignore[assignment]
    cotangent = torch.randn_like(conv(x))
    kept = {way: _checked(module, conv, x, cotangent, learned, way) for way, module in modules.items()}
    forward: dict[str, list[float]] = {way: [] for way in modules}

    def run(way: str) -> None:
        x.grad = None
        modules[way].zero_grad()
        started = synchronized_clock()
        output = modules[way](x)
        forward[way].append(synchronized_clock() - started)
        output.backward(cotangent)

    seconds = interleaved({way: lambda w=way: run(w) for way in modules}, rounds)
    forward = {way: times[-rounds:] for way, times in forward.items()}
    backward = {way: [a - b for a, b in zip(seconds[way], forward[way], strict=True)] for way in modules}
    sizes = (tuple(x.shape), tuple(conv.weight.shape), tuple(cotangent.shape))
    share = {PLAIN: layer.k, FROZEN: 0}
    floor = {
        way: convolution_floor(rates(DEVICE, dtype), *sizes, share.get(way, learned), dtype.itemsize)
        for way in modules
        if way != LORA
    }
    return Group(
        "layer", name, {"N,C,H,K,R,stride": ",".join(map(str, layer)), "p": part, "learned": f"{learned}/{layer.k}"},
        seconds, (PLAIN, SLICED), {"forward": forward, "backward": backward}, kept, floor,
    )  # fmt: skip


def _checked(module: nn.Module, conv: nn.Conv2d, x: Tensor, cotangent: Tensor, learned: int, way: str) -> int:
    """Compares output and gradients with the dense convolution in float64; returns the bytes kept for backward."""
    x.grad = None
    with saved_for_backward(module) as saved:
        output = module(x)
    output.backward(cotangent)
    exact, exact_x = copy.deepcopy(conv).double().requires_grad_(), x.detach().double().requires_grad_()
    expected = exact(exact_x)
    expected.backward(cotangent.double())
    pairs = {"output": (output, expected), "grad_input": (x.grad, exact_x.grad)}
    gradient = None if way == FROZEN else learned_gradient(getattr(module, "_orig_mod", module), learned)
    if gradient is not None:
        pairs["grad_weight"] = (gradient, exact.weight.grad[-learned:])
    allowed = tolerance(torch.finfo(x.dtype).eps, expected.numel() // expected.size(1))
    for what, (ours, reference) in pairs.items():
        error = (ours.double() - reference).norm() / reference.norm()
        assert error <= allowed, f"{what} of {way} is off by {error}"
    return saved.bytes
