"""Rows and columns of kernels, learned alone: against dense autograd, over the geometry of convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, dense
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rwn_ext.paper.networks import build
from rwn_ext.paper.slices import SlicedConv2d

GEOMETRY = {
    "kernel": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 4), st.integers(0, 4)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "size": st.tuples(st.integers(9, 12), st.integers(9, 12)),
}


@pytest.mark.parametrize("frozen", ["random", "zero"])
@given(
    dim=st.sampled_from([2, 3]), count=st.integers(0, 5), groups=st.sampled_from([1, 2]), bias=st.booleans(), **GEOMETRY
)
def test_equals_the_dense_convolution(frozen, dim, count, groups, bias, kernel, stride, padding, dilation, size):
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias)
    count = min(count, kernel[dim - 2])
    learned = max(count, 1)
    first = kernel[dim - 2] - learned
    sliced = SlicedConv2d(conv, dim, count, frozen)
    if frozen == "zero":
        with torch.no_grad():
            conv.weight.narrow(dim, 0, first).zero_()
    assert torch.equal(sliced.whole_weight(), conv.weight)
    x = torch.randn(2, 4, *size, requires_grad=True)
    output = sliced(x)
    cotangent = torch.randn_like(output)
    expected, grad_input, grads = dense(conv, x, cotangent)
    output.backward(cotangent)
    assert_close(output, expected, conv.weight[0].numel())
    assert_close(x.grad, grad_input, conv.weight[0].numel() * 6)
    assert_close(sliced.weight_trainable.grad, grads["weight"].narrow(dim, first, learned), output[:, 0].numel())
    if bias:
        assert_close(sliced.bias.grad, grads["bias"], output[:, 0].numel())
    assert sliced.weight_frozen is None or sliced.weight_frozen.grad is None


def test_rows_that_see_only_padding_have_no_gradient():
    sliced = SlicedConv2d(nn.Conv2d(2, 3, 3, padding=3, bias=False), 2, 1)
    x = torch.randn(1, 2, 1, 5)
    conv = nn.Conv2d(2, 3, 3, stride=(6, 1), padding=3, bias=False)
    far = SlicedConv2d(conv, 2, 1)
    output = far(torch.randn(1, 2, 1, 5))
    output.backward(torch.randn_like(output))
    assert not far.weight_trainable.grad.any()
    assert sliced(x).shape == F.conv2d(x, sliced.whole_weight(), padding=3).shape


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_under_autocast_it_computes_in_half(layout):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    sliced = SlicedConv2d(conv, 3, 0.4).to(memory_format=layout)
    x = torch.randn(2, 8, 7, 7).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        output = sliced(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    half = copy.deepcopy(conv).to(torch.bfloat16)
    expected, _, grads = dense(half, x.to(torch.bfloat16), cotangent)
    assert output.dtype == torch.bfloat16 and sliced.weight_trainable.grad.dtype == torch.float32
    assert_close(output, expected, 72)
    assert_close(sliced.weight_trainable.grad.to(torch.bfloat16), grads["weight"][..., 2:], 98)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("frozen", ["random", "zero"])
def test_network_learns_the_last_slices_at_least_one(dim, frozen):
    whole = build("densenet-bc-22-12", 10, seed=0)
    network = build("densenet-bc-22-12", 10, 0.4, frozen=frozen, dim=dim, seed=0)
    for name, sliced in network.named_modules():
        if isinstance(sliced, SlicedConv2d):
            weight = whole.get_submodule(name).weight
            assert sliced.weight_trainable.size(dim) == 1
            assert torch.equal(sliced.weight_trainable, weight.narrow(dim, weight.size(dim) - 1, 1))
    if frozen == "random":
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(network.eval()(x), whole.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1), "dim=4"), ((2, 7), "part=7"), ((2, 1.5), "part=1.5"), ((2, 1, "ones"), "frozen='ones'"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_choices_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlicedConv2d(nn.Conv2d(2, 3, 3), *arguments)


def test_padding_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="padding='same'"):
        SlicedConv2d(nn.Conv2d(2, 3, 3, padding="same"), 2, 1)
