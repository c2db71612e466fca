"""What a training step keeps and costs in memory, layer by layer: measured, and beside it predicted and enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rwn_ext.convert import restore
from rwn_ext.describe import table
from rwn_ext.lean import block, pooling, undo_lean
from rwn_ext.lean.activations import activation_of
from rwn_ext.lean.rewrite import IN_BLOCK, label, lean_graph
from rwn_ext.lean.tracing import CannotTrace, lent_forward, trace
from rwn_ext.partial_layer import PartialLayer
from rwn_ext.subsets import run_length


@dataclass
class Layer:
    """Bytes that a layer, or the layers of a block, keep for backward."""

    name: str
    plain: int
    now: int
    predicted: int
    """By the rules of what each kind of layer keeps, for the model as it is now."""
    minimum: int


COLUMNS = ("plain", "now", "predicted", "minimum")


@dataclass
class Step:
    """Bytes of one training step."""

    kept: int
    """Live between forward and backward, beyond what lives between steps."""
    gradients: int
    optimizer: int
    """Of the optimizer's state."""
    peak: int
    """The most at any time, parameters, buffers, optimizer state and the example included."""


@dataclass
class Memory:
    """What `memory` found; printed, a table."""

    layers: list[Layer]
    plain: Step
    now: Step

    def __str__(self) -> str:
        rows = [[la.name, *(_mb(getattr(la, column)) for column in COLUMNS)] for la in self.layers]
        rows.append(["sum", *(_mb(sum(getattr(la, column) for la in self.layers)) for column in COLUMNS)])
        steps = [
            [name, _mb(getattr(self.plain, field)), _mb(getattr(self.now, field)), f"{ratio:.2f}"]
            for name, field in STEP_ROWS
            for ratio in [getattr(self.now, field) / max(getattr(self.plain, field), 1)]
        ]
        return "\n\n".join(
            [
                table(["kept for backward (MB)", "plain nn", "now", "predicted", "minimum"], rows),
                table(["one training step (MB)", "plain nn", "now", "of plain"], steps),
            ]
        )


STEP_ROWS = (
    ("live between forward and backward", "kept"),
    ("gradients", "gradients"),
    ("optimizer state", "optimizer"),
    ("peak of the step", "peak"),
)


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"


def memory(
    model: nn.Module,
    example: Tensor,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Memory:
    """Measures one training step on `example`: of the model as it is, and as plain `nn` that learns everything.

    The table by layer counts what autograd saves, each storage once and at the first layer that saves it, parameters
    and buffers not: for plain nn (`rwn_ext.restore`) and for the model now. Beside it what the rules of the layers'
    kinds predict for the model now, and the minimum that the maths needs of one that learns what this one does: for a
    norm by batch statistics its input; else one bit an element of an activation and the channels that learned weights
    see; one byte an output of a maximum pooling. The table of a model that cannot be traced is empty.

    The step's numbers are the allocator's own: on a CPU the record of its every allocation, on CUDA its statistics.

    Args:
        example: an input of the model, with the batch size to be measured.
        loss: makes a scalar of the model's output; default: the mean of its squares.
        optimizer: makes an optimizer of the learned parameters; default: SGD with momentum 0.9.

    The model runs on copies and is not changed; they take as much memory as the model itself, one at a time.
    """
    loss = loss or _mean_square
    optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9))
    plain, now = _plain(model), copy.deepcopy(model)
    layers = _layers(plain, now, example, loss)
    return Memory(layers, _step(plain, example, loss, optimizer), _step(now, example, loss, optimizer))


def _plain(model: nn.Module) -> nn.Module:
    return restore(copy.deepcopy(model)).train(model.training)


def _mean_square(output: Any) -> Tensor:
    while not torch.is_tensor(output):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output.float().square().mean()


