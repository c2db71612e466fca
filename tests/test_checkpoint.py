"""Compact checkpoints: what they hold, what they give back bit for bit, what they refuse."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rwn_ext import PartialConv2d, convert, draw_, load_compact, restore, save_compact, set_subsets_, subsets
from rwn_ext.paper import networks


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 40, 3, groups=2, bias=False),
        nn.Sequential(nn.Conv2d(40, 20, 1), nn.Flatten(), nn.Linear(20 * 4, 5)),
    )  # fmt: skip


CHOICES = {
    "last": {"trainable": 0.1},
    "scattered": {"trainable": [0, 3, 17]},
    "inputs": {"trainable": 1.0, "trainable_inputs": [1, 2]},
    "block": {"trainable": [2, 5], "trainable_inputs": [0]},
    "none": {"trainable": 0},
    "all": {"trainable": 1.0},
    "biases": {"trainable": 2, "trainable_bias": "all"},
    "zero": {"trainable": 0.1, "frozen": "zero"},
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 6, 6)), torch.randint(5, (8,))).backward()
        optimizer.step()
    return model


def drawn(seed: int, **choice) -> nn.Module:
    return convert(draw_(plain(), seed), **{"trainable": 0.1, **choice})


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    return copy.deepcopy(model.state_dict()), subsets(model)


def unchanged(model: nn.Module, before: tuple[dict[str, Tensor], dict]) -> bool:
    state = model.state_dict()
    return subsets(model) == before[1] and all(torch.equal(state[key], before[0][key]) for key in state)


class TestRoundTrip:
    @EVERY_CHOICE
    def test_from_a_seed(self, tmp_path, choice: dict):
        model, path = trained(drawn(3, **choice)), tmp_path / "task.safetensors"
        save_compact(model, path, seed=3)
        other = convert(plain(), 1)
        assert load_compact(other, path) is other
        assert same(other, model) and subsets(other) == subsets(model)
        assert same(load_compact(plain(), path, seed=3), model)
        assert [file.name for file in tmp_path.iterdir()] == ["task.safetensors"]

    @EVERY_CHOICE
    def test_what_is_stored_is_the_learned_block(self, tmp_path, choice: dict):
        model = trained(drawn(3, **choice))
        save_compact(model, tmp_path / "task", seed=3)
        stored = load_file(tmp_path / "task")
        assert set(stored) == set(model.state_dict())
        for name, layer in model.named_modules():
            if isinstance(layer, PartialConv2d):
                block = layer.weight[list(layer.partition.block.indices)][:, list(layer.inputs.indices)]
                assert torch.equal(stored[f"{name}.weight"].flatten(), block.flatten())
                if layer.bias is not None:
                    bias = layer.bias[list(layer.partition.bias_filters.indices)]
                    assert torch.equal(stored[f"{name}.bias"], bias)

    @pytest.mark.parametrize("init", ["uniform", "normal"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_types_and_layouts(self, tmp_path, init: str, dtype: torch.dtype):
        model = convert(draw_(plain(), 3, init=init), 0.1).to(dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            model[0].weight_trainable.add_(1)
        save_compact(model, tmp_path / "task", seed=3, init=init)
        assert load_file(tmp_path / "task")["0.weight"].shape == (4, 3, 3, 3)
        assert same(load_compact(plain().to(dtype), tmp_path / "task"), model)
        assert torch.equal(load_compact(plain(), tmp_path / "task")[0].weight, model[0].weight.float())

    def test_filters_learned_before_a_switch_are_stored_too(self, tmp_path):
        model = trained(drawn(3, trainable=[0, 1]))
        trained(set_subsets_(model, {"0": ([5], None), "3": ([1], [4])}))
        save_compact(model, tmp_path / "task", seed=3)
        assert load_file(tmp_path / "task")["0.weight"].shape == (3, 3, 3, 3)
        assert load_file(tmp_path / "task")["3.weight"].shape == (2, 20, 3, 3)
        other = load_compact(drawn(8), tmp_path / "task")
        assert same(other, model) and subsets(other)["3"] == ([1], [4])

    def test_values_that_compare_oddly(self, tmp_path):
        model = drawn(3, frozen="zero")
        with torch.no_grad():
            model[0].weight_trainable.fill_(float("nan"))
            model[0].weight_frozen[1, 2] = -0.0
        save_compact(model, tmp_path / "task", seed=3)
        weight = load_compact(plain(), tmp_path / "task")[0].weight
        assert weight[-4:].isnan().all() and weight[1, 2].signbit().all() and not weight[0].signbit().any()


def test_many_tasks_share_one_backbone(tmp_path):
    backbone = trained(plain(), 4)
    base = copy.deepcopy(backbone.state_dict())
    tasks = [trained(convert(copy.deepcopy(backbone), [4, 5])) for _ in range(3)]
    for number, task in enumerate(tasks):
        save_compact(task, tmp_path / f"{number}", base=base)
    model = convert(copy.deepcopy(backbone), 1)
    whole = sum(value.numel() for key, value in base.items() if key[0] in "03" or key.startswith("4.0"))
    for number in (0, 2, 1, 0):
        # One after the other into one model: what the tasks share has not moved.
        assert same(load_compact(model, tmp_path / f"{number}"), tasks[number])
        stored = load_file(tmp_path / f"{number}")
        assert sum(v.numel() for k, v in stored.items() if k[0] in "03" or k.startswith("4.0")) < whole / 5
    assert same(load_compact(plain(), tmp_path / "1", base=base), tasks[1])
    with pytest.raises(ValueError, match=r"what is fixed of 0\.\w+ was not that of this backbone"):
        load_compact(plain(), tmp_path / "1")
    with pytest.raises(ValueError, match="backbone"):
        save_compact(tasks[0], tmp_path / "wrong", base=plain().state_dict())
    with pytest.raises(ValueError, match=r"the backbone has no 0\.weight of shape \(40, 3, 3, 3\)"):
        save_compact(tasks[0], tmp_path / "wrong", base={})


def test_wide_residual_network_28_10_fits_in_16_megabytes(tmp_path):
    model = networks.build("wrn-28-10", 10, 0.1, seed=1)
    assert sum(p.numel() for p in model.parameters()) * 4 > 145_900_000
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    save_compact(model, tmp_path / "task", seed=1)
    assert (tmp_path / "task").stat().st_size < 16_000_000
    with torch.device("meta"):
        other = networks.build("wrn-28-10", 10, 0.1)
    other = other.to_empty(device="cpu")
    assert same(load_compact(other, tmp_path / "task"), model)


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        save_compact(trained(drawn(3)), tmp_path / "task", seed=3)
        return tmp_path / "task"

    def refused(self, model: nn.Module, path: Path, match: str, **options) -> None:
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            load_compact(model, path, **options)
        assert unchanged(model, before)

    def rewritten(self, path: Path, change) -> None:
        """The file with its layout changed, its hash put right: a deliberate forgery, or another version's."""
        from rwn_ext.checkpoint import _content_hash

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        layout, stored = json.loads(metadata["layout"]), load_file(path)
        change(layout)
        metadata["layout"] = json.dumps(layout)
        save_file(stored, path, metadata | {"sha256": _content_hash(stored, metadata["layout"])})

    def test_another_seed(self, path: Path):
        self.refused(drawn(4), path, "is of seed=3 with init='uniform', not of seed=4", seed=4)
        self.rewritten(path, lambda layout: layout["source"].update(seed=4))
        self.refused(drawn(3), path, r"what is fixed of 0\.\w+ was not seed=4 with init='uniform' when it was saved")

    def test_another_init_or_version(self, path: Path):
        self.rewritten(path, lambda layout: layout["source"].update(init="normal"))
        self.refused(drawn(3), path, r"0\.weight was not seed=3 with init='normal'")
        self.rewritten(path, lambda layout: layout["source"].update(version=2))
        self.refused(drawn(3), path, "'version': 2.*update rwn_ext")

    def test_another_network(self, path: Path):
        other = plain()
        other[3] = nn.Conv2d(40, 40, 3, groups=4, bias=False)
        self.refused(convert(other, 0.1), path, r"3\.weight has shape \(40, 20, 3, 3\) there, \(40, 10, 3, 3\) in the")
        self.refused(nn.Sequential(*plain(), nn.Linear(5, 5)), path, r"lacks 5\.bias, 5\.weight, and holds nothing")
        self.refused(plain()[:2], path, r"lacks nothing, and holds 3\.weight, 4\.0\.bias")

    @pytest.mark.parametrize("bytes_left", [0, 5, 100, -1])
    def test_a_truncated_file(self, path: Path, bytes_left: int):
        path.write_bytes(path.read_bytes()[:bytes_left])
        self.refused(drawn(3), path, "task is damaged or no safetensors file")

    @pytest.mark.parametrize("where", [-1, -2000, 0.5])
    def test_a_flipped_bit(self, path: Path, where: float):
        content = bytearray(path.read_bytes())
        content[where if isinstance(where, int) else int(len(content) * where)] ^= 4
        path.write_bytes(content)
        self.refused(drawn(3), path, "task is damaged")

    def test_other_files(self, tmp_path):
        torch.save(plain().state_dict(), tmp_path / "pickle")
        self.refused(drawn(3), tmp_path / "pickle", "pickle is damaged or no safetensors file")
        save_file(plain().state_dict(), tmp_path / "whole")
        self.refused(drawn(3), tmp_path / "whole", "whole is no compact checkpoint of this version: its format is None")
        with pytest.raises(FileNotFoundError):
            load_compact(plain(), tmp_path / "none")

    def test_fixed_weights_that_are_from_elsewhere(self, tmp_path):
        for model, options in (
            (drawn(3), {"seed": 4}),
            (drawn(3), {"seed": 3, "init": "normal"}),
            (convert(plain(), 0.1), {"seed": 3}),
        ):
            with pytest.raises(ValueError, match=f"nothing of the fixed weights is what seed={options['seed']}"):
                save_compact(model, tmp_path / "task", **options)
        assert not list(tmp_path.iterdir())

    def test_no_source_or_two(self, tmp_path):
        for options in ({}, {"seed": 3, "base": plain().state_dict()}):
            with pytest.raises(ValueError, match=r"give the seed .* or the backbone"):
                save_compact(drawn(3), tmp_path / "task", **options)

    def test_parametrized_layers(self, tmp_path):
        model = drawn(3)
        nn.utils.parametrizations.spectral_norm(model[0], "weight_trainable")
        with pytest.raises(ValueError, match="0 is sharded, parametrized or pruned"):
            save_compact(model, tmp_path / "task", seed=3)

    def test_without_safetensors(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(RuntimeError, match=r"pip install 'rwn_ext\[checkpoint\]'"):
            load_compact(plain(), tmp_path / "task")


def test_a_restored_network_is_stored_whole_and_loads(tmp_path):
    model = trained(drawn(3))
    save_compact(model, tmp_path / "task", seed=3)
    whole = restore(copy.deepcopy(model))
    save_compact(whole, tmp_path / "whole", seed=3)
    assert same(load_compact(plain(), tmp_path / "whole"), model)
    assert (tmp_path / "task").stat().st_size < (tmp_path / "whole").stat().st_size
