"""The weight gradient by the compiled kernel of csrc/cpu/: what it can compute, and the call.

`native` is the compiled module, or None where the package was built without a C++ compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwn_ext.subsets import run_indices

if TYPE_CHECKING:
    from rwn_ext.planner import Problem

Pair = tuple[int, int]
Runs = tuple[int, ...]

# A module that is there but does not load is an error, never "absent".
native: ModuleType | None = (
    importlib.import_module("rwn_ext._cpu") if importlib.util.find_spec("rwn_ext._cpu") is not None else None
)


def weight_grad(
    grad_output: Tensor,
    input: Tensor,
    filters: Runs,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    out: Tensor,
    instructions: str = "",
) -> Tensor:
    """Writes the gradient of the filters `filters` alone into `out` (Kt, C, R, S), and returns it.

    Equals `torch.nn.grad.conv2d_weight(...)[filters]` of a convolution with one group. All are float32 on the CPU, of
    any strides; the order of the sums depends on the sizes alone, not on the number of threads (torch's).
    `instructions` names an instruction set of `native.INSTRUCTIONS`, by default the best here; ValueError for another.
    """
    assert native is not None
    native.weight_grad(
        input.data_ptr(), input.shape, input.stride(), grad_output.data_ptr(), grad_output.shape[2:],
        grad_output.stride(), _indices(filters), out.data_ptr(), out.stride(), kernel_size, stride, padding, dilation,
        torch.get_num_threads(), instructions,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _indices(filters: Runs) -> list[int]:
    return list(run_indices(filters))


def obstacle(p: Problem) -> str | None:
    """Why this kernel cannot compute this problem; None if it can."""
    if native is None:
        return "rwn_ext was built without a C++ compiler, rwn_ext.report.backends() says more"
    if p.device != "cpu" or p.dtype != "float32":
        return f"it computes float32 on a CPU, not {p.dtype} on {p.device}"
    if p.groups > 1:
        return f"it needs one group, the learned filters lie in {p.groups}"
    return None
