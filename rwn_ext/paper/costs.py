"""What a training step of several runs costs: time relative to one of them, and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rwn_ext.paper.timing import interleaved, ratio
from rwn_ext.paper.training import Run
from rwn_ext.report import saved_for_backward, training_bytes


@dataclass
class Cost:
    """Of one training step."""

    learned_weights: int
    step_ms: float
    """Median."""
    step_ratio: float
    """Time relative to the reference, median over the rounds."""
    training_bytes: int
    """Of gradients and of the optimizer's state."""
    saved_bytes: int
    """Kept for backward."""


def costs(
    runs: Mapping[str, Run], reference: str, rounds: int, after_round: Callable[[], object] = lambda: None
) -> dict[str, Cost]:
    """Step times of all runs in turn, so that drift of the machine cancels; bytes of one step of each.

    The steps are real ones: the runs are of no use for training afterwards.
    """
    run = runs[reference]
    images, size = run.images.train, run.config.schedule.batch_size
    batch = images.images[:size], images.labels[:size]
    seconds = interleaved({name: _step(run, batch) for name, run in runs.items()}, rounds, after_round=after_round)
    found = {}
    for name, run in runs.items():
        with saved_for_backward(run.model) as saved:
            loss, _ = run.loss(run.model, *batch)
        loss.backward()
        found[name] = Cost(
            learned_weights=run.learned_weights,
            step_ms=1000 * statistics.median(seconds[name]),
            step_ratio=ratio(seconds, name, reference),
            training_bytes=training_bytes(run.model, run.optimizer),
            saved_bytes=saved.bytes,
        )
    return found


def _step(run: Run, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    run.model.train()
    return lambda: run.step(run.model, *batch)


def machine(device: torch.device) -> str:
    """The device and torch, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
