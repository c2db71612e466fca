"""Zeroed filters: equal to the dense convolution with zeros, in layers and in networks that fold their constants."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, dense, filled_with_integers, integers
from hypothesis import example, given, settings
from test_functional import ODD, Case, assert_learned_gradients, cases
from torch import nn

import rwn_ext
from rwn_ext import PartialConv2d
from rwn_ext.paper.networks import build
from rwn_ext.zeroed import Compact, fold


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=200)
@given(case=cases())
@example(case=ODD)
def test_layer_equals_the_dense_zeroed_one(case: Case, device: str):
    layer = PartialConv2d.from_conv2d(
        case.conv(device), trainable=case.filters, trainable_inputs=case.inputs, frozen="zero"
    )
    x = case.input(device)
    conv = layer.to_conv2d()
    with torch.no_grad():
        cotangent = integers(*conv(x).shape, device=device)
    output, grad_input, grads = dense(conv, x, cotangent)
    leaf = x.clone().requires_grad_()
    ours = layer(leaf)
    ours.backward(cotangent)
    assert torch.equal(ours, output)
    assert torch.equal(leaf.grad, grad_input)
    assert_learned_gradients(layer, case, grads)


@pytest.mark.parametrize("choice", [[5, 0, 3], 2, 0], ids=str)
@pytest.mark.parametrize("trainable_bias", ["all", "none"])
def test_every_choice_of_biases(choice, trainable_bias):
    conv = filled_with_integers(nn.Conv2d(3, 6, 3, padding=1, dtype=torch.float64), 1, 3)
    layer = PartialConv2d.from_conv2d(conv, trainable=choice, trainable_bias=trainable_bias, frozen="zero")
    assert bool(layer.bias.all()) == (trainable_bias == "all")
    x, cotangent = integers(2, 3, 5, 5), integers(2, 6, 5, 5)
    output, grad_input, grads = dense(layer.to_conv2d(), x, cotangent)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(cotangent)
    assert torch.equal(layer(leaf), output) and torch.equal(leaf.grad, grad_input)
    if trainable_bias == "all":
        assert torch.equal(layer.bias_trainable.grad, grads["bias"])


def test_double_backward_and_autocast_are_those_of_conv2d():
    layer = PartialConv2d(3, 8, 3, trainable=[1, 6], frozen="zero", dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


# Few channels that strided 1x1 filters see: oneDNN's own weight gradient writes beyond its memory there.
FEW_CHANNELS = """
import torch
from torch import nn
from rwn_ext import PartialConv2d
from rwn_ext.paper.networks import build

torch.set_num_threads(1)
nhwc = torch.channels_last
x = torch.randn(32, 64, 32, 32).to(memory_format=nhwc)
shortcuts = [
    PartialConv2d(64, 128, 1, 2, trainable=1.0, trainable_inputs=6, bias=False, frozen=frozen, algorithm=algorithm)
    for frozen, algorithm in (("random", "full"), ("random", "gather"), ("zero", None))
]
shortcuts += [PartialConv2d(6, 128, 1, 2, trainable=12, bias=False, algorithm="full")]
for layer in shortcuts:
    for _ in range(3):
        own = x[:, : layer.in_channels].contiguous(memory_format=nhwc).requires_grad_()
        output = layer.to(memory_format=nhwc)(own)
        cotangent = torch.randn_like(output)
        output.backward(cotangent)
        cells = own.detach()[:, :, ::2, ::2].double()
        whole = torch.einsum("nkpq,ncpq->kc", cotangent.double(), cells)
        expected = whole[list(layer.filters.indices)][:, list(layer.inputs.indices)]
        assert torch.allclose(layer.weight_trainable.grad[..., 0, 0].double(), expected, atol=1e-2)
        layer.weight_trainable.grad = None
network = build("wrn-10-4", 10, 0.1, frozen="zero", seed=0).to(memory_format=nhwc)
images = torch.randn(32, 3, 32, 32).to(memory_format=nhwc)
for _ in range(3):
    network(images).square().sum().backward()
