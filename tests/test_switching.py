"""Changing what is learned while training: nothing goes stale, nothing is rebuilt, resuming is bit for bit."""

from __future__ import annotations

import copy
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext import PartialConv2d, convert, gradient_norms, restore, set_subsets_, subsets

EXAMPLES = Path(__file__).parents[1] / "examples"
FIRST = {"0": ([1, 2, 7], None), "3": ([0, 5, 11], [1, 3]), "5": ([0, 1], None)}
OTHERS = {"0": ([0, 2, 8, 9], [0, 2]), "3": ([], None), "5": ([1, 3, 7], [0, 5])}
THIRD = {"0": ([4], None), "3": ([2, 3], None), "5": ([0], None)}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05),
}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 12, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def partial(choice: dict = FIRST) -> nn.Module:
    return set_subsets_(convert(network(), 1.0), choice)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, 3, 9, 9, generator=generator), torch.randint(4, (4,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        loss_of(model, batch(number)).backward()
        optimizer.step()


def test_a_switch_between_forward_and_backward_is_refused_by_backward():
    """The weights that forward used are gone; torch says so as after any change in place."""
    conv = PartialConv2d(4, 8, 3, padding=1, trainable=[0, 1])
    output = conv(torch.randn(2, 4, 6, 6, requires_grad=True))
    conv.set_trainable_([6, 7])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_loss_that_is_still_at_hand_does_not_disturb():
    """Its graph keeps autograd's memory of the Parameters' shapes alive."""
    layer = PartialConv2d(3, 6, 2, trainable=2)
    x, seen = torch.randn(2, 3, 5, 5), []
    layer.weight_trainable.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    for filters in (3, [0, 2], 4, 6):
        kept = layer(x).sum()
        kept.backward()
        layer.set_trainable_(filters)
        layer(x).sum().backward()
        assert layer.weight_trainable.grad.shape == layer.weight_trainable.shape
        layer.zero_grad()
    assert [shape[0] for shape in seen] == [2, 3, 3, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.works_with("another subset between epochs, with momentum and moments that follow (SGD, Adam, AdamW)")
def test_module_and_optimizer_stay_the_same_objects(make):
    model = partial()
    optimizer = make(model.parameters())
    parameters = dict(model.named_parameters())
    for choice in (OTHERS, THIRD, FIRST):
        train(model, optimizer, range(3))
        set_subsets_(model, choice, optimizer=optimizer)
        for name, parameter in model.named_parameters():
            # A frozen part may come into being; the optimizer has no use for it.
            assert parameters.setdefault(name, parameter) is parameter
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for value in optimizer.state.get(parameter, {}).values():
                    assert not value.dim() or value.shape == parameter.shape
    train(model, optimizer, range(3))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_layer_that_learned_nothing_for_a_while_starts_afresh(make):
    model = partial()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    learned = model[3].weight_trainable
    set_subsets_(model, OTHERS, optimizer=optimizer)
    assert model[3].weight_trainable is None and learned.numel() == 0 and learned not in optimizer.state
    weight = model[3].weight.detach()
    train(model, optimizer, range(3, 6))
    assert torch.equal(model[3].weight, weight)
    set_subsets_(model, THIRD, optimizer=optimizer)
    assert model[3].weight_trainable is learned and torch.equal(model[3].weight, weight)
    twin = copy.deepcopy(model)
    fresh = make(twin.parameters())
    for m, o in ((model, optimizer), (twin, fresh)):
        o.zero_grad()
        loss_of(m, batch(6)).backward()
    fresh.step()
    optimizer.step()
    assert torch.equal(model[3].weight, twin[3].weight)


def test_state_that_cannot_follow_is_refused_before_anything_changes():
    model = partial()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, range(2))
    before = subsets(model)
    with pytest.raises(ValueError, match=r"0: the state 'row_var' that Adafactor keeps for weight_trainable has shape"):
        set_subsets_(model, OTHERS, optimizer=optimizer)
    assert subsets(model) == before
    set_subsets_(model, OTHERS)
    optimizer.state.clear()
    train(model, optimizer, range(2))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resuming_after_a_switch_is_bit_for_bit(make):
    model = partial()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    start = copy.deepcopy(model.state_dict())
    choices = {2: {**OTHERS, "3": ([4, 5], None)}, 6: THIRD}
    file = io.BytesIO()
    for number in range(10):
        if number in choices:
            set_subsets_(model, choices[number], optimizer=optimizer)
        train(model, optimizer, range(number, number + 1))
        if number == 4:
            state = {"model": model.state_dict(), "subsets": subsets(model), "optimizer": optimizer.state_dict()}
            torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = set_subsets_(convert(network(), 0.5), state["subsets"])
    resumed.load_state_dict(start)
    resumed.load_state_dict(state["model"])
    other = make([p for p in resumed.parameters() if p.requires_grad])
    other.load_state_dict(state["optimizer"])
    for number in range(5, 10):
        if number in choices:
            set_subsets_(resumed, choices[number], optimizer=other)
        train(resumed, other, range(number, number + 1))
    assert subsets(resumed) == subsets(model)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_compiled_code_follows():
    """The subset is a constant of the compiled code, so another one compiles anew."""
    torch._dynamo.reset()
    model = partial()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    data = batch(0)
    for choice in (FIRST, {**FIRST, "0": ([0, 3, 9], None)}, THIRD, FIRST):
        set_subsets_(model, choice)
        loss_of(compiled, data).backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        loss_of(model, data).backward()
        theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close(ours, theirs)
        model.zero_grad()


@pytest.mark.does_not("switch a layer that a CUDA graph has captured: capture again")
def test_a_captured_layer_is_not_switched():
    layer = PartialConv2d(3, 6, 2, trainable=2)
    layer.captured = True
    weight = layer.weight.detach()
    layer.set_trainable_([4, 5])
    with pytest.raises(RuntimeError, match="CUDA graph has captured this layer"):
        layer.set_trainable_(3)
    assert len(layer.filters) == 2 and torch.equal(layer.weight, weight)
    layer.captured = False
    layer.set_trainable_(3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph_is_never_stale():
    layer = PartialConv2d(3, 6, 2, trainable=2, device="cuda")
    x = torch.randn(2, 3, 5, 5, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        assert not layer.captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(x)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        layer.set_trainable_(3)
    del graph
    layer.captured = False
    layer.set_trainable_(3)


@pytest.mark.does_not("give Rprop a start for weights that become learned: their step size begins at its minimum, 1e-6")
def test_rprop_starts_new_weights_at_its_smallest_step():
    """A limit: the state of what becomes learned starts at zero, and Rprop multiplies its step sizes."""
    layer = PartialConv2d(3, 4, 3, trainable=[0, 1])
    optimizer = torch.optim.Rprop([layer.weight_trainable, layer.bias_trainable], lr=0.01)
    x = torch.randn(2, 3, 6, 6)

    def step() -> torch.Tensor:
        before = layer.weight.detach()
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
        return (layer.weight.detach() - before).abs().amax((1, 2, 3))

    step()
    layer.set_trainable_([1, 2], optimizer=optimizer)
    moved = step()
    assert moved[1] > 1e-3 and 0 < moved[2] < 2e-6 and moved[0] == moved[3] == 0


def test_gradient_norms_are_those_of_dense_training():
    model = partial()
    plain = restore(copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    batches = [batch(0), batch(1)]
    norms = gradient_norms(model, loss_of, batches)
    for data in batches:
        loss_of(plain, data).backward()
    assert list(norms) == ["0", "3", "5"]
    for name, norm in norms.items():
        torch.testing.assert_close(norm, plain.get_submodule(name).weight.grad.flatten(1).norm(dim=1))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters()) and subsets(model)["3"] == ([0, 5, 11], [1, 3])


def run_example(name: str, *arguments: str) -> None:
    """An example as a user runs it, but in this process, which has imported torch already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_example_picks_filters_every_epoch_and_resumes(tmp_path, capsys):
    pytest.importorskip("sklearn")
    whole, broken = str(tmp_path / "whole.pt"), str(tmp_path / "broken.pt")
    run_example("pick_filters.py", "--epochs", "3", "--images", "300", "--out", whole)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split("filters")[1] for line in lines}) == len(lines) == 3
    run_example("pick_filters.py", "--epochs", "2", "--images", "300", "--out", broken)
    assert capsys.readouterr().out.splitlines() == lines[:2]
    run_example("pick_filters.py", "--epochs", "3", "--images", "300", "--out", broken, "--resume")
    assert capsys.readouterr().out.splitlines() == lines[2:]
    left, right = (torch.load(path, weights_only=True) for path in (whole, broken))
    torch.testing.assert_close(left, right, rtol=0, atol=0)
