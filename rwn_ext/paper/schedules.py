"""How the paper trains each of its networks: batch size, weight decay, epochs, when the learning rate drops."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwn_ext.paper.networks import NAMES


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum and without Nesterov; the learning rate is multiplied by `factor` after each milestone."""

    batch_size: int
    weight_decay: float
    epochs: int
    milestones: tuple[int, ...]
    factor: float
    lr: float = 0.1
    momentum: float = 0.9

    def __post_init__(self) -> None:
        checks = {
            "batch_size": self.batch_size >= 1,
            "epochs": self.epochs >= 1,
            "lr": 0 < self.lr < math.inf,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "factor": 0 < self.factor <= 1,
            "milestones": all(milestone >= 1 for milestone in self.milestones),
        }
        for name, sound in checks.items():
            if not sound:
                raise ValueError(f"{name}={getattr(self, name)} makes no training schedule")

    def lr_at(self, epoch: int) -> float:
        """The learning rate of epoch 0, 1, ..."""
        return self.lr * self.factor ** sum(milestone <= epoch for milestone in self.milestones)


# Section 4 of the paper and the authors' logs; other networks of a family train as the family does.
SCHEDULES = {
    "wrn": Schedule(128, 5e-4, 200, (60, 120, 160), 0.2),
    "densenet": Schedule(64, 1e-4, 300, (150, 225), 0.1),
    "vgg": Schedule(128, 1e-4, 164, (81, 122), 0.1),
    "alexnet": Schedule(128, 1e-4, 164, (81, 122), 0.1),
}


def schedule_of(name: str) -> Schedule:
    """The paper's schedule for a network that `networks.build` knows."""
    for family, schedule in SCHEDULES.items():
        if name.startswith(family):
            return schedule
    raise ValueError(f"there is no network {name!r}; choose {NAMES}")
