"""A whole training step of each of the paper's networks and of common ones, by what is learned and how it is done.

The ratio to "all frozen" tells what is left to gain by a faster weight gradient. Before anything is timed, float32 loss
and gradients of every eager model are compared with float64, on a CPU those of compiled ones too. On a GPU, where steps
are timed under autocast, the gradients of a captured one are compared with the eager one's. Compiled steps are not
compared there: they round elsewhere, which under autocast changes gradients of deep networks as much as an error may.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.competitors import CHECKPOINTED, FROZEN, FROZEN_PLAIN, LEAN, MEMSAVE, OTHERS, OURS, PLAIN, rivals
from bench.conftest import DEVICE, DTYPE, marks
from bench.group import Group
from bench.networks import CAPTURED_AS, COMPILED_AS, IMAGENET, MEMSAVE_IS_INSTALLED, Captured, Step, floors_of, model_of
from bench.oracle import NetworkOracle, close
from bench.rates import rates
from bench.turns import Effort, in_turns

AGAIN = f"{PLAIN} again"
"""What the machine's noise makes of no difference at all."""
REPLAY_TOLERANCE = 0.1
"""Relative, of the gradients of a captured step, which rounds as the eager one does but for the order of some sums."""
PARTS, ALL_PARTS = (0.05, 0.1, 0.4), (0.05, 0.1, 0.4, 1.0)
KNOWN = (*(f"{way} p = 0.1" for way in OTHERS), CHECKPOINTED, *([MEMSAVE] if MEMSAVE_IS_INSTALLED else []))
LEANS = (f"{LEAN} p = 0.1",)


class Net(NamedTuple):
    """A network, its batch and image size, and how long it is measured."""

    name: str
    batch: int
    effort: Effort
    size: int = 32
    parts: tuple[float, ...] = PARTS


# How near the first three come to the ceiling takes more rounds to say: bench_ceiling has them.
CPU_NETS = (
    Net("wrn-16-4", 32, Effort(48, least=7), parts=ALL_PARTS),
    Net("densenet-bc-40-12", 32, Effort(20, least=7)),
    Net("vgg19-bn", 16, Effort(20, least=7), parts=(0.05, 0.1)),
    Net("alexnet", 64, Effort(10)),
    # The papers' images are larger; on them a CPU takes seconds for a step, and the ratios are much the same.
    Net("resnet-18", 4, Effort(10, least=7), 112, (0.05, 0.1)),
    Net("resnet-50", 2, Effort(10, least=7), 112, (0.1,)),
    Net("mobilenet-v2", 4, Effort(10), 112, (0.1,)),
)
# The most important first: those with little time get no further.
GPU_NETS = tuple(
    Net(name, 128, Effort(8, least=15, most=15), 224 if name in IMAGENET else 32, ALL_PARTS)
    for name in (
        "wrn-28-10", "resnet-50", "wrn-28-4", "vgg19-bn", "densenet-bc-100-12", "resnet-18", "mobilenet-v2", "alexnet",
    )
)  # fmt: skip
NETS = {net.name: net for net in (GPU_NETS if DEVICE == "cuda" else CPU_NETS)}
FIRST, QUICK = next(iter(NETS)), "alexnet"
# Compiling takes long, so a CPU does it for one network unless it is asked to do it for all.
WITH_COMPILED = list(NETS) if DEVICE == "cuda" else [FIRST]


def rows(net: Net) -> tuple[str, ...]:
    """The contenders that need no compiler."""
    # AlexNet has no units to recompute.
    known = tuple(row for row in KNOWN if (net.name, row) != ("alexnet", CHECKPOINTED))
    if DEVICE == "cuda":
        # Eager steps, where the host may be what is waited for, and the same steps captured in CUDA graphs.
        ours = tuple(f"{OURS} p = {p}" for p in (0.01, *net.parts))
        captured = (PLAIN, FROZEN, *(f"{OURS} p = {p}" for p in (0.01, 0.05, 0.1)))
        return (PLAIN, AGAIN, FROZEN, FROZEN_PLAIN, *ours, *LEANS, *(CAPTURED_AS + row for row in captured), *known)
    again = (AGAIN,) if net.name == FIRST else ()
    return (PLAIN, *again, FROZEN, FROZEN_PLAIN, *(f"{OURS} p = {p}" for p in net.parts), *LEANS, *known)


def compiled_rows(net: Net) -> tuple[str, ...]:
    more = (FROZEN, f"{OURS} p = 0.05") if DEVICE == "cuda" else ()
    return tuple(COMPILED_AS + row for row in (PLAIN, f"{OURS} p = 0.1", *more))


