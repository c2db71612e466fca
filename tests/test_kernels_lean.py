"""Weight gradients through the norm and ReLU before a convolution: the operator, and lean blocks that need no y."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, integers
from torch import Tensor, nn

import rwn_ext
from rwn_ext import PartialConv2d, ops
from rwn_ext.lean.norms import BatchNorm

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
WAYS = [
    ("full", 1, (3, 2)), ("gather", 1, (3, 2)), ("unfold", 1, (3, 2)), ("matmul", 1, (1, 1)), ("full", 2, (3, 2)),
    ("stationary", 1, (3, 2)), ("stationary", 2, (3, 2)), ("swapped", 1, (3, 2)), ("pointwise", 1, (1, 1)),
    ("depthwise", 4, (3, 2)),
]  # fmt: skip


def operands(groups: int, kernel_size: tuple[int, int], layout: torch.memory_format, dtype=torch.float32) -> tuple:
    """grad_output, input, the middle of 8 filters and the geometry; scale and shift. All whole numbers."""
    padding = (0, 0) if kernel_size == (1, 1) else (1, 1)
    x = integers(2, 4, 7, 6, dtype=dtype, device=DEVICE).to(memory_format=layout)
    size = [7 + 2 * padding[0] - kernel_size[0] + 1, 6 + 2 * padding[1] - kernel_size[1] + 1]
    cotangent = integers(2, 8, *size, dtype=dtype, device=DEVICE).to(memory_format=layout)
    vectors = (integers(4, dtype=torch.float32, device=DEVICE) for _ in range(2))
    return (cotangent, x, (1, 2, 3, 7), kernel_size, (1, 1), padding, (1, 1), groups), *vectors


def activation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.relu(x.double() * scale.double()[:, None, None] + shift.double()[:, None, None])


@LAYOUTS
@pytest.mark.parametrize(("algorithm", "groups", "kernel_size"), WAYS, ids=str)
def test_the_input_may_be_given_before_norm_and_relu(algorithm: str, groups: int, kernel_size, layout):
    arguments, scale, shift = operands(groups, kernel_size, layout)
    cotangent, x, *_, padding, _, _ = arguments
    arguments = (*arguments, algorithm, torch.float32, scale, shift)
    whole = torch.nn.grad.conv2d_weight(
        activation(x, scale, shift), (8, 4 // groups, *kernel_size), cotangent.double(), 1, padding, 1, groups
    )
    actual = torch.ops.rwn_ext.conv2d_weight_grad(*arguments)
    assert torch.equal(actual.double(), whole[[1, 3, 4, 5, 6]])
    assert torch.equal(ops.conv2d_weight_grad(*arguments), actual)
    torch.library.opcheck(torch.ops.rwn_ext.conv2d_weight_grad.default, arguments)


@LAYOUTS
@pytest.mark.parametrize(("algorithm", "groups", "kernel_size"), WAYS, ids=str)
def test_the_bias_too_from_one_call(algorithm: str, groups: int, kernel_size, layout):
    arguments, scale, shift = operands(groups, kernel_size, layout, torch.bfloat16)
    arguments = (*arguments, algorithm, torch.float32, scale, shift)
    weight, bias = torch.ops.rwn_ext.conv2d_weight_bias_grad(*arguments)
    assert torch.equal(weight, torch.ops.rwn_ext.conv2d_weight_grad(*arguments))
    assert torch.equal(bias, arguments[0][:, [1, 3, 4, 5, 6]].float().sum((0, 2, 3)))
    torch.library.opcheck(torch.ops.rwn_ext.conv2d_weight_bias_grad.default, arguments)


@pytest.mark.parametrize("interpreted", [True, False], ids=["triton", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@LAYOUTS
def test_the_gradient_of_the_relu_needs_no_y(layout, dtype: torch.dtype, interpreted: bool, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(rwn_ext.planner, "TRITON_IS_INSTALLED", False)
    x = torch.randn(3, 5, 17, 13, device=DEVICE).to(dtype).to(memory_format=layout)
    scale, shift = (torch.randn(5, device=DEVICE) for _ in range(2))
    shift[2] = scale[2] = 0  # y = 0 has no gradient
    grad = torch.randn(3, 5, 17, 13, device=DEVICE).to(dtype)
    y = ops.affine_relu(x, scale, shift)
    expected = torch.ops.aten.threshold_backward(grad, y, 0)
    assert 0 < (expected != 0).sum() < expected.numel() * 0.7
    assert torch.equal(ops.affine_relu_backward(grad, x, scale, shift), expected)
    torch.library.opcheck(torch.ops.rwn_ext.affine_relu_backward.default, (grad, x, scale, shift))


def test_the_bias_of_a_layer_costs_no_sum_of_its_own(monkeypatch: pytest.MonkeyPatch):
    taken = []
    take = ops.take
    monkeypatch.setattr(ops, "take", lambda *arguments: taken.append(1) or take(*arguments))
    conv = nn.Conv2d(6, 12, 3, padding=1).to(DEVICE)
    x, grads = torch.randn(2, 6, 7, 5, device=DEVICE, requires_grad=True), []
    for algorithm in ("stationary", "gather"):
        layer = PartialConv2d.from_conv2d(conv, trainable=[0, 3, 4], algorithm=algorithm)
        taken.clear()
        layer(x).square().sum().backward()
        assert bool(taken) == (algorithm == "gather")
        grads.append([layer.weight_trainable.grad, layer.bias_trainable.grad])
    for ours, aten in zip(*grads, strict=True):
        torch.testing.assert_close(ours, aten, rtol=1e-4, atol=1e-4)


class Blocks(nn.Module):
    """Each kind of block: pre-activation with a shortcut that reads the same y, concatenated pieces, depthwise, 1x1."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (width, width, 3 * width, width))
        self.first = nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.skinny = nn.Conv2d(3 * width, width, 1)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.stem(x)))
        z = self.first(y)
        wide = self.second(F.relu(self.norms[1](z))) + self.shortcut(y)
        narrow = self.skinny(F.relu(self.norms[2](torch.cat([wide, z], 1))))
        return self.deep(F.relu(self.norms[3](narrow)))


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each norm that is computed, whether for backward."""
    calls: list[bool] = []

    def spy(again: bool, method):
        return lambda *arguments: (calls.append(again), method(*arguments))[1]

    for name in ("forward", "again"):
        monkeypatch.setattr(BatchNorm, name, spy(name == "again", getattr(BatchNorm, name)))
    return calls


def gradients(model: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """By name; of the input under its own."""
    x = x.detach().clone().requires_grad_()
    model(x).backward(cotangent)
    return {"input": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@LAYOUTS
@pytest.mark.parametrize(
    "choice",
    [{}, {"norm": "frozen"}, {"trainable_inputs": 0.5}, {"trainable_bias": "all"}, {"trainable_bias": "none"}],
    ids=str,
)
def test_lean_blocks_never_make_the_activation_again(choice: dict, layout, rebuilt: list[bool]):
    """Against float64, dense; the ReLU's mask is exact where no pre-activation is nearly zero, as none is here."""
    torch.manual_seed(3)
    model = Blocks().to(DEVICE)
    for norm in model.norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    x = torch.randn(4, 3, 10, 9, device=DEVICE).to(memory_format=layout)
    cotangent = torch.randn(4, 8, 5, 5, device=DEVICE)
    dense = copy.deepcopy(model).double()
    for norm in dense.norms:
        norm.train("norm" not in choice)
    expected = gradients(dense, x.double(), cotangent.double())
    lean = rwn_ext.convert(model, trainable=0.5, lean=True, algorithm="triton", **choice)
    actual = gradients(lean, x, cotangent)
    assert rebuilt and not any(rebuilt)
    layers = {name: layer for name, layer in lean.named_modules() if isinstance(layer, PartialConv2d)}
    assert len(layers) == 6
    for name, layer in layers.items():
        part = expected[f"{name}.weight"][list(layer.filters.indices)]
        if layer.groups == 1:
            part = part[:, list(layer.inputs.indices)]
        assert_close(actual[f"{name}.weight_trainable"], part, 4 * 10 * 9 * 3)
        # A bias before a norm by batch statistics changes nothing.
        if f"{name}.bias_trainable" in actual and (name == "deep" or "norm" in choice):
            learned = list(layer.partition.bias_filters.indices)
            assert_close(actual[f"{name}.bias_trainable"], expected[f"{name}.bias"][learned], 4 * 10 * 9 * 3)
    assert_close(actual["input"], expected["input"], 4 * 10 * 9 * 3)
    for i in range(4):
        for part in ("weight", "bias") if "norm" not in choice else ():
            name = f"norms.{i}.{part}"
            assert_close(actual[name], expected[name], 4 * 10 * 9 * 9)


