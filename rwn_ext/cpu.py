"""The weight gradient by the compiled kernel of csrc/cpu/: what it can compute, and the call.

`native` is the compiled module, or None where the package was built without a C++ compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwn_ext.subsets import run_indices

if TYPE_CHECKING:
    from rwn_ext.planner import Problem

Pair = tuple[int, int]
Runs = tuple[int, ...]
Sizes = tuple[int, ...]

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
    bias: Tensor | None = None,
    depthwise: bool = False,
    instructions: str = "",
) -> Tensor:
    """Writes the gradient of the filters `filters` alone into `out` (Kt, C / groups, R, S), and returns it.

    Equals `torch.nn.grad.conv2d_weight(...)[filters]` of a convolution with one group; into a dense `bias` (Kt,), if
    there is one, goes `grad_output[:, filters].sum((0, 2, 3))`. With `depthwise`, of a convolution with as many groups
    as channels and filters; `input` (N, Kt, H, W) then holds the channels of `filters` alone, and there is no `bias`.
    All are float32 on the CPU, of any strides; the order of the sums depends on the sizes alone, not on the number of
    threads (torch's). `instructions` names an instruction set of `native.INSTRUCTIONS`, by default the best here for
    so many channels; ValueError for another.
    """
    task = _task(
        input.shape, input.stride(), grad_output.shape, grad_output.stride(), filters, out.stride(), kernel_size,
        stride, padding, dilation, depthwise, instructions,
    )  # fmt: skip
    task(
        input.data_ptr(),
        grad_output.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@lru_cache(maxsize=4096)
def _task(
    input_size: Sizes, input_stride: Sizes, output_size: Sizes, output_stride: Sizes, filters: Runs, *others: Any
) -> Any:
    """The compiled code's own form of these arguments: to read them takes it as long as a small layer's gradient."""
    assert native is not None
    return native.WeightGrad(
        input_size, input_stride, output_size[2:], output_stride, list(run_indices(filters)), *others
    )


def obstacle(p: Problem) -> str | None:
    """Why this kernel cannot compute this problem; None if it can."""
    if native is None:
        return "rwn_ext was built without a C++ compiler, rwn_ext.report.backends() says more"
    if p.device != "cpu" or p.dtype != "float32":
        return f"it computes float32 on a CPU, not {p.dtype} on {p.device}"
    if p.groups > 1 and not p.groups == p.channels == p.filters:
        return (
            f"it needs one group, or one channel and filter for each of the {p.groups} with learned filters; "
            f"they have {p.channels} channels and {p.filters} filters"
        )
    return None
