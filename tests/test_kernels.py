"""The Triton kernels against torch in float64: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, integers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from rwn_ext.kernels import tiles
from rwn_ext.kernels import weight_grad as launcher
from rwn_ext.kernels.weight_grad import Affine, Filters, weight_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


class Case(NamedTuple):
    """A convolution and its learned filters, as runs."""

    family: str
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel_size: tuple[int, int]
    runs: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        r, s = self.kernel_size
        text = f"{self.family}-{self.n}x{self.c}x{self.h}x{self.w}-{self.k}x{r}x{s}-of{'_'.join(map(str, self.runs))}"
        return f"{text}-s{self.stride}-p{self.padding}-d{self.dilation}-g{self.groups}".replace(" ", "")

    @property
    def chosen(self) -> list[int]:
        return [k for start, stop in zip(self.runs[::2], self.runs[1::2], strict=True) for k in range(start, stop)]

    @property
    def seen(self) -> list[int]:
        """The input channels of the groups that have a chosen filter."""
        size = self.c // self.groups
        touched = sorted({k * self.groups // self.k for k in self.chosen})
        return [group * size + channel for group in touched for channel in range(size)]

    @property
    def output_size(self) -> torch.Size:
        empty = torch.empty(self.k, self.c // self.groups, *self.kernel_size, device="meta")
        x = torch.empty(self.n, self.c, self.h, self.w, device="meta")
        return F.conv2d(x, empty, None, self.stride, self.padding, self.dilation, self.groups).shape

    def expected(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """In float64, by torch, for the whole input."""
        shape = (self.k, self.c // self.groups, *self.kernel_size)
        whole = torch.nn.grad.conv2d_weight(
            x.double(), shape, grad_output.double(), self.stride, self.padding, self.dilation, self.groups
        )
        return whole[self.chosen]

    def actual(
        self, x: Tensor, grad_output: Tensor, out_dtype: torch.dtype, affine: Affine | None = None, **how
    ) -> Tensor:
        """By the kernels, into memory that holds NaN, in the input's memory format."""
        layout = NHWC if x.is_contiguous(memory_format=NHWC) and not x.is_contiguous() else NCHW
        seen = x[:, self.seen].contiguous(memory_format=layout)
        affine = affine and Affine(affine.scale[self.seen], affine.shift[self.seen])
        shape = (len(self.chosen), self.c // self.groups, *self.kernel_size)
        out = torch.full(shape, torch.nan, dtype=out_dtype, device=x.device).contiguous(memory_format=layout)
        filters = Filters(self.runs, self.k, self.groups)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        result = weight_grad(self.family, grad_output, seen, filters, *geometry, out=out, affine=affine, **how)
        assert result is out
        return out

    def length(self) -> int:
        return self.n * self.output_size[2] * self.output_size[3]


# Odd sizes: primes, one smaller than any tile, one learned filter, all of them, batch 1, crops (a padding wider than
# the filter's border), scattered filters, filters in unequal numbers a group.
CASES = [
    Case("stationary", 2, 5, 7, 6, 8, (3, 3), (7, 8), padding=(1, 1)),
    Case("stationary", 1, 37, 5, 7, 6, (3, 3), (0, 6), padding=(1, 1)),
    Case("stationary", 3, 70, 11, 13, 9, (3, 3), (1, 2, 4, 7), padding=(1, 1)),
    Case("stationary", 2, 16, 9, 8, 40, (3, 3), (9, 38), padding=(1, 1)),
    Case("stationary", 2, 9, 9, 11, 8, (3, 2), (2, 5), stride=(2, 3), padding=(2, 0), dilation=(1, 2)),
    Case("stationary", 2, 4, 6, 7, 5, (2, 3), (0, 1, 3, 5), padding=(3, 5)),
    Case("stationary", 2, 3, 9, 9, 4, (7, 5), (1, 3), stride=(3, 2), padding=(3, 2)),
    Case("stationary", 1, 4, 1, 1, 3, (1, 1), (0, 3)),
    Case("stationary", 2, 12, 6, 7, 12, (3, 3), (1, 2, 4, 8), padding=(1, 1), groups=3),
    Case("stationary", 2, 12, 6, 7, 12, (3, 3), (1, 3, 5, 7, 9, 11), padding=(1, 1), groups=3),
    Case("stationary", 2, 12, 6, 7, 12, (3, 3), (1, 2), padding=(1, 1), stride=(2, 2), groups=6),
    Case("swapped", 2, 3, 19, 17, 24, (7, 7), (4, 24), stride=(2, 2), padding=(3, 3)),
    Case("swapped", 1, 1, 8, 9, 7, (3, 3), (0, 2, 5, 7), padding=(1, 1)),
    Case("swapped", 2, 4, 9, 11, 33, (3, 2), (0, 33), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    Case("pointwise", 2, 24, 7, 5, 16, (1, 1), (8, 16)),
    Case("pointwise", 2, 24, 7, 5, 16, (1, 1), (3, 16), stride=(2, 3)),
    Case("pointwise", 2, 24, 7, 5, 12, (1, 1), (1, 2, 4, 9), stride=(2, 1), groups=4),
    Case("depthwise", 2, 6, 9, 7, 6, (3, 3), (2, 5), padding=(1, 1), groups=6),
    Case("depthwise", 2, 6, 9, 7, 6, (5, 5), (0, 1, 3, 5), stride=(2, 1), padding=(2, 1), groups=6),
    Case("depthwise", 2, 24, 9, 7, 24, (3, 3), (8, 16), padding=(1, 1), groups=24),
    Case("depthwise", 2, 20, 9, 7, 40, (3, 2), (1, 38), dilation=(2, 3), padding=(2, 4), groups=20),
]


def operands(case: Case, dtype: torch.dtype, layout: torch.memory_format, make=integers) -> tuple[Tensor, Tensor]:
    x = make(case.n, case.c, case.h, case.w, device=DEVICE).to(dtype).to(memory_format=layout)
    grad_output = make(*case.output_size, device=DEVICE).to(dtype).to(memory_format=layout)
    return x, grad_output


@LAYOUTS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_give_the_exact_gradient(case: Case, layout: torch.memory_format):
    x, grad_output = operands(case, torch.float32, layout)
    assert torch.equal(case.actual(x, grad_output, torch.float32).double(), case.expected(x, grad_output))


@DTYPES
@pytest.mark.parametrize("case", [CASES[2], CASES[11], CASES[15], CASES[17]], ids=str)
def test_every_dtype_within_its_rounding_of_float64(case: Case, dtype: torch.dtype):
    x, grad_output = operands(case, dtype, NHWC, torch.randn)
    expected = case.expected(x, grad_output)
    assert_close(case.actual(x, grad_output, dtype), expected, case.length())
    # Sums are float32 whatever the operands are, and can be had unrounded.
    assert_close(case.actual(x, grad_output, torch.float32), expected, case.length())


@LAYOUTS
@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[11], CASES[15], CASES[17]], ids=str)
def test_the_operand_may_be_normalised_while_it_is_read(case: Case, layout: torch.memory_format):
    """relu(shift) of what lies behind the last pixel, or in the padding, must not count."""
    x, grad_output = operands(case, torch.float32, layout)
    affine = Affine(*(integers(case.c, dtype=torch.float32, device=DEVICE) for _ in range(2)))
    scale, shift = (t[None, :, None, None] for t in affine)
    assert torch.equal(
        case.actual(x, grad_output, torch.float32, affine).double(),
        case.expected(torch.relu(x * scale + shift), grad_output),
    )