def test_one_convolution_that_needs_y_keeps_the_others_to_the_plain_way(rebuilt: list[bool]):
    """Made once, it serves all."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(DEVICE)
    x, cotangent = torch.randn(2, 3, 9, 9, device=DEVICE), torch.randn(2, 8, 5, 5, device=DEVICE)
    plain = gradients(rwn_ext.convert(copy.deepcopy(model), trainable=2, algorithm="gather"), x, cotangent)
    lean = rwn_ext.convert(copy.deepcopy(model), trainable=2, lean=True, algorithm="gather")
    for name, grad in gradients(lean, x, cotangent).items():
        assert torch.equal(grad, plain[name]) or DEVICE == "cuda"
    assert True in rebuilt


def test_second_derivatives_make_the_activation_again(rebuilt: list[bool]):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(DEVICE)
    x, seconds = torch.randn(2, 3, 7, 7, device=DEVICE), []
    for options in ({"lean": True, "algorithm": "triton"}, {}):
        part = rwn_ext.convert(copy.deepcopy(model), trainable=2, **options)
        learned = [p for name, p in part.named_parameters() if name.endswith("weight_trainable")]
        grads = torch.autograd.grad(part(x).square().sum(), learned, create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), learned))
    assert True in rebuilt
    for ours, plain in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_under_autocast_the_sums_are_float32(rebuilt: list[bool]):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(DEVICE)
    lean = rwn_ext.convert(model, trainable=2, lean=True, algorithm="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        output = lean(torch.randn(2, 3, 9, 9, device=DEVICE))
    output.sum().backward()
    grad = lean[3].weight_trainable.grad
    assert rebuilt == [False] and grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())
