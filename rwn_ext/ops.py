"""The waist: the operators everything above is made of, as torch.library ops without autograd.

`merge` builds a whole weight from its learned and its fixed part; `conv2d_weight_grad` computes the weight gradient of
the learned filters, `conv2d_weight_bias_grad` that of their biases too; `affine_relu_backward` is for those who have
kept only what went into a normalisation and a ReLU, whose output the weight gradient, too, can do without. Each has one
schema, one fake and one aten implementation that runs on every device.

The functions of the same names are the way in. Where a compiler, a dispatch mode or a tracer watches, they call the
registered op; else its implementation itself: that spares two thirds of the cost of a call, and is differentiable
(double backward, `PartialConv2d.weight`), being made of aten calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from rwn_ext import costs, cpu, cuda, planner, rooms
from rwn_ext.cpu import Sizes
from rwn_ext.planner import Problem, plan
from rwn_ext.subsets import Subset, run_indices, run_length

Pair = tuple[int, int]
Runs = tuple[int, ...]

torch.library.define(
    "rwn_ext::merge",
    "(Tensor learned, Tensor fixed, int[] runs, int axis, ScalarType dtype, str stage) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
for _name, _results in (("conv2d_weight_grad", "Tensor"), ("conv2d_weight_bias_grad", "(Tensor, Tensor)")):
    torch.library.define(
        f"rwn_ext::{_name}",
        "(Tensor grad_output, Tensor input, int[] filters, int[2] kernel_size, int[2] stride, int[2] padding, "
        "int[2] dilation, int groups, str algorithm, ScalarType? dtype=None, Tensor? scale=None, Tensor? shift=None) "
        f"-> {_results}",
        tags=torch.Tag.pt2_compliant_tag,
    )
torch.library.define(
    "rwn_ext::affine_relu_backward",
    "(Tensor grad, Tensor input, Tensor scale, Tensor shift) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def merge(
    learned: Tensor | None, fixed: Tensor | None, runs: Runs, axis: int, dtype: torch.dtype, *, stage: str | None = None
) -> Tensor:
    """The tensor whose channels `runs` along `axis` are `learned` and whose others are `fixed`, cast to `dtype`.

    `stage` is "forward" or "backward": it keeps a compiler from merging the two calls of a training step into one,
    which would keep the whole weight alive between them. Without it, the result is differentiable wherever it is made.
    """
    if learned is None or fixed is None:
        whole = fixed if learned is None else learned
        assert whole is not None
        return whole.to(dtype)
    if stage is None:
        plain = _merge_pieces if transformed() or torch.compiler.is_compiling() else _merge
        return plain(learned, fixed, runs, axis, dtype)
    if _watched():
        return torch.ops.rwn_ext.merge(learned, fixed, runs, axis, dtype, stage)
    if axis == 0:
        whole = rooms.whole(learned, fixed, runs, dtype)
        if whole is not None:
            return whole
    return _merge(learned, fixed, runs, axis, dtype)


def merge_block(
    parts: Sequence[Tensor | None], filters: Runs, inputs: Runs, dtype: torch.dtype, *, stage: str | None = None
) -> Tensor:
    """The whole (K, C / groups, R, S) weight of its learned block, its fixed filters, the block's fixed inputs."""
    trainable, frozen, frozen_inputs = parts
    if frozen_inputs is not None:
        trainable = merge(trainable, frozen_inputs, inputs, 1, dtype, stage=stage)
    return merge(trainable, frozen, filters, 0, dtype, stage=stage)


def conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    filters: Runs,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The gradient of the filters `filters` alone, shape (Kt, Ct, R, S), in `dtype` (the input's by default).

    Equals `torch.nn.grad.conv2d_weight(...)[filters]`. `grad_output` (N, K, P, Q) is whole; `input` (N, C', H, W) holds
    the channels that `seen_channels` names: those of the groups that hold a learned filter. `groups` counts all groups.
    The result is channels_last where the input is.

    With `scale` and `shift`, float32 (C',), the convolution's input was not `input` but `affine_relu` of it. The
    algorithms of `planner.READERS` compute that while they read, for the others it is made first.
    """
    plain = transformed(grad_output)
    if plain:
        # The others look at strides and view memory in ways that vmap does not follow.
        algorithm = "full"
    function = torch.ops.rwn_ext.conv2d_weight_grad if _watched() and not plain else _weight_grad
    return function(
        grad_output, input, filters, kernel_size, stride, padding, dilation, groups, algorithm, dtype, scale, shift
    )


def conv2d_weight_grads(
    grad_output: Tensor, input: Tensor, filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, algorithm: str = "auto", dtype: torch.dtype | None = None, bias: bool = False,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`conv2d_weight_grad`; with `bias`, also the gradient of the same filters' bias, (Kt,) in `dtype`.

    None instead of that where no algorithm would compute it in the same pass: `grad_output[:, filters].sum((0, 2, 3))`.
    """
    arguments = (
        grad_output, input, filters, kernel_size, stride, padding, dilation, groups, algorithm, dtype, scale, shift
    )  # fmt: skip
    if transformed(grad_output) or not bias:
        return conv2d_weight_grad(*arguments), None
    if not _watched():
        return _weight_grads(*arguments, bias=True)
    # On a CPU a watched call leaves the bias to a sum of its own, on a GPU the op decides.
    if input.is_cuda:
        return torch.ops.rwn_ext.conv2d_weight_bias_grad(*arguments)
    return conv2d_weight_grad(*arguments), None


def reads_normed(
    input: Tensor, layout: torch.memory_format, out_channels: int, filters: Runs, kernel_size: Pair, stride: Pair,
    padding: Pair, dilation: Pair, groups: int, algorithm: str,
) -> bool:  # fmt: skip
    """Whether `conv2d_weight_grad` with a `scale` and `shift` of such an input would apply them while reading it."""
    if transformed() or (algorithm == "auto" and input.is_cpu):
        return False
    chosen = _chosen(
        _precision_for(input), algorithm, input.shape, out_channels, filters, kernel_size, stride, padding, dilation,
        groups, input.device, layout, input.dtype, True,
    )  # fmt: skip
    return chosen in planner.READERS


@lru_cache(maxsize=4096)
def _chosen(precision: str, algorithm: str, *geometry: Any) -> str:
    """The algorithm for the problem of these arguments."""
    return plan(problem(*geometry), algorithm).algorithm


def affine_relu(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(input * scale + shift) by channel, computed in float32 or float64 and rounded to the type of the input."""
    return torch.relu(_affine(input, scale, shift))


def _affine(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    precise = input.to(torch.promote_types(input.dtype, torch.float32))
    return (precise * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def affine_relu_backward(grad: Tensor, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The gradient with respect to input * scale + shift of a `grad` with respect to `affine_relu` of these."""
    function = torch.ops.rwn_ext.affine_relu_backward if _watched() else _affine_relu_backward
    return function(grad, input, scale, shift)


def _affine_relu_backward(grad: Tensor, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    grad, input, layout = _in_memory(grad), _in_memory(input), memory_format(input)
    grad = grad.contiguous(memory_format=layout)
    if planner.can_run_triton(input.device.type, _chip(input.device).arch, str(input.dtype).removeprefix("torch.")):
        kernels = import_module("rwn_ext.kernels.affine_relu")
        input, out = input.contiguous(memory_format=layout), torch.empty_like(grad)
        return kernels.affine_relu_backward(grad, input, scale, shift, out=out)
    return torch.ops.aten.threshold_backward(grad, _affine(input, scale, shift), 0).contiguous(memory_format=layout)


torch.library.impl("rwn_ext::affine_relu_backward", "CompositeExplicitAutograd", _affine_relu_backward)


@torch.library.register_fake("rwn_ext::affine_relu_backward")
def _(grad: Tensor, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(input))


def conv2d_input_grad(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """The gradient of an (N, C, *input_size) input.

    It is the transposed convolution: `aten.convolution_backward` would want the input, or make a full-size dummy of it.
    """
    output_padding = [
        input_size[i]
        - (grad_output.size(2 + i) - 1) * stride[i]
        + 2 * padding[i]
        - dilation[i] * (kernel_size[i] - 1)
        - 1
        for i in (0, 1)
    ]
    return torch.convolution(grad_output, weight, None, stride, padding, dilation, True, output_padding, groups)


def conv2d_grads(
    grad_output: Tensor, input: Tensor, weight: Tensor, filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, algorithm: str = "auto", dtype: torch.dtype | None = None, bias: bool = False,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`conv2d_input_grad` and `conv2d_weight_grads` where the learned weights see all of the input.

    The library's whole gradients come from one call, which small layers feel.
    """
    if _watched() or transformed(grad_output) or scale is not None:
        geometry = (kernel_size, stride, padding, dilation, groups)
        return conv2d_input_grad(grad_output, weight, input.shape[2:], *geometry), *conv2d_weight_grads(
            grad_output, input, filters, *geometry, algorithm, dtype, bias, scale, shift
        )
    grad_output, input = _in_memory(grad_output), _in_memory(input)
    number = input.dtype
    dtype = dtype or number
    planned = _planned(
        _precision_for(input), algorithm, input.shape, input.stride(), grad_output.shape, grad_output.stride(), filters,
        kernel_size, stride, padding, dilation, groups, input.device, number, False,
    )  # fmt: skip
    if planned.with_input:
        grad_input, whole, sums = torch.ops.aten.convolution_backward.default(
            grad_output, input, weight, [weight.size(0)] if bias else None, stride, padding, dilation, False, (0, 0),
            groups, (True, True, bias),
        )  # fmt: skip
        grad_weight, grad_bias = _copied(whole, filters, _layout(planned.problem)), None
        if bias:
            grad_bias = _copied(sums, filters, torch.contiguous_format)
        if number != dtype:
            grad_weight, grad_bias = grad_weight.to(dtype), None if grad_bias is None else grad_bias.to(dtype)
        return grad_input, grad_weight, grad_bias
    grad_input = conv2d_input_grad(
        grad_output, weight, input.shape[2:], kernel_size, stride, padding, dilation, groups
    )  # fmt: skip
    return grad_input, *_run(planned, grad_output, input, filters, groups, dtype, bias)


def take(tensor: Tensor, runs: Runs, axis: int) -> Tensor:
    """The channels `runs` along `axis`: a view where they are contiguous."""
    if len(runs) == 2:
        return tensor.narrow(axis, runs[0], runs[1] - runs[0])
    if torch.compiler.is_compiling():
        # Slices, which a compiler fuses: an index tensor would be a constant copied to the device at every step.
        pieces = [take(tensor, (start, stop), axis) for start, stop in zip(runs[::2], runs[1::2], strict=True)]
        return torch.cat(pieces, axis)
    return tensor.index_select(axis, _index(runs, tensor.device))


def seen_channels(in_channels: int, out_channels: int, groups: int, filters: Runs, inputs: Runs) -> Runs:
    """The input channels that the learned block of a weight touches; `inputs` count within a group."""
    per_group = in_channels // groups
    touched = run_indices(_touched_groups(filters, out_channels, groups))
    channels = [group * per_group + channel for group in touched for channel in run_indices(inputs)]
    return Subset.from_indices(in_channels, channels).runs


def copy_channels(input: Tensor, channels: Runs) -> Tensor:
    """A compact copy of these channels of an (N, C, H, W) input, in its memory format. Differentiable."""
    if len(channels) == 2:
        return take(input, channels, 1).clone(memory_format=memory_format(input))
    return _gather_channels(input, channels, memory_format(input))


def _gather_channels(tensor: Tensor, channels: Runs, layout: torch.memory_format) -> Tensor:
    """These channels of an (N, C, H, W) tensor, dense in this memory format; a view where that is one already."""
    if len(channels) > 2 and layout == torch.channels_last:
        return take(tensor.permute(0, 2, 3, 1), channels, 3).permute(0, 3, 1, 2)
    return take(tensor, channels, 1).contiguous(memory_format=layout)


def problem(
    input_size: tuple[int, ...], out_channels: int, filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, device: torch.device, layout: torch.memory_format, dtype: torch.dtype,
    normed: bool = False,
) -> Problem:  # fmt: skip
    """What the planner sees of a `conv2d_weight_grad` call."""
    touched = run_length(_touched_groups(filters, out_channels, groups))
    batch, channels, height, width = input_size
    return Problem(
        batch=batch, channels=channels, height=height, width=width, filters=out_channels // groups * touched,
        learned=run_length(filters), kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
        groups=max(touched, 1), device=device.type, channels_last=layout == torch.channels_last,
        dtype=str(dtype).removeprefix("torch."), precision=float32_precision(device, dtype), normed=normed,
        chip=_chip(device),
    )  # fmt: skip


def float32_precision(device: torch.device, dtype: torch.dtype) -> str:
    """How float32 is multiplied on a GPU, as torch's flags allow a convolution: "tf32", "tf32x3" or "ieee".

    "tf32x3" (three products, nearly exact) is what a matrix product's permission for tf32 gives a convolution without.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return "ieee"
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _precision_for(input: Tensor) -> str:
    """`float32_precision`, without the questions that a CPU need not be asked: small layers feel them."""
    return "ieee" if input.is_cpu else float32_precision(input.device, input.dtype)


@lru_cache(maxsize=64)
def _chip(device: torch.device) -> costs.Chip:
    if device.type != "cuda":
        return costs.H200
    found = torch.cuda.get_device_properties(device)
    return costs.chip(found.name, found.multi_processor_count, 10 * found.major + found.minor)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is dense in NHWC order and in no other, else contiguous."""
    if (
        transformed()
        or tensor.dim() != 4
        or tensor.is_contiguous()
        or not tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.contiguous_format
    return torch.channels_last


def _format_of(size: Sizes, stride: Sizes) -> torch.memory_format:
    """Likewise, of an (N, C, H, W) tensor of this size and stride."""
    channels_last = _is_dense(size, stride, (1, 3, 2, 0)) and not _is_dense(size, stride, (3, 2, 1, 0))
    return torch.channels_last if channels_last else torch.contiguous_format


def _is_dense(size: Sizes, stride: Sizes, order: tuple[int, ...]) -> bool:
    """With these axes from the innermost one on, as torch counts: one of size 1 may have any stride."""
    expected = 1
    for axis in order:
        if size[axis] != 1 and stride[axis] != expected:
            return 0 in size
        expected *= size[axis]
    return True


def _layout(p: Problem) -> torch.memory_format:
    """That of the input, and so of the weight gradient."""
    return torch.channels_last if p.channels_last else torch.contiguous_format


def transformed(grad_output: Tensor | None = None) -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which need plain differentiable operations.

    Or whether this `grad_output` is many at once (`torch.autograd.grad(..., is_grads_batched=True)`).
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if grad_output is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(grad_output)


def _in_memory(operand: Tensor) -> Tensor:
    """The numbers as kernels read them: in memory, not to be negated (as the imaginary part of a conjugate is)."""
    return operand.resolve_neg() if operand.is_neg() else operand


def _watched() -> bool:
    """Whether someone must see the op as one: a compiler, a dispatch mode (counting FLOPs, tracing, faking)."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


_INDICES: dict[tuple[Runs, torch.device], Tensor] = {}


def _index(runs: Runs, device: torch.device) -> Tensor:
    """The channels as an index tensor, made once per device: a copy from the host would stall a GPU at every step."""
    key = (tuple(runs), device)
    if key not in _INDICES:
        with torch.inference_mode(False):
            index = torch.tensor(run_indices(runs), device=device)
        if type(index) is not Tensor:  # a tracer's
            return index
        _INDICES[key] = index
    return _INDICES[key]


def _merge(
    learned: Tensor, fixed: Tensor, runs: Runs, axis: int, dtype: torch.dtype, stage: str | None = None
) -> Tensor:
    if learned.dtype != dtype or fixed.dtype != dtype:
        learned, fixed = learned.to(dtype), fixed.to(dtype)
    if len(runs) == 2:
        before, size = runs[0], fixed.size(axis)
        if before == size:
            parts = [fixed, learned]
        elif before == 0:
            parts = [learned, fixed]
        else:
            parts = [fixed.narrow(axis, 0, before), learned, fixed.narrow(axis, before, size - before)]
        layout = memory_format(fixed)
        whole = torch.cat(parts, axis)
        return whole if layout == torch.contiguous_format else whole.contiguous(memory_format=layout)
    whole = _empty_whole(learned, fixed, axis)
    whole.index_copy_(axis, _index(runs, fixed.device), learned)
    return whole.index_copy_(axis, _index(_complement(tuple(runs), whole.size(axis)), fixed.device), fixed)


@lru_cache(maxsize=4096)
def _complement(runs: Runs, size: int) -> Runs:
    return Subset(size, runs).complement.runs


def _merge_pieces(learned: Tensor, fixed: Tensor, runs: Runs, axis: int, dtype: torch.dtype) -> Tensor:
    """Likewise, in operations that compilers and the transforms of torch.func follow."""
    pieces, position, taken = [], 0, 0
    for start, stop in zip(runs[::2], runs[1::2], strict=True):
        pieces.append(fixed.narrow(axis, position - taken, start - position))
        pieces.append(learned.narrow(axis, taken, stop - start))
        position, taken = stop, taken + stop - start
    pieces.append(fixed.narrow(axis, position - taken, fixed.size(axis) - (position - taken)))
    return torch.cat([piece.to(dtype) for piece in pieces], axis)


torch.library.impl("rwn_ext::merge", "CompositeExplicitAutograd", _merge)


@torch.library.register_fake("rwn_ext::merge")
def _(learned: Tensor, fixed: Tensor, runs: Runs, axis: int, dtype: torch.dtype, stage: str) -> Tensor:
    if len(runs) == 2:
        return _merge(learned, fixed, runs, axis, dtype, stage)
    return _empty_whole(learned.to(dtype), fixed.to(dtype), axis)


def _empty_whole(learned: Tensor, fixed: Tensor, axis: int) -> Tensor:
    shape = list(fixed.shape)
    shape[axis] += learned.size(axis)
    return torch.empty(shape, dtype=fixed.dtype, device=fixed.device, memory_format=memory_format(fixed))


def _weight_grad(*arguments: Any, **options: Any) -> Tensor:
    return _weight_grads(*arguments, **options)[0]


def _weight_bias_grad(grad_output: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    grad_weight, grad_bias = _weight_grads(grad_output, *arguments, **options, bias=True)
    if grad_bias is None:
        filters = tuple(arguments[1])
        grad_bias = take(grad_output, filters, 1).sum((0, 2, 3)).to(grad_weight.dtype)
    return grad_weight, grad_bias


def _weight_grads(
    grad_output: Tensor, input: Tensor, filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, algorithm: str, dtype: torch.dtype | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, *, bias: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradient of these filters and, with `bias`, of their bias where one pass computes both."""
    filters, dtype = tuple(filters), dtype or input.dtype
    geometry = (kernel_size, stride, padding, dilation, groups)
    grad_output, input = _in_memory(grad_output), _in_memory(input)
    planned = _plan_of(grad_output, input, filters, *geometry, algorithm, scale=scale)
    if scale is not None and shift is not None and planned.algorithm not in planner.READERS:
        # Its strides may be others.
        input, scale = affine_relu(input, scale, shift), None
        planned = _plan_of(grad_output, input, filters, *geometry, planned.algorithm)
    affine = None if scale is None or shift is None else (scale, shift)
    return _run(planned, grad_output, input, filters, groups, dtype, bias, affine)


class _Planned(NamedTuple):
    problem: Problem
    algorithm: str
    implementation: Callable[..., Tensor]
    """Of grad_output, input, filters, the problem, groups and dtype; those of `planner.READERS` also of an `affine`."""
    with_input: bool = False
    """Whether the library's call can give the input's gradient, too."""
    direct: cpu.WeightGrad | None = None
    """Computes `direct`, where nobody differentiates that; then `implementation` does."""


def _plan_of(
    grad_output: Tensor, input: Tensor, filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, algorithm: str, dtype: Any = None, scale: Tensor | None = None, shift: Any = None,
) -> _Planned:  # fmt: skip
    """What a `conv2d_weight_grad` of these arguments does."""
    # Transforms know of no memory format.
    strides = ((), ()) if transformed(grad_output) else (input.stride(), grad_output.stride())
    return _planned(
        _precision_for(input), algorithm, input.shape, strides[0], grad_output.shape, strides[1], tuple(filters),
        tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups, input.device, input.dtype,
        scale is not None,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _planned(
    precision: str, algorithm: str, input_size: Sizes, input_stride: Sizes, output_size: Sizes, output_stride: Sizes,
    filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int, device: torch.device,
    dtype: torch.dtype, normed: bool,
) -> _Planned:  # fmt: skip
    """The problem of these arguments and the implementation of its plan, in one look-up."""
    layout = _format_of(input_size, input_stride) if input_stride else torch.contiguous_format
    p = problem(
        input_size, output_size[1], filters, kernel_size, stride, padding, dilation, groups, device, layout, dtype,
        normed,
    )  # fmt: skip
    algorithm = plan(p, algorithm).algorithm
    spared = p.device == "cpu" and (
        _overruns(p.channels // p.groups, p.kernel_size, p.stride)
        or (p.dtype == "bfloat16" and _oversteps(p.width, p.kernel_size, p.stride))
    )
    direct = None
    if algorithm == "direct":
        direct = cpu.WeightGrad(
            input_size, input_stride, output_size, output_stride, filters, kernel_size, stride, padding, dilation,
            depthwise=p.groups > 1, layout=layout,
        )  # fmt: skip
    return _Planned(p, algorithm, _ALGORITHMS[algorithm], algorithm == "full" and not spared, direct)


def _forget() -> None:
    """The plans, which depend on what was measured."""
    _planned.cache_clear()
    _chosen.cache_clear()


def _run(
    planned: _Planned, grad_output: Tensor, input: Tensor, filters: Runs, groups: int, dtype: torch.dtype, bias: bool,
    affine: Affine | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`_weight_grads` as planned; with `affine`, an algorithm of `planner.READERS`."""
    p, grad_bias = planned.problem, None
    if planned.direct is not None and not _is_differentiated(grad_output, input):
        grad_weight, grad_bias = planned.direct(grad_output, input, bias)
    else:
        how: dict[str, Any] = {} if affine is None else {"affine": affine}
        if bias and _sums_bias(planned, grad_output, input):
            how["bias"] = grad_bias = torch.empty(p.learned, dtype=dtype, device=input.device)
        grad_weight = planned.implementation(grad_output, input, filters, p, groups, dtype, **how)
        grad_weight = grad_weight.contiguous(memory_format=_layout(p))
    if grad_weight.dtype != dtype:
        return grad_weight.to(dtype), None if grad_bias is None else grad_bias.to(dtype)
    return grad_weight, grad_bias


def _sums_bias(planned: _Planned, grad_output: Tensor, input: Tensor) -> bool:
    """Whether one of Triton's kernels computes the bias' gradient in the same pass."""
    if planned.algorithm not in costs.TRITON or _is_differentiated(grad_output, input):
        return False
    p = planned.problem
    geometry = (p.kernel_size, p.stride, p.padding, p.dilation)
    return _triton_kernels().sums_bias(planned.algorithm, geometry, input.shape[2:], grad_output.shape[2:])


torch.library.impl("rwn_ext::conv2d_weight_grad", "CompositeExplicitAutograd", _weight_grad)
torch.library.impl("rwn_ext::conv2d_weight_bias_grad", "CompositeExplicitAutograd", _weight_bias_grad)


@torch.library.register_fake("rwn_ext::conv2d_weight_bias_grad")
def _(grad_output: Tensor, input: Tensor, filters: Runs, *others: Any) -> tuple[Tensor, Tensor]:
    grad_weight = _fake_weight_grad(grad_output, input, filters, *others)
    return grad_weight, grad_weight.new_empty(run_length(filters))


@torch.library.register_fake("rwn_ext::conv2d_weight_grad")
def _fake_weight_grad(
    grad_output: Tensor, input: Tensor, filters: Runs, kernel_size: Pair, stride: Pair, padding: Pair,
    dilation: Pair, groups: int, algorithm: str, dtype: torch.dtype | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    # int: a compiler may hold the number of filters for one that varies; which groups are touched, it then does not.
    touched = run_length(_touched_groups(tuple(filters), int(grad_output.size(1)), groups))
    shape = (run_length(filters), input.size(1) // touched, *kernel_size)
    return torch.empty(shape, dtype=dtype or input.dtype, device=input.device, memory_format=memory_format(input))


class _GroupClass(NamedTuple):
    """Touched groups that hold equally many learned filters, so that one library call serves them all."""

    rows: Runs  # their filters' places in the result
    filters: Runs
    groups: Runs  # their places among the touched groups


@lru_cache(maxsize=4096)
def _touched_groups(filters: Runs, out_channels: int, groups: int) -> Runs:
    """The groups that hold a learned filter."""
    return Subset.from_indices(groups, sorted({k * groups // out_channels for k in run_indices(filters)})).runs


@lru_cache(maxsize=4096)
def group_classes(filters: Runs, out_channels: int, groups: int) -> tuple[_GroupClass, ...]:
    learned = run_indices(filters)
    rows_of: dict[int, list[int]] = {}
    for row, k in enumerate(learned):
        rows_of.setdefault(k * groups // out_channels, []).append(row)
    classes = []
    for count in sorted({len(rows) for rows in rows_of.values()}):
        places = [i for i, rows in enumerate(rows_of.values()) if len(rows) == count]
        rows = [row for members in rows_of.values() if len(members) == count for row in members]
        classes.append(
            _GroupClass(
                Subset.from_indices(len(learned), rows).runs,
                Subset.from_indices(out_channels, [learned[row] for row in rows]).runs,
                Subset.from_indices(len(rows_of), places).runs,
            )
        )
    return tuple(classes)


def _scaled(runs: Runs, factor: int) -> Runs:
    """The channels of these groups, `factor` channels a group."""
    return tuple(edge * factor for edge in runs)


def _full(grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int, dtype: torch.dtype) -> Tensor:
    """The library's weight gradient of every filter in the touched groups, then the learned ones of it."""
    candidates, rows = _candidates(filters, grad_output.size(1), groups)
    whole = _library_weight_grad(_gather_channels(grad_output, candidates, _layout(p)), input, p, p.groups)
    return _copied(whole, rows, _layout(p))


def _copied(whole: Tensor, filters: Runs, layout: torch.memory_format) -> Tensor:
    """A copy of these filters: a view would keep the whole gradient alive for as long as the learned part of it."""
    if len(filters) == 2 and layout == torch.contiguous_format:
        return torch.narrow_copy(whole, 0, filters[0], filters[1] - filters[0])
    part = take(whole, filters, 0)
    return part.clone(memory_format=layout) if len(filters) == 2 else part.contiguous(memory_format=layout)


@lru_cache(maxsize=4096)
def _candidates(filters: Runs, out_channels: int, groups: int) -> tuple[Runs, Runs]:
    """Every filter of the touched groups, and the places of the learned ones among them."""
    candidates = _scaled(_touched_groups(filters, out_channels, groups), out_channels // groups)
    place = {k: i for i, k in enumerate(run_indices(candidates))}
    return candidates, Subset.from_indices(len(place), [place[k] for k in run_indices(filters)]).runs


def _gather(grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int, dtype: torch.dtype) -> Tensor:
    """The library's weight gradient of the learned filters alone, one call a class of groups."""
    classes, layout = group_classes(filters, grad_output.size(1), groups), _layout(p)
    parts = [
        _library_weight_grad(
            _gather_channels(grad_output, members.filters, layout),
            _gather_channels(input, _scaled(members.groups, p.channels // p.groups), layout),
            p,
            run_length(members.groups),
        )
        for members in classes
    ]
    if len(parts) == 1:
        return parts[0]
    result = parts[0].new_empty(p.learned, *parts[0].shape[1:])
    for members, part in zip(classes, parts, strict=True):
        result.index_copy_(0, _index(members.rows, result.device), part)
    return result


def _library_weight_grad(grad_output: Tensor, input: Tensor, p: Problem, groups: int) -> Tensor:
    """The weight gradient as cuDNN or oneDNN computes it, of all the filters of this `grad_output`.

    In float32 where the library cannot be trusted with less (`misreads`).
    """
    if misreads(input, p.kernel_size, p.stride):
        grad_output, input = grad_output.float(), input.float()
    # Only the sizes of the weight are looked at: one element stands for all.
    weight = input.new_empty(()).expand(grad_output.size(1), input.size(1) // groups, *p.kernel_size)
    input, stride = visited(input, p.kernel_size, p.stride, p.padding, groups)
    return torch.ops.aten.convolution_backward.default(
        grad_output, input, weight, None, stride, p.padding, p.dilation, False, (0, 0), groups, (False, True, False)
    )[1]


def visited(input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, groups: int) -> tuple[Tensor, Pair]:
    """Input and stride of the same convolution with strided 1x1 filters, without the pixels that they skip.

    Only where the library cannot be given the whole (`_overruns`); elsewhere input and stride as they are.
    """
    if padding != (0, 0) or not input.is_cpu or not _overruns(input.size(1) // groups, kernel_size, stride):
        return input, stride
    return input[:, :, :: stride[0], :: stride[1]], (1, 1)


def _overruns(channels: int, kernel_size: Pair, stride: Pair) -> bool:
    """Whether oneDNN's weight gradient, the CPU's, may write beyond its memory.

    In version 3.12 it does, with AVX2, for strided 1x1 filters of up to 7 channels, channels_last; plain `nn.Conv2d`
    crashes alike. Twice as many channels are spared for wider vectors.
    """
    return kernel_size == (1, 1) and stride != (1, 1) and channels < 16


def misreads(input: Tensor, kernel_size: Pair, stride: Pair) -> bool:
    """Whether oneDNN's weight gradient may be of numbers that are not the input's.

    In version 3.12 it is, in bfloat16 with AVX-512's instructions for it, where a step of the filters is wider than the
    image: what happens to lie in memory is added, to plain `nn.Conv2d`'s gradient alike.
    """
    return input.dtype == torch.bfloat16 and input.is_cpu and _oversteps(input.size(3), kernel_size, stride)


def _oversteps(width: int, kernel_size: Pair, stride: Pair) -> bool:
    """Whether a step of the filters is wider than the image."""
    return kernel_size[1] > 1 and width < stride[1]


def _matmul(grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int, dtype: torch.dtype) -> Tensor:
    """1x1 filters: grad_output^T (Kt x NPQ) times the visited pixels of the input (NPQ x C)."""
    visited = input[:, :, :: p.stride[0], :: p.stride[1]]
    product = _pixels(take(grad_output, filters, 1)).t() @ _pixels(visited)
    return product[:, :, None, None]


def _unfold(grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int, dtype: torch.dtype) -> Tensor:
    """Few filters: the input stays a matrix (NHW x C), the small side is unfolded to (NHW x R*S*Kt).

    grad_W[k,c,r,s] = sum over n,h,w of input[n,c,h,w] * G[n,k,h + pad - r*dilation, w + pad - s*dilation], where G is
    grad_output with stride - 1 zeros between its pixels and zeros around them.
    """
    spread = _spread(take(grad_output, filters, 1).permute(0, 2, 3, 1), p)
    (r, s), (dh, dw) = p.kernel_size, p.dilation
    top, left = (r - 1) * dh - p.padding[0], (s - 1) * dw - p.padding[1]
    bottom = p.height + p.padding[0] - spread.size(1)
    right = p.width + p.padding[1] - spread.size(2)
    padded = F.pad(spread, (0, 0, left, right, top, bottom))  # (N, H + (R-1)d, W + (S-1)d, Kt)
    taps = padded.unfold(1, (r - 1) * dh + 1, 1).unfold(2, (s - 1) * dw + 1, 1)
    if p.dilation != (1, 1):
        taps = taps[..., ::dh, ::dw]
    columns = taps.permute(0, 1, 2, 4, 5, 3).reshape(-1, r * s * p.learned)  # (N*H*W, R*S*Kt), taps reversed
    product = _pixels(input).t() @ columns  # (C, R*S*Kt)
    return product.view(p.channels, r, s, p.learned).flip(1, 2).permute(3, 0, 1, 2)


def _spread(pixels: Tensor, p: Problem) -> Tensor:
    """(N, P, Q, Kt) with stride - 1 zeros between neighbouring pixels."""
    if p.stride == (1, 1):
        return pixels
    n, height, width, learned = pixels.shape
    rows, columns = (height - 1) * p.stride[0] + 1, (width - 1) * p.stride[1] + 1
    spread = pixels.new_zeros(n, rows, columns, learned)
    spread[:, :: p.stride[0], :: p.stride[1]] = pixels
    return spread


def _pixels(tensor: Tensor) -> Tensor:
    """(N, C, H, W) -> (N*H*W, C): a view of a channels_last tensor."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.size(1))


Affine = tuple[Tensor, Tensor]


def _kernel(
    launch: Callable[..., Tensor], grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int,
    dtype: torch.dtype, affine: Affine | None = None, **how: Any,
) -> Tensor:  # fmt: skip
    """The gradient by one of this package's kernels, rounded once, from float32 sums to `dtype`."""
    if _is_differentiated(grad_output, input, *(affine or ())):
        # Double backward goes through aten.
        input = affine_relu(input, *affine) if affine else input
        return _gather(grad_output, input, filters, p, groups, dtype)
    if affine:
        how["affine"] = affine
    return launch(grad_output, input, filters, p, groups, dtype, **how)


def _is_differentiated(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)


def _triton(
    family: str, grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int, dtype: torch.dtype,
    affine: Affine | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    kernels = _triton_kernels()
    shape = (p.learned, p.channels // p.groups, *p.kernel_size)
    out = torch.empty(shape, dtype=dtype, device=input.device, memory_format=_layout(p))
    return kernels.weight_grad(
        family, grad_output, input, kernels.Filters(filters, grad_output.size(1), groups), p.kernel_size, p.stride,
        p.padding, p.dilation, out=out, bias=bias, affine=affine and kernels.Affine(*affine), precision=p.precision,
    )  # fmt: skip


def _cuda(
    kernel: str, grad_output: Tensor, input: Tensor, filters: Runs, p: Problem, groups: int, dtype: torch.dtype,
    affine: Affine | None = None,
) -> Tensor:  # fmt: skip
    scale, shift = affine or (None, None)
    return cuda.weight_grad(grad_output, input, filters, p, kernel=kernel, dtype=dtype, scale=scale, shift=shift)


@lru_cache(maxsize=1)
def _triton_kernels() -> Any:
    """The launchers, imported at their first use: Triton is not there on every machine, and takes a while."""
    return import_module("rwn_ext.kernels.weight_grad")


_ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "full": _full,
    "gather": _gather,
    "matmul": _matmul,
    "unfold": _unfold,
    "direct": _gather,  # for double backward, which goes through aten
    **{family: partial(_kernel, partial(_triton, family)) for family in costs.TRITON},
    **{f"cuda_{kernel}": partial(_kernel, partial(_cuda, kernel)) for kernel in cuda.KERNELS},
}


def _rehearse(p: Problem, algorithms: list[str]) -> dict[str, Callable[[], Any]]:
    """Each algorithm on operands of this problem's shape, for the planner to measure."""
    dtype, layout = getattr(torch, p.dtype), _layout(p)
    sizes = (p.batch, p.channels, p.height, p.width), (p.batch, p.filters, *p.output_size)
    input, grad_output = (torch.randn(size, dtype=dtype, device=p.device).to(memory_format=layout) for size in sizes)
    # Some in each group.
    size, (least, more) = p.filters // p.groups, divmod(p.learned, p.groups)
    learned = [group * size + k for group in range(p.groups) for k in range(least + (group < more))]
    runs = Subset.from_indices(p.filters, learned).runs
    vector = torch.ones(p.channels, device=p.device)
    affine = (vector, vector) if p.normed else (None, None)
    geometry = (p.kernel_size, p.stride, p.padding, p.dilation, p.groups)
    return {
        name: partial(_weight_grads, grad_output, input, runs, *geometry, name, dtype, *affine) for name in algorithms
    }


planner.connect(_rehearse, _forget)


def _flops(p: Problem, algorithm: str) -> int:
    """Multiply-adds, times two, of one weight gradient as it is really computed."""
    chosen = plan(p, algorithm).algorithm
    columns = p.filters if chosen == "full" else p.learned
    # These multiply every pixel of the input, the others those of the output.
    over_input = chosen in ("unfold", "stationary") or (
        chosen in costs.CUDA and p.groups == 1 and p.kernel_size != (1, 1)
    )
    pixels = p.height * p.width if over_input else p.output_size[0] * p.output_size[1]
    return 2 * p.batch * pixels * columns * (p.channels // p.groups) * p.kernel_size[0] * p.kernel_size[1]


@register_flop_formula([torch.ops.rwn_ext.conv2d_weight_grad, torch.ops.rwn_ext.conv2d_weight_bias_grad], get_raw=True)
def _(*arguments: Any, out_val: Any = None, **options: Any) -> int:
    planned = _plan_of(*arguments, **options)
    return _flops(planned.problem, planned.algorithm)
