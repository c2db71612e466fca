"""Rewrites traced models: what becomes a lean block, what stays as it is, and why."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rwn_ext.lean import pooling
from rwn_ext.lean.activations import activation_of
from rwn_ext.lean.block import block, has_hooks
from rwn_ext.lean.convs import can_be_taken
from rwn_ext.lean.norms import BATCH_NORMS
from rwn_ext.lean.tracing import CannotTrace, Forward, give_back, lent_forward, trace
from rwn_ext.modules import PartialConv2d

# Functions that are an activation: its name for `block`, and the defaults of the arguments after the input.
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    F.relu: ("relu", {"inplace": False}),
    torch.relu: ("relu", {}),
    torch.relu_: ("relu", {"inplace": True}),
    "relu": ("relu", {}),
    "relu_": ("relu", {"inplace": True}),
    F.relu6: ("relu6", {"inplace": False}),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01, "inplace": False}),
    F.silu: ("silu", {"inplace": False}),
    F.hardswish: ("hardswish", {"inplace": False}),
}
_POOLS = {
    F.max_pool2d: pooling.max_pool2d,
    torch.max_pool2d: pooling.max_pool2d,
    F.avg_pool2d: pooling.avg_pool2d,
}
# What they return is new, or their first argument; and they do not keep it.
_SUMS, _SUMS_IN_PLACE = (operator.add, torch.add, "add"), (operator.iadd, "add_")
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_NO_KEEPERS = {
    operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_",
    torch.mean, "mean", torch.sum, "sum", "size", "dim", "numel", getattr, F.dropout, F.pad, F.interpolate,
    *_CONCATENATIONS, *_POOLS.values(), pooling.pool,
}  # fmt: skip
_VIEWS = {torch.flatten, "flatten", "view", "reshape", "permute", "contiguous", torch.reshape, operator.getitem}
_NO_KEEPING_MODULES = (nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.Upsample)
_VIEWING_MODULES = (nn.Flatten, nn.Identity)


def make_lean(model: nn.Module) -> nn.Module:
    """Makes the model keep less for backward, in place: the same function, parameters, state_dict and gradients.

    The model's forward is traced and written anew with `block` and lean poolings. The modules stay where they are and
    are looked up at each call, so what is done to them later counts; only hooks on containers are no longer called. A
    module that cannot be traced stays as it is, and its children are tried one by one. `explain` tells what became of
    each layer.
    """
    _make_lean(undo_lean(model), set())
    return model


def undo_lean(model: nn.Module) -> nn.Module:
    """Undoes `make_lean`."""
    for module in model.modules():
        give_back(module)
        vars(module).pop(_STOPPED, None)
    return model


def explain(model: nn.Module) -> dict[str, str]:
    """Of a model made lean: by layer, which block it is part of, or why it is part of none."""
    told: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        stopped, forward = vars(module).get(_STOPPED), lent_forward(module)
        if stopped:
            told[path or "the model"] = f"not traced: {stopped}"
        if forward:
            for name, text in forward.notes.items():
                parts = text.removeprefix(IN_BLOCK).split(" - ")
                inside = text.startswith(IN_BLOCK)
                told[prefix + name] = IN_BLOCK + " - ".join(prefix + part for part in parts) if inside else text
    return told


def lean_graph(module: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """The module's forward written anew, and what became of each layer. Raises CannotTrace."""
    rewriting = _Rewriting(module, trace(module))
    rewriting.run()
    return rewriting.graph, rewriting.notes


IN_BLOCK = "in the block "
LABEL = "lean label"
_STOPPED = "_lean_tracing_stopped_by"


def _make_lean(module: nn.Module, seen: set[nn.Module]) -> None:
    if module in seen or not _has_something_to_gain(module):
        return
    seen.add(module)
    reason = None
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        try:
            graph, notes = lean_graph(module)
        except CannotTrace as error:
            reason = str(error)
        else:
            Forward.of(module, graph, notes).lend(module)
            return
    for child in module.children():
        _make_lean(child, seen)
    if reason and not any(_STOPPED in vars(m) for m in module.modules()):
        # Else what stopped a child stopped this one, too.
        setattr(module, _STOPPED, reason)


def _has_something_to_gain(module: nn.Module) -> bool:
    """Whether this is a module of modules, a norm or a pooling among them."""
    inside = list(module.modules())[1:]
    return any(isinstance(m, (*NORMS, nn.MaxPool2d, PartialConv2d)) for m in inside)


NORMS = (*BATCH_NORMS, nn.GroupNorm)


@dataclass
class _Unit:
    """The nodes of one future block, in the order of the data."""

    norm: fx.Node | None
    activation: fx.Node | None
    dropout: fx.Node | None = None
    convs: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    """Who else reads y."""

    @property
    def head(self) -> fx.Node:
        head = self.norm or self.activation
        assert head is not None
        return head

    @property
    def tail(self) -> fx.Node:
        tail = self.dropout or self.activation or self.norm
        assert tail is not None
        return tail

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for n in (self.norm, self.activation, self.dropout, *self.convs) if n is not None]


