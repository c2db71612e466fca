"""Whatever the geometry, subset and algorithm: the values and gradients of a dense float64 convolution."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, assert_close, dense, filled_with_integers, integers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rwn_ext import PartialConv2d, costs, partial_conv2d
from rwn_ext.partition import Partition
from rwn_ext.planner import ALGORITHMS
from rwn_ext.subsets import Subset, choose

HALVES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """One convolution, one input, one learned block."""

    batch: int | None  # None: unbatched
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    bias: bool
    filters: tuple[int, ...]
    inputs: tuple[int, ...]
    channels_last: bool

    def conv(self, device: str, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias, self.padding_mode, device, dtype,
        )  # fmt: skip
        return filled_with_integers(conv)

    def input(self, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
        batch = () if self.batch is None else (self.batch,)
        x = integers(*batch, self.in_channels, *self.size, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def obstacles(self) -> set[str]:
        """The algorithms that cannot compute this weight gradient."""
        if not self.filters or not self.inputs:
            return set()
        groups = {k * self.groups // self.out_channels for k in self.filters}
        one_by_one = self.kernel_size == (1, 1)
        unpadded = self.padding in ("same", "valid", (0, 0)) or self.padding_mode != "zeros"
        several = {"matmul", "unfold"} if len(groups) > 1 else set()
        return {"none"} | several | (set() if one_by_one and unpadded else {"matmul"})


def subset_of(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    runs = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: tuple(range(*sorted(ends))))
    scattered = st.sets(st.integers(0, size - 1)).map(lambda chosen: tuple(sorted(chosen)))
    return st.one_of(st.just(tuple(range(size))), runs, scattered)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    per_group, filters_per_group = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    if draw(st.booleans()) and draw(st.booleans()):
        groups, per_group = draw(st.integers(2, 5)), 1  # depthwise
    kernel_size = draw(st.one_of(st.just((1, 1)), pairs(1, 5)))
    stride, dilation = draw(pairs(1, 3)), draw(st.one_of(st.just((1, 1)), pairs(1, 3)))
    padding_mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(pairs(0, 3), st.sampled_from(["same", "valid"])))
    if padding == "same":
        stride = (1, 1)
    # Just large enough for the filter and for what reflection needs, or a little larger.
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    size = tuple(r + draw(st.integers(0, 6)) for r in reach)
    if padding_mode == "zeros" and not isinstance(padding, str):
        size = tuple(max(1, h - 2 * p) for h, p in zip(size, padding, strict=True))
    elif not isinstance(padding, str):
        size = tuple(max(h, p + 1) for h, p in zip(size, padding, strict=True))
    return Case(
        batch=draw(st.sampled_from([None, 1, 2, 3])), size=size, in_channels=groups * per_group,
        out_channels=groups * filters_per_group, kernel_size=kernel_size, stride=stride, padding=padding,
        dilation=dilation, groups=groups, padding_mode=padding_mode, bias=draw(st.booleans()),
        filters=draw(subset_of(groups * filters_per_group)), inputs=draw(subset_of(per_group)),
        channels_last=draw(st.booleans()),
    )  # fmt: skip


# One filter of each of the kernel's columns, on an input that the stride does not divide.
ODD = Case(
    2, (9, 7), 6, 8, (3, 2), (2, 3), (1, 0), (1, 2), 2, "zeros", True, filters=(1, 4, 6), inputs=(0, 2),
    channels_last=True,
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=300)
@given(case=cases())
@example(case=ODD)
def test_equals_dense_for_every_algorithm(case: Case, device: str):
    conv, x = case.conv(device), case.input(device)
    with torch.no_grad():
        cotangent = integers(*conv(x).shape, device=device)
    output, grad_input, grads = dense(conv, x, cotangent)
    kernels = {"direct", *costs.TRITON, *costs.CUDA}  # these know no float64
    for algorithm in ("auto", *(name for name in ALGORITHMS if name not in kernels)):
        layer = PartialConv2d.from_conv2d(
            conv, trainable=case.filters, trainable_inputs=case.inputs, algorithm=algorithm
        )
        leaf = x.clone().requires_grad_()
        if algorithm in case.obstacles():
            with pytest.raises(ValueError, match=f"{algorithm}.* cannot compute .*: "):
                layer(leaf)
            continue
        ours = layer(leaf)
        ours.backward(cotangent)
        assert torch.equal(ours, output)
        assert torch.equal(leaf.grad, grad_input)
        assert_learned_gradients(layer, case, grads)


def assert_learned_gradients(layer: PartialConv2d, case: Case, grads: dict[str, Tensor]) -> None:
    if case.filters and case.inputs:
        assert torch.equal(layer.weight_trainable.grad, grads["weight"][list(case.filters)][:, list(case.inputs)])
    else:
        assert layer.weight_trainable is None
    if case.filters and case.bias:
        assert torch.equal(layer.bias_trainable.grad, grads["bias"][list(case.filters)])
    for name, parameter in layer.named_parameters():
        assert ("trainable" in name) == parameter.requires_grad == (parameter.grad is not None)


@settings(max_examples=40)
@given(case=cases())
def test_an_input_without_gradient_changes_no_other(case: Case):
    conv, x = case.conv("cpu"), case.input("cpu")
    layer = PartialConv2d.from_conv2d(conv, trainable=case.filters, trainable_inputs=case.inputs)
    output = layer(x)
    cotangent = integers(*output.shape)
    expected, _, grads = dense(conv, x, cotangent)
    assert torch.equal(output, expected)
    if output.requires_grad:
        output.backward(cotangent)
    assert output.requires_grad == any(p.requires_grad for p in layer.parameters())
    assert_learned_gradients(layer, case, grads)


@settings(max_examples=40)
@given(case=cases().filter(lambda case: case.filters and case.inputs))
def test_second_derivatives_equal_dense(case: Case):
    conv, x = case.conv("cpu"), case.input("cpu")
    layer = PartialConv2d.from_conv2d(conv, trainable=case.filters, trainable_inputs=case.inputs)
    rows, columns = torch.tensor(case.filters)[:, None], torch.tensor(case.inputs)[None]
    block = layer.weight_trainable.detach().clone().requires_grad_()

    def dense_call(leaf: Tensor) -> Tensor:
        whole = conv.weight.detach().index_put((rows, columns), block)
        return torch.func.functional_call(conv, {"weight": whole}, (leaf,))

    cotangent, directions = integers(*conv(x).shape), [integers(*x.shape), integers(*block.shape)]

    def second(call, weight: Tensor) -> tuple[Tensor, ...]:
        leaf, up = x.clone().requires_grad_(), cotangent.clone().requires_grad_()
        first = torch.autograd.grad(call(leaf), [leaf, weight], up, create_graph=True)
        total = sum((g.square() * v).sum() for g, v in zip(first, directions, strict=True))
        return torch.autograd.grad(total, [leaf, up, weight])

    for ours, theirs in zip(second(layer, layer.weight_trainable), second(dense_call, block), strict=True):
        assert torch.equal(ours, theirs)


SHAPES = {
    "2x7x9x11-to-13-k3-s2-p1": {"in_channels": 7, "out_channels": 13, "kernel_size": 3, "stride": 2, "padding": 1},
    "2x8x9x11-to-12-k1": {"in_channels": 8, "out_channels": 12, "kernel_size": 1},
    "2x6x9x11-to-12-k3-g3": {"in_channels": 6, "out_channels": 12, "kernel_size": (3, 2), "groups": 3, "padding": 1},
    "2x12x9x11-to-12-k3-g12": {
        "in_channels": 12,
        "out_channels": 12,
        "kernel_size": 3,
        "groups": 12,
        "padding": "same",
    },
}
CHOICES = {
    "last": {"trainable": 3},
    "scattered": {"trainable": [0, 3, 4, 9]},
    "block": {"trainable": [1, 5], "trainable_inputs": [0]},
    "all": {"trainable": 1.0},
    "none": {"trainable": 0},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_types_and_layouts(shape: dict, choice: dict, dtype: torch.dtype, layout: torch.memory_format, device: str):
    conv = nn.Conv2d(**shape, device=device).to(dtype=dtype, memory_format=layout)
    x = torch.randn(2, conv.in_channels, 9, 11).to(device, dtype, memory_format=layout).requires_grad_()
    layer = PartialConv2d.from_conv2d(conv, **choice)
    ours = layer(x)
    cotangent = torch.randn(ours.shape).to(device, dtype)
    output, grad_input, grads = dense(conv, x, cotangent)
    ours.backward(cotangent)
    assert ours.dtype == x.grad.dtype == dtype and ours.is_contiguous(memory_format=layout)
    taps = conv.weight[0, 0].numel()
    assert_close(ours, output, conv.weight[0].numel())
    assert_close(x.grad, grad_input, conv.out_channels // conv.groups * taps)
    if layer.weight_trainable is not None:
        learned = layer.weight_trainable
        expected = grads["weight"][list(layer.filters.indices)][:, list(layer.inputs.indices)]
        assert learned.grad.dtype == dtype
        assert_close(learned.grad, expected, cotangent[:, 0].numel())
        assert_close(layer.bias_trainable.grad, grads["bias"][list(layer.filters.indices)], cotangent[:, 0].numel())


@pytest.mark.parametrize("algorithm", ["full", "gather", "unfold"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_whole_numbers_are_exact_in_small_types(dtype: torch.dtype, algorithm: str, device: str):
    conv = filled_with_integers(nn.Conv2d(5, 7, 3, padding=1, device=device, dtype=dtype), -1, 1)
    x = integers(2, 5, 6, 5, low=-1, high=1, dtype=dtype, device=device).requires_grad_()
    layer = PartialConv2d.from_conv2d(conv, trainable=[0, 2, 3], trainable_inputs=[1, 4], algorithm=algorithm)
    cotangent = integers(2, 7, 6, 5, low=-1, high=1, dtype=dtype, device=device)
    output, grad_input, grads = dense(conv, x, cotangent)
    ours = layer(x)
    ours.backward(cotangent)
    assert torch.equal(ours.double(), output) and torch.equal(x.grad.double(), grad_input)
    assert torch.equal(layer.weight_trainable.grad.double(), grads["weight"][[0, 2, 3]][:, [1, 4]])


def views(device: str) -> dict[str, Tensor]:
    """Inputs and cotangents (2, 6, 8, 10) that are not dense."""
    whole = integers(4, 12, 16, 20, device=device)
    return {
        "sliced": whole[1:3, 3:9, 2:10, 5:15],
        "strided": whole[::2, ::2, ::2, ::2],
        "transposed": integers(2, 6, 10, 8, device=device).transpose(2, 3),
        "expanded": integers(2, 1, 8, 1, device=device).expand(2, 6, 8, 10),
        "flipped-batch": integers(6, 2, 8, 10, device=device).transpose(0, 1),
    }


@pytest.mark.parametrize("view", views("cpu"))
@pytest.mark.parametrize("algorithm", ["full", "gather", "unfold"])
def test_inputs_and_cotangents_that_are_not_contiguous(algorithm: str, view: str, device: str):
    conv = filled_with_integers(nn.Conv2d(6, 6, 3, padding=1, device=device, dtype=torch.float64))
    x, cotangent = views(device)[view].requires_grad_(), views(device)[view]
    layer = PartialConv2d.from_conv2d(conv, trainable=[0, 2, 5], trainable_inputs=[1, 2, 4], algorithm=algorithm)
    output, grad_input, grads = dense(conv, x, cotangent)
    ours = layer(x)
    ours.backward(cotangent)
    assert torch.equal(ours, output) and torch.equal(x.grad, grad_input)
    assert torch.equal(layer.weight_trainable.grad, grads["weight"][[0, 2, 5]][:, [1, 2, 4]])


@pytest.mark.parametrize("algorithm", ["auto", "full", "gather", "unfold"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_batch_of_none(choice: dict, algorithm: str, device: str):
    layer = PartialConv2d(7, 13, 3, padding=1, algorithm=algorithm, device=device, **choice)
    x = torch.randn(0, 7, 9, 11, device=device, requires_grad=True)
    output = layer(x)
    assert output.shape == nn.Conv2d(7, 13, 3, padding=1, device=device)(x).shape
    output.backward(torch.randn_like(output))
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters() if p.requires_grad)


def block_of(weight: Tensor, **choice) -> tuple[Partition, dict[str, Tensor | None]]:
    filters = choose(choice["trainable"], weight.size(0))
    inputs = choose(choice.get("trainable_inputs", 1.0), weight.size(1))
    partition = Partition(filters, inputs, filters)
    return partition, partition.split_weight(weight)


def test_the_function_alone_equals_its_formula():
    weight, bias = integers(4, 3, 2, 2), integers(4)
    partition, parts = block_of(weight, trainable=[1, 3], trainable_inputs=[0, 2])
    assert torch.equal(parts["weight_trainable"], weight[[1, 3]][:, [0, 2]])
    assert torch.equal(parts["weight_frozen"], weight[[0, 2]])
    assert torch.equal(parts["weight_frozen_inputs"], weight[[1, 3]][:, [1]])
    x = integers(2, 3, 5, 6)
    ours = partial_conv2d(
        x, *parts.values(), bias[[1, 3]], bias[[0, 2]], (2, 1), (1, 0), padding_mode="circular", partition=partition
    )
    padded = nn.functional.pad(x, (0, 0, 1, 1), mode="circular")
    assert torch.equal(ours, nn.functional.conv2d(padded, weight, bias, (2, 1)))


def test_wrong_arguments_are_refused_by_value(monkeypatch: pytest.MonkeyPatch):
    partition, parts = block_of(torch.randn(4, 3, 2, 2), trainable=2)
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(ValueError, match="weight_trainable"):
        partial_conv2d(x, None, partition=partition)
    with pytest.raises(ValueError, match="'fast'"):
        partial_conv2d(x, *parts.values(), partition=partition, algorithm="fast")
    with pytest.raises(ValueError, match="'full '"):
        partial_conv2d(x, *parts.values(), padding="full ", partition=partition)
    with pytest.raises(RuntimeError, match="same"):
        partial_conv2d(x, *parts.values(), stride=2, padding="same", partition=partition)
    with pytest.raises(RuntimeError, match=r"\(2, 5, 5, 5\)"):
        partial_conv2d(torch.randn(2, 5, 5, 5), *parts.values(), partition=partition)
    with pytest.raises(RuntimeError, match=r"\(3, 5\)"):
        partial_conv2d(torch.randn(3, 5), *parts.values(), partition=partition)
    with pytest.raises(RuntimeError, match=r"float64.*float32"):
        partial_conv2d(x.double(), *parts.values(), partition=partition)
    with pytest.raises(RuntimeError):
        partial_conv2d(torch.randn(2, 3, 1, 1), *parts.values(), partition=partition)
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "faster")
    with pytest.raises(ValueError, match="RWN_EXT_ALGORITHM='faster'"):
        partial_conv2d(x, *parts.values(), partition=partition)


def test_the_environment_forces_an_algorithm(monkeypatch: pytest.MonkeyPatch):
    grouped = PartialConv2d(4, 8, 3, groups=2, trainable=1.0, trainable_inputs=1)
    x = torch.randn(2, 4, 5, 5)
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "unfold")
    with pytest.raises(ValueError, match=r"'unfold' cannot compute .*2 group"):
        grouped(x)
    PartialConv2d(4, 8, 3, trainable=0)(x)
    grouped.algorithm = "gather"
    grouped(x)
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "none")
    with pytest.raises(ValueError, match="something is learned"):
        PartialConv2d(4, 8, 3, trainable=1.0)(x)


def test_subsets_are_values():
    assert Subset.from_indices(5, [1, 2, 4]) == choose([4, 2, 1], 5)


def test_a_layer_forgets_what_has_changed(monkeypatch: pytest.MonkeyPatch):
    layer, x = PartialConv2d(3, 4, 3, trainable=2), torch.randn(1, 3, 9, 9)

    def expected() -> torch.Tensor:
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)

    for name, value in (("stride", (2, 1)), ("padding", (1, 0)), ("dilation", (1, 2))):
        layer(x)
        setattr(layer, name, value)
        assert torch.equal(layer(x), expected())
    layer.set_trainable_([0, 3])
    assert torch.equal(layer(x), expected())
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "faster")
    with pytest.raises(ValueError, match="RWN_EXT_ALGORITHM='faster'"):
        layer(x)
