"""report.memory: what it counts is what is kept, and the allocator agrees."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import rwn_ext
from rwn_ext.paper.networks import build
from rwn_ext.report import memory, saved_for_backward


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.MaxPool2d(2)
    )


X = torch.randn(4, 3, 16, 16)
IMAGE, Z = X.nbytes, 4 * 8 * 16 * 16 * 4
OUT = 4 * 4 * 16 * 16 * 4
VECTORS = 200  # statistics of the batch and the like


def test_a_chain_by_hand():
    """Plain nn keeps image, z, y, the pool's input and 8 bytes an output; lean image, z and 1 byte an output."""
    found = memory(rwn_ext.convert(chain(), 0.5, lean=True), X)
    layers = {layer.name: layer for layer in found.layers}
    block = layers["1 - 2 - 3"]
    assert (layers["0"].plain, layers["0"].now, layers["0"].minimum) == (IMAGE, IMAGE, IMAGE)
    assert 2 * Z <= block.plain <= 2 * Z + VECTORS and Z <= block.now <= Z + VECTORS and block.minimum == Z
    assert layers["4"].plain == OUT + OUT // 4 * 2 and layers["4"].now == layers["4"].minimum == OUT // 16


def test_the_allocator_agrees_with_the_sum_of_layers():
    """The image lived before; everything else that is kept was allocated by forward."""
    model = build("densenet-bc-10-4", 10, 0.5, lean=True)
    found = memory(model, X)
    for column in ("plain", "now"):
        total = sum(getattr(layer, column) for layer in found.layers)
        assert abs(getattr(found, column).kept + IMAGE - total) <= 0.02 * total + 4096
    with saved_for_backward(model) as saved:
        model(X)
    assert abs(saved.bytes - sum(layer.now for layer in found.layers)) <= 4096
    assert found.now.peak < found.plain.peak


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("net", ["wrn-10-1", "densenet-bc-10-4", "vgg11-bn", "alexnet"])
def test_the_prediction_is_what_is_measured(net: str, lean: bool):
    """By layer, but for what the loss keeps, which no layer does, and a few numbers a layer."""
    found = memory(build(net, 10, 0.1, lean=lean), torch.randn(2, 3, 32, 32))
    assert len(found.layers) > 4
    for layer in found.layers:
        assert layer.name == "loss" or abs(layer.predicted - layer.now) <= 300, layer


def test_gradients_and_optimizer_state():
    model = rwn_ext.convert(chain(), 0.5)
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    everything = sum(p.nbytes for p in model.parameters())
    found = memory(model, X)
    assert (found.now.gradients, found.now.optimizer) == (learned, learned)
    assert (found.plain.gradients, found.plain.optimizer) == (everything, everything)
    found = memory(model, X, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), loss=lambda y: y.sum())
    assert found.now.optimizer == 0


def test_the_model_is_not_changed():
    model = build("wrn-10-1", 10, 0.1, lean=True)
    before = copy.deepcopy(model.state_dict())
    memory(model, X)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("lean", [True, False])
def test_the_minimum_is_that_of_what_is_learned(lean: bool):
    model = rwn_ext.convert(chain(), 0, norm="frozen", lean=lean)
    found = memory(model, X.clone().requires_grad_())
    (block,) = [layer for layer in found.layers if layer.name.startswith("1 - 2")]
    assert block.minimum == Z // 32
    assert (block.now == block.minimum) == lean


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


def test_a_model_that_cannot_be_traced_has_a_step_but_no_table():
    found = memory(Branching(), X)
    assert not found.layers and found.now.kept == found.plain.kept > 0


def test_the_table_names_the_columns_and_the_share():
    text = str(memory(rwn_ext.convert(chain(), 0.5, lean=True), X))
    for word in (
        "plain nn",
        "now",
        "predicted",
        "minimum",
        "1 - 2 - 3",
        "live between forward and backward",
        "of plain",
    ):
        assert word in text


def test_the_program_prints_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from rwn_ext.paper.__main__ import main

    arguments = ["--net", "wrn-10-1", "--part", "0.1", "--lean", "--batch-size", "4", "--image-size", "16"]
    assert main(["memory", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "minimum" in capsys.readouterr().out and (tmp_path / "memory.png").stat().st_size > 10_000
    steps = json.loads((tmp_path / "memory.json").read_text())["steps"]
    assert steps["now"]["kept"] < 0.6 * steps["plain"]["kept"] and steps["now"]["peak"] < steps["plain"]["peak"]
    assert main(["memory", "--net", "wrn-10-1", "--batch-size", "0", "--out", str(tmp_path)]) == 2
