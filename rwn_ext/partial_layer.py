"""PartialLayer: what layers of which only a block of the weight is learned have in common: parts, state, switching."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rwn_ext import rooms
from rwn_ext.partition import BIAS_PARTS, PARTS, WEIGHT_PARTS, Partition
from rwn_ext.subsets import Subset, choose

FROZEN = ("random", "zero")
TRAINABLE_BIAS = ("with_filters", "all", "none")
Self = TypeVar("Self", bound="PartialLayer")


class PartialLayer(nn.Module):
    """A layer of torch whose weight and bias are held in parts, of which one is learned.

    A kind of layer adds its constructor, `forward`, and what it is a partly learned form of: `plain`, `_ATTRIBUTES`,
    `_weight_size` and `_new_plain`. Axis 0 of a weight is called its filters, axis 1 its inputs.
    """

    plain: ClassVar[type[nn.Module]]
    """What it computes the same as, whose state dict and repr it has."""
    _ATTRIBUTES: ClassVar[tuple[str, ...]]
    """The attributes of `plain` that say what it computes."""

    weight_trainable: nn.Parameter | None
    weight_frozen: nn.Parameter | None
    weight_frozen_inputs: nn.Parameter | None
    bias_trainable: nn.Parameter | None
    bias_frozen: nn.Parameter | None
    partition: Partition
    captured: bool
    """Whether a CUDA graph has captured this layer's forward; then its subset must not change under the graph."""
    _idle: dict[str, nn.Parameter]
    """Parameters of parts that are empty at present, which the optimizer may know."""

    @classmethod
    def from_plain(cls: type[Self], layer: nn.Module, **choice: Any) -> Self:
        """A copy of `layer` that computes the same and learns the chosen part, by the constructor's own keywords.

        `layer` and its gradients stay untouched. What is learned is what the arguments say, whether or not
        `layer.weight` requires a gradient.
        """
        if not isinstance(layer, cls.plain):
            raise TypeError(f"{cls.__name__} is made from an nn.{cls.plain.__name__}, got {type(layer).__name__}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(layer, **choice)
        return self

    def to_plain(self) -> Any:
        """The layer of torch that computes the same, all of it learnable."""
        layer = self._new_plain(partial(nn.utils.skip_init, self.plain))
        layer.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach())
        return layer.train(self.training)

    @property
    def filters(self) -> Subset:
        """The learned filters."""
        return self.partition.filters

    @property
    def inputs(self) -> Subset:
        """The learned input channels of the learned filters, along weight axis 1."""
        return self.partition.inputs

    @property
    def weight(self) -> Tensor:
        """The whole weight, merged anew at each access.

        Gradients flow through it to `weight_trainable`. It is a copy: writing into it changes nothing. To set values,
        load a state dict, or write into the parts.
        """
        return self.partition.merge_weight(self._parts(WEIGHT_PARTS), self._like.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The whole bias, merged anew at each access; None without one. A copy, as `weight` is."""
        return self.partition.merge_bias(self._parts(BIAS_PARTS), self._like.dtype)

    def reset_parameters(self) -> None:
        """New initial values, drawn as torch draws them."""
        computed = [part for parts in PARTS.values() for part in parts if part not in self._parameters]
        if computed:
            raise RuntimeError(
                f"{', '.join(computed)} is parametrized or pruned, so it has no values of its own to reset"
            )
        layer = self._new_plain(self.plain)
        self.set_initial_(layer.weight, layer.bias)

    @torch.no_grad()
    def set_initial_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes the values of this whole weight and bias; what is fixed becomes zero if this layer wants it so."""
        for name, value in self._split(weight, bias).items():
            if value is not None:
                parameter = self.get_parameter(name)
                parameter.copy_(_laid_out_as(parameter, value))

    def set_trainable_(
        self: Self,
        trainable: Any,
        trainable_inputs: Any = None,
        *,
        select: str = "last",
        seed: int | torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Self:
        """Chooses anew what is learned; the function computed stays the same unless frozen="zero". Returns the module.

        The Parameters stay the same objects with new values, possibly of a new shape, so optimizers keep them, also
        over a time in which the layer learns nothing. Given the `optimizer`, its state (momentum, moments) moves with
        the weights: what stays learned keeps its own, what is new starts at zero. Without it, clear the state of an
        optimizer that has made steps. torch.compile compiles anew. DistributedDataParallel follows a choice of the same
        size; after one of another size delete the wrapper and wrap anew: the second step of the old one raises.

        Raises before anything changes: ValueError if a Parameter comes into being that the optimizer does not know, or
        the optimizer holds state that cannot follow; RuntimeError if a CUDA graph has captured the layer, or its parts
        are sharded or parametrized.
        """
        partition = self.partition_for(trainable, trainable_inputs, select=select, seed=seed, optimizer=optimizer)
        return self.set_partition_(partition, optimizer=optimizer)

    def partition_for(
        self,
        trainable: Any,
        trainable_inputs: Any = None,
        *,
        select: str = "last",
        seed: int | torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Partition:
        """What `set_trainable_` would set. Raises what it raises, and changes nothing."""
        if not all(self._mergeable(parts) for parts in PARTS.values()):
            raise RuntimeError(
                "weight_trainable or another part is sharded, parametrized or pruned, so values cannot move between "
                "the parts; choose what is learned before"
            )
        partition = self._choose(self.weight.detach(), trainable, trainable_inputs, select, seed)
        if partition == self.partition:
            return partition
        if self.captured:
            raise RuntimeError(
                "a CUDA graph has captured this layer and would go on computing with the old subset; drop the graph, "
                "set the layer's `captured` to False, and capture again"
            )
        if optimizer is not None:
            self._check_state(optimizer, partition)
        return partition

    def set_partition_(self: Self, partition: Partition, *, optimizer: torch.optim.Optimizer | None = None) -> Self:
        """`set_trainable_` of what `partition_for` has checked."""
        if partition == self.partition:
            return self
        weight, bias = self.weight.detach(), self.bias
        parts = partition.split_weight(weight) | partition.split_bias(None if bias is None else bias.detach())
        self._zero_fixed(parts)
        if optimizer is not None:
            self._move_state(optimizer, partition)
        self.partition = partition
        self._set_parts(parts)
        return self

    def extra_repr(self) -> str:
        text = self.plain.extra_repr(self)
        text += f", trainable={len(self.filters)}/{self.filters.size}"
        if not self.inputs.is_full:
            text += f", trainable_inputs={len(self.inputs)}/{self.inputs.size}"
        if self.trainable_bias != "with_filters":
            text += f", trainable_bias={self.trainable_bias}"
        if self.frozen != "random":
            text += f", frozen={self.frozen}"
        return text

    def _adopt(
        self,
        layer: Any,
        *,
        trainable: Any,
        trainable_inputs: Any = None,
        trainable_bias: str = "with_filters",
        select: str = "last",
        seed: int | torch.Generator | None = None,
        frozen: str = "random",
    ) -> None:
        """Takes over the shape and a copy of the values of `layer`."""
        if trainable_bias not in TRAINABLE_BIAS:
            raise ValueError(f"trainable_bias={trainable_bias!r} is unknown; choose one of {', '.join(TRAINABLE_BIAS)}")
        if frozen not in FROZEN:
            raise ValueError(f"frozen={frozen!r} is unknown; choose one of {', '.join(FROZEN)}")
        for name in self._ATTRIBUTES:
            setattr(self, name, getattr(layer, name))
        self.trainable_bias, self.frozen = trainable_bias, frozen
        self.captured, self._idle = False, {}
        self.partition = self._choose(layer.weight, trainable, trainable_inputs, select, seed)
        self._set_parts(self._split(layer.weight, layer.bias))
        self.train(layer.training)

    def _choose(
        self, weight: Tensor, trainable: Any, trainable_inputs: Any, select: str, seed: int | torch.Generator | None
    ) -> Partition:
        filters = choose(trainable, weight.size(0), policy=select, weight=weight, axis=0, seed=seed)
        inputs = Subset.full(weight.size(1))
        if trainable_inputs is not None:
            inputs = choose(
                trainable_inputs,
                weight.size(1),
                what="trainable_inputs",
                policy=select,
                weight=weight,
                axis=1,
                seed=seed,
            )
        bias_filters = {
            "with_filters": filters,
            "all": Subset.full(weight.size(0)),
            "none": Subset.empty(weight.size(0)),
        }
        return Partition(filters, inputs, bias_filters[self.trainable_bias], getattr(self, "groups", 1))

    def _split(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """The parts of these initial values, the fixed ones zeroed if this layer wants them so."""
        bias = None if bias is None else bias.detach()
        parts = self.partition.split_weight(weight.detach()) | self.partition.split_bias(bias)
        self._zero_fixed(parts)
        return parts

    def _zero_fixed(self, parts: dict[str, Tensor | None]) -> None:
        """Zeroes the fixed ones of these parts, if this layer wants them so."""
        if self.frozen == "zero":
            for name, part in parts.items():
                if part is not None and "frozen" in name:
                    part.zero_()

    def _set_parts(self, parts: dict[str, Tensor | None]) -> None:
        for name, part in parts.items():
            old = self._parameters.get(name)
            if part is None:
                self.register_parameter(name, None)
                if old is not None:
                    _set_value(old, old.new_empty(0))
                    self._idle[name] = old
            elif old is None and name not in self._idle:
                self.register_parameter(name, nn.Parameter(part, requires_grad=name.endswith("trainable")))
            else:
                parameter = self._idle.pop(name) if old is None else old
                _set_value(parameter, part)
                self.register_parameter(name, parameter)
        self._make_room()

    def _make_room(self) -> None:
        """Lets the parts lie where merging the fixed one with the learned one costs least."""
        for name, learned in (("weight", self.filters), ("bias", self.partition.bias_filters)):
            fixed, own = self._parameters.get(f"{name}_frozen"), self._parameters.get(f"{name}_trainable")
            if fixed is not None and len(learned.runs) == 2 and self.frozen != "zero":
                whole_rows = name == "bias" or self.inputs.is_full
                rooms.make(self, name, fixed, learned.runs[0], len(learned), own if whole_rows else None)
            else:
                rooms.leave(self, name)

    def _apply(self, *args: Any, **kwargs: Any) -> PartialLayer:
        super()._apply(*args, **kwargs)
        self._make_room()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_room()

    def _parts(self, names: tuple[str, ...]) -> list[Tensor | None]:
        # nn.Module.__getattr__ takes longer; parametrised and pruned Parameters are found by it alone.
        own = self._parameters
        return [own[name] if name in own else getattr(self, name) for name in names]

    @property
    def _like(self) -> Tensor:
        """The Parameter whose dtype and device are the layer's."""
        like = self.weight_frozen if self.weight_trainable is None else self.weight_trainable
        assert like is not None
        return like

    def _shape(self, name: str) -> torch.Size | None:
        """Of the whole weight or bias; None without a bias."""
        size = self._weight_size()
        if name == "weight":
            return torch.Size(size)
        return None if all(part is None for part in self._parts(BIAS_PARTS)) else torch.Size(size[:1])

    def _weight_size(self) -> tuple[int, ...]:
        """Of the whole weight."""
        raise NotImplementedError

    def _new_plain(self, make: Callable[..., nn.Module]) -> Any:
        """`make` called with the arguments of `plain` for a layer like this."""
        raise NotImplementedError

    def _note_capture(self, input: Tensor) -> None:
        if input.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self.captured = True

    def _check_state(self, optimizer: torch.optim.Optimizer, partition: Partition) -> None:
        """Raises if the optimizer could not follow to this partition."""
        bias_filters = Subset.empty(self.filters.size) if self._shape("bias") is None else partition.bias_filters
        for name, learned in (("weight_trainable", partition.block), ("bias_trainable", bias_filters)):
            if self._parameters[name] is None and name not in self._idle and not learned.is_empty:
                raise ValueError(
                    f"{name} comes into being, so the optimizer has no group for it; build the optimizer anew, or pass "
                    "optimizer=None and call optimizer.add_param_group"
                )
            parameter = self._parameters[name]
            if parameter is None:
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(
                        f"the state {key!r} that {type(optimizer).__name__} keeps for {name} has shape "
                        f"{tuple(value.shape)}, not the Parameter's {tuple(parameter.shape)}, so it cannot follow its "
                        "weights; pass optimizer=None and clear optimizer.state"
                    )

    def _move_state(self, optimizer: torch.optim.Optimizer, partition: Partition) -> None:
        """Momentum and the like follow the weights they belong to; weights that were fixed start at zero."""
        old = self.partition
        moves = (
            (WEIGHT_PARTS, lambda parts, dtype: partition.split_weight(old.merge_weight(parts, dtype))),
            (BIAS_PARTS, lambda parts, dtype: partition.split_bias(old.merge_bias(parts, dtype))),
        )
        for names, move in moves:
            learned, *fixed = self._parts(names)
            # Whatever steps a Parameter made before it became idle, it starts afresh.
            if names[0] in self._idle:
                optimizer.state.pop(self._idle[names[0]], None)
            if learned is None or learned not in optimizer.state:
                continue
            state = optimizer.state[learned]
            moved = {}
            for key, value in state.items():
                if torch.is_tensor(value) and value.dim():
                    zeros = [None if part is None else torch.zeros_like(part) for part in fixed]
                    moved[key] = move([value, *zeros], value.dtype)[names[0]]
            if any(value is None for value in moved.values()):
                del optimizer.state[learned]
            else:
                state.update(moved)

    def _mergeable(self, parts: tuple[str, ...]) -> bool:
        """Whether these parts are plain Parameters: not computed from others, not sharded (DTensor) or wrapped."""
        return all(
            part in self._parameters and not hasattr(self._parameters[part], "__tensor_flatten__") for part in parts
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        merged: set[str] = set()
        for name, parts in PARTS.items():
            if self._mergeable(parts):
                merged.update(prefix + part for part in parts)
                whole = getattr(self, name)
                if whole is not None:
                    destination[prefix + name] = whole if keep_vars else whole.detach()
        # What else a module may hold: parts that stay apart, buffers and extra state.
        rest: dict[str, Any] = {}
        super()._save_to_state_dict(rest, prefix, keep_vars)
        destination.update({key: value for key, value in rest.items() if key not in merged})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Splits `weight` and `bias` before nn.Module loads the parts, and reports under their names."""
        # These may rename or make the very keys that are split below, so they come first; and only once.
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            for hook in hooks.values():
                hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
            refused = [name for name in PARTS if self._split_loaded(own, prefix, name, error_msgs)]
            missing: list[str] = []
            super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        finally:
            self._load_state_dict_pre_hooks = hooks
            self._make_room()
        whole_of = {part: name for name, parts in PARTS.items() if self._mergeable(parts) for part in parts}
        names = [key.removeprefix(prefix) for key in missing]
        wholes = dict.fromkeys(whole_of.get(name, name) for name in names)
        missing_keys += [prefix + name for name in wholes if name not in refused]

    def _split_loaded(self, own: dict[str, Any], prefix: str, name: str, error_msgs: list[str]) -> bool:
        """Puts the parts of a loaded `weight` or `bias` in its place; whether it was refused."""
        shape = self._shape(name)
        if shape is None or prefix + name not in own:
            return False
        whole = own.pop(prefix + name)
        if not self._mergeable(PARTS[name]):
            how = (
                "sharded: convert the state dict with rwn_ext.split_state_dict"
                if all(part in self._parameters for part in PARTS[name])
                else "parametrized or pruned: load before that"
            )
            error_msgs.append(f"{prefix}{name} is whole, but the layer's parts are {how}.")
        elif not torch.is_tensor(whole):
            error_msgs.append(
                f'While copying the parameter named "{prefix}{name}", expected torch.Tensor or Tensor-like object '
                f"from checkpoint but received {type(whole)}"
            )
        elif whole.shape != shape:
            error_msgs.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {whole.shape} from checkpoint, the "
                f"shape in current model is {shape}."
            )
        else:
            parts = self.partition.split_weight(whole) if name == "weight" else self.partition.split_bias(whole)
            if self.frozen == "zero" and any(p is not None and p.any() for n, p in parts.items() if "frozen" in n):
                error_msgs.append(
                    f"{prefix}{name} holds values other than zero where this layer learns nothing and is "
                    'frozen="zero", which never computes them; load into a layer with frozen="random" and the same '
                    'subset, or convert(..., frozen="zero") after loading, which zeroes them.'
                )
                return True
            own.update({prefix + part: value for part, value in parts.items() if value is not None})
            return False
        return True


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` sharded as `parameter` is: the first process's value, if it is a DTensor."""
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _set_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives the Parameter this value, which may have another shape, and no gradient."""
    parameter.grad = None
    if parameter.shape != value.shape:
        # While a graph of an earlier step lives (its loss is still at hand), autograd remembers the old shape. A change
        # of dtype makes it forget.
        parameter.data = torch.empty(0, dtype=torch.float16 if value.dtype != torch.float16 else torch.float32)
    parameter.data = value
    # A backward pass whose forward saw the old value raises, as after any change in place.
    torch.autograd.graph.increment_version(parameter)
