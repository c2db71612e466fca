"""The Triton kernels on a GPU at real sizes: each family, number format and configuration; graphs, compilers, plans."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rwn_ext
from rwn_ext import PartialConv2d, ops, planner

pytest.importorskip("triton")
from rwn_ext.kernels import tiles, weight_grad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
REPEATS = 5
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "tf32x3": torch.float32,
           "ieee": torch.float32}  # fmt: skip
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


@dataclass(frozen=True)
class Size:
    """A weight gradient as large as networks have them."""

    family: str
    n: int
    c: int
    size: int
    k: int
    r: int
    runs: tuple[int, ...]
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        filters = f"{self.k}x{self.r}x{self.r}-of{'_'.join(map(str, self.runs))}"
        return f"{self.family}-{self.n}x{self.c}x{self.size}-{filters}-s{self.stride}-g{self.groups}"

    @property
    def chosen(self) -> list[int]:
        return [k for start, stop in zip(self.runs[::2], self.runs[1::2], strict=True) for k in range(start, stop)]

    @property
    def output_size(self) -> int:
        return (self.size + 2 * (self.r // 2) - self.r) // self.stride + 1


SIZES = [
    Size("stationary", 32, 160, 32, 160, 3, (152, 160)),
    Size("stationary", 32, 160, 32, 160, 3, (3, 4, 70, 90, 159, 160)),
    Size("stationary", 64, 67, 17, 40, 3, (1, 14), 2),
    Size("stationary", 64, 128, 16, 64, 3, (1, 3, 40, 41), groups=4),
    Size("swapped", 16, 3, 112, 64, 7, (4, 64), 2),
    Size("swapped", 16, 3, 112, 64, 3, (0, 9, 11, 60)),
    Size("pointwise", 64, 256, 28, 64, 1, (56, 64)),
    Size("pointwise", 64, 256, 28, 128, 1, (1, 3, 60, 90), 2),
    Size("depthwise", 32, 96, 56, 96, 3, (0, 48), groups=96),
    Size("depthwise", 32, 96, 56, 96, 5, (1, 6, 90, 94), 2, groups=96),
]


def operands(size: Size, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """grad_output and the input's touched groups, whole numbers: every sum of their products is exact in float32."""
    make = torch.Generator(DEVICE).manual_seed(0)
    touched = len({k * size.groups // size.k for k in size.chosen})
    shapes = (
        (size.n, size.k, size.output_size, size.output_size),
        (size.n, size.c // size.groups * touched, size.size, size.size),
    )
    grad_output, x = (
        torch.randint(-3, 4, shape, generator=make, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        for shape in shapes
    )
    return grad_output, x


def expected(size: Size, grad_output: Tensor, x: Tensor) -> Tensor:
    """In float64, tap by tap, by matrix products: (Kt, C / groups, R, S)."""
    groups = sorted({k * size.groups // size.k for k in size.chosen})
    channels, reach = size.c // size.groups, (size.output_size - 1) * size.stride + 1
    padded = F.pad(x.double(), (size.r // 2,) * 4)
    total = torch.zeros(len(size.chosen), channels, size.r, size.r, dtype=torch.float64, device=x.device)
    for place, group in enumerate(groups):
        rows = [row for row, k in enumerate(size.chosen) if k * size.groups // size.k == group]
        grad = grad_output[:, [size.chosen[row] for row in rows]].double()
        own = padded[:, place * channels : (place + 1) * channels]
        for r in range(size.r):
            for s in range(size.r):
                seen = own[:, :, r : r + reach : size.stride, s : s + reach : size.stride]
                total[rows, :, r, s] = torch.einsum("nkpq,ncpq->kc", grad, seen)
    return total


def sums_bias(size: Size) -> bool:
    pairs = (size.r, size.r), (size.stride, size.stride), (size.r // 2, size.r // 2), (1, 1)
    return weight_grad.sums_bias(size.family, pairs, (size.size, size.size), (size.output_size, size.output_size))


def actual(size: Size, grad_output: Tensor, x: Tensor, precision: str = "ieee", **how) -> Tensor:
    """Into memory that holds NaN."""
    shape = (len(size.chosen), size.c // size.groups, size.r, size.r)
    out = torch.full(shape, torch.nan, device=x.device)
    pair = (size.r // 2, size.r // 2)
    return weight_grad.weight_grad(
        size.family, grad_output, x, weight_grad.Filters(size.runs, size.k, size.groups), (size.r, size.r),
        (size.stride, size.stride), pair, (1, 1), out=out, precision=precision, **how,
    )  # fmt: skip


def assert_exact_every_time(size: Size, numbers: str, layout: str, **how) -> None:
    """Miscompiled kernels and races may show in one run of several."""
    grad_output, x = operands(size, NUMBERS[numbers], LAYOUTS[layout])
    precision, reference = numbers if NUMBERS[numbers] == torch.float32 else "ieee", expected(size, grad_output, x)
    for _ in range(REPEATS):
        assert torch.equal(actual(size, grad_output, x, precision, **how).double(), reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_family_is_exact_for_whole_numbers(size: Size, numbers: str, layout: str):
    assert_exact_every_time(size, numbers, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", ["bf16", "fp16", "ieee"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_family_reads_through_norm_and_relu_and_sums_the_bias(size: Size, numbers: str, layout: str):
    """Whole numbers again, of which -3 ... 3 times -1 ... 1 plus -1 ... 1 are exact in every format."""
    grad_output, x = operands(size, NUMBERS[numbers], LAYOUTS[layout])
    make = torch.Generator(DEVICE).manual_seed(1)
    affine = weight_grad.Affine(
        *(torch.randint(-1, 2, (x.size(1),), generator=make, device=DEVICE).float() for _ in range(2))
    )
    reference = expected(size, grad_output, ops.affine_relu(x, *affine))
    for last_block in (None, True):
        bias = torch.full((len(size.chosen),), torch.nan, device=DEVICE) if sums_bias(size) else None
        for _ in range(REPEATS):
            found = actual(size, grad_output, x, affine=affine, bias=bias, last_block=last_block)
            assert torch.equal(found.double(), reference)
            assert bias is None or torch.equal(bias.double(), grad_output[:, size.chosen].double().sum((0, 2, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gradient_of_the_relu_needs_no_y(dtype: torch.dtype, layout: str):
    """The very places where what the kernels make of x is positive: rounded once after each operation."""
    x, grad = (torch.randn(64, 67, 33, 31, device=DEVICE).to(dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    scale, shift = (torch.randn(67, device=DEVICE) for _ in range(2))
    y = ops.affine_relu(x, scale, shift)
    assert torch.equal(ops.affine_relu_backward(grad, x, scale, shift), torch.where(y > 0, grad, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_lean_training_on_a_gpu_is_the_plain_one_within_rounding(norm: str, dtype: torch.dtype, layout: str):
    """Gradients differ by roundings: of a pre-activation next to zero the ReLU may decide otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1),
    ).to(DEVICE, dtype, memory_format=LAYOUTS[layout])  # fmt: skip
    x = torch.randn(32, 3, 32, 32, device=DEVICE).to(dtype).to(memory_format=LAYOUTS[layout])
    grads = []
    for lean, algorithm in ((False, "full"), (True, "triton"), (True, "auto")):
        converted = rwn_ext.convert(copy.deepcopy(model), trainable=0.1, norm=norm, lean=lean, algorithm=algorithm)
        output = converted(x)
        output.backward(
            torch.randn(output.shape, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE).to(output)
        )
        grads.append([p.grad.double() for p in converted.parameters() if p.grad is not None])
    for other in grads[1:]:
        for ours, plain in zip(other, grads[0], strict=True):
            assert (ours - plain).norm() <= 0.02 * plain.norm() + 1e-3


@pytest.mark.parametrize("last_block", [False, True])
@pytest.mark.parametrize("size", SIZES[:8], ids=str)
def test_one_launch_and_two_sum_the_splits_alike(size: Size, last_block: bool):
    assert_exact_every_time(size, "bf16", "nhwc", last_block=last_block)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_random_numbers_give_the_same_bits_every_time(size: Size):
    grad_output, x = (torch.randn_like(t) for t in operands(size, torch.bfloat16, torch.channels_last))
    first = actual(size, grad_output, x)
    assert all(torch.equal(actual(size, grad_output, x), first) for _ in range(REPEATS))
    reference = expected(size, grad_output, x)
    assert (first.double() - reference).norm() < 1e-4 * reference.norm()


def configurations() -> Iterator[tuple[str, str, int, int]]:
    for numbers, dtype in NUMBERS.items():
        for layout in LAYOUTS:
            for shape in tiles.shipped(tiles.Operands(dtype.itemsize, layout == "nhwc"), 90):
                yield numbers, layout, shape.block_channels, shape.block_columns


@pytest.mark.parametrize(("numbers", "layout", "block_channels", "block_columns"), list(configurations()))
def test_every_shipped_configuration_is_exact(numbers, layout, block_channels, block_columns, monkeypatch):
    monkeypatch.setattr(tiles, "_blocks", lambda *_: (block_channels, block_columns))
    size = Size("stationary", 16, 96, 28, 64, 3, (3, 21))
    assert_exact_every_time(size, numbers, layout)
    # And as it reads through a norm and a ReLU that change nothing of what is not negative.
    affine = weight_grad.Affine(torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE))
    grad_output, x = operands(size, NUMBERS[numbers], LAYOUTS[layout])
    precision = numbers if NUMBERS[numbers] == torch.float32 else "ieee"
    found = actual(size, grad_output, x, precision, affine=affine)
    assert torch.equal(found.double(), expected(size, grad_output, x.relu()))


@pytest.mark.parametrize("size", [SIZES[0], SIZES[4], SIZES[6], SIZES[8]], ids=str)
def test_a_captured_launch_repeats_with_other_operands(size: Size):
    grad_output, x = operands(size, torch.bfloat16, torch.channels_last)
    for last_block in (False, True):
        actual(size, grad_output, x, last_block=last_block)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = actual(size, grad_output, x, last_block=last_block)
        for shift in (1, 2):
            x.copy_(x.roll(shift, 0))
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out.double(), expected(size, grad_output, x))


@pytest.mark.parametrize("choice", [0.05, [1, 8, 40]])
def test_a_step_compiled_into_cuda_graphs_is_the_eager_step(choice):
    model = nn.Sequential(
        PartialConv2d(64, 64, 3, padding=1, trainable=choice, algorithm="triton"), nn.ReLU(),
        PartialConv2d(64, 64, 1, trainable=choice, algorithm="triton"),
    ).to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)  # fmt: skip
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(16, 64, 32, 32, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        grads = []
        for way in (model, compiled):
            model.zero_grad()
            way(x).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        for ours, eager in zip(*grads, strict=True):
            assert (ours - eager).norm() <= 0.02 * eager.norm()


@pytest.mark.parametrize("numbers", ["bf16", "fp16", "ieee"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_planner_s_choice_and_all_it_may_choose_run(size: Size, layout: str, numbers: str):
    conv = nn.Conv2d(size.c, size.k, size.r, size.stride, size.r // 2, groups=size.groups, bias=False)
    conv = conv.to(DEVICE, NUMBERS[numbers], memory_format=LAYOUTS[layout])
    x = torch.randn(size.n, size.c, size.size, size.size, device=DEVICE, dtype=conv.weight.dtype)
    x = x.to(memory_format=LAYOUTS[layout])
    grads = {}
    problem = PartialConv2d.from_conv2d(conv, trainable=size.chosen).problem(x)
    for algorithm in ("auto", *planner.candidates(problem)):
        layer = PartialConv2d.from_conv2d(conv, trainable=size.chosen, algorithm=algorithm)
        output = layer(x)
        cotangent = torch.randn(output.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
        output.backward(cotangent.to(output))
        grads[algorithm] = layer.weight_trainable.grad
    reference = grads["full"].double()
    for algorithm, grad in grads.items():
        assert (grad.double() - reference).norm() <= 0.02 * reference.norm(), algorithm
    assert "predicted" in planner.explain(problem)