LONG = Case("stationary", 4, 20, 31, 29, 8, (3, 3), (1, 2, 5, 8), padding=(1, 1))


def geometry_of(case: Case) -> tuple:
    """The arguments of `sums_bias` behind the family."""
    geometry = (case.kernel_size, case.stride, case.padding, case.dilation)
    return geometry, (case.h, case.w), case.output_size[2:]


@LAYOUTS
@pytest.mark.parametrize("last_block", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if launcher.sums_bias(case.family, *geometry_of(case))),
        LONG._replace(n=2),
        Case("stationary", 1, 8, 13, 11, 160, (1, 1), (1, 150)),  # more filters than columns of a tile
        LONG._replace(family="pointwise", kernel_size=(1, 1), padding=(0, 0)),
        LONG._replace(family="depthwise", k=20, groups=20, runs=(1, 2, 5, 19)),
    ],
    ids=str,
)
def test_the_bias_is_summed_in_the_same_pass(case: Case, layout: torch.memory_format, last_block: bool):
    x, grad_output = operands(case, torch.float32, layout)
    bias = torch.full((len(case.chosen),), torch.nan, device=DEVICE)
    actual = case.actual(x, grad_output, torch.float32, bias=bias, last_block=last_block)
    assert torch.equal(actual.double(), case.expected(x, grad_output))
    assert torch.equal(bias.double(), grad_output[:, case.chosen].double().sum((0, 2, 3)))


