"""What a model trains and keeps: a table of its layers, bytes saved for backward, bytes of gradients and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rwn_ext.backends import backends as backends
from rwn_ext.modules import PartialConv2d
from rwn_ext.planner import plan, requested


def describe(model: nn.Module, example: Tensor | None = None) -> str:
    """A table of the model's convolutions: name, weight shape, learned filters and weights.

    With `example`, an input of the model, also the algorithm planned for each weight gradient at that size; the model
    runs once for that, in evaluation mode and without gradients.
    """
    convs = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, PartialConv2d))}
    algorithms = {} if example is None else _algorithms(model, example)
    header = ["layer", "weight", "filters learned", "weights learned", *(["algorithm"] if algorithms else [])]
    rows = []
    for name, conv in convs.items():
        shape = tuple(conv.weight.shape)
        filters = len(conv.filters) if isinstance(conv, PartialConv2d) else shape[0]
        weights = sum(p.numel() for p in conv.parameters() if p.requires_grad)
        row = [name or type(conv).__name__, "x".join(map(str, shape)), f"{filters}/{shape[0]}", f"{weights:,}"]
        rows.append(row + ([algorithms.get(conv, "full")] if algorithms else []))
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


class Saved:
    """What autograd has saved for backward."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        """Each storage once, however many views of it are saved."""
        return sum(storage.nbytes() for storage in self._storages.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Counts what the forward pass inside the `with` keeps for backward, beside the model's parameters and buffers.

    Counted storages are kept alive until the block ends.
    """
    saved = Saved()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved._storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients present and of the optimizer's state, after a step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    storages = [tensor.untyped_storage() for tensor in (*gradients, *states)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _algorithms(model: nn.Module, example: Tensor) -> dict[nn.Module, str]:
    planned: dict[nn.Module, str] = {}

    def look(module: PartialConv2d, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        problem = module.problem(args[0] if args else kwargs["input"])
        planned[module] = plan(problem, requested(module.algorithm)).algorithm

    hooks = [
        m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules() if isinstance(m, PartialConv2d)
    ]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return planned
