"""Which filters to learn in which layer, so that training stays within a budget of bytes or of learned weights.

A filter costs its gradient and its optimizer state. The first filter of a layer also costs what the layer then keeps of
its input for backward, and, where no earlier layer learns, all that backward needs from there on. Filters are taken
greedily by score² per byte; a layer is opened with as many as make its ratio best. What is kept is measured, not
modelled: once for each layer as the only one that learns, whenever a layer is opened, and for the choice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rwn_ext.describe import table
from rwn_ext.ops import run_length
from rwn_ext.partial_layer import PartialLayer
from rwn_ext.saved import saved_for_backward

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_REST = "everything else"
# One number.
_LOSS = 4


@dataclass
class Share:
    """What one layer learns, and the bytes that costs."""

    name: str
    filters: tuple[int, ...]
    of: int
    """How many filters the layer has."""
    kept: int
    """Kept for backward; a tensor that several layers keep counts at the first."""
    gradient: int
    optimizer: int

    @property
    def bytes(self) -> int:
        return self.kept + self.gradient + self.optimizer


@dataclass
class Budget:
    """A choice of filters within a budget; printed, a table."""

    said: str
    """The budget in words."""
    layers: list[Share]
    rest: Share
    """What is not chosen: other learned parameters, and what backward keeps beside the layers' inputs."""

    @property
    def filters(self) -> dict[str, tuple[int, ...]]:
        """What each layer learns, as `convert(model, trainable=...)` takes it."""
        return {layer.name: layer.filters for layer in self.layers}

    @property
    def bytes(self) -> int:
        """Kept for backward, gradients and optimizer state of one training step."""
        return sum(share.bytes for share in (*self.layers, self.rest))

    def __str__(self) -> str:
        rows = [
            [share.name, f"{len(share.filters)}/{share.of}" if share.of else "", *_mb(share)]
            for share in (*self.layers, self.rest)
        ]
        columns = [sum(getattr(s, c) for s in (*self.layers, self.rest)) for c in ("kept", "gradient", "optimizer")]
        total = Share("sum", (), 0, *columns)
        header = ["MB", "filters learned", "kept for backward", "gradient", "optimizer", "sum"]
        return f"{table(header, [*rows, ['sum', '', *_mb(total)]])}\nwithin a budget of {self.said}"


def _mb(share: Share) -> list[str]:
    return [f"{size / 1e6:.3f}" for size in (share.kept, share.gradient, share.optimizer, share.bytes)]


def fit(
    probe: nn.Module, budget: Any, example: Tensor | None, scores: Mapping[str, Tensor], optimizer_states: int
) -> Budget:
    """The filters to learn of each PartialLayer of `probe`, which is changed.

    Args:
        probe: a copy of the model, each of whose layers that `scores` names learns one filter.
        budget: bytes (an int, or a text such as "2 GB"), or the share of its layers' weights to be learned (a float).
        scores: of each layer's filters.
        optimizer_states: how many numbers the optimizer keeps for a learned one.

    Raises ValueError for a budget that is none, that needs an example, or that nothing fits into.
    """
    layers = {name: m for name, m in probe.named_modules() if isinstance(m, PartialLayer) and name in scores}
    able = {name: layer for name, layer in layers.items() if layer.weight_trainable is not None}
    if isinstance(budget, float):
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"budget={budget} is no fraction of the weights between 0.0 and 1.0; bytes must be an int")
        weights = sum(layer.weight.numel() for layer in layers.values())
        prices = {name: float(layer.weight_trainable[0].numel()) for name, layer in able.items()}  # type: ignore[index]
        counts = _greedy(scores, prices, budget * weights, None)
        said = f"{budget:.1%} of {weights:,} weights"
        return _result(probe, layers, _best(scores, counts), example, optimizer_states, said)
    limit = parse(budget)
    if example is None:
        raise ValueError("a budget of bytes needs example=, an input with the batch size of training")
    ledger = _Ledger(probe, able, example, optimizer_states)
    least = ledger.nothing + ledger.fixed
    if limit < least:
        raise ValueError(
            f"budget={budget!r} is less than the {least:,} bytes that the model takes if no filter is learned: "
            f"{ledger.nothing:,} kept for backward, {ledger.fixed:,} for gradients and optimizer state of its other "
            'parameters; take a smaller batch, norm="frozen", or freeze those'
        )
    room = float(limit - least)
    said = f"{limit / 1e6:,.3f} MB, optimizer states {optimizer_states}"
    best, tried = None, 0
    # Of a grouped layer the prices say too much; what that leaves is spent again.
    while best is None or tried < 4:
        tried += 1
        counts = _greedy(scores, ledger.prices, room, ledger)
        result = _result(probe, layers, _best(scores, counts), example, optimizer_states, said)
        if result.bytes <= limit and (best is None or result.bytes > best.bytes):
            best = result
        room += limit - result.bytes
    return best


