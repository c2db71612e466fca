"""PartialLinear and PartialConv1d: the values, gradients, state and conversions of nn.Linear and nn.Conv1d."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, dense, filled_with_integers, integers, saved_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap

from rwn_ext import (
    PartialConv1d,
    PartialConv2d,
    PartialLinear,
    convert,
    draw_,
    gradient_norms,
    load_compact,
    restore,
    save_compact,
    set_subsets_,
    subsets,
)
from rwn_ext.modules import PARTIAL
from rwn_ext.report import describe, memory

KINDS = {"linear": nn.Linear, "conv1d": nn.Conv1d}
ARGUMENTS = {nn.Linear: (6, 8), nn.Conv1d: (6, 8, 3)}
INPUTS = {nn.Linear: (2, 3, 6), nn.Conv1d: (2, 6, 7)}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
CHOICES = {
    "last": {"trainable": 2},
    "scattered": {"trainable": [0, 2, 5]},
    "block": {"trainable": [1, 4], "trainable_inputs": [0, 3]},
    "inputs": {"trainable": 1.0, "trainable_inputs": [5]},
    "all": {"trainable": 1.0},
    "none": {"trainable": 0},
    "bias-only": {"trainable": 0, "trainable_bias": "all"},
    "zero": {"trainable": [0, 2], "frozen": "zero"},
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def made(kind: type[nn.Module], choice: dict, **options) -> nn.Module:
    return PARTIAL[kind](*ARGUMENTS[kind], **{"dtype": torch.float64, **choice, **options})


def learned(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def compare(layer: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Output and every gradient equal those of dense float64 autograd, for integers of which every sum is exact."""
    x = x.requires_grad_()
    output = layer(x)
    cotangent = integers(*output.shape)
    expected, grad_input, grads = dense(plain, x, cotangent)
    assert torch.equal(output, expected)
    leaves = learned(layer)
    if not output.requires_grad:
        assert not leaves
        return
    (ours, *mine) = torch.autograd.grad(output, [x, *leaves.values()], cotangent)
    assert torch.equal(ours, grad_input)
    rows, columns, biases = (list(s.indices) for s in (layer.filters, layer.inputs, layer.partition.bias_filters))
    wanted = {"weight_trainable": grads["weight"][rows][:, columns]}
    if "bias" in grads:
        wanted["bias_trainable"] = grads["bias"][biases]
    assert set(leaves) == {name for name, value in wanted.items() if value.numel()}
    for name, value in zip(leaves, mine, strict=True):
        assert torch.equal(value, wanted[name]), name


def chosen(size: int) -> st.SearchStrategy[list[int]]:
    runs = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: list(range(*sorted(ends))))
    return st.one_of(st.just(list(range(size))), runs, st.sets(st.integers(0, size - 1)).map(sorted))


@given(st.data())
def test_any_linear_layer_equals_the_dense_one(data: st.DataObject):
    features, out = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    choice = {
        "trainable": data.draw(chosen(out)), "trainable_inputs": data.draw(chosen(features)),
        "trainable_bias": data.draw(st.sampled_from(["with_filters", "all", "none"])),
        "frozen": data.draw(st.sampled_from(["random", "zero"])),
    }  # fmt: skip
    plain = filled_with_integers(nn.Linear(features, out, data.draw(st.booleans()), dtype=torch.float64))
    layer = PartialLinear.from_linear(plain, **choice)
    shape = (*data.draw(st.lists(st.integers(0, 3), max_size=3)), features)
    x = integers(*shape)
    if len(shape) > 1 and data.draw(st.booleans()):
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    compare(layer, layer.to_linear(), x)


@dataclass(frozen=True)
class Case:
    """One 1-d convolution and one input."""

    arguments: tuple
    size: tuple[int, ...]
    choice: dict


