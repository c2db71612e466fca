"""The memory of a training step of one of the paper's networks: the table of `report.memory`, and its picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console

from rwn_ext.files import replacing
from rwn_ext.frozen_norm import freeze_norms
from rwn_ext.lean import make_lean
from rwn_ext.memory import COLUMNS, STEP_ROWS, Memory, memory
from rwn_ext.paper.networks import build
from rwn_ext.paper.schedules import schedule_of

COLOURS = {"plain": "tab:gray", "now": "tab:blue", "predicted": "tab:cyan", "minimum": "tab:green"}
LABELS = {"plain": "plain nn", "now": "this network", "predicted": "predicted", "minimum": "minimum"}


@dataclass
class Footprint:
    """What is to be measured, and where the results go."""

    net: str
    part: Any
    lean: bool
    norm: str
    batch_size: int
    image_size: int
    device: str
    out: Path

    def __post_init__(self) -> None:
        for name in ("batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is less than 1")
        self.model = build(self.net, 10, self.part, seed=0).to(self.device)
        if self.norm == "frozen":
            freeze_norms(self.model)
        if self.lean:
            make_lean(self.model)
        self.out.mkdir(parents=True, exist_ok=True)

    def show(self) -> None:
        """Measures, prints the table, and draws it into memory.png beside memory.json."""
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=self.device)
        labels = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        schedule = schedule_of(self.net)

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=1e-3, momentum=schedule.momentum, weight_decay=schedule.weight_decay)

        console = Console()
        with console.status(f"measuring a training step of {self.net}"):
            found = memory(self.model, images, loss=lambda y: F.cross_entropy(y, labels), optimizer=optimizer)
        console.print(str(found), highlight=False, soft_wrap=True)
        results: dict[str, Any] = {"title": self.title, "layers": [asdict(layer) for layer in found.layers]}
        results |= {"steps": {name: asdict(getattr(found, name)) for name in ("plain", "now")}}
        with replacing(self.out / "memory.json") as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        drawn(found, self.title).savefig(self.out / "memory.png", dpi=120)
        console.print(f"in {self.out}: memory.json, memory.png")

    @property
    def title(self) -> str:
        learned = "all learned" if self.part is None else f"part {self.part} learned"
        ways = [learned, *(["lean"] if self.lean else []), *(["frozen norms"] if self.norm == "frozen" else [])]
        return f"{self.net}, {', '.join(ways)}, batch {self.batch_size}, {self.image_size}x{self.image_size}"


def drawn(found: Memory, title: str) -> Figure:
    """Bars by layer of what is kept for backward; bars of the whole step."""
    layers = found.layers
    figure = Figure(figsize=(11, max(3.6, 1.4 + 0.3 * len(layers))), layout="constrained")
    by_layer, by_step = figure.subplots(1, 2, width_ratios=(2, 1))
    height = 0.8 / len(COLUMNS)
    for i, column in enumerate(COLUMNS):
        places = [row + (i - (len(COLUMNS) - 1) / 2) * height for row in range(len(layers))]
        sizes = [getattr(layer, column) / 1e6 for layer in layers]
        by_layer.barh(places, sizes, height, label=LABELS[column], color=COLOURS[column])
    by_layer.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    by_layer.invert_yaxis()
    by_layer.set(title="kept for backward, by layer", xlabel="MB")
    by_layer.legend()
    for i, (column, step) in enumerate((("plain", found.plain), ("now", found.now))):
        sizes = [getattr(step, field) / 1e6 for _, field in STEP_ROWS]
        bars = by_step.barh([row + (i - 0.5) * 0.4 for row in range(len(sizes))], sizes, 0.4, color=COLOURS[column])
        by_step.bar_label(bars, [f"{size:.1f}" for size in sizes], fontsize=7, padding=2)
    by_step.set_yticks(range(len(STEP_ROWS)), [name.replace(" ", "\n", 1) for name, _ in STEP_ROWS], fontsize=8)
    by_step.invert_yaxis()
    by_step.margins(x=0.2)
    by_step.set(title="one training step", xlabel="MB")
    figure.suptitle(title)
    return figure