def test_a_bias_that_no_tap_sees_whole_is_refused_in_words():
    crop = CASES[5]  # a padding wider than the filter: every tap meets some of it
    assert not launcher.sums_bias(crop.family, *geometry_of(crop))
    x, grad_output = operands(crop, torch.float32, NHWC)
    with pytest.raises(ValueError, match=r"stationary cannot sum the bias of .*padding=\(3, 5\)"):
        crop.actual(x, grad_output, torch.float32, bias=torch.empty(3, device=DEVICE))


def test_many_splits_sum_to_the_same_by_one_launch_and_by_two():
    x, grad_output = operands(LONG, torch.float32, NHWC, torch.randn)
    one, two = (LONG.actual(x, grad_output, torch.float32, last_block=last) for last in (True, False))
    assert tiles.cut(4 * 31 * 29, 20, 36, 1, tiles.Operands(4), multiprocessors=132, arch=90).splits > 1
    assert_close(one, LONG.expected(x, grad_output), LONG.length())
    assert_close(two, LONG.expected(x, grad_output), LONG.length())
    x, grad_output = operands(LONG, torch.float32, NHWC)
    assert torch.equal(
        LONG.actual(x, grad_output, torch.float32, last_block=True).double(), LONG.expected(x, grad_output)
    )


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (LONG._replace(n=2), 1),  # 3 splits
        (LONG, 2),  # 7
        (Case("pointwise", 2, 24, 31, 29, 16, (1, 1), (3, 9)), 1),  # 3, gathered
        (Case("pointwise", 2, 24, 31, 29, 16, (1, 1), (8, 16)), 2),  # 3, in place: nobody zeroes the counters
    ],
    ids=str,
)
def test_few_splits_are_summed_without_a_launch_of_their_own(case, launches, monkeypatch: pytest.MonkeyPatch):
    sums, seen = launcher._sum_splits, []
    monkeypatch.setattr(launcher, "_sum_splits", lambda *arguments: seen.append(1) or sums(*arguments))
    x, grad_output = operands(case, torch.float32, NHWC)
    assert torch.equal(case.actual(x, grad_output, torch.float32).double(), case.expected(x, grad_output))
    assert len(seen) == launches - 1


def test_an_unknown_precision_is_refused_in_words():
    x, grad_output = operands(CASES[0], torch.float32, NHWC)
    with pytest.raises(ValueError, match="precision='fp8' is unknown; choose one of tf32, tf32x3, ieee"):
        CASES[0].actual(x, grad_output, torch.float32, precision="fp8")


