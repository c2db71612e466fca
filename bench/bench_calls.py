"""What a call costs: an eager forward + backward of a layer so small that nothing but the call counts, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from torch import nn

from bench.competitors import FROZEN, FROZEN_PLAIN, PLAIN, SLICED, WAYS, rivals
from bench.conftest import DEVICE
from bench.group import Group
from bench.oracle import LayerOracle
from bench.turns import Effort, in_turns

CALLS, EFFORT = 100, Effort(8, least=41, most=41)


@pytest.mark.parametrize("row", WAYS)
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("size", (1, 3), ids=("1x1", "3x3"))
def test_call(record, effort, size, bias, row):
    record(measured(size, bias, effort(EFFORT)), row)


@lru_cache(maxsize=1)
def measured(size: int, bias: bool, effort: Effort) -> Group:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, size, padding=size // 2, bias=bias).to(DEVICE)
    x = torch.randn(1, 8, 4, 4, device=DEVICE, requires_grad=True)
    cotangent = torch.randn_like(x)
    oracle = LayerOracle(conv, x, cotangent)

    def run(module: nn.Module) -> None:
        for _ in range(CALLS):
            module(x).backward(cotangent)

    modules = {row: way(conv, 1) for row, way in WAYS.items()}
    for row, module in modules.items():
        oracle.check(row, module, 0 if row in (FROZEN, FROZEN_PLAIN) else 1)
    with one_thread():
        seconds = in_turns({row: lambda m=module: run(m) for row, module in modules.items()}, effort)
    case = {"layer": f"8 to 8 filters {size}x{size} on 4x4", "calls": CALLS}
    named = {row: others for row in modules if (others := rivals(row, modules))}
    return Group("call", f"{size}x{size}{' with bias' if bias else ''}", case, seconds, (PLAIN, SLICED), rivals=named)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
