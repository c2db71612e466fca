"""What a call costs: an eager forward + backward of a layer so small that nothing but the call counts, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from torch import nn

from bench.competitors import FROZEN, OURS, PLAIN, SLICED, WAYS
from bench.conftest import DEVICE
from bench.group import Group
from rwn_ext.paper.timing import interleaved

CALLS, ROUNDS = 100, 41
ROWS = (PLAIN, SLICED, OURS, FROZEN)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", (1, 3), ids=("1x1", "3x3"))
def test_call(record, rounds, size, row):
    record(measured(size, rounds(ROUNDS)), row)


@lru_cache(maxsize=1)
def measured(size: int, rounds: int) -> Group:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, size, padding=size // 2, bias=False).to(DEVICE)
    x = torch.randn(1, 8, 4, 4, device=DEVICE, requires_grad=True)
    cotangent = torch.randn_like(x)

    def run(module: nn.Module) -> None:
        for _ in range(CALLS):
            module(x).backward(cotangent)

    modules = {row: WAYS[row](conv, 1) for row in ROWS}
    with one_thread():
        seconds = interleaved({row: lambda m=module: run(m) for row, module in modules.items()}, rounds)
    case = {"layer": f"8 to 8 filters {size}x{size} on 4x4", "calls": CALLS}
    return Group("call", f"{size}x{size}", case, seconds, (PLAIN, SLICED))


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