@pytest.mark.parametrize("case", [LONG, CASES[11], CASES[14], CASES[17]], ids=str)
def test_the_same_twice_is_the_same_bit_for_bit(case: Case):
    x, grad_output = operands(case, torch.float32, NHWC, torch.randn)
    first, second = (case.actual(x, grad_output, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter computes tf32 as float32")
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_precisions_are_accepted(precision: str):
    x, grad_output = operands(CASES[0], torch.float32, NHWC)
    actual = CASES[0].actual(x, grad_output, torch.float32, precision=precision)
    assert torch.equal(actual.double(), CASES[0].expected(x, grad_output))


def test_other_pixels_and_filters_are_never_read():
    """NaN in the channels of other filters, and around the operands in memory, reaches nothing."""
    case = CASES[3]
    x, grad_output = operands(case, torch.float32, NHWC)
    expected = case.expected(x, grad_output)
    grad_output[:, [k for k in range(case.k) if k not in case.chosen]] = torch.nan
    inside = []
    for tensor in (x, grad_output):
        flat = torch.full((tensor.numel() + 256,), torch.nan, device=DEVICE)
        flat[128:-128] = tensor.permute(0, 2, 3, 1).reshape(-1)
        n, c, h, w = tensor.shape
        inside.append(flat[128:-128].view(n, h, w, c).permute(0, 3, 1, 2))
    assert torch.equal(case.actual(*inside, torch.float32).double(), expected)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", [CASES[0], CASES[11], CASES[14], CASES[17]], ids=str)
def test_offsets_beyond_32_bits(case: Case, layout: torch.memory_format, tmp_path):
    """The third image begins at element 2**31 + 128; a file without content in between holds them."""
    if DEVICE == "cuda":
        pytest.skip("the storage is a sparse file on the host")
    case = case._replace(n=3)
    x, grad_output = operands(case, torch.float32, layout)
    far = []
    for name, tensor in (("x", x[:, case.seen].contiguous(memory_format=layout)), ("grad_output", grad_output)):
        apart = 2**30 + 64
        elements = apart * (case.n - 1) + tensor[0].numel()
        storage = torch.from_file(str(tmp_path / name), shared=True, size=elements, dtype=torch.float32)
        far.append(storage.as_strided(tensor.shape, (apart, *tensor.stride()[1:])))
        far[-1].copy_(tensor)
    shape = (len(case.chosen), case.c // case.groups, *case.kernel_size)
    out = torch.full(shape, torch.nan)
    geometry = (case.kernel_size, case.stride, case.padding, case.dilation)
    weight_grad(case.family, far[1], far[0], Filters(case.runs, case.k, case.groups), *geometry, out=out)
    assert torch.equal(out.double(), case.expected(x, grad_output))


@st.composite
def geometries(draw) -> Case:
    """Any convolution of one group or of several, small."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    k, c = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    r, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride, padding = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(0, 4)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    h, w = (
        draw(st.integers(max(1, d * (size - 1) + 1 - 2 * p), 9))
        for size, d, p in zip((r, s), dilation, padding, strict=True)
    )
    chosen = sorted(draw(st.sets(st.integers(0, k - 1), min_size=1)))
    runs: list[int] = []
    for index in chosen:
        if runs and runs[-1] == index:
            runs[-1] += 1
        else:
            runs += [index, index + 1]
    family = draw(st.sampled_from(["stationary", "swapped"] if groups == 1 else ["stationary"]))
    if c == groups:
        family = draw(st.sampled_from([family, "depthwise"]))
    return Case(family, draw(st.integers(1, 3)), c, h, w, k, (r, s), tuple(runs), stride, padding, dilation, groups)


@settings(max_examples=40)
@given(case=geometries(), layout=st.sampled_from([NCHW, NHWC]))
def test_any_geometry(case: Case, layout: torch.memory_format):
    x, grad_output = operands(case, torch.float32, layout)
    bias = None
    if launcher.sums_bias(case.family, *geometry_of(case)):
        bias = torch.full((len(case.chosen),), torch.nan, device=DEVICE)
    assert torch.equal(case.actual(x, grad_output, torch.float32, bias=bias).double(), case.expected(x, grad_output))
    assert bias is None or torch.equal(bias.double(), grad_output[:, case.chosen].double().sum((0, 2, 3)))


def test_cpu_tensors_outside_the_interpreter_are_refused_in_words():
    code = """
import torch
from rwn_ext.kernels.weight_grad import Filters, weight_grad
x = torch.ones(1, 8, 4, 4)
weight_grad("pointwise", x, x, Filters((0, 1), 8), (1, 1), out=torch.empty(1, 8, 1, 1))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "RuntimeError: Triton kernels cannot run on cpu: use a GPU, or set TRITON_INTERPRET=1" in done.stderr


def test_kernels_know_nothing_of_the_package():
    import ast
    from pathlib import Path

    import rwn_ext.kernels

    for file in Path(rwn_ext.kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.split(".")[0] == "rwn_ext" for name in names), f"{file.name}: {names}"