@st.composite
def conv1d_cases(draw: st.DrawFn) -> Case:
    groups, per_group, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    padding = draw(st.one_of(st.integers(0, 3), st.sampled_from(["same", "valid"])))
    stride = 1 if padding == "same" else draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    length = dilation * (kernel - 1) + 1 + draw(st.integers(3, 6))
    choice = {
        "trainable": draw(chosen(groups * filters)), "trainable_inputs": draw(chosen(per_group)),
        "trainable_bias": draw(st.sampled_from(["with_filters", "all", "none"])),
        "frozen": draw(st.sampled_from(["random", "random", "zero"])),
        "algorithm": draw(st.sampled_from([None, "full", "gather"])),
    }  # fmt: skip
    if not choice["trainable"] or not choice["trainable_inputs"]:
        choice["algorithm"] = None
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    arguments = (groups * per_group, groups * filters, kernel, stride, padding, dilation, groups, draw(st.booleans()))
    return Case((*arguments, mode), (*batch, groups * per_group, length), choice)


@given(conv1d_cases(), st.booleans())
def test_any_1d_convolution_equals_the_dense_one(case: Case, strided: bool):
    plain = filled_with_integers(nn.Conv1d(*case.arguments, dtype=torch.float64))
    layer = PartialConv1d.from_conv1d(plain, **case.choice)
    x = integers(*case.size)
    compare(layer, layer.to_conv1d(), x.transpose(-1, -2).contiguous().transpose(-1, -2) if strided else x)


@EVERY_KIND
@EVERY_CHOICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_one_sum(kind, choice: dict, dtype: torch.dtype, device: str):
    layer = made(kind, choice, dtype=dtype, device=device)
    x = torch.randn(INPUTS[kind], dtype=dtype, device=device, requires_grad=True)
    output = layer(x)
    cotangent = torch.randn_like(output)
    expected, grad_input, grads = dense(layer.to_plain(), x, cotangent)
    assert_close(output, expected, 18)
    if output.requires_grad:
        output.backward(cotangent)
        assert_close(x.grad, grad_input, 24)
    if layer.weight_trainable is not None:
        wanted = grads["weight"][list(layer.filters.indices)][:, list(layer.inputs.indices)]
        assert_close(layer.weight_trainable.grad, wanted, 14)


@EVERY_KIND
@EVERY_CHOICE
def test_every_mode_of_differentiation_is_numerically_right(kind, choice: dict):
    layer = made(kind, choice)
    x = torch.randn(INPUTS[kind], dtype=torch.float64, requires_grad=True)
    names = list(learned(layer))

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = (call, (x, *learned(layer).values()))
    assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(*arguments, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@EVERY_KIND
@EVERY_CHOICE
def test_gradients_of_each_sample(kind, choice: dict):
    layer, xs = filled_with_integers(made(kind, {**choice, "frozen": "random"})), integers(3, *INPUTS[kind])
    cotangents, parameters = integers(*layer(xs.flatten(0, 1)).shape).unflatten(0, (3, -1)), learned(layer)

    def loss(parameters: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * cotangent).sum()

    ours = vmap(grad(loss, (0, 1)), (None, 0, 0))(parameters, xs, cotangents)
    for i in range(3):
        layer.zero_grad()
        leaf = xs[i].clone().requires_grad_()
        layer(leaf).backward(cotangents[i])
        assert torch.equal(ours[1][i], leaf.grad)
        assert all(torch.equal(ours[0][name][i], layer.get_parameter(name).grad) for name in parameters)


@EVERY_KIND
@pytest.mark.parametrize("choice", [name for name in CHOICES if name not in ("all", "zero")])
def test_what_is_kept_for_backward(kind, choice: str):
    """The input, or a compact copy of what learned weights see of it; Parameters; never the merged weight."""
    layer = made(kind, CHOICES[choice])
    x = torch.randn(INPUTS[kind], dtype=torch.float64, requires_grad=True)
    with saved_tensors() as kept:
        layer(x)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    rest = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in parameters]
    if layer.weight_trainable is None:
        assert not rest
        return
    (seen,) = rest
    axis = x.dim() - 1 if kind is nn.Linear else 1
    assert torch.equal(seen.reshape(-1), x.index_select(axis, torch.tensor(layer.inputs.indices)).reshape(-1))
    assert seen.untyped_storage().nbytes() == 8 * seen.numel()
    with saved_tensors() as kept:
        layer(x.detach())
    assert len([t for t in kept if t.is_floating_point()]) == 1, "no weight where the input needs no gradient"
    with torch.no_grad(), saved_tensors() as kept:
        layer(x)
    assert not kept