def _step(model: nn.Module, example: Tensor, loss: Callable, optimizer: Callable) -> Step:
    learned = [p for p in model.parameters() if p.requires_grad]
    stepper = optimizer(learned) if learned else None
    x = example.detach().clone().requires_grad_(example.requires_grad)

    def step(mark: Callable[[], None]) -> None:
        value = loss(model(x))
        mark()
        value.backward()
        del value
        if stepper is not None:
            stepper.step()

    step(lambda: None)  # a first time, for what is made once
    gradients = _bytes(p.grad for p in learned)
    x.grad = None
    model.zero_grad()
    state = _bytes(v for s in (stepper.state.values() if stepper else ()) for v in s.values())
    between_steps = _bytes([*model.parameters(), *model.buffers(), x]) + state
    measure = measure_cuda if example.is_cuda else measure_cpu
    kept, peak = measure(step)
    return Step(kept, gradients, state, between_steps + peak)


def _bytes(tensors: Any) -> int:
    storages = [t.untyped_storage() for t in tensors if torch.is_tensor(t)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure_cpu(step: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Bytes live at the mark, and at most, of what the step allocates: from the allocator's own record."""
    name = "rwn_ext: between forward and backward"

    def mark() -> None:
        with torch.profiler.record_function(name):
            pass

    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step(mark)
    results = profile.kineto_results
    assert results is not None
    events = sorted((event.start_ns(), event.name(), event.nbytes()) for event in results.events())
    live = peak = kept = 0
    for _, event, size in events:
        if event == "[memory]":
            live += size
            peak = max(peak, live)
        elif event == name:
            kept = live
    return kept, peak


def measure_cuda(step: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    kept = []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(lambda: kept.append(torch.cuda.memory_allocated() - before))
    return kept[0], torch.cuda.max_memory_allocated() - before


def _layers(plain: nn.Module, now: nn.Module, example: Tensor, loss: Callable) -> list[Layer]:
    """What each layer keeps; the layers of one block together."""
    is_lean, now = lent_forward(now) is not None, undo_lean(copy.deepcopy(now))
    try:
        lean, notes = lean_graph(now)
        graphs = {"plain": (plain, trace(plain)), "now": (now, lean if is_lean else trace(now)), "minimum": (now, lean)}
    except CannotTrace:
        return []
    rows: dict[str, Layer] = {}
    for column, (model, graph) in graphs.items():
        accountant = _Accountant(copy.deepcopy(model), graph)
        kept = accountant.account(example, loss)
        counts = {"minimum": accountant.minimum} if column == "minimum" else {column: kept}
        if column == "now":
            counts["predicted"] = accountant.predicted
        for counted, sizes in counts.items():
            for name, size in sizes.items():
                row = notes.get(name, name)
                row = row.removeprefix(IN_BLOCK) if row.startswith(IN_BLOCK) else name
                layer = rows.setdefault(row, Layer(row, 0, 0, 0, 0))
                setattr(layer, counted, getattr(layer, counted) + size)
    return list(rows.values())


class _Accountant(fx.Interpreter):
    """Runs a graph and counts, by label of the node, what autograd saves and what the node's kind lets expect.

    Of a lean graph also what would be enough.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.kept: dict[str, int] = {}
        self.minimum: dict[str, int] = {}
        self.predicted: dict[str, int] = {}
        self._label = ""
        self._counted = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._expected = set(self._counted)
        self._alive: list[Any] = []
        self._pieces: set[int] = set()

    def account(self, example: Tensor, loss: Callable) -> dict[str, int]:
        x = example.detach().clone().requires_grad_(example.requires_grad)
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            output = self.run(x)
            self._label = "loss"
            loss(output)
        return self.kept

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self._alive.append(storage)  # so that its address means nothing else
            self.kept[self._label] = self.kept.get(self._label, 0) + storage.nbytes()
        return tensor

    def run_node(self, n: fx.Node) -> Any:
        self._label = label(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        module = self.module.get_submodule(n.target) if n.op == "call_module" else None
        size = 0
        if n.target is block:
            size = self._minimum_of_block(*args, **kwargs)
        elif n.target in _LEAN_POOLS and result.requires_grad:
            size = result.numel() if n.target is pooling.max_pool2d or isinstance(args[1], nn.MaxPool2d) else 0
        elif isinstance(module, (nn.Conv2d, nn.Conv1d, nn.Linear, PartialLayer)):
            size = int(_seen_share(module) * args[0].nbytes)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and result.requires_grad:
            size = args[0].nbytes
        if size:
            self.minimum[self._label] = self.minimum.get(self._label, 0) + size
        if n.args and torch.is_tensor(result) and result.requires_grad:
            self._expect(_kept_by(n, module, args[0], result) if n.target not in _LEAN_POOLS else [size])
        elif n.target is block:
            self._expect([size + _statistics(args[1] if len(args) > 1 else kwargs.get("norm"))] if size else [])
        return result

    def _expect(self, kept: Sequence[Tensor | int]) -> None:
        """Counts these tensors, each storage once, and these bytes as expected here."""
        for tensor in kept:
            size = tensor
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                size = 0 if storage.data_ptr() in self._expected else storage.nbytes()
                self._expected.add(storage.data_ptr())
                self._alive.append(storage)
            self.predicted[self._label] = self.predicted.get(self._label, 0) + size

    def _minimum_of_block(
        self, pieces: Sequence[Tensor], norm: Any = None, activation: Any = None, dropout: Any = None,
        convolutions: Sequence[nn.Module] = (), slope: Any = None, sharers: Sequence[int] | None = None, **_: Any,
    ) -> int:  # fmt: skip
        gamma = getattr(norm, "weight", None)
        below = any(t is not None and t.requires_grad for t in (*pieces, gamma, getattr(norm, "bias", None)))
        known = activation_of(activation, slope)
        y_bytes = sum(piece.nbytes for piece in pieces)
        y_numel = sum(piece.numel() for piece in pieces)
        learns = max((_seen_share(conv) for conv in convolutions), default=0.0)
        if not below and not learns:
            return 0
        by_input = norm is not None and (
            isinstance(norm, nn.GroupNorm) or norm.training or norm.running_mean is None or gamma.requires_grad
        )
        dropped = y_numel // 8 if isinstance(dropout, nn.Dropout) and dropout.training else 0
        mask = y_numel // 8 if below and activation is not None and (learns < 1 or dropped) else 0
        of_output = learns * y_bytes + mask
        of_input = sum(p.nbytes / s for p, s in zip(pieces, sharers or [1] * len(pieces), strict=True))
        if (below and (by_input or (known is not None and known.reads_input))) or of_input < of_output:
            new = {p.untyped_storage().data_ptr(): p.nbytes for p in pieces}
            size = sum(nbytes for address, nbytes in new.items() if address not in self._pieces)
            self._pieces |= set(new)
            return size + dropped
        return int(of_output) + dropped


_LEAN_POOLS = (pooling.pool, pooling.max_pool2d, pooling.avg_pool2d)


def _kept_by(node: fx.Node, module: nn.Module | None, input: Any, output: Tensor) -> list[Tensor | int]:
    """What torch keeps for backward of a node outside a block: tensors, or bytes of new ones."""
    if isinstance(module, PartialLayer):
        share = _seen_share(module)
        return [input] if share == 1 else [int(share * input.nbytes)]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return [input, _statistics(module)]
    if isinstance(module, (nn.Conv2d, nn.Conv1d, nn.GroupNorm, nn.AvgPool2d)):
        return [input]
    if isinstance(module, nn.Linear):
        return [input] if module.weight.requires_grad else []
    name = getattr(node.target, "__name__", str(node.target))
    if isinstance(module, nn.MaxPool2d) or name == "max_pool2d":
        return [input, 8 * output.numel()]  # its indices are int64
    if name == "avg_pool2d":
        return [input]
    if isinstance(module, nn.Dropout):
        return [output.nbytes] if module.training and module.p else []
    known = activation_of(name if module is None else module)
    if known is None:
        return []
    return [input if known.reads_input else output]


def _statistics(norm: Any) -> int:
    """Of a batch: mean and inverse deviation of each channel, in float32."""
    return 8 * norm.num_features if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training else 0


def _seen_share(layer: nn.Module) -> float:
    """The share of its input that the learned weights of a convolution or linear layer see."""
    if isinstance(layer, PartialLayer):
        learned = layer.weight_trainable is not None and layer.weight_trainable.requires_grad
        return run_length(layer.partition.seen) / layer.partition.in_channels if learned else 0.0
    return float(layer.weight.requires_grad)
