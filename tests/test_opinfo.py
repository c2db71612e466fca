"""PyTorch's own samples of conv2d and of nn.Conv2d, its erroneous ones included, run against ours."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from rwn_ext import PartialConv2d, partial_conv2d
from rwn_ext.partition import Partition
from rwn_ext.subsets import Subset

pytest.importorskip("expecttest", reason="torch.testing's samples need it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d")
MODULE = next(info for info in module_db if info.module_cls is nn.Conv2d)
# What a partial convolution learns of K filters of C / G input channels.
SUBSETS = {
    "all": lambda k, c: (Subset.full(k), Subset.full(c)),
    "last": lambda k, c: (Subset(k, (k - 1, k)), Subset.full(c)),
    "scattered block": lambda k, c: (Subset.from_indices(k, range(0, k, 2)), Subset.from_indices(c, range(0, c, 2))),
    "none": lambda k, c: (Subset.empty(k), Subset.full(c)),
}


def partial_call(subsets, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """`F.conv2d`'s signature; the output and the parts of the weight that it is differentiated by."""
    filters, inputs = subsets(weight.size(0), weight.size(1))
    partition = Partition(filters, inputs, filters, groups)
    parts = partition.split_weight(weight.detach()) | partition.split_bias(None if bias is None else bias.detach())
    leaves = {name: part.requires_grad_("trainable" in name) for name, part in parts.items() if part is not None}
    output = partial_conv2d(
        input, *parts.values(), stride=pair(stride), padding=padding if isinstance(padding, str) else pair(padding),
        dilation=pair(dilation), partition=partition,
    )  # fmt: skip
    return output, {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}, partition


def pair(value):
    """F.conv2d takes a list of one for both dimensions."""
    return value * 2 if isinstance(value, (list, tuple)) and len(value) == 1 else value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("subsets", SUBSETS.values(), ids=SUBSETS)
def test_samples_of_conv2d(subsets, dtype: torch.dtype, device: str):
    samples = list(CONV2D.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 10
    for sample in samples:
        arguments = (sample.input, *sample.args)
        expected = torch.nn.functional.conv2d(*arguments, **sample.kwargs)
        ours, leaves, partition = partial_call(subsets, *arguments, **sample.kwargs)
        torch.testing.assert_close(ours, expected, check_stride=False)
        cotangent = torch.randn_like(expected)
        bound = inspect.signature(partial_call).bind(subsets, *arguments, **sample.kwargs).arguments
        wholes = [bound["input"], bound["weight"], *([] if bound.get("bias") is None else [bound["bias"]])]
        grad_input, *grads = torch.autograd.grad(expected, wholes, cotangent)
        wanted = partition.split_weight(grads[0]) | partition.split_bias(grads[1] if len(grads) > 1 else None)
        mine = torch.autograd.grad(ours, [bound["input"], *leaves.values()], cotangent)
        for actual, reference in zip(mine, [grad_input, *(wanted[name] for name in leaves)], strict=True):
            torch.testing.assert_close(actual, reference, check_stride=False)


@pytest.mark.parametrize("subsets", SUBSETS.values(), ids=SUBSETS)
def test_errors_of_conv2d(subsets, device: str):
    """All but its biases of other types than the weight: ours are cast to the computation's."""
    errors = [e for e in CONV2D.error_inputs(device) if "should be the same" not in e.error_regex]
    assert len(errors) >= 8
    for error in errors:
        sample = error.sample_input
        with pytest.raises((error.error_type, ValueError)) as caught:
            partial_call(subsets, sample.input, *sample.args, **sample.kwargs)
        assert "zip" not in str(caught.value), "an error of ours, not an accident"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("trainable", [0, 1, 0.5, 1.0], ids=str)
def test_module_samples_of_conv2d(trainable, training: bool, device: str):
    samples = MODULE.module_inputs_func(MODULE, device, torch.float64, requires_grad=True, training=training)
    assert len(samples) >= 4
    for sample in samples:
        conv = nn.Conv2d(*sample.constructor_input.args, **sample.constructor_input.kwargs).to(device, torch.float64)
        made = PartialConv2d(*sample.constructor_input.args, **sample.constructor_input.kwargs, trainable=trainable)
        made.to(device, torch.float64).train(training).load_state_dict(conv.state_dict(), strict=True)
        torch.testing.assert_close(made(*sample.forward_input.args), conv(*sample.forward_input.args))
        assert repr(made).startswith(f"Partial{repr(conv)[:-1]}, trainable=")
