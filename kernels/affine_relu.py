"""The gradient at the input of the ReLU in relu(x * scale + shift), from x: the output of the ReLU is not needed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def affine_relu_backward(grad: Tensor, input: Tensor, scale: Tensor, shift: Tensor, *, out: Tensor) -> Tensor:
    """Writes `grad` where relu(input * scale + shift), rounded to the input's type, is positive, else 0, into `out`.

    `grad`, `input` and `out` are (N, C, H, W) and dense in the same memory format; `scale` and `shift` float32 (C,).
    What a prologue of the weight gradient in this folder makes of `input` is positive at the very same places.
    """
    channels_fastest = input.stride(1) == 1
    with torch.cuda.device(input.device) if input.is_cuda else nullcontext():
        affine_relu_backward_kernel[(triton.cdiv(input.numel(), BLOCK),)](
            grad, input, scale, shift, out, input.numel(), input.size(1), input.size(2) * input.size(3),
            CHANNELS_FASTEST=channels_fastest, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def affine_relu_backward_kernel(
    grad_ptr, input_ptr, scale_ptr, shift_ptr, out_ptr, size, channels, image,
    CHANNELS_FASTEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK elements in the order of memory."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    channel = element % channels if CHANNELS_FASTEST else element // image % channels
    value = tl.load(input_ptr + element, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + element, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=inside, other=0.0)
    rounded = (value.to(tl.float32) * scale + shift).to(value.dtype).to(tl.float32)
    tl.store(out_ptr + element, tl.where(rounded <= 0.0, 0.0, grad.to(tl.float32)).to(grad.dtype), mask=inside)
