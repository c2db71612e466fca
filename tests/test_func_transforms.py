"""torch.func and forward-mode differentiation of a partly learned layer: what they give for nn.Conv2d."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import filled_with_integers, integers
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

from rwn_ext import PartialConv2d

CHOICES = {
    "last": {"trainable": 2},
    "scattered": {"trainable": [0, 2, 5]},
    "block": {"trainable": [1, 2], "trainable_inputs": [0, 3]},
    "none": {"trainable": 0},
    "all": {"trainable": 1.0},
    "grouped": {"trainable": [0, 1, 4], "groups": 2},
    "reflect": {"trainable": [0, 2], "padding_mode": "reflect"},
    "forced": {"trainable": [0, 2], "algorithm": "unfold"},
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def layer_of(choice: dict) -> PartialConv2d:
    return filled_with_integers(PartialConv2d(4, 6, (3, 2), (1, 2), (1, 0), dtype=torch.float64, **choice))


def learned(layer: PartialConv2d) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def dense_call(layer: PartialConv2d):
    """`call(parameters, x)` of an nn.Conv2d whose learned weights are put into the whole ones by index."""
    conv, geometry = layer.to_conv2d().requires_grad_(False), layer.partition
    rows, columns = torch.tensor(geometry.filters.indices), torch.tensor(geometry.inputs.indices)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        whole = dict(conv.named_parameters())
        if "weight_trainable" in parameters:
            place = (rows[:, None], columns[None])
            whole["weight"] = whole["weight"].index_put(place, parameters["weight_trainable"])
        if "bias_trainable" in parameters:
            whole["bias"] = whole["bias"].index_put((rows,), parameters["bias_trainable"])
        return functional_call(conv, whole, (x,))

    return call


def assert_equal(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, check_stride=False)


@EVERY_CHOICE
def test_grad_vjp_and_jacobians(choice: dict):
    layer, x = layer_of(choice), integers(2, 4, 4, 5)
    cotangent = integers(*layer(x).shape)
    results = []
    for call in (lambda p, x: functional_call(layer, p, (x,)), dense_call(layer)):
        output, pullback = vjp(call, learned(layer), x)
        loss = lambda p, x, call=call: (call(p, x).square() * cotangent).sum()  # noqa: E731
        results.append(
            (output, pullback(cotangent), grad(loss, (0, 1))(learned(layer), x), hessian(loss, 1)(learned(layer), x))
        )
        results[-1] += (jacrev(call, (0, 1))(learned(layer), x), jacfwd(call, (0, 1))(learned(layer), x))
    assert_equal(*results)


@EVERY_CHOICE
def test_jvp_dual_numbers_and_linearize(choice: dict):
    layer, x = layer_of(choice), integers(2, 4, 4, 5)
    primals = (learned(layer), x)
    tangents = ({name: integers(*p.shape) for name, p in primals[0].items()}, integers(*x.shape))
    ours, theirs = lambda p, x: functional_call(layer, p, (x,)), dense_call(layer)
    expected = jvp(theirs, primals, tangents)
    assert_equal(jvp(ours, primals, tangents), expected)
    output, pushforward = linearize(ours, *primals)
    assert_equal((output, pushforward(*tangents)), expected)
    expected = jvp(lambda x: theirs(primals[0], x), (x,), tangents[1:])[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangents[1])
        assert_equal(forward_ad.unpack_dual(layer(dual)).tangent, expected)


@EVERY_CHOICE
def test_gradients_of_each_sample(choice: dict):
    layer, xs = layer_of(choice), integers(3, 4, 4, 5)
    cotangents = integers(*layer(xs).shape)

    def loss(parameters: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * cotangent).sum()

    ours = vmap(grad(loss, (0, 1)), (None, 0, 0))(learned(layer), xs, cotangents)
    for i in range(3):
        layer.zero_grad()
        leaf = xs[i].clone().requires_grad_()
        layer(leaf).backward(cotangents[i])
        expected = {name: layer.get_parameter(name).grad for name in ours[0]}
        assert_equal(({name: g[i] for name, g in ours[0].items()}, ours[1][i]), (expected, leaf.grad))


@pytest.mark.parametrize("dimension", [0, 1, 4])
@EVERY_CHOICE
def test_vmap_over_any_dimension_of_the_input(choice: dict, dimension: int):
    layer, xs = layer_of(choice), integers(3, 2, 4, 4, 5)
    expected = torch.stack([layer(x) for x in xs])
    assert_equal(vmap(layer, dimension)(xs.movedim(0, dimension)), expected)


@pytest.mark.parametrize("choice", ["last", "scattered", "block"])
def test_an_ensemble_of_stacked_models(choice: str):
    models = [layer_of(CHOICES[choice]) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), integers(2, 4, 4, 5)
    ours = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    assert_equal(ours, torch.stack([model(x) for model in models]))


def test_fixed_parts_are_constants_whatever_one_differentiates_by():
    layer, x = layer_of(CHOICES["block"]), integers(2, 4, 4, 5)
    everything = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(everything)
    assert {name: bool(g.any()) for name, g in gradient.items()} == {name: "trainable" in name for name in everything}


@pytest.mark.parametrize("algorithm", ["full", "gather", "unfold"])
@EVERY_CHOICE
def test_many_backward_passes_at_once(choice: dict, algorithm: str):
    """`is_grads_batched` follows a backward pass with vmap that a forward pass without it prepared."""
    choice = choice | ({} if "groups" in choice and algorithm == "unfold" else {"algorithm": algorithm})
    layer = layer_of(choice)
    x = integers(2, 4, 4, 5).requires_grad_()
    output = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    cotangents = integers(3, *output.shape)
    batched = torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(output, leaves, cotangent, retain_graph=True) for cotangent in cotangents]
    assert_equal(batched, tuple(torch.stack(parts) for parts in zip(*single, strict=True)))


@EVERY_CHOICE
@pytest.mark.works_with("torch.func (grad, vmap, jvp, functional_call) and forward mode")
def test_every_mode_of_differentiation_is_numerically_right(choice: dict):
    layer = PartialConv2d(4, 6, (3, 2), (1, 2), (1, 0), dtype=torch.float64, **choice)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    arguments = (call, (x, *parameters.values()))
    assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(*arguments, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)