class _Rewriting:
    """One graph on its way."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.notes: dict[str, str] = {}
        self.units: dict[fx.Node, _Unit] = {}
        """By head."""

    def run(self) -> None:
        """Rewrites the graph and takes the notes."""
        self._make_pools_lean()
        self._find_units()
        readers = Counter(piece for unit in self.units.values() for piece in self._pieces(unit))
        shares = {head: [readers[piece] for piece in self._pieces(unit)] for head, unit in self.units.items()}
        for head, unit in self.units.items():
            self._emit(unit, shares[head])
        self._note_the_rest()
        for node in reversed(self.graph.nodes):
            if _is_concatenation(node) and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()

    def _make_pools_lean(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in _POOLS and not node.kwargs.get("return_indices"):
                node.target = _POOLS[node.target]
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != "return_indices"}
                self.notes[label(node)] = "lean pooling"
            elif type(self._called(node)) in (nn.MaxPool2d, nn.AvgPool2d) and not has_hooks(self._called(node)):
                with self.graph.inserting_before(node):
                    module = self.graph.get_attr(node.target)
                    lean = self.graph.call_function(pooling.pool, (node.args[0], module))
                lean.meta = node.meta | {LABEL: label(node)}
                self.notes[label(node)] = "lean pooling"
                node.replace_all_uses_with(lean)
                self.graph.erase_node(node)

    def _find_units(self) -> None:
        taken: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in taken or not (self._is_norm(node) or self._activation(node)):
                continue
            unit = self._unit(node)
            taken.update(unit.nodes)
            reason = self._reason_against(unit)
            if reason is None:
                self.units[node] = unit
            else:
                self.notes |= {label(n): reason for n in unit.nodes}

    def _unit(self, head: fx.Node) -> _Unit:
        unit = _Unit(head, None) if self._is_norm(head) else _Unit(None, head)
        reader = _only_reader(unit.tail)
        if unit.activation is None and reader is not None and self._activation(reader):
            unit.activation = reader
        reader = _only_reader(unit.tail)
        if reader is not None and self._is(reader, nn.Dropout, nn.Identity):
            unit.dropout = reader
        unit.convs = [node for node in unit.tail.users if self._is_conv(node) and node.args[0] is unit.tail]
        unit.others = [node for node in unit.tail.users if node not in unit.convs]
        return unit

    def _reason_against(self, unit: _Unit) -> str | None:
        """Why the unit is better left alone, if it is."""
        head, activation = unit.head, unit.activation
        source = head.args[0]
        if unit.norm is None and self._activation(head)["inplace"] and (len(source.users) > 1 or _is_view(source)):
            return "it overwrites what others read"
        if len(unit.tail.users) > 1 and any(self._overwrites(n) and n.args[0] is unit.tail for n in unit.tail.users):
            return "its output is overwritten, and read"
        if unit.convs or (unit.norm is not None and (activation is not None or not self._is(head, nn.GroupNorm))):
            return None
        if activation is None or (unit.dropout is None and self._activation(activation)["reads_input"]):
            return "it keeps its input and nothing else, as it is"
        keeper = next((node for node in unit.others if self._may_keep(node)), None)
        return None if keeper is None else f"its output is kept for {label(keeper)} as it is"

    def _emit(self, unit: _Unit, sharers: list[int]) -> None:
        """Puts the block in the place of the unit: where y is made, so that dropouts keep their order."""
        pieces = self._pieces(unit)
        options: dict[str, Any] = {}
        with self.graph.inserting_before(unit.tail.next):
            for name, node in (("norm", unit.norm), ("dropout", unit.dropout)):
                if node is not None:
                    options[name] = self.graph.get_attr(node.target)
            if unit.activation is not None:
                activation = self._activation(unit.activation)
                if unit.activation.op == "call_module":
                    options["activation"] = self.graph.get_attr(unit.activation.target)
                else:
                    options |= {name: activation[name] for name in ("activation", "slope") if activation[name]}
            if unit.convs:
                options["convolutions"] = tuple(self.graph.get_attr(conv.target) for conv in unit.convs)
            if unit.others:
                options["give_y"] = True
                if any(self._may_keep(node) for node in unit.others):
                    options["y_is_kept"] = True
            if self._may_overwrite(unit):
                options["overwrites"] = True
            if any(count > 1 for count in sharers):
                options["sharers"] = tuple(sharers)
            outputs = self.graph.call_function(block, (tuple(pieces),), options)
            outputs.meta = unit.tail.meta | {LABEL: " - ".join(label(node) for node in unit.nodes)}
            results = [
                self.graph.call_function(operator.getitem, (outputs, i))
                for i in range(len(unit.convs) + bool(unit.others))
            ]
        self.notes |= {label(node): IN_BLOCK + label(outputs) for node in unit.nodes}
        for conv, result in zip(unit.convs, results, strict=False):
            conv.replace_all_uses_with(result)
            self.graph.erase_node(conv)
        if unit.others:
            unit.tail.replace_all_uses_with(results[-1])
        for node in (unit.dropout, unit.activation, unit.norm):
            if node is not None:
                self.graph.erase_node(node)

    def _may_overwrite(self, unit: _Unit) -> bool:
        """Whether the unit's output may take the memory of its input, a sum: as it did, or because nobody can tell."""
        source = unit.head.args[0]
        if unit.norm is not None or len(source.users) > 1 or source.kwargs.get("out") is not None:
            return False
        return source.target in _SUMS or (source.target in _SUMS_IN_PLACE and self._overwrites(unit.head))

    def _overwrites(self, node: fx.Node) -> bool:
        """Whether this node writes into its first argument."""
        activation = self._activation(node)
        if activation:
            return activation["inplace"]
        in_place = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
        return in_place or node.target in _SUMS_IN_PLACE

    def _pieces(self, unit: _Unit) -> list[fx.Node]:
        """What the unit's input is concatenated of, unless the whole is kept for somebody else anyway."""

        def cut(node: fx.Node) -> list[fx.Node]:
            if not _is_concatenation(node) or any(
                self._may_keep(reader) for reader in node.users if reader not in self.units
            ):
                return [node]
            return [piece for part in node.args[0] for piece in cut(part)]

        return cut(unit.head.args[0])

    def _note_the_rest(self) -> None:
        for node in self.graph.nodes:
            module = self._called(node)
            if module is None or label(node) in self.notes:
                continue
            if isinstance(module, (nn.Conv2d, PartialConv2d)):
                self.notes[label(node)] = _obstacle(module) or "its input is no activation that a block makes"
            elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.ReLU):
                self.notes[label(node)] = _obstacle(module) or f"{type(module).__name__} is not supported"

    def _may_keep(self, reader: fx.Node) -> bool:
        """Whether this reader of a tensor may keep it for backward."""
        module = self._called(reader)
        if reader.op in ("call_function", "call_method"):
            if reader.target in _VIEWS:
                return any(self._may_keep(node) for node in reader.users)
            return reader.target not in _NO_KEEPERS
        if isinstance(module, _VIEWING_MODULES):
            return any(self._may_keep(node) for node in reader.users)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return module.output_size not in (1, (1, 1))
        return not isinstance(module, _NO_KEEPING_MODULES)

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def _is(self, node: fx.Node, *types: type[nn.Module]) -> bool:
        """Whether the node calls such a module, on one tensor and without hooks."""
        module = self._called(node)
        return type(module) in types and not has_hooks(module) and len(node.args) == 1 and not node.kwargs

    def _is_norm(self, node: fx.Node) -> bool:
        return self._is(node, *NORMS)

    def _is_conv(self, node: fx.Node) -> bool:
        return self._is(node, nn.Conv2d, PartialConv2d) and can_be_taken(self._called(node))

    def _activation(self, node: fx.Node) -> dict[str, Any] | None:
        """What a node that applies an activation says of it; None for any other."""
        module = self._called(node)
        if module is not None:
            known = self._is(node, type(module)) and type(module) is not nn.Identity and activation_of(module)
            return {"inplace": getattr(module, "inplace", False), "reads_input": known.reads_input} if known else None
        name, defaults = _FUNCTIONS.get(node.target, (None, {}))
        if name is None or len(node.args) > 1 + len(defaults):
            return None
        given = defaults | dict(zip(defaults, node.args[1:], strict=False)) | node.kwargs
        slope = given.get("negative_slope")
        known = activation_of(name, slope)
        if known is None or set(given) - set(defaults):
            return None
        inplace = bool(given.get("inplace"))
        return {"activation": name, "slope": slope, "inplace": inplace, "reads_input": known.reads_input}


