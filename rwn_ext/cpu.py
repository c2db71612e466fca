"""The weight gradient by the compiled kernel of csrc/cpu/: what it can compute, and its calls.

`native` is the compiled module, or None where the package was built without a C++ compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwn_ext.subsets import run_indices, run_length

if TYPE_CHECKING:
    from rwn_ext.planner import Problem

Pair = tuple[int, int]
Runs = tuple[int, ...]
Sizes = tuple[int, ...]

# A module that is there but does not load is an error, never "absent".
native: ModuleType | None = (
    importlib.import_module("rwn_ext._cpu") if importlib.util.find_spec("rwn_ext._cpu") is not None else None
)


class WeightGrad:
    """The gradient of some filters of a convolution alone, and of their bias, for operands of these sizes and strides.

    Equals `torch.nn.grad.conv2d_weight(...)[filters]`, (Kt, C / groups, R, S) in this memory format, and
    `grad_output[:, filters].sum((0, 2, 3))`, (Kt,); of one group, or of as many as there are channels and filters
    (`depthwise`): the input (N, Kt, H, W) then holds the channels of `filters` alone, and no bias is computed. All are
    float32 on the CPU; the order of the sums depends on the sizes and the machine, not on the number of
    threads (torch's).
    """

    def __init__(
        self, input_size: Sizes, input_stride: Sizes, output_size: Sizes, output_stride: Sizes, filters: Runs,
        kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, depthwise: bool, layout: torch.memory_format,
    ) -> None:  # fmt: skip
        assert native is not None
        self.shape = (run_length(filters), 1 if depthwise else input_size[1], *kernel_size)
        self.strides = torch.empty(self.shape, device="meta", memory_format=layout).stride()
        self.sums_bias = not depthwise
        # Once for all calls: to read its arguments takes it as long as a small layer's gradient.
        self.compute = native.WeightGrad(
            input_size, input_stride, output_size[2:], output_stride, list(run_indices(filters)), self.strides,
            kernel_size, stride, padding, dilation, depthwise,
        )  # fmt: skip

    def __call__(self, grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weight's gradient; with `bias`, the bias', too, where it is computed."""
        weight = input.new_empty_strided(self.shape, self.strides)
        sums = input.new_empty(self.shape[0]) if bias and self.sums_bias else None
        self.compute(
            input.data_ptr(),
            grad_output.data_ptr(),
            weight.data_ptr(),
            0 if sums is None else sums.data_ptr(),
            torch.get_num_threads(),
        )
        return weight, sums


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
