"""Training: what is fixed stays bit for bit, what is learned follows dense training, and memory shrinks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import integers
from torch import Tensor, nn

from rwn_ext import PartialConv2d, convert, set_subsets_, subsets


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 12, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


CONVS = {"0": ([1, 2, 7], None), "3": ([0, 5, 11], [1, 3]), "5": ([0, 1], None)}
OTHERS = {"0": ([0, 2, 9], [0, 2]), "3": ([5, 6], None), "5": ([1, 3, 7], [0, 5])}
SAME_SHAPES = {"0": ([0, 2, 8], None), "3": ([1, 5, 10], [0, 4]), "5": ([4, 5], None)}


def partial(model: nn.Module, choice: dict) -> nn.Module:
    return set_subsets_(convert(model, trainable=1.0), choice)


def masks(model: nn.Module, choice: dict) -> dict[str, Tensor]:
    """1 for each learned element of the dense weights and biases."""
    result = {}
    for name, (filters, inputs) in choice.items():
        weight = model.get_submodule(name).weight
        inputs = list(range(weight.size(1))) if inputs is None else inputs
        result[f"{name}.weight"] = torch.zeros_like(weight)
        result[f"{name}.weight"][torch.tensor(filters).long()[:, None], torch.tensor(inputs)] = 1
        result[f"{name}.bias"] = torch.zeros_like(weight[:, 0, 0, 0])
        result[f"{name}.bias"][filters] = 1
    return result


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 9, 9, generator=generator, dtype=dtype)
    return x, torch.randint(4, (8,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, dtype: torch.dtype = torch.float32) -> float:
    x, labels = batch(number, dtype)
    loss = F.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05),
    "adam-amsgrad-foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True, foreach=True),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def assert_moved_only(model: nn.Module, before: dict[str, Tensor], choice: dict) -> None:
    after = model.state_dict()
    for name, mask in masks(model, choice).items():
        fixed, moved = mask == 0, mask == 1
        assert torch.equal(after[name][fixed], before[name][fixed]), f"{name} moved where it is fixed"
        assert (after[name][moved] != before[name][moved]).all(), f"{name} stands still where it is learned"


@EVERY_OPTIMIZER
def test_the_fixed_part_is_bit_identical_after_20_steps(optimizer):
    model = partial(network(), CONVS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = optimizer(model.parameters())
    for number in range(20):
        step(model, optimizer, number)
    assert_moved_only(model, before, CONVS)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("how", ["optimizer", "cleared-state", "same-shapes-stale-state"])
def test_also_when_the_subset_is_switched(optimizer, how: str):
    choice = SAME_SHAPES if how == "same-shapes-stale-state" else OTHERS
    model = partial(network(), CONVS)
    optimizer = optimizer(model.parameters())
    for number in range(10):
        step(model, optimizer, number)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_subsets_(model, choice, optimizer=optimizer if how == "optimizer" else None)
    assert {name: filters for name, (filters, _) in subsets(model).items()} == {
        name: filters for name, (filters, _) in choice.items()
    }
    if how == "cleared-state":
        optimizer.state.clear()
    for number in range(10, 20):
        step(model, optimizer, number)
    assert_moved_only(model, before, choice)


def test_switching_layers_off_and_on_again_with_one_optimizer():
    """A layer that learns nothing for a while: its state must not come back to life."""
    model = partial(network(), CONVS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    step(model, optimizer, 0)
    model[0].set_trainable_(0, optimizer=optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(5):
        step(model, optimizer, number)
    assert_moved_only(model, before, {**CONVS, "0": ([], None)})
    copy.deepcopy(optimizer.state_dict())
    model[0].set_trainable_([4], optimizer=optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(5):
        step(model, optimizer, number)
    assert_moved_only(model, before, {**CONVS, "0": ([4], None)})


class MaskedSGD:
    """Dense training in which only masked elements have gradient, momentum and decay: full-size buffers, no module."""

    def __init__(self, model: nn.Module, choice: dict, lr: float, momentum: float, weight_decay: float) -> None:
        self.model, self.lr, self.momentum, self.weight_decay = model, lr, momentum, weight_decay
        self.buffers = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.masks = masks(model, choice)

    def switch(self, choice: dict) -> None:
        self.masks = masks(self.model, choice)
        for name, mask in self.masks.items():
            self.buffers[name] *= mask

    def zero_grad(self) -> None:
        self.model.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            mask = self.masks.get(name, 1)
            buffer = self.buffers[name]
            buffer.mul_(self.momentum).add_((parameter.grad + self.weight_decay * parameter) * mask)
            parameter.sub_(self.lr * buffer)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_momentum_follows_the_weights(weight_decay: float):
    """Twice switched, against full-size momentum buffers in float64."""
    plain = network().double()
    model = partial(copy.deepcopy(plain), CONVS)
    ours = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=weight_decay)
    theirs = MaskedSGD(plain, CONVS, 0.05, 0.9, weight_decay)
    for number in range(15):
        if number in (5, 10):
            choice = OTHERS if number == 5 else CONVS
            set_subsets_(model, choice, optimizer=ours)
            theirs.switch(choice)
        losses = step(model, ours, number, torch.float64), step(plain, theirs, number, torch.float64)
        assert math.isclose(*losses, rel_tol=1e-9)
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-9, atol=1e-12), name


def test_adam_s_moments_follow_the_weights():
    layer = PartialConv2d(3, 6, 2, trainable=[1, 4], trainable_inputs=[0, 2])
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(2):
        output = layer(torch.randn(2, 3, 4, 4))
        output.backward(torch.randn_like(output))
        optimizer.step()
    state = optimizer.state[layer.weight_trainable]
    before = {key: value.clone() for key, value in state.items()}
    bias = optimizer.state[layer.bias_trainable]["exp_avg"].clone()
    layer.set_trainable_([0, 1, 2], optimizer=optimizer)
    state = optimizer.state[layer.weight_trainable]
    assert set(state) == set(before) and state["step"] == 2
    for key in ("exp_avg", "exp_avg_sq"):
        expected = torch.zeros(3, 3, 2, 2)
        expected[1, [0, 2]] = before[key][0]
        assert torch.equal(state[key], expected)
    assert torch.equal(
        optimizer.state[layer.bias_trainable]["exp_avg"], torch.stack([bias[0] * 0, bias[0], bias[0] * 0])
    )


def test_50_steps_equal_dense_training_with_masked_gradients():
    plain = network()
    model = partial(copy.deepcopy(plain), CONVS)
    for name, mask in masks(plain, CONVS).items():
        plain.get_parameter(name).register_hook(lambda grad, mask=mask: grad * mask)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
    curves = [[step(m, o, number % 2) for number in range(50)] for m, o in zip((model, plain), optimizers, strict=True)]
    assert curves[1][0] - curves[1][-1] > 0.3, "nothing is learned"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-4


def bytes_of_gradients_and_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradients_and_optimizer_state_shrink_to_the_learned_part(layout: torch.memory_format):
    counted = {}
    for part in (0.1, None):
        model = nn.Sequential(
            nn.Conv2d(3, 100, 3), nn.BatchNorm2d(100), nn.Conv2d(100, 120, 3), nn.Flatten(), nn.Linear(120, 4)
        )
        rest = sum(p.numel() for module in (model[1], model[4]) for p in module.parameters())
        if part is not None:
            convert(model, trainable=part)
        model = model.to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        output = model(torch.randn(2, 3, 5, 5).to(memory_format=layout))
        output.backward(torch.randn_like(output))
        optimizer.step()
        counted[part] = bytes_of_gradients_and_state(model, optimizer) - 2 * 4 * rest
    assert 0 < counted[0.1] <= 0.11 * counted[None]


def test_gradient_clipping_and_scaling_see_the_learned_part_alone():
    layer = PartialConv2d(3, 6, 2, trainable=[1, 4], dtype=torch.float64)
    output = layer(integers(2, 3, 4, 4))
    output.backward(integers(*output.shape))
    total = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters() if p.grad is not None])
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0) == total > 1
    clipped = torch.cat([layer.weight_trainable.grad.flatten(), layer.bias_trainable.grad])
    assert math.isclose(clipped.norm().item(), 1.0, rel_tol=1e-6)