@EVERY_KIND
@EVERY_CHOICE
@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast_equals_the_plain_layer_under_autocast(kind, choice: dict, inside: bool, device: str):
    layer = made(kind, choice, dtype=torch.float32, device=device)
    plain, x = layer.to_plain(), torch.randn(INPUTS[kind], device=device)
    leaves, outputs = [x.clone().requires_grad_() for _ in range(2)], []
    for module, leaf in zip((layer, plain), leaves, strict=True):
        with torch.autocast(device, torch.bfloat16):
            outputs.append(module(leaf))
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    cotangent = torch.randn(outputs[0].shape, device=device).bfloat16()
    for output in outputs:
        if output.requires_grad:
            with torch.autocast(device, torch.bfloat16, enabled=inside):
                output.backward(cotangent)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0.02, atol=0.02)
    if layer.weight_trainable is not None:
        expected = plain.weight.grad[list(layer.filters.indices)][:, list(layer.inputs.indices)]
        assert layer.weight_trainable.grad.dtype == torch.float32
        torch.testing.assert_close(layer.weight_trainable.grad, expected, rtol=0.02, atol=0.05)


@EVERY_KIND
@pytest.mark.parametrize("choice", [CHOICES[name] for name in ("scattered", "block", "none")], ids=str)
def test_one_graph_and_eager_s_values_for_all_batches(kind, choice: dict):
    torch.compiler.reset()
    layer = filled_with_integers(made(kind, {**choice, "frozen": "random"}))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 7):
        x, results = integers(batch, *INPUTS[kind][1:]), []
        for call in (compiled, layer):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            output = call(leaf)
            output.backward(torch.ones_like(output) * torch.arange(output.size(-1)))
            results.append([output, leaf.grad, *(p.grad for p in learned(layer).values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor_equals_eager_and_keeps_no_merged_weight():
    """Of a linear layer; a 1-d convolution is compiled as a 2-d one."""
    torch.compiler.reset()
    layer = made(nn.Linear, CHOICES["block"])
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(INPUTS[nn.Linear], dtype=torch.float64, requires_grad=True)
    with saved_tensors() as kept:
        output = compiled(x)
    assert kept and layer.weight.numel() not in [t.numel() for t in kept]
    cotangent = torch.randn_like(output)
    leaves = [x, *learned(layer).values()]
    ours, eager = (torch.autograd.grad(o, leaves, cotangent) for o in (output, layer(x)))
    torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("runs", [(2, 4), (0, 1, 3, 5)], ids=str)
@pytest.mark.parametrize("trailing", [(), (3,)], ids=["linear", "conv1d"])
def test_the_operator_that_merges_is_well_made(runs: tuple[int, ...], trailing: tuple[int, ...]):
    count = sum(runs[1::2]) - sum(runs[::2])
    parts = torch.randn(count, 4, *trailing), torch.randn(6 - count, 4, *trailing)
    torch.library.opcheck(torch.ops.rwn_ext.merge.default, (*parts, runs, 0, torch.float32, "forward"))


@EVERY_KIND
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_recomputes_the_same(kind, reentrant: bool):
    layer = made(kind, CHOICES["block"])
    x = torch.randn(INPUTS[kind], dtype=torch.float64, requires_grad=True)
    leaves = [x, *learned(layer).values()]
    cotangent = torch.randn_like(layer(x))
    expected = torch.autograd.grad(layer(x), leaves, cotangent)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).backward(cotangent)
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(expected, leaves, strict=True))


@EVERY_KIND
@EVERY_CHOICE
class TestState:
    def test_is_that_of_the_plain_layer_both_ways(self, kind, choice: dict):
        torch.manual_seed(3)
        plain = kind(*ARGUMENTS[kind], dtype=torch.float64)
        torch.manual_seed(3)
        layer = made(kind, choice)
        if layer.frozen == "random":
            assert same(layer, plain), "initial values"
            layer.load_state_dict(kind(*ARGUMENTS[kind], dtype=torch.float64).state_dict(), strict=True)
            assert not same(layer, plain)
        plain.load_state_dict(layer.state_dict(), strict=True)
        assert same(layer, plain) and same(layer.to_plain(), plain)
        torch.manual_seed(4)
        layer.reset_parameters()
        torch.manual_seed(4)
        plain.reset_parameters()
        assert same(layer, plain) == (layer.frozen == "random")

    def test_complaints_are_those_of_the_plain_layer(self, kind, choice: dict):
        wrong = kind(*ARGUMENTS[kind]).state_dict()
        wrong["other"], wrong["weight"] = torch.ones(1), torch.ones(3, *wrong["weight"].shape[1:])
        del wrong["bias"]
        said = []
        for module in (made(kind, choice), kind(*ARGUMENTS[kind])):
            with pytest.raises(RuntimeError) as caught:
                module.load_state_dict(wrong)
            said.append(str(caught.value).replace("for Partial", "for "))
        assert said[0] == said[1]

    def test_copies_and_repr(self, kind, choice: dict):
        layer = made(kind, choice).eval()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
            assert same(other, layer) and repr(other) == repr(layer) and other.partition == layer.partition
        plain = layer.to_plain()
        assert repr(layer).startswith("Partial" + repr(plain)[:-1] + f", trainable={len(layer.filters)}/8")
        assert type(plain) is kind and not plain.training and all(p.requires_grad for p in plain.parameters())

    def test_meta_device_and_assign(self, kind, choice: dict):
        layer, values = made(kind, choice, device="meta"), made(kind, choice)
        assert all(p.is_meta for p in layer.parameters())
        layer.load_state_dict(values.state_dict(), assign=True)
        assert same(layer, values) and set(learned(layer)) == set(learned(values))


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: PartialLinear(4, 6), TypeError, "trainable"),
        (lambda: PartialLinear(4, 6, trainable=7), ValueError, r"trainable=7\b"),
        (lambda: PartialLinear(4, 6, trainable=1, trainable_inputs=5), ValueError, "trainable_inputs=5"),
        (lambda: PartialLinear(4, 6, trainable=1, algorithm="gather"), TypeError, "algorithm"),
        (lambda: PartialConv1d(4, 6, 3, trainable=1, algorithm="fast"), ValueError, "algorithm='fast'"),
        (lambda: PartialConv1d(4, 6, 3, trainable=1, frozen="ones"), ValueError, "frozen='ones'"),
        (lambda: PartialLinear.from_linear(nn.Conv1d(2, 2, 1), trainable=1), TypeError, r"nn\.Linear, got Conv1d"),
        (lambda: PartialConv1d.from_conv1d(nn.Conv2d(2, 2, 1), trainable=1), TypeError, r"nn\.Conv1d, got Conv2d"),
        (lambda: PartialLinear(4, 6, trainable=1)(torch.ones(2, 5)), RuntimeError, r"\(\.\.\., 4\), got \(2, 5\)"),
        (lambda: PartialLinear(4, 6, trainable=1)(torch.ones(2, 4).double()), RuntimeError, "should be the same"),
        (lambda: PartialConv1d(4, 6, 3, trainable=1)(torch.ones(2, 5, 9)), RuntimeError, r"\(N, 4, L\).*\(2, 5, 9\)"),
        (lambda: PartialConv1d(4, 6, 3, trainable=1)(torch.ones(4)), RuntimeError, r"got \(4,\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_value(make, error: type, named: str):
    with pytest.raises(error, match=named):
        make()


@EVERY_KIND
@pytest.mark.parametrize(
    "make",
    [lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), lambda ps: torch.optim.AdamW(ps, lr=0.01)],
    ids=["sgd", "adamw"],
)
def test_switching_takes_the_optimizer_along(kind, make):
    """What stays learned has the state of dense training under a mask, what is new starts at zero."""
    layer = made(kind, {"trainable": [0, 2, 5], "trainable_inputs": [1, 3]})
    optimizer = make(learned(layer).values())

    def step() -> None:
        optimizer.zero_grad()
        layer(torch.ones(INPUTS[kind], dtype=torch.float64)).square().mean().backward()
        optimizer.step()

    step()
    weight, state = layer.weight.detach(), copy.deepcopy(optimizer.state[layer.weight_trainable])
    layer.set_trainable_([2, 7], [3, 4], optimizer=optimizer)
    assert torch.equal(layer.weight, weight)
    for key, value in optimizer.state[layer.weight_trainable].items():
        if value.dim():
            assert value.shape == layer.weight_trainable.shape
            assert torch.equal(value[0, 0], state[key][1, 1]) and not value[1].any() and not value[0, 1].any()
    fixed = torch.ones_like(weight, dtype=torch.bool)
    fixed[[[2], [7]], [3, 4]] = False
    step()
    assert torch.equal(layer.weight[fixed], weight[fixed]) and not torch.equal(layer.weight, weight)