@pytest.mark.parametrize(
    ("name", "row"),
    [pytest.param(net.name, row, marks=marks(net.name == QUICK, row.startswith(COMPILED_AS), net.name in WITH_COMPILED))
     for net in NETS.values() for row in (*rows(net), *compiled_rows(net))],
)  # fmt: skip
def test_step(record, effort, request, name, row):
    asked = request.config.option.compiled
    compiled = asked == "all" or (asked == "some" and name in WITH_COMPILED)
    group, failures = measured(NETS[name], effort(NETS[name].effort), compiled)
    if row in failures:
        pytest.fail(failures[row])
    record(group, row)


class Measured(NamedTuple):
    """A group of those who can run and compute what they should; of the others, what is wrong."""

    group: Group | None
    failures: dict[str, str]


@lru_cache(maxsize=1)
def measured(net: Net, effort: Effort, compiled: bool) -> Measured:
    torch.manual_seed(0)
    images = torch.randn(net.batch, 3, net.size, net.size, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (net.batch,), device=DEVICE)
    # A few images are enough for a GPU; on a CPU compiled steps are compared too, for which they are all needed.
    few = slice(8) if DEVICE == "cuda" else slice(None)
    oracle = NetworkOracle.of(model_of(net.name, PLAIN).to(DEVICE), images[few], labels[few])
    steps: dict[str, Step | Captured] = {}
    failures: dict[str, str] = {}
    names = (*rows(net), *(compiled_rows(net) if compiled else ()))
    for row in names:
        try:
            steps[row] = checked(net.name, row, images, labels, oracle, few)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            failures[row] = f"{type(error).__name__}: {error}"
    for reference in {PLAIN, FROZEN} & failures.keys():
        return Measured(None, dict.fromkeys(names, f"it is compared with {reference}, which failed") | failures)
    return Measured(timed(net, steps, images, effort), failures)


def checked(net: str, row: str, images: Tensor, labels: Tensor, oracle: NetworkOracle, few: slice) -> Step | Captured:
    """A row's step that computes what it should; on a GPU one that has run, so that what cannot fails here."""
    form = CAPTURED_AS if row.startswith(CAPTURED_AS) else ""
    step = Step(net, row.removeprefix(form).removesuffix(" again"), images, labels)
    if form:
        captured = Captured(step)
        check_replay(row, captured)
        return captured
    compiled = row.startswith(COMPILED_AS)
    if DEVICE == "cpu" or not compiled:
        oracle.check(row, step.model, step.learner, images[few], labels[few])
    if DEVICE == "cuda":
        # The first call compiles, the next ones warm up and record what is replayed from then on.
        for _ in range(3 if compiled else 1):
            step()
    return step


def check_replay(row: str, captured: Captured) -> None:
    """WrongResultError where a replay's gradients are not those of its eager step, from the same weights.

    Those of weights alone: a bias before a norm has a gradient of nothing but rounding.
    """
    step = captured.step
    learned = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learned.items()}
    gradients = []
    for run in (captured, step):
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(before[name])
        torch.manual_seed(0)  # dropout's
        run()
        gradients.append({name: p.grad.clone() for name, p in learned.items() if p.dim() > 1})
    replayed, eager = gradients
    for name in eager:
        close(f"gradient of {name} of {row}", replayed[name], eager[name], REPLAY_TOLERANCE)


def timed(net: Net, steps: Mapping[str, Step | Captured], images: Tensor, effort: Effort) -> Group:
    """All that can run, in turns."""
    bounded = {
        row: step.step if isinstance(step, Captured) else step
        for row, step in steps.items()
        if (OURS in row or row == FROZEN) and row.replace(LEAN, OURS) in steps
    }
    floor = floors_of(bounded, images, rates(DEVICE, DTYPE), DTYPE.itemsize)
    seconds = in_turns(steps, effort)
    memory = {
        row: step.memory()
        for row, step in steps.items()
        if isinstance(step, Step) and not (DEVICE == "cuda" and row.startswith(COMPILED_AS))
    }
    case = {
        "batch": net.batch, "image": net.size, "layout": "channels_last",
        "numbers": "bf16 autocast" if DEVICE == "cuda" else "float32",
    }  # fmt: skip
    return Group(
        "step", net.name, case, seconds, (PLAIN, FROZEN), floor=floor,
        rivals={row: others for row in steps if (others := rivals(row, steps))}, more=memory,
    )  # fmt: skip
