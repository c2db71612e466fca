"""PartialConv2d: nn.Conv2d of which only a chosen block of the weight is learned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rwn_ext import zeroed
from rwn_ext.functional import partial_conv2d, weight_grad_problem
from rwn_ext.ops import Pair
from rwn_ext.partition import BIAS_PARTS, WEIGHT_PARTS, Partition
from rwn_ext.planner import Problem, requested
from rwn_ext.subsets import Subset, choose

FROZEN = ("random", "zero")
TRAINABLE_BIAS = ("with_filters", "all", "none")
# The parts of what nn.Conv2d calls its weight and its bias.
PARTS = {"weight": WEIGHT_PARTS, "bias": BIAS_PARTS}
# The attributes of nn.Conv2d that say what it computes; its repr reads output_padding too.
_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "output_padding",
)  # fmt: skip


class PartialConv2d(nn.Module):
    """A convolution that learns some filters (or some input channels of them) and keeps the rest as it is.

    Equivalent to `F.conv2d(x, weight, bias, ...)` of which only `weight[filters][:, inputs]` ever receives a gradient::

        conv = PartialConv2d(64, 128, 3, padding=1, trainable=0.1)     # int(128 * 0.1) = 12 filters, the last ones

    The learned block is a small Parameter of its own, so its gradient, optimizer state and all-reduce traffic are
    proportional to what is learned, and no optimizer setting can move the rest:

    * `weight_trainable` (Kt, Ct, R, S), learned; None if nothing is learned
    * `weight_frozen` (K - Kt, C / groups, R, S), the other filters; None if every filter is learned
    * `weight_frozen_inputs` (Kt, C / groups - Ct, R, S), the other input channels of the learned filters; None if none
    * `bias_trainable`, `bias_frozen`: likewise

    `state_dict()` is that of `nn.Conv2d` (`weight`, `bias`), both ways. Its tensors are copies: writing into them in
    place changes nothing; load the changed state dict. Where parts are sharded (FSDP2) or parametrized, it holds the
    parts under their own names; `rwn_ext.merge_state_dict` and `split_state_dict` convert.

    Args (after those of `nn.Conv2d`, by keyword):
        trainable: which filters are learned: a fraction (float), a count (int), indices, or a bool mask.
        trainable_inputs: which input channels, along weight axis 1; default all.
        trainable_bias: "with_filters" (a learned filter's bias is learned), "all" or "none".
        select: which channels a fraction or count takes: "last" (the paper's), "first", "random", "magnitude".
        seed: of `select="random"`.
        frozen: what is not learned keeps its initial value ("random") or is zero ("zero"). Zeros are not computed: such
            a layer costs what its learned filters alone cost. A filter that is no longer learned becomes zero, and
            loading other values into it is an error. `rwn_ext.zeroed.fold` saves more in whole models.
        algorithm: of the weight gradient, see `rwn_ext.planner.ALGORITHMS`; default: the planner's choice. With
            frozen="zero" it is always the library's, of the learned filters alone.

    Shapes as for `nn.Conv2d`: (N, C, H, W) or (C, H, W) in, (N, K, P, Q) or (K, P, Q) out.

    Raises TypeError or ValueError for a choice that is none, naming its value.
    Source: Rosenfeld & Tsotsos, "Intriguing Properties of Randomly Weighted Networks", section 3.
    """

    weight_trainable: nn.Parameter | None
    weight_frozen: nn.Parameter | None
    weight_frozen_inputs: nn.Parameter | None
    bias_trainable: nn.Parameter | None
    bias_frozen: nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int
    padding_mode: str
    partition: Partition
    captured: bool
    """Whether a CUDA graph has captured this layer's forward; then its subset must not change under the graph."""
    _idle: dict[str, nn.Parameter]
    """Parameters of parts that are empty at present, which the optimizer may know."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        trainable: Any,
        trainable_inputs: Any = None,
        trainable_bias: str = "with_filters",
        select: str = "last",
        seed: int | torch.Generator | None = None,
        frozen: str = "random",
        algorithm: str | None = None,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._adopt(conv, trainable, trainable_inputs, trainable_bias, select, seed, frozen, algorithm)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        *,
        trainable: Any,
        trainable_inputs: Any = None,
        trainable_bias: str = "with_filters",
        select: str = "last",
        seed: int | torch.Generator | None = None,
        frozen: str = "random",
        algorithm: str | None = None,
    ) -> PartialConv2d:
        """A copy of `conv` that computes the same and learns the chosen part. `conv` and its gradients stay untouched.

        What is learned is what the arguments say, whether or not `conv.weight` requires a gradient.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"from_conv2d takes an nn.Conv2d, got {type(conv).__name__}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(conv, trainable, trainable_inputs, trainable_bias, select, seed, frozen, algorithm)
        return self

    def to_conv2d(self) -> nn.Conv2d:
        """An `nn.Conv2d` that computes the same, all of it learnable."""
        conv = self._new_conv2d(partial(nn.utils.skip_init, nn.Conv2d))
        conv.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach())
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen == "zero":
            return zeroed.conv2d(
                input, self.weight_trainable, self.bias_trainable, self.kernel_size, self.stride, self.padding,
                self.dilation, self.padding_mode, partition=self.partition, dtype=self._like.dtype,
            )  # fmt: skip
        input = zeroed.dense(input)
        if input.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self.captured = True
        learned, fixed, fixed_inputs, bias_learned, bias_fixed = self._parts(WEIGHT_PARTS + BIAS_PARTS)
        return partial_conv2d(
            input, learned, fixed, fixed_inputs, bias_learned, bias_fixed, self.stride, self.padding, self.dilation,
            self.padding_mode, partition=self.partition, algorithm=self.algorithm,
        )  # fmt: skip

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
        """The whole weight (K, C / groups, R, S), merged anew at each access.

        Gradients flow through it to `weight_trainable`. It is a copy: writing into it changes nothing. To set values,
        load a state dict, or write into the parts.
        """
        return self.partition.merge_weight(self._parts(WEIGHT_PARTS), self._like.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The whole bias (K,), merged anew at each access; None without one. A copy, as `weight` is."""
        return self.partition.merge_bias(self._parts(BIAS_PARTS), self._like.dtype)

    def reset_parameters(self) -> None:
        """New initial values, drawn as `nn.Conv2d` draws them."""
        computed = [part for parts in PARTS.values() for part in parts if part not in self._parameters]
        if computed:
            raise RuntimeError(
                f"{', '.join(computed)} is parametrized or pruned, so it has no values of its own to reset"
            )
        conv = self._new_conv2d(nn.Conv2d)
        self.set_initial_(conv.weight, conv.bias)

    @torch.no_grad()
    def set_initial_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes the values of this whole weight and bias; what is fixed becomes zero if this layer wants it so."""
        for name, value in self._split(weight, bias).items():
            if value is not None:
                parameter = self.get_parameter(name)
                parameter.copy_(_laid_out_as(parameter, value))

    def set_trainable_(
        self,
        trainable: Any,
        trainable_inputs: Any = None,
        *,
        select: str = "last",
        seed: int | torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> PartialConv2d:
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

    def set_partition_(self, partition: Partition, *, optimizer: torch.optim.Optimizer | None = None) -> PartialConv2d:
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

    def problem(self, input: Tensor) -> Problem:
        """The weight gradient this layer computes for such an input, for `rwn_ext.planner.explain`."""
        return weight_grad_problem(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode,
            partition=self.partition,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = nn.Conv2d.extra_repr(self)  # type: ignore[arg-type]
        text += f", trainable={len(self.filters)}/{self.out_channels}"
        if not self.inputs.is_full:
            text += f", trainable_inputs={len(self.inputs)}/{self.inputs.size}"
        if self.trainable_bias != "with_filters":
            text += f", trainable_bias={self.trainable_bias}"
        if self.frozen != "random":
            text += f", frozen={self.frozen}"
        return text if self.algorithm is None else f"{text}, algorithm={self.algorithm}"

    def _adopt(
        self, conv: nn.Conv2d, trainable: Any, trainable_inputs: Any, trainable_bias: str, select: str,
        seed: int | torch.Generator | None, frozen: str, algorithm: str | None,
    ) -> None:  # fmt: skip
        """Takes over the shape and a copy of the values of `conv`."""
        if trainable_bias not in TRAINABLE_BIAS:
            raise ValueError(f"trainable_bias={trainable_bias!r} is unknown; choose one of {', '.join(TRAINABLE_BIAS)}")
        if frozen not in FROZEN:
            raise ValueError(f"frozen={frozen!r} is unknown; choose one of {', '.join(FROZEN)}")
        requested(algorithm)
        for name in _GEOMETRY:
            setattr(self, name, getattr(conv, name))
        self.trainable_bias, self.frozen, self.algorithm = trainable_bias, frozen, algorithm
        self.captured, self._idle = False, {}
        self.partition = self._choose(conv.weight, trainable, trainable_inputs, select, seed)
        self._set_parts(self._split(conv.weight, conv.bias))
        self.train(conv.training)

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
        return Partition(filters, inputs, bias_filters[self.trainable_bias], self.groups)

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
        if name == "weight":
            return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))
        return None if all(part is None for part in self._parts(BIAS_PARTS)) else torch.Size((self.out_channels,))

    def _new_conv2d(self, make: Callable[..., nn.Conv2d]) -> nn.Conv2d:
        return make(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self._shape("bias") is not None, self.padding_mode, device=self._like.device,
            dtype=self._like.dtype,
        )  # fmt: skip

    def _check_state(self, optimizer: torch.optim.Optimizer, partition: Partition) -> None:
        """Raises if the optimizer could not follow to this partition."""
        bias_filters = Subset.empty(self.out_channels) if self._shape("bias") is None else partition.bias_filters
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
        """Splits `weight` and `bias` before nn.Module loads the parts, and reports under the names of nn.Conv2d."""
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