def parse(budget: Any) -> int:
    """Bytes, from an int or from a text such as "2 GB" or "512 MiB"."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", budget) if isinstance(budget, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(
            f"budget={budget!r} is no budget; give bytes (an int, or a text such as '2 GB' or '512 MiB') or a fraction "
            "of the weights such as 0.1"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass
class _Ledger:
    """What learning costs, measured on the probe."""

    probe: nn.Module
    layers: dict[str, PartialLayer]
    example: Tensor
    states: int
    nothing: int = field(init=False)
    """Bytes kept for backward if no filter is learned."""
    fixed: int = field(init=False)
    """Bytes of the gradients and optimizer state of all that is learned whatever filters are."""
    prices: dict[str, float] = field(init=False)
    """Bytes of a filter in a layer that learns already."""

    def __post_init__(self) -> None:
        self._only([])
        learned = {id(p) for p in self.probe.parameters() if p.requires_grad}
        self.fixed = (1 + self.states) * sum(p.nbytes for p in self.probe.parameters() if id(p) in learned)
        first = measure(self.probe, self.layers, self.example)
        self.nothing = first.bytes
        # In the order in which they run; those that do not learn nothing.
        self._order = {name: place for place, name in enumerate(first.inputs)}
        self._measured = {frozenset[str](): first.bytes}
        for name in self._order:
            self._only([name])
            run = measure(self.probe, self.layers, self.example)
            self._measured[frozenset([name])] = run.bytes
            if self._order[name] == 0:
                self._inputs, self._saved = run.inputs, run.saved
        self.prices = {name: self._price(name) for name in self._order}

    def opening(self, opened: list[str], name: str) -> float:
        """What is kept more once this layer learns, too."""
        return max(0.0, self._kept([*opened, name]) - self._kept(opened))

    def confirmed(self, opened: list[str], name: str) -> bool:
        """Whether `opening` is measured, not estimated; if not, it is from now on."""
        together = frozenset([*opened, name])
        if together in self._measured:
            return True
        self._only(together)
        self._measured[together] = measure(self.probe, self.layers, self.example).bytes
        return False

    def _kept(self, opened: list[str]) -> float:
        if frozenset(opened) in self._measured:
            return self._measured[frozenset(opened)]
        first = min(opened, key=self._order.__getitem__)
        others: dict[Any, float] = {}
        for name in opened:
            share, (address, nbytes) = self._share(name), self._inputs[name]
            if name != first and share < 1.0:
                others[name] = self._copied(name)
            elif name != first and address not in self._saved and address != self._inputs[first][0]:
                others[address] = nbytes
        return self._measured[frozenset([first])] + sum(others.values())

    def _share(self, name: str) -> float:
        """Of its input, what the one filter of the probe sees."""
        partition = self.layers[name].partition
        return run_length(partition.seen) / partition.in_channels

    def _copied(self, name: str) -> float:
        """The copy that is kept instead of the input; of grouped layers each filter pays for it."""
        return 0.0 if self.layers[name].partition.groups > 1 else self._share(name) * self._inputs[name][1]

    def _price(self, name: str) -> float:
        layer = self.layers[name]
        assert layer.weight_trainable is not None
        size = layer.weight_trainable[0].nbytes
        if layer.trainable_bias == "with_filters" and layer.bias_trainable is not None:
            size += layer.bias_trainable[0].nbytes
        grouped = self._share(name) * self._inputs[name][1] if layer.partition.groups > 1 else 0.0
        return (1 + self.states) * size + grouped

    def _only(self, names: Collection[str]) -> None:
        """Lets the filters of these layers alone learn."""
        for name, layer in self.layers.items():
            assert layer.weight_trainable is not None
            layer.weight_trainable.requires_grad_(name in names)
            if layer.trainable_bias == "with_filters" and layer.bias_trainable is not None:
                layer.bias_trainable.requires_grad_(name in names)


@dataclass
class Kept:
    """What one forward pass keeps for backward, its output and the loss included."""

    by_layer: dict[str, int]
    inputs: dict[str, tuple[int, int]]
    """Address and bytes of what each layer got, in the order of the calls."""
    saved: set[int]
    """Addresses."""

    @property
    def bytes(self) -> int:
        return sum(self.by_layer.values())


def measure(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> Kept:
    """Runs `model` in its mode; each storage counts at the first of `layers` that saves it, else as everything else."""
    by_layer, before = dict.fromkeys(layers, 0), 0
    inputs: dict[str, tuple[int, int]] = {}
    alive: list[Tensor] = []
    handles = []
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad(), saved_for_backward(model) as saved:

        def enter(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal before
            tensor, before = next(t for t in tree_leaves((arguments, named)) if torch.is_tensor(t)), saved.bytes
            alive.append(tensor)
            inputs.setdefault(name, (tensor.untyped_storage().data_ptr(), tensor.nbytes))

        def leave(name: str) -> None:
            by_layer[name] += saved.bytes - before

        for name, layer in layers.items():
            handles += [
                layer.register_forward_pre_hook(lambda _, a, k, name=name: enter(name, a, k), with_kwargs=True),
                layer.register_forward_hook(lambda *_, name=name: leave(name)),
            ]
        try:
            output = model(example.detach())
        finally:
            for handle in handles:
                handle.remove()
        storages = dict(saved.storages)
        storages.update(
            (s.data_ptr(), s) for s in (t.untyped_storage() for t in tree_leaves(output) if torch.is_tensor(t))
        )
        by_layer[_REST] = sum(s.nbytes() for s in storages.values()) + _LOSS - sum(by_layer.values())
        return Kept(by_layer, inputs, set(saved.storages))


def _greedy(
    scores: Mapping[str, Tensor], prices: Mapping[str, float], room: float, ledger: _Ledger | None
) -> dict[str, int]:
    """How many of its best filters each layer learns."""
    gains = {n: scores[n].double().cpu().square().sort(descending=True).values for n in prices}
    ratios_of = {name: (values / prices[name]).tolist() for name, values in gains.items()}
    counts = dict.fromkeys(prices, 0)
    while True:
        opened = [name for name, count in counts.items() if count]
        best, best_ratio, best_cost = ("", 0), -1.0, 0.0
        for name in prices:
            if counts[name]:
                continue
            costs = (ledger.opening(opened, name) if ledger else 0.0) + prices[name] * torch.arange(
                1, len(gains[name]) + 1, dtype=torch.float64
            )
            affordable = int((costs <= room).sum())
            if affordable:
                ratios = gains[name].cumsum(0)[:affordable] / costs[:affordable].clamp(min=1)
                place = int(ratios.argmax())
                if float(ratios[place]) > best_ratio:
                    best, best_ratio, best_cost = (name, place + 1), float(ratios[place]), float(costs[place])
        if best_ratio >= 0 and ledger and not ledger.confirmed(opened, best[0]):
            continue
        # Before another layer is opened, those that are take their filters of a better ratio.
        waiting = sorted(
            ((ratios_of[name][i], name) for name in opened for i in range(counts[name], len(gains[name]))),
            key=lambda entry: -entry[0],
        )
        taken = False
        for ratio, name in waiting:
            if ratio < best_ratio:
                break
            if prices[name] <= room:
                room -= prices[name]
                counts[name] += 1
                taken = True
        if not taken and best_ratio < 0:
            return counts
        if not taken:
            counts[best[0]] = best[1]
            room -= best_cost


def _best(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, list[int]]:
    order = {name: score.double().cpu().argsort(descending=True, stable=True) for name, score in scores.items()}
    return {name: sorted(order[name][:count].tolist()) for name, count in counts.items()}


def _result(
    probe: nn.Module, layers: Mapping[str, PartialLayer], filters: Mapping[str, list[int]], example: Tensor | None,
    states: int, said: str,
) -> Budget:  # fmt: skip
    """The choice, set in a copy of the probe, and what it costs there; without an example nothing is kept."""
    probe = copy.deepcopy(probe)
    layers = {name: probe.get_submodule(name) for name in layers}  # type: ignore[misc]
    for name, layer in layers.items():
        layer.set_trainable_(filters.get(name, []), None if layer.inputs.is_full else list(layer.inputs.indices))
        for parameter in (layer.weight_trainable, layer.bias_trainable):
            if parameter is not None:
                parameter.requires_grad_()
    kept = {} if example is None else measure(probe, layers, example).by_layer
    shares, chosen = [], 0
    for name, layer in layers.items():
        gradient = sum(p.nbytes for p in layer.parameters() if p.requires_grad)
        chosen += gradient
        shares.append(
            Share(name, layer.filters.indices, layer.filters.size, kept.get(name, 0), gradient, states * gradient)
        )
    other = sum(p.nbytes for p in probe.parameters() if p.requires_grad) - chosen
    return Budget(said, shares, Share(_REST, (), 0, kept.get(_REST, 0), other, states * other))
