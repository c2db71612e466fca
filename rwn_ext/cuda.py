"""The weight gradient by the compiled kernels of csrc/: what they can compute, at what cost, and the launch.

`native` is the compiled module, or None where the package was built without it. Plans come from its host planner, which
needs no device. None of this has run on a GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwn_ext.subsets import run_indices, run_length

if TYPE_CHECKING:
    from rwn_ext.costs import Chip
    from rwn_ext.planner import Problem

Runs = tuple[int, ...]
Strides = tuple[int, ...]

# A module that is there but does not load is an error, never "absent".
native: ModuleType | None = (
    importlib.import_module("rwn_ext._cuda") if importlib.util.find_spec("rwn_ext._cuda") is not None else None
)

KERNELS = ("wgmma", "mma", "ffma", "depthwise")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# KiB of shared memory by compute capability: what a block may ask for, what a multiprocessor has.
SHARED_MEMORY = {75: (64, 64), 80: (163, 164), 87: (163, 164), 90: (227, 228), 100: (227, 228), 103: (227, 228)}
SMALL_SHARED_MEMORY = (99, 100)

_COUNTERS: dict[tuple[int, int], Tensor] = {}
_FILTERS: dict[tuple[Runs, torch.device], Tensor] = {}


def weight_grad(
    grad_output: Tensor,
    input: Tensor,
    filters: Runs,
    p: Problem,
    *,
    kernel: str = "",
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The gradient of the filters `filters` alone, (Kt, Ct, R, S), in the input's memory format and in `dtype`.

    Equals `torch.nn.grad.conv2d_weight(...)[filters]`, summed in float32 in an order that depends on the sizes alone.
    `grad_output` (N, K, P, Q) is whole; `input` (N, C, H, W) holds the channels of the groups with a learned filter.
    `p` is the problem as the planner sees it, whose geometry counts here. `dtype` is the input's, or torch.float32.
    With `scale` and `shift`, float32 (C,), the input is replaced by relu(input * scale + shift), rounded to its type.

    `kernel`, one of `KERNELS`, is taken where it can read these tensors (16-byte copies need 16-byte boundaries), else,
    and by default, the one that csrc's planner predicts to be the fastest.

    ValueError for a problem that no kernel computes, with the reasons; RuntimeError where CUDA fails.
    """
    if native is None:
        raise RuntimeError(f"{_NOT_BUILT}; rwn_ext.report.backends() says more")
    _check(grad_output, input, filters, p, scale, shift)
    channels_last = input.stride(1) == 1 and input.size(1) > 1
    result = torch.empty(
        (p.learned, p.channels // p.groups, *p.kernel_size), dtype=dtype or input.dtype, device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    with torch.cuda.device(input.device):
        plan = _plan(
            p, kernel, input.device.index, input.stride(), grad_output.stride(), result.stride(),
            input.data_ptr() % 16 == 0, scale is not None, TYPES[result.dtype],
        )  # fmt: skip
        workspace = result.new_empty(plan.workspace, dtype=torch.float32)
        index = None if len(filters) == 2 else _filters(filters, input.device)
        native.weight_grad(
            plan,
            input=input.data_ptr(),
            grad_output=grad_output.data_ptr(),
            filters=index.data_ptr() if index is not None else 0,
            first_filter=filters[0],
            scale=scale.data_ptr() if scale is not None else 0,
            shift=shift.data_ptr() if shift is not None else 0,
            result=result.data_ptr(),
            workspace=workspace.data_ptr(),
            counters=_counters(plan.counters, input.device).data_ptr() if plan.counters else 0,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return result


def planned(p: Problem, kernel: str = "") -> Any:
    """csrc's plan for this problem on its chip, for dense operands: grid, splits, workspace, predicted time, ...

    Needs no device. ValueError, with the reasons, where the kernel (by default: every kernel) cannot compute it.
    """
    if native is None:
        raise ValueError(_NOT_BUILT)
    return _native_plan(p, kernel, _device_like(p.chip), *_dense(p))


def obstacle(p: Problem, kernel: str) -> str | None:
    """Why this kernel cannot compute this weight gradient; None if it can."""
    if native is None:
        return _NOT_BUILT
    if p.device != "cuda":
        return f"CUDA kernels need a GPU, not {p.device}"
    if getattr(torch, p.dtype) not in TYPES:
        return f"CUDA kernels compute {', '.join(str(t).removeprefix('torch.') for t in TYPES)}, not {p.dtype}"
    if p.groups > 1 and not p.groups == p.channels == p.learned:
        return "CUDA kernels need one group, or one input channel and one filter a group"
    # A compiler cannot follow into the compiled planner; under it the launch tells.
    return None if torch.compiler.is_compiling() else _native_obstacle(p, kernel)


_NOT_BUILT = "rwn_ext was built without CUDA kernels"


@lru_cache(maxsize=4096)
def _native_obstacle(p: Problem, kernel: str) -> str | None:
    assert native is not None
    return native.obstacle(_native_problem(p, *_dense(p)), _device_like(p.chip), kernel) or None


@lru_cache(maxsize=4096)
def _plan(p: Problem, kernel: str, device: int, *tensors: Any) -> Any:
    """The plan for these very tensors."""
    assert native is not None
    if kernel and native.obstacle(_native_problem(p, *tensors), _device(device), kernel):
        kernel = ""
    return _native_plan(p, kernel, _device(device), *tensors)


def _native_plan(p: Problem, kernel: str, device: Any, *tensors: Any) -> Any:
    assert native is not None
    return native.plan(_native_problem(p, *tensors), device, kernel)


def _native_problem(
    p: Problem, strides: Strides, grad_strides: Strides, result_strides: Strides, aligned: bool, normed: bool,
    result_type: int,
) -> Any:  # fmt: skip
    assert native is not None
    size, stride = (p.batch, p.channels, p.height, p.width), p.stride
    if p.kernel_size == (1, 1) and p.padding == (0, 0):
        # Only the visited pixels take part.
        n, c, h, w = strides
        size, strides = (p.batch, p.channels, *p.output_size), (n, c, h * stride[0], w * stride[1])
        stride = (1, 1)
    return native.Problem(
        input_size=size, input_strides=strides, output_size=p.output_size, grad_output_strides=grad_strides,
        result_strides=result_strides, learned=p.learned, kernel_size=p.kernel_size, stride=stride, padding=p.padding,
        dilation=p.dilation, depthwise=p.groups > 1, aligned=aligned, normed=normed,
        type=TYPES[getattr(torch, p.dtype)], result_type=result_type,
    )  # fmt: skip


def _dense(p: Problem) -> tuple[Any, ...]:
    """What `_native_problem` wants to know of operands that stand dense in the problem's memory format."""
    sizes = (p.channels, p.height, p.width), (p.filters, *p.output_size), (p.channels // p.groups, *p.kernel_size)
    strides = [(c * h * w, 1, w * c, c) if p.channels_last else (c * h * w, h * w, w, 1) for c, h, w in sizes]
    return *strides, True, p.normed, TYPES[getattr(torch, p.dtype)]


@lru_cache(maxsize=64)
def _device(index: int) -> Any:
    assert native is not None
    return native.device(index)


@lru_cache(maxsize=64)
def _device_like(chip: Chip) -> Any:
    assert native is not None
    block, multiprocessor = SHARED_MEMORY.get(chip.arch, SMALL_SHARED_MEMORY)
    return native.Device(
        capability=chip.arch, multiprocessors=chip.multiprocessors, block_memory=block << 10,
        multiprocessor_memory=multiprocessor << 10, bandwidth=chip.bandwidth / 1e9,
    )  # fmt: skip


def _check(
    grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, scale: Tensor | None, shift: Tensor | None
) -> None:
    """What a kernel would otherwise read out of bounds."""
    outputs = (p.batch, grad_output.size(1), *p.output_size)
    if input.shape != (p.batch, p.channels, p.height, p.width) or grad_output.shape != outputs:
        raise ValueError(f"input {tuple(input.shape)} or grad_output {tuple(grad_output.shape)} does not fit {p}")
    if input.dtype not in TYPES or input.dtype != getattr(torch, p.dtype) or grad_output.dtype != input.dtype:
        raise ValueError(
            f"input is {input.dtype}, grad_output {grad_output.dtype}: both must be {p.dtype}, one of {list(TYPES)}"
        )
    if input.device.type != "cuda" or grad_output.device != input.device:
        raise ValueError(f"input is on {input.device}, grad_output on {grad_output.device}: both must be on one GPU")
    if run_length(filters) != p.learned or p.learned == 0 or filters[0] < 0 or filters[-1] > grad_output.size(1):
        raise ValueError(
            f"filters={filters} are not {p.learned} of the {grad_output.size(1)} channels of grad_output, as runs"
        )
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (
            vector.shape != (input.size(1),) or vector.dtype != torch.float32 or vector.device != input.device
            or not vector.is_contiguous()
        ):  # fmt: skip
            raise ValueError(f"{name} must be a contiguous float32 vector of {input.size(1)} on {input.device}")


def _counters(count: int, device: torch.device) -> Tensor:
    """Zeros for the kernels' barriers, which leave them ready for the next launch of the same stream.

    One buffer a stream, whose launches follow each other. A graph may be replayed beside anything: it gets its own,
    zeroed at each replay.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream().cuda_stream)
    held = _COUNTERS.get(key)
    if held is None or held.numel() < count:
        held = _COUNTERS[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return held


def _filters(filters: Runs, device: torch.device) -> Tensor:
    """The filters as an index tensor, made once per device."""
    key = (filters, device)
    if key not in _FILTERS:
        _FILTERS[key] = torch.tensor(run_indices(filters), device=device)
    return _FILTERS[key]