print("whole")
"""


def test_few_channels_under_strided_1x1_filters():
    done = subprocess.run([sys.executable, "-c", FEW_CHANNELS], capture_output=True, text=True)
    assert done.stdout == "whole\n", done.stderr


def test_memory_format_is_kept():
    layer = PartialConv2d(3, 8, 3, trainable=0.5, frozen="zero").to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for choice in (0.5, [0, 3]):
        assert layer.set_trainable_(choice)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_loading_what_is_not_zero_is_an_error(name):
    layer = PartialConv2d(3, 4, 1, trainable=1, frozen="zero")
    sound = layer.state_dict()
    before = {key: value.clone() for key, value in sound.items()}
    broken = {**sound, name: torch.ones_like(sound[name])}
    with pytest.raises(RuntimeError, match=rf'{name} holds values other than zero.*frozen="random"'):
        layer.load_state_dict(broken)
    assert torch.equal(layer.state_dict()[name], before[name])
    sound = {key: 2 * value for key, value in sound.items()}
    layer.load_state_dict(sound)
    assert torch.equal(layer.weight, 2 * before["weight"])
    nn.Conv2d(3, 4, 1).load_state_dict(layer.state_dict())


def test_what_is_no_longer_learned_becomes_zero():
    layer = PartialConv2d(3, 4, 1, trainable=[2, 3], frozen="zero")
    kept = layer.weight[3].clone()
    layer.set_trainable_([0, 3])
    assert torch.equal(layer.weight[3], kept) and not layer.weight[:3].any() and not layer.bias[:3].any()
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(layer(x), layer.to_conv2d()(x))


def perturbed(network: nn.Module) -> nn.Module:
    """In float64 and with norms of which every number counts."""
    for module in network.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.add_(torch.randn_like(tensor))
    return network


def dense_twin(network: nn.Module) -> nn.Module:
    return rwn_ext.restore(copy.deepcopy(network))


def assert_same_training(folded: nn.Module, twin: nn.Module, x: torch.Tensor) -> None:
    """Output, every gradient and the running statistics; then evaluation with those."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(leaf) for network, leaf in zip((folded, twin), leaves, strict=True)]
    assert type(outputs[0]) is torch.Tensor
    cotangent = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(cotangent)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    others = dict(twin.named_parameters())
    for name, module in folded.named_modules():
        if isinstance(module, PartialConv2d):
            partition = module.partition
            for kind, rows in (("weight", partition.block), ("bias", partition.bias_filters)):
                learned = getattr(module, f"{kind}_trainable")
                if learned is not None:
                    torch.testing.assert_close(learned.grad, others[f"{name}.{kind}"].grad[list(rows.indices)])
        else:
            for kind, parameter in module.named_parameters(recurse=False):
                torch.testing.assert_close(parameter.grad, others[f"{name}.{kind}"].grad)
    torch.testing.assert_close(dict(folded.named_buffers()), dict(twin.named_buffers()))
    with torch.no_grad():
        torch.testing.assert_close(folded.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("part", [0.3, 1, 0.05, 0], ids=str)
@pytest.mark.parametrize("name", ["wrn-10-1", "densenet-bc-10-8", "vgg11-bn", "alexnet"])
def test_network_equals_its_dense_twin(name, part):
    if name == "vgg11-bn" and part == 0.05:
        pytest.skip("covered by the smaller networks")
    network = perturbed(build(name, 5, part, frozen="zero", seed=0))
    assert_same_training(network, dense_twin(network), torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("select", ["first", "random"])
def test_scattered_filters_and_channels_last(select):
    network = build("wrn-10-1", 5, seed=0)
    rwn_ext.convert(network, 0.4, frozen="zero", select=select, seed=1)
    network = perturbed(fold(network)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert_same_training(network, dense_twin(network), x)


class Zoo(nn.Module):
    """Whatever may stand between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.affine = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False, track_running_stats=False)
        self.group_norm, self.cumulative = nn.GroupNorm(2, 6), nn.BatchNorm2d(18, momentum=None)
        self.last = nn.Conv2d(18, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.avg_pool2d(F.silu(self.norm(self.first(x))), 3, 1, 1)
        x = F.relu(self.affine(self.second(x)), inplace=True)
        y = self.group_norm(self.grouped(F.leaky_relu(x, 0.1)))
        z = self.cumulative(torch.cat([x, y, self.second(x) + x], dim=1))
        z = self.last(F.max_pool2d(F.sigmoid(z), 3, 2, padding=1) * 2)
        return self.fc(F.adaptive_avg_pool2d(1 + torch.add(z, z), 1).flatten(1))


@pytest.mark.parametrize("trainable_bias", ["with_filters", "all"])
def test_whatever_stands_between(trainable_bias):
    network = rwn_ext.convert(Zoo(), [1, 3], trainable_bias=trainable_bias, frozen="zero")
    network = perturbed(fold(network))
    assert_same_training(network, dense_twin(network), torch.randn(2, 3, 9, 9, dtype=torch.float64))


class Between(nn.Module):
    """Two convolutions and what is done between them."""

    def __init__(self, between, padding_mode: str = "zeros", norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.second = nn.Conv2d(6, 6, 3, padding=2, padding_mode=padding_mode)
        self.last, self.between = nn.BatchNorm2d(6), between

    def forward(self, x):
        return self.last(self.second(self.between(self.norm(self.first(x)))))


def in_place(x):
    """Whoever else holds it sees it changed."""
    y = x = x + 0 * x
    y += 1
    y *= 2
    y -= x.detach().abs()
    y.add_(1)
    torch.tanh_(y)
    return x


BETWEEN = {
    "times a number": lambda x: 0.5 * x * 2,
    "times a tensor": lambda x: x * torch.linspace(0, 1, 6, dtype=x.dtype).view(6, 1, 1),
    "of two": lambda x: (x * F.relu(x) - x / (1 + F.relu(x))) ** 2,
    "negated": lambda x: -x,
    "number first": lambda x: 1 - x,
    "compared": lambda x: torch.where(x > 0, x, 0.1 * x),
    "sliced": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "iterated": lambda x: torch.stack([image[:, 1:] for image in x]),
    "in place": in_place,
}


@pytest.mark.parametrize("choice", [[1, 3], 0], ids=str)
@pytest.mark.parametrize("name", BETWEEN)
def test_operators_see_the_whole_tensor(name, choice):
    network = rwn_ext.convert(Between(BETWEEN[name]), choice, frozen="zero")
    network = perturbed(fold(network))
    assert_same_training(network, dense_twin(network), torch.randn(2, 3, 7, 7, dtype=torch.float64))


@pytest.mark.parametrize("choice", [[1, 3], 0], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_mode_of_constants(mode, choice):
    """Also where nothing varies, and biases alone lead to what a norm throws away: their gradients are zeros."""
    for norm in (True, False):
        network = Between(F.silu, mode, norm)
        network = rwn_ext.convert(network, choice, trainable_bias="all", frozen="zero")
        network = perturbed(fold(network))
        assert_same_training(network, dense_twin(network), torch.randn(2, 3, 7, 7, dtype=torch.float64))


def test_dropout_while_training_sees_the_whole_tensor():
    """The same draw of dropout, so the same numbers."""
    network = perturbed(build("wrn-10-1", 5, 0.3, frozen="zero", dropout=0.5, seed=0))
    twin, x = dense_twin(network), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    outputs = []
    for model in (network, twin):
        torch.manual_seed(3)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


def test_dead_channels_are_not_computed_per_pixel():
    network = build("wrn-10-1", 5, 0.25, frozen="zero", seed=0)
    seen = []
    unit = network.block2[0]
    handle = unit.bn2.register_forward_hook(lambda module, args, output: seen.append(output))
    network(torch.randn(2, 3, 16, 16))
    handle.remove()
    (output,) = seen
    assert isinstance(output, Compact) and output.varying.shape == (2, 8, 8, 8) and output.rest.shape == (24,)
    assert output.shape == output.dense().shape == (2, 32, 8, 8)
    # Outside of a folded model, parts of it pass ordinary tensors on.
    assert type(unit.conv1(torch.randn(2, 16, 8, 8))) is torch.Tensor


def test_an_exception_inside_leaves_no_trace():
    network = build("wrn-10-1", 5, 0.25, frozen="zero", seed=0)
    with pytest.raises(RuntimeError, match="expected an input"):
        network(torch.randn(2, 4, 16, 16))
    assert type(network.conv1(torch.randn(1, 3, 8, 8))) is torch.Tensor


def test_fixed_random_layers_take_compact_inputs():
    network = build("wrn-10-1", 5, seed=0)
    rwn_ext.convert(network, {"*.conv1": 0.25}, frozen="zero")
    rwn_ext.convert(network, 0.5)
    network = perturbed(fold(network))
    assert_same_training(network, dense_twin(network), torch.randn(2, 3, 16, 16, dtype=torch.float64))
