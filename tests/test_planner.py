"""The planner picks, explains what it picked, and refuses what cannot be."""

from dataclasses import replace

import pytest
import torch

from rwn_ext import PartialConv2d, planner
from rwn_ext.planner import ALGORITHMS, Problem, explain, plan

LAYER = Problem(2, 64, 32, 32, 64, 6, (3, 3), padding=(1, 1), channels_last=True)


@pytest.mark.parametrize(
    ("change", "picked"),
    [
        ({}, "unfold"),
        ({"learned": 0}, "none"),
        ({"learned": 64}, "full"),
        ({"learned": 32}, "gather"),
        ({"channels": 16}, "gather"),
        ({"groups": 2}, "gather"),
        ({"stride": (2, 2)}, "gather"),
        ({"channels_last": False}, "gather"),
        ({"kernel_size": (1, 1), "padding": (0, 0)}, "matmul"),
        ({"kernel_size": (1, 1), "padding": (0, 0), "channels_last": False}, "gather"),
        ({"batch": 1, "height": 4, "width": 4}, "full"),
    ],
    ids=str,
)
def test_heuristic(change: dict, picked: str):
    chosen = plan(replace(LAYER, **change))
    assert chosen.algorithm == picked and chosen.reason


@pytest.mark.parametrize(
    ("change", "algorithm", "why"),
    [
        ({}, "none", "learned"),
        ({}, "matmul", "1x1"),
        ({"kernel_size": (1, 1)}, "matmul", "padding"),
        ({"kernel_size": (1, 1), "padding": (0, 0), "groups": 2}, "matmul", "2"),
        ({"groups": 4}, "unfold", "4"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_a_reason(change: dict, algorithm: str, why: str):
    problem = replace(LAYER, **change)
    with pytest.raises(ValueError, match=f"'{algorithm}' cannot compute .*: .*{why}"):
        plan(problem, algorithm)
    assert any(line.strip().startswith(f"cannot be {algorithm}: ") for line in explain(problem).splitlines())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forcing_is_obeyed_and_a_layer_that_learns_nothing_needs_nothing(algorithm: str):
    assert plan(replace(LAYER, learned=0), algorithm).algorithm == "none"
    if algorithm != "none":
        possible = replace(LAYER, kernel_size=(1, 1), padding=(0, 0))
        assert plan(possible, algorithm).algorithm == algorithm


def test_explain_says_what_and_why(monkeypatch: pytest.MonkeyPatch):
    text = explain(LAYER)
    for part in ("6 of 64 filters 3x3", "(2, 64, 32, 32)", "channels_last on cpu", "picked unfold", "54 columns"):
        assert part in text
    assert "cannot be matmul: it needs 1x1" in text and "cannot be gather" not in text
    assert "picked full" in explain(LAYER, "full") and "asked for" in explain(LAYER, "full")
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "gather")
    assert "picked gather" in explain(LAYER) and "picked full" in explain(LAYER, "full")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="algorithm='fast' is unknown; choose auto, none, full"):
        planner.requested("fast")
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "")
    with pytest.raises(ValueError, match="RWN_EXT_ALGORITHM=''"):
        planner.requested(None)
    assert planner.requested("full") == "full"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"trainable": 2, "padding": 1}, {"channels": 6, "filters": 12, "learned": 2, "padding": (1, 1)}),
        ({"trainable": 2, "trainable_inputs": [0, 3]}, {"channels": 2, "filters": 12, "learned": 2}),
        ({"trainable": [0, 11], "groups": 3}, {"channels": 4, "filters": 8, "learned": 2, "groups": 2}),
        ({"trainable": 0}, {"learned": 0}),
        ({"trainable": 1, "padding": "same"}, {"padding": (1, 1), "height": 9}),
        ({"trainable": 1, "padding": 2, "padding_mode": "circular"}, {"padding": (0, 0), "height": 13, "width": 15}),
    ],
    ids=str,
)
def test_a_layer_states_its_problem(arguments: dict, expected: dict):
    layer = PartialConv2d(6, 12, 3, **arguments)
    x = torch.randn(2, 6, 9, 11)
    problem = layer.problem(x)
    assert {name: getattr(problem, name) for name in expected} == expected
    assert problem.output_size == layer(x).shape[2:]
    assert problem.batch == 2 and layer.problem(x[0]).batch == 1
    assert not problem.channels_last
    # Circular padding makes a contiguous copy.
    nhwc = layer.problem(x.to(memory_format=torch.channels_last))
    assert nhwc.channels_last == (arguments.get("padding_mode") != "circular")