class Mixed(nn.Module):
    """Images, then sequences, then vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 20, 3, padding=1)
        self.sequence = nn.Conv1d(20, 20, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 20))
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sequence(self.image(x).flatten(2).relu())
        return self.fc((x.mT + self.mlp(x.mT)).mean(1))


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, 3, 5, 5, generator=generator), torch.randint(4, (4,), generator=generator)


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(learned(model).values(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for number in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        optimizer.step()
    return model


@pytest.mark.works_with(
    "linear layers and 1-d convolutions, with the same state dicts, switching and compact checkpoints"
)
class TestConvert:
    def test_linear_layers_are_taken_when_asked_for(self):
        model = convert(Mixed(), 0.5)
        assert list(subsets(model)) == ["image", "sequence"] and type(model.mlp[0]) is nn.Linear
        model = convert(Mixed(), {"*": 0.5, "mlp.*": [1, 3]}, linear=True, skip="fc", algorithm="gather")
        assert {name: len(filters) for name, (filters, _) in subsets(model).items()} == {
            "image": 10, "sequence": 10, "mlp.0": 2, "mlp.2": 2,
        }  # fmt: skip
        assert type(model.fc) is nn.Linear
        with pytest.raises(ValueError, match=r"pattern 'fc' matches no layer.*image, sequence$"):
            convert(Mixed(), 0.5, skip="fc")
        with pytest.raises(ValueError, match=r"mlp\.0: trainable=41"):
            convert(Mixed(), {"mlp.0": 41}, linear=True)

    def test_trains_the_chosen_part_and_restores(self):
        plain = Mixed()
        model = convert(copy.deepcopy(plain), 0.25, trainable_inputs=[0, 2], linear=True, skip="fc")
        x = batch(9)[0]
        assert torch.equal(model(x), plain(x))
        train(model)
        output, before = model(x), plain.state_dict()
        for name, (filters, inputs) in subsets(model).items():
            moved = (model.get_submodule(name).weight != before[f"{name}.weight"]).flatten(
                2 if "mlp" not in name else 1
            )
            moved = moved.reshape(*before[f"{name}.weight"].shape[:2], -1).any(2)
            assert {k for k, c in moved.nonzero().tolist()} <= set(filters) and moved.any()
            assert {c for k, c in moved.nonzero().tolist()} <= set(inputs)
        assert str(restore(model)) == str(plain) and torch.equal(model(x), output)

    def test_subsets_and_gradient_norms(self):
        model = convert(Mixed(), 2, linear=True)
        norms = gradient_norms(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch(0)])
        plain = restore(copy.deepcopy(model))
        F.cross_entropy(plain(batch(0)[0]), batch(0)[1]).backward()
        for name, norm in norms.items():
            torch.testing.assert_close(norm, plain.get_submodule(name).weight.grad.flatten(1).norm(dim=1))
        best = {name: (norm.topk(2).indices, None) for name, norm in norms.items()}
        set_subsets_(model, best)
        assert subsets(model)["mlp.0"][0] == sorted(best["mlp.0"][0].tolist())

    @pytest.mark.parametrize("choice", ["block", "inputs", "zero"])
    def test_a_seed_stands_for_what_is_fixed(self, tmp_path, choice: str):
        choice = {**CHOICES[choice], "trainable": [0, 2]}
        if "trainable_inputs" in choice:
            choice["trainable_inputs"] = [1]
        model = train(convert(Mixed(), **choice, linear=True, skip="fc", draw_seed=5))
        path = tmp_path / "task.safetensors"
        save_compact(model, path, seed=5)
        whole = sum(v.numel() for v in model.state_dict().values())
        assert path.stat().st_size < 4 * whole
        other = load_compact(convert(Mixed(), **choice, linear=True, skip="fc"), path)
        assert same(other, model) and subsets(other) == subsets(model)
        if "frozen" not in choice:
            fixed = draw_(Mixed(), 5).state_dict()
            assert torch.equal(model.mlp[0].weight[1], fixed["mlp.0.weight"][1])
            assert torch.equal(model.sequence.weight[3], fixed["sequence.weight"][3])
            assert same(load_compact(Mixed(), path), model)

    def test_shows_what_each_layer_learns_and_how(self):
        x = torch.randn(2, 3, 5, 5)
        model = convert(Mixed(), {"*": 0.5, "mlp.0": 0}, linear=True, skip="fc")
        rows = {line.split()[0]: line.split()[1:] for line in describe(model, x).splitlines()}
        assert rows["mlp.0"] == ["40x20", "0/40", "0", "none"]
        assert rows["mlp.2"] == ["20x40", "10/20", "410", "matmul"]
        assert rows["sequence"][:3] == ["20x20x3", "10/20", str(10 * 60 + 10)]
        linear = memory(convert(nn.Sequential(nn.Linear(5, 8)), 1.0, trainable_inputs=[1], linear=True), x).layers[0]
        assert (linear.plain, linear.now, linear.minimum) == (x.nbytes, x.nbytes // 5, x.nbytes // 5)

    def test_is_lean_around_linear_layers(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(72, 4)
        )
        plain = convert(copy.deepcopy(model), 2, linear=True)
        lean = convert(copy.deepcopy(model), 2, linear=True, lean=True)
        for number in range(2):
            results = []
            for m in (plain, lean):
                m.zero_grad()
                output = m(batch(number)[0])
                output.square().mean().backward()
                results.append([output, *(p.grad for p in learned(m).values())])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestLeftAlone:
    """What reads the weight of a linear layer otherwise than by calling it."""

    def test_the_output_projection_of_attention(self):
        attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with pytest.warns(UserWarning, match=r"self_attn\.out_proj \(a subclass of nn\.Linear, NonDynamically"):
            convert(attention, 0.5, linear=True)
        assert list(subsets(attention)) == ["linear1", "linear2"]
        plain, x = restore(copy.deepcopy(attention)), torch.randn(2, 5, 8)
        assert torch.equal(attention.train(False)(x), plain.train(False)(x))
        with torch.no_grad():  # the fused path reads the weights of the linear layers
            torch.testing.assert_close(attention(x), plain(x))

    def test_weights_tied_to_an_embedding(self):
        class Language(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
                self.head.weight = self.embed.weight

        model = Language()
        with pytest.warns(UserWarning, match="head .its weight is shared with another module"):
            convert(model, 0.5, linear=True)
        assert model.head.weight is model.embed.weight and list(subsets(model)) == ["inner"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            convert(Language(), 0.5)
            convert(Language(), 0.5, linear=True, skip="head")


def test_the_two_dimensional_form_has_the_same_names():
    conv = nn.Conv2d(2, 4, 1)
    layer = PartialConv2d.from_plain(conv, trainable=1)
    assert type(layer.to_plain()) is nn.Conv2d and same(layer, conv) and same(layer.to_conv2d(), conv)
