"""A table of a model's layers: what each learns, and how its weight gradient is planned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rwn_ext.partial_layer import PartialLayer
from rwn_ext.planner import plan, problems, requested


def describe(model: nn.Module, example: Tensor | None = None) -> str:
    """A table of the model's convolutions and partly learned layers: name, weight shape, learned filters and weights.

    With `example`, an input of the model, also the algorithm planned for each weight gradient at that size; the model
    runs once for that, in evaluation mode and without gradients.
    """
    convs = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv1d, PartialLayer))}
    algorithms = {} if example is None else _algorithms(model, example)
    header = ["layer", "weight", "filters learned", "weights learned", *(["algorithm"] if algorithms else [])]
    rows = []
    for name, conv in convs.items():
        shape = tuple(conv.weight.shape)
        filters = len(conv.filters) if isinstance(conv, PartialLayer) else shape[0]
        weights = sum(p.numel() for p in conv.parameters() if p.requires_grad)
        row = [name or type(conv).__name__, "x".join(map(str, shape)), f"{filters}/{shape[0]}", f"{weights:,}"]
        rows.append(row + ([algorithms.get(conv, _library(conv))] if algorithms else []))
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"{table(header, rows)}\n{learned:,} of the model's {total:,} parameters are learned"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns of text, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _library(layer: nn.Module) -> str:
    """What computes the weight gradient of a layer that the planner does not plan."""
    if not isinstance(layer, PartialLayer):
        return "full"
    return "none" if layer.weight_trainable is None else "matmul"


def _algorithms(model: nn.Module, example: Tensor) -> dict[nn.Module, str]:
    found = problems(model, example)
    return {layer: plan(problem, requested(layer.algorithm)).algorithm for layer, problem in found.items()}
