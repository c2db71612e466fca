"""Mixed precision: autocast and GradScaler beside nn.Conv2d's, pure half-precision models."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, dense
from torch import nn

from rwn_ext import PartialConv2d, convert

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
CHOICES = {
    "last": {"trainable": 2},
    "scattered": {"trainable": [0, 2, 5]},
    "block": {"trainable": [1, 2], "trainable_inputs": [0, 3]},
    "grouped": {"trainable": [0, 1, 4], "groups": 2},
    "all": {"trainable": 1.0},
    "none": {"trainable": 0},
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@HALVES
@EVERY_CHOICE
@pytest.mark.works_with("autocast in bfloat16 and float16, `GradScaler`")
def test_gradients_under_autocast_are_the_dense_ones_in_the_parameters_type(choice: dict, dtype, device: str):
    layer = PartialConv2d(4, 6, 3, padding=1, device=device, **choice)
    x = torch.randn(2, 4, 8, 9, device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        output = layer(x)
    cotangent = torch.randn(output.shape, device=device).to(dtype)
    output.backward(cotangent)
    # The rounding of weight and input to the small type is autocast's own.
    conv = layer.to_conv2d().to(dtype)
    expected, grad_input, grads = dense(conv, x.detach().to(dtype), cotangent)
    assert output.dtype == dtype
    assert_close(output.detach(), expected, conv.weight[0].numel())
    assert x.grad.dtype == torch.float32
    assert_close(x.grad.to(dtype), grad_input, conv.weight[:, 0].numel())
    for parameter in layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    if layer.weight_trainable is not None:
        rows, columns = list(layer.filters.indices), list(layer.inputs.indices)
        length = cotangent[:, 0].numel()
        assert_close(layer.weight_trainable.grad.to(dtype), grads["weight"][rows][:, columns], length)
        assert_close(layer.bias_trainable.grad.to(dtype), grads["bias"][rows], length)


@HALVES
@EVERY_CHOICE
@pytest.mark.works_with("models wholly in bfloat16 or float16")
def test_a_model_wholly_in_a_small_type_trains(choice: dict, dtype, device: str):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=choice.get("groups", 1)), nn.BatchNorm2d(6), nn.ReLU())
    trainable = {key: value for key, value in choice.items() if key != "groups"}
    model = convert(model, **trainable).to(device, dtype)
    fixed = {name: p.detach().clone() for name, p in model.named_parameters() if "frozen" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        output = model(torch.randn(2, 4, 8, 9, device=device).to(dtype))
        assert output.dtype == dtype
        optimizer.zero_grad()
        output.backward(torch.randn(output.shape, device=device).to(dtype))
        optimizer.step()
    assert all(p.grad.dtype == dtype and p.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in fixed.items())


@pytest.mark.parametrize("choice", ["last", "scattered", "block", "grouped"])
def test_grad_scaler_unscales_clips_skips_and_steps(choice: str, device: str):
    layer = PartialConv2d(4, 6, 3, device=device, **CHOICES[choice])
    fixed = {name: p.detach().clone() for name, p in layer.named_parameters() if "frozen" in name}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    x = torch.randn(2, 4, 8, 9, device=device)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = layer(x).float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    before = layer.weight_trainable.detach().clone()
    step(float("inf"))
    assert torch.equal(layer.weight_trainable, before) and scaler.get_scale() == 128.0
    step(1.0)
    assert not torch.equal(layer.weight_trainable, before) and scaler.get_scale() == 128.0
    assert layer.weight_trainable.grad.norm() <= 1.0001
    assert all(torch.equal(layer.get_parameter(name), value) for name, value in fixed.items())
