"""Budgets: the converted model stays within them as the allocator measures it, and the best filters are learned."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import resnet18
from torch import Tensor, nn

from rwn_ext import convert, plan_budget, subsets
from rwn_ext.budget import Budget, parse
from rwn_ext.report import memory

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SGD = lambda ps: torch.optim.SGD(ps, lr=0.1)  # noqa: E731
MOMENTUM = lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)  # noqa: E731


def network() -> nn.Sequential:
    """Convolutions plain and depthwise, a branch, a linear layer."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.deep = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(self.one(x) + self.two(x).sigmoid())

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Tanh(), Branch(),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(),
        nn.Linear(6, 4),
    )  # fmt: skip


def least(model: nn.Module, **options) -> int:
    """What the error names."""
    with pytest.raises(ValueError, match=r"budget=1 is less than the [\d,]+ bytes") as caught:
        plan_budget(model, 1, example=X, **options)
    return int(re.search(r"less than the ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))


def used(model: nn.Module, optimizer=MOMENTUM) -> int:
    step = memory(model, X, optimizer=optimizer).now
    return step.kept + step.gradients + step.optimizer


OPTIONS = {
    "batch-norm": {},
    "frozen-norm": {"norm": "frozen"},
    "linear": {"norm": "frozen", "linear": True, "skip": "12"},
    "skip": {"norm": "frozen", "skip": ["0", "5.one"]},
    "inputs": {"norm": "frozen", "trainable_inputs": 0.5},
    "biases": {"norm": "frozen", "trainable_bias": "all"},
    "zero": {"norm": "frozen", "frozen": "zero"},
}


@pytest.mark.works_with("a budget of bytes, within which the measured training step stays")
@pytest.mark.parametrize("more", [0, 60_000, 150_000], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stays_within_the_budget_as_measured(options: dict, more: int):
    model = network()
    budget = least(model, **options) + more
    plan = plan_budget(model, budget, example=X, **options)
    assert plan.bytes <= budget
    convert(model, budget=budget, example=X, **options)
    assert {name: tuple(filters) for name, (filters, _) in subsets(model).items() if filters} == {
        name: filters for name, filters in plan.filters.items() if filters
    } or "trainable_inputs" in options
    assert used(model) <= budget
    assert any(plan.filters.values()) == (more > 0)


def test_the_plan_of_a_real_network_is_what_is_measured():
    """Kept bytes agree with the allocator's, but for what lived before and is counted: the image, index tensors."""
    model = resnet18(num_classes=5)
    budget = 2_000_000
    plan = plan_budget(model, budget, example=X, norm="frozen")
    convert(model, plan.filters, norm="frozen")
    step = memory(model, X).now
    kept = sum(share.kept for share in (*plan.layers, plan.rest))
    image = X.nbytes if plan.filters[plan.layers[0].name] else 0
    assert 0 <= kept - image - step.kept <= 8 * sum(len(share.filters) for share in plan.layers)
    assert step.gradients == sum(share.gradient for share in (*plan.layers, plan.rest)) == step.optimizer
    assert budget - 50_000 <= plan.bytes <= budget, "the budget is used"


def test_layers_that_learn_nothing_keep_nothing_and_backward_stops_before_them():
    model = network()
    plan = plan_budget(model, least(model, norm="frozen") + 60_000, example=X, norm="frozen")
    for share in plan.layers:
        assert bool(share.filters) == bool(share.gradient) and (share.filters or not share.kept)
    assert not plan.filters["0"], "from the first layer on backward would need everything"


def test_more_room_is_used_where_branches_run_beside_each_other():
    """What two layers keep together is measured before the second is opened, not only guessed."""
    model = network()
    room = least(model, norm="frozen")
    learned = [
        sum(len(filters) for filters in plan_budget(model, room + more, example=X, norm="frozen").filters.values())
        for more in (46_000, 48_000, 52_000, 58_000)
    ]
    assert learned[0] >= 9 and learned == sorted(learned)


def test_the_optimizer_counts():
    model, states = network(), {0: SGD, 1: MOMENTUM, 2: lambda ps: torch.optim.Adam(ps)}
    learned = []
    for count, optimizer in states.items():
        budget = least(model, norm="frozen", optimizer_states=2) + 54_000
        converted = convert(
            copy.deepcopy(model), budget=budget, example=X, norm="frozen", optimizer_states=count
        )  # fmt: skip
        # Adam counts its steps, in 4 bytes for each Parameter.
        assert used(converted, optimizer) <= budget + 4 * len(list(converted.parameters()))
        learned.append(sum(p.numel() for p in converted.parameters() if p.requires_grad))
    assert learned[0] > learned[1] > learned[2]


class TestChoice:
    def test_the_filters_of_largest_norm(self):
        model = network()
        with torch.no_grad():
            model[5].deep.weight[[3, 7]] *= 50
        filters = plan_budget(model, 0.2).filters
        assert {3, 7} <= set(filters["5.deep"])
        for name, chosen in filters.items():
            norms = model.get_submodule(name).weight.flatten(1).norm(dim=1)
            others = [k for k in range(len(norms)) if k not in chosen]
            assert not chosen or not others or norms[list(chosen)].min() >= norms[others].max()

    def test_the_filters_of_largest_gradient(self):
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        model = network().eval()
        before = copy.deepcopy(model.state_dict())
        batches = [(X, torch.tensor([1, 3]))]
        plan = plan_budget(model, 0.1, select="gradient", loss=loss, batches=iter(batches))
        loss(model, batches[0]).backward()
        for name, chosen in plan.filters.items():
            norms = model.get_submodule(name).weight.grad.flatten(1).norm(dim=1)
            assert sorted(norms.topk(len(chosen)).indices.tolist()) == list(chosen)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert plan.filters != plan_budget(model, 0.1).filters

    @pytest.mark.parametrize("fraction", [0.0, 0.07, 0.5, 1.0])
    def test_a_fraction_is_of_the_weights(self, fraction: float):
        model = network()
        total = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
        convert(model, budget=fraction)
        learned = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_trainable"))
        assert fraction * total - 108 < learned <= fraction * total


def test_verbose_prints_and_the_plan_is_a_table(capsys: pytest.CaptureFixture[str]):
    model = network()
    plan = plan_budget(model, "1 MB", example=X, norm="frozen")
    assert isinstance(plan, Budget)
    convert(model, budget="1 MB", example=X, norm="frozen", verbose=True)
    assert capsys.readouterr().out.endswith(f"{plan}\n")
    rows = {line.split("  ")[0]: line.split() for line in str(plan).splitlines()}
    assert rows["5.deep"][1] == f"{len(plan.filters['5.deep'])}/12" and float(rows["sum"][-1]) <= 1.0
    assert str(plan).endswith("within a budget of 1.000 MB, optimizer states 1")


@pytest.mark.parametrize(
    ("text", "size"), [(12, 12), ("2 GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), ("7 B", 7)], ids=str
)
def test_sizes_are_read(text, size: int):
    assert parse(text) == size


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": "2 GHz"}, "budget='2 GHz' is no budget.*'2 GB'"),
        ({"budget": True}, "budget=True is no budget"),
        ({"budget": 1.5}, r"budget=1\.5 is no fraction.*bytes must be an int"),
        ({"budget": "1 MB", "example": None}, "needs example="),
        ({"budget": 0.1, "trainable": 0.1}, r"trainable=0\.1 or budget=0\.1, not both"),
        ({"budget": 0.1, "select": "last"}, "select='last' gives filters no score.*magnitude, gradient"),
        ({"budget": 0.1, "select": "gradient"}, "needs loss="),
        ({"trainable": 0.1, "select": "gradient"}, "select='gradient' is not a selection policy"),
        ({"budget": 1000}, r"budget=1000 is less than the [\d,]+ bytes"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_changes_nothing(options: dict, named: str):
    model = network()
    before = list(model.modules())
    with pytest.raises(ValueError, match=named):
        convert(model, **{"example": X, **options})
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_the_example_fine_tunes_within_its_budget(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("sklearn")
    example = str(Path(__file__).parents[1] / "examples" / "finetune_budget.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [example, "--budget", "1.5 MB", "--epochs", "3"])
        runpy.run_path(example, run_name="__main__")
    text = capsys.readouterr().out
    before, after = (
        float(re.search(rf"{when} fine-tuning: test accuracy (.*)%", text)[1]) for when in ("before", "after")
    )
    assert after > 80 > before
    rows = [re.search(rf"{row} .*?([\d.]+) +[\d.]+\n", text)[1] for row in ("backward", "gradients", "optimizer state")]
    assert "within a budget of 1.500 MB" in text and sum(map(float, rows)) <= 1.5
