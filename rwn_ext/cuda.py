"""The weight gradient by the compiled kernels of csrc/: what they can compute, at what cost, and the launch.

`native` is the compiled module, or None where the package was built without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rwn_ext.subsets import run_indices, run_length

Pair = tuple[int, int]
Runs = tuple[int, ...]

# A module that is there but does not load is an error, never "absent".
native: ModuleType | None = (
    importlib.import_module("rwn_ext._cuda") if importlib.util.find_spec("rwn_ext._cuda") is not None else None
)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_COUNTERS: dict[tuple[int, int], Tensor] = {}
_FILTERS: dict[tuple[Runs, torch.device], Tensor] = {}


def weight_grad(
    grad_output: Tensor,
    input: Tensor,
    filters: Runs,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The gradient of the filters `filters` alone, (Kt, Ct, R, S), in the input's memory format and in `dtype`.

    Equals `torch.nn.grad.conv2d_weight(...)[filters]`, summed in float32 in an order that depends on the sizes alone.
    `grad_output` (N, K, P, Q) is whole; of a depthwise convolution `input` (N, Kt, H, W) holds the learned channels.
    `dtype` is the input's, or torch.float32. With `scale` and `shift`, float32 (C,), the input is replaced by
    relu(input * scale + shift), rounded to its type.

    ValueError for a problem that no kernel computes, with the reasons; RuntimeError where CUDA fails.
    """
    if native is None:
        raise RuntimeError("rwn_ext was built without CUDA kernels; rwn_ext.report.backends() says more")
    _check(grad_output, input, filters, scale, shift)
    if kernel_size == (1, 1) and padding == (0, 0) and stride != (1, 1):
        # Only the visited pixels take part.
        p, q = grad_output.shape[2:]
        input, stride = input[:, :, :: stride[0], :: stride[1]][:, :, :p, :q], (1, 1)
    learned = run_length(filters)
    depthwise = groups > 1
    result = torch.empty(
        (learned, 1 if depthwise else input.size(1), *kernel_size), dtype=dtype or input.dtype, device=input.device,
        memory_format=torch.channels_last if _channels_last(input) else torch.contiguous_format,
    )  # fmt: skip
    with torch.cuda.device(input.device):
        plan = _plan(
            tuple(input.shape), input.stride(), tuple(grad_output.shape[2:]), grad_output.stride(), result.stride(),
            learned, kernel_size, stride, padding, dilation, depthwise, input.data_ptr() % 16 == 0, scale is not None,
            TYPES[input.dtype], TYPES[result.dtype], input.device.index,
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


def obstacle(channels: int, learned: int, groups: int, dtype: torch.dtype, device: str) -> str | None:
    """Why the compiled kernels cannot compute a weight gradient of this kind; None if they can."""
    if native is None:
        return "rwn_ext was built without CUDA kernels"
    if device != "cuda":
        return f"it needs a CUDA device, not {device}"
    if dtype not in TYPES:
        return f"it computes {', '.join(str(t) for t in TYPES)}, not {dtype}"
    if groups > 1 and not groups == channels == learned:
        return "it needs one group, or one input channel and one filter a group"
    return None


def _check(grad_output: Tensor, input: Tensor, filters: Runs, scale: Tensor | None, shift: Tensor | None) -> None:
    """What a kernel would otherwise read out of bounds."""
    if input.dim() != 4 or grad_output.dim() != 4 or input.size(0) != grad_output.size(0):
        raise ValueError(
            f"input {tuple(input.shape)} and grad_output {tuple(grad_output.shape)} must be N C H W, N K P Q"
        )
    if input.dtype not in TYPES or grad_output.dtype != input.dtype:
        raise ValueError(f"input is {input.dtype}, grad_output {grad_output.dtype}: both must be one of {list(TYPES)}")
    if input.device.type != "cuda" or grad_output.device != input.device:
        raise ValueError(f"input is on {input.device}, grad_output on {grad_output.device}: both must be on one GPU")
    if not filters or filters[0] < 0 or filters[-1] > grad_output.size(1):
        raise ValueError(f"filters={filters} are not runs of the {grad_output.size(1)} channels of grad_output")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (
            vector.shape != (input.size(1),) or vector.dtype != torch.float32 or vector.device != input.device
            or not vector.is_contiguous()
        ):  # fmt: skip
            raise ValueError(f"{name} must be a contiguous float32 vector of {input.size(1)} on {input.device}")


@lru_cache(maxsize=4096)
def _plan(
    input_size: tuple[int, ...], input_strides: tuple[int, ...], output_size: Pair, grad_strides: tuple[int, ...],
    result_strides: tuple[int, ...], learned: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair,
    depthwise: bool, aligned: bool, normed: bool, dtype: int, result_dtype: int, device: int,
) -> Any:  # fmt: skip
    assert native is not None
    problem = native.Problem(
        input_size=input_size, input_strides=input_strides, output_size=output_size, grad_output_strides=grad_strides,
        result_strides=result_strides, learned=learned, kernel_size=kernel_size, stride=stride, padding=padding,
        dilation=dilation, depthwise=depthwise, aligned=aligned, normed=normed, type=dtype, result_type=result_dtype,
    )  # fmt: skip
    return native.plan(problem, _device(device))


@lru_cache(maxsize=64)
def _device(index: int) -> Any:
    assert native is not None
    return native.device(index)


def _channels_last(input: Tensor) -> bool:
    return input.stride(1) == 1 and input.size(1) > 1


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
