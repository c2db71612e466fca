"""Forward and backward of one layer: ours against the other ways to learn a part of it.

The layers are those of the papers and of common networks; small ones on a CPU.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from bench.competitors import FROZEN, LAYER_WAYS, LORA, OURS, PLAIN, SLICED, WAYS, rivals
from bench.conftest import DEVICE, DTYPE, marks
from bench.floors import convolution_floor
from bench.group import Group
from bench.layers import CPU_LAYERS, GPU_LAYERS
from bench.oracle import LayerOracle
from bench.rates import rates
from bench.turns import Effort, in_turns
from rwn_ext.paper.timing import synchronized_clock
from rwn_ext.report import saved_for_backward

LAYERS = GPU_LAYERS if DEVICE == "cuda" else CPU_LAYERS
PARTS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0) if DEVICE == "cuda" else (0.05, 0.1, 0.4, 1.0)
EFFORT = Effort(8, least=41, most=41) if DEVICE == "cuda" else Effort(1.5, least=7, most=21)
# Compiling takes long, so it is done for a few.
COMPILED = {f"compiled {way}": way for way in (PLAIN, OURS)}
CASES = [(name, part) for name in LAYERS for part in PARTS]
QUICK = [("wrn-16-4 stage 2", 0.1), ("wrn-28-10 stage 2", 0.1)]
WITH_COMPILED = QUICK


def rows(name: str, part: float) -> tuple[str, ...]:
    return (*LAYER_WAYS, *(COMPILED if (name, part) in WITH_COMPILED else ()))


@pytest.mark.parametrize(
    ("name", "part", "way"),
    [pytest.param(*case, way, marks=marks(case in QUICK, way in COMPILED)) for case in CASES for way in rows(*case)],
)
def test_layer(record, effort, request, name, part, way):
    record(measured(name, part, effort(EFFORT), request.config.option.compiled is not None), way)


@lru_cache(maxsize=1)
def measured(name: str, part: float, effort: Effort, compiled: bool) -> Group:
    """All ways in turn, after they have been found to compute what they should."""
    torch.manual_seed(0)
    layer, dtype = LAYERS[name], DTYPE
    learned = max(1, int(layer.k * part))
    conv = nn.Conv2d(layer.c, layer.k, layer.r, layer.stride, padding=layer.r // 2, bias=False)
    conv = conv.to(DEVICE, dtype, memory_format=torch.channels_last)
    x = torch.randn(layer.n, layer.c, layer.size, layer.size, device=DEVICE, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    modules: dict[str, nn.Module] = {}
    for way in rows(name, part) if compiled else LAYER_WAYS:
        module = WAYS[COMPILED.get(way, way)](conv, learned)
        modules[way] = torch.compile(module) if way in COMPILED else module  # type: ignore[assignment]
    cotangent = torch.randn_like(conv(x))
    oracle = LayerOracle(conv, x, cotangent)
    kept: dict[str, int] = {}
    for way, module in modules.items():
        oracle.check(way, module, 0 if way == FROZEN else learned)
        with saved_for_backward(module) as saved:
            module(x)
        kept[way] = saved.bytes
    forward: dict[str, list[float]] = {way: [] for way in modules}

    def run(way: str) -> None:
        x.grad = None
        modules[way].zero_grad()
        started = synchronized_clock()
        output = modules[way](x)
        forward[way].append(synchronized_clock() - started)
        output.backward(cotangent)

    seconds = in_turns({way: lambda w=way: run(w) for way in modules}, effort)
    forward = {way: times[-len(seconds[way]) :] for way, times in forward.items()}
    backward = {way: [a - b for a, b in zip(seconds[way], forward[way], strict=True)] for way in modules}
    sizes = (tuple(x.shape), tuple(conv.weight.shape), tuple(cotangent.shape))
    # Of those who compute more than is learned, too, the floor is that of what is learned.
    share = {PLAIN: layer.k, FROZEN: 0}
    floor = {
        way: convolution_floor(rates(DEVICE, dtype), *sizes, share.get(COMPILED.get(way, way), learned), dtype.itemsize)
        for way in modules
        if way != LORA
    }
    return Group(
        "layer", name, {"N,C,H,K,R,stride": ",".join(map(str, layer)), "p": part, "learned": f"{learned}/{layer.k}"},
        seconds, (PLAIN, SLICED), {"forward": forward, "backward": backward}, kept, floor=floor,
        rivals={way: others for way in modules if (others := rivals(way, modules))},
    )  # fmt: skip