def _only_reader(node: fx.Node) -> fx.Node | None:
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.args and reader.args[0] is node else None


def _is_concatenation(node: fx.Node) -> bool:
    """Whether the node concatenates tensors along their channels."""
    if node.op != "call_function" or node.target not in _CONCATENATIONS or not isinstance(node.args[0], list | tuple):
        return False
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return axis in (1, -3) and all(isinstance(part, fx.Node) for part in node.args[0])


def _is_view(node: fx.Node) -> bool:
    return node.target in _VIEWS or node.target in ("chunk", "split", torch.chunk, torch.split)


def _obstacle(module: nn.Module) -> str | None:
    """What about the module itself keeps it out of any block."""
    if has_hooks(module):
        return "it has hooks"
    if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
        return f"a subclass of nn.Conv2d, {type(module).__name__}"
    if isinstance(module, nn.Conv2d | PartialConv2d) and not can_be_taken(module):
        return f"it pads its input itself (padding={module.padding!r}, padding_mode={module.padding_mode!r})"
    return None


def label(node: fx.Node) -> str:
    """The module's name; of a function, the module it is called in and its own; of a block, all of its parts."""
    if LABEL in node.meta or node.op == "call_module":
        return node.meta.get(LABEL, node.target)
    stack = node.meta.get("nn_module_stack") or {}
    scope = next(reversed(stack), "")
    return f"{scope}.{node.name}" if scope else node.name
