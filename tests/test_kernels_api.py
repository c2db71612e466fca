"""The Triton kernels through the public API, on the GPU or in Triton's interpreter: `algorithm="triton"`."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, dense, filled_with_integers, integers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rwn_ext import PartialConv2d, ops, planner

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LAYERS = [
    ("triton", {"padding": 1}, {"trainable": 2}),
    ("stationary", {"padding": "same", "dilation": 2, "bias": False}, {"trainable": [0, 3, 4]}),
    ("stationary", {"stride": (2, 1), "padding": 1}, {"trainable": 1.0}),
    ("triton", {"padding": 1}, {"trainable": [1, 6], "trainable_inputs": [0, 2, 5]}),
    ("triton", {"padding": 1, "padding_mode": "circular"}, {"trainable": 2, "trainable_bias": "all"}),
    ("stationary", {"padding": 1, "groups": 2}, {"trainable": [0, 1, 7]}),
    ("depthwise", {"padding": 1, "groups": 6}, {"trainable": [0, 1, 7, 11]}),
    ("swapped", {"padding": 1}, {"trainable": 0.5}),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("algorithm", "geometry", "choice"), LAYERS, ids=str)
def test_a_layer_trains_as_conv2d_does(algorithm: str, geometry: dict, choice: dict, layout):
    conv = filled_with_integers(nn.Conv2d(6, 12, 3, **geometry)).to(DEVICE)
    layer = PartialConv2d.from_conv2d(conv, **choice, algorithm=algorithm)
    x = integers(2, 6, 7, 5, dtype=torch.float32, device=DEVICE).to(memory_format=layout).requires_grad_()
    output = layer(x)
    cotangent = integers(*output.shape, dtype=torch.float32, device=DEVICE)
    output.backward(cotangent)
    expected, grad_input, grads = dense(conv, x, cotangent)
    assert torch.equal(output.double(), expected) and torch.equal(x.grad.double(), grad_input)
    chosen = grads["weight"][list(layer.filters.indices)][:, list(layer.inputs.indices)]
    assert torch.equal(layer.weight_trainable.grad.double(), chosen)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_environment_variable_does_it_too(kernel_size: int, monkeypatch: pytest.MonkeyPatch):
    conv = nn.Conv2d(16, 24, kernel_size, stride=2).to(DEVICE)
    x = torch.randn(2, 16, 9, 9, device=DEVICE)
    grads = []
    for name in ("triton", "full"):
        monkeypatch.setenv("RWN_EXT_ALGORITHM", name)
        layer = PartialConv2d.from_conv2d(conv, trainable=[2, 9])
        layer(x).square().sum().backward()
        grads.append(layer.weight_trainable.grad)
        expected = "pointwise" if kernel_size == 1 else "stationary"
        assert f"picked {expected if name == 'triton' else name}" in planner.explain(layer.problem(x))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_what_triton_cannot_do_is_refused_in_the_forward_pass():
    layer = PartialConv2d(4, 4, 3, trainable=1, dtype=torch.float64, algorithm="triton", device=DEVICE)
    with pytest.raises(ValueError, match=r"'triton' cannot compute .* not in float64"):
        layer(torch.randn(1, 4, 5, 5, dtype=torch.float64, device=DEVICE))
    layer = PartialConv2d(4, 4, 3, trainable=1, algorithm="pointwise", device=DEVICE)
    with pytest.raises(ValueError, match=r"'pointwise' cannot compute .* 1x1"):
        layer(torch.randn(1, 4, 5, 5, device=DEVICE))


def test_under_autocast_the_gradient_is_not_rounded_to_bfloat16():
    """float32 sums go to a float32 Parameter as they are: closer to float64 than bfloat16 can be."""
    layer = PartialConv2d(8, 8, 3, padding=1, trainable=3, algorithm="triton", bias=False, device=DEVICE)
    x = torch.randn(4, 8, 9, 9, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        output = layer(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    grad = layer.weight_trainable.grad
    shape = (8, 8, 3, 3)
    expected = torch.nn.grad.conv2d_weight(x.double(), shape, cotangent.double(), padding=1)[5:]
    assert grad.dtype == torch.float32
    assert_close(grad, expected, 4 * 9 * 9)


def test_double_backward_goes_through_aten():
    layers = [
        PartialConv2d(4, 6, 3, padding=1, trainable=[1, 4], algorithm=name, device=DEVICE)
        for name in ("triton", "gather")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    seconds = []
    for layer in layers:
        (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight_trainable, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), layer.weight_trainable)[0])
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-4, atol=1e-4)


def test_a_compiled_step_calls_the_same_kernel():
    layer = PartialConv2d(4, 6, 3, padding=1, trainable=[1, 4], algorithm="triton", device=DEVICE)
    x = integers(2, 4, 5, 5, dtype=torch.float32, device=DEVICE)
    layer(x).sum().backward()
    expected, layer.weight_trainable.grad = layer.weight_trainable.grad, None
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(layer.weight_trainable.grad, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_its_contract(layout, dtype: torch.dtype | None):
    x = integers(2, 4, 7, 6, dtype=torch.bfloat16, device=DEVICE).to(memory_format=layout)
    cotangent = integers(2, 6, 7, 6, dtype=torch.bfloat16, device=DEVICE).to(memory_format=layout)
    arguments = (cotangent, x, (1, 2, 4, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1, "triton", dtype)
    grad = torch.ops.rwn_ext.conv2d_weight_grad(*arguments)
    assert grad.dtype == (dtype or torch.bfloat16) and grad.is_contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.rwn_ext.conv2d_weight_grad.default, arguments)


def test_counted_flops_are_those_of_the_pixels_that_are_walked():
    layer = PartialConv2d(8, 12, 3, stride=2, padding=1, trainable=[0, 5], algorithm="stationary", device=DEVICE)
    output = layer(torch.randn(2, 8, 9, 11, device=DEVICE))
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.randn_like(output))
    assert counter.get_total_flops() == 2 * 2 * (9 * 11) * 2 * 8 * 9


@pytest.mark.parametrize(
    ("conv", "matmul", "expected"),
    [("tf32", "ieee", "tf32"), ("ieee", "tf32", "tf32x3"), ("ieee", "ieee", "ieee")],
)
def test_float32_is_as_precise_as_torch_s_flags_say(conv: str, matmul: str, expected: str):
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = conv, matmul
    try:
        assert ops.float32_precision(torch.device("cuda"), torch.float32) == expected
        assert ops.float32_precision(torch.device("cuda"), torch.bfloat16) == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
