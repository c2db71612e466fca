"""PartialConv2d: nn.Conv2d of which only a chosen block of the weight is learned."""

from __future__ import annotations

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

    `state_dict()` is that of `nn.Conv2d` (`weight`, `bias`), both ways.

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
        return partial_conv2d(
            zeroed.dense(input), self.weight_trainable, self.weight_frozen, self.weight_frozen_inputs,
            self.bias_trainable, self.bias_frozen, self.stride, self.padding, self.dilation, self.padding_mode,
            partition=self.partition, algorithm=self.algorithm,
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
        conv = self._new_conv2d(nn.Conv2d)
        with torch.no_grad():
            for name, value in self._split(conv.weight, conv.bias).items():
                if value is not None:
                    self.get_parameter(name).copy_(value)

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

        The Parameters stay the same objects with new values, possibly of a new shape, so optimizers keep them. Given
        the `optimizer`, its state moves with the weights: what stays learned keeps its momentum, what is new starts at
        zero. Without it, clear the state of an optimizer that has made steps.

        Raises ValueError, before anything changes, if a Parameter comes into being that the optimizer does not know.
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
        partition = self._choose(self.weight.detach(), trainable, trainable_inputs, select, seed)
        bias_filters = Subset.empty(self.out_channels) if self.bias is None else partition.bias_filters
        for name, learned in (("weight_trainable", partition.block), ("bias_trainable", bias_filters)):
            if optimizer is not None and self._parameters[name] is None and not learned.is_empty:
                raise ValueError(
                    f"{name} comes into being, so the optimizer has no group for it; build the optimizer anew, or pass "
                    "optimizer=None and call optimizer.add_param_group"
                )
        return partition

    def set_partition_(self, partition: Partition, *, optimizer: torch.optim.Optimizer | None = None) -> PartialConv2d:
        """`set_trainable_` of what `partition_for` has checked."""
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
            if old is None or part is None:
                new = None if part is None else nn.Parameter(part, requires_grad=name.endswith("trainable"))
                self.register_parameter(name, new)
            else:
                old.data = part
            if old is not None:
                old.grad = None

    def _parts(self, names: tuple[str, ...]) -> list[Tensor | None]:
        return [getattr(self, name) for name in names]

    @property
    def _like(self) -> Tensor:
        """The Parameter whose dtype and device are the layer's."""
        like = self.weight_frozen if self.weight_trainable is None else self.weight_trainable
        assert like is not None
        return like

    def _new_conv2d(self, make: Callable[..., nn.Conv2d]) -> nn.Conv2d:
        return make(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device=self._like.device, dtype=self._like.dtype,
        )  # fmt: skip

    def _move_state(self, optimizer: torch.optim.Optimizer, partition: Partition) -> None:
        """Momentum and the like follow the weights they belong to; weights that were fixed start at zero."""
        old = self.partition
        moves = (
            (WEIGHT_PARTS, lambda parts, dtype: partition.split_weight(old.merge_weight(parts, dtype))),
            (BIAS_PARTS, lambda parts, dtype: partition.split_bias(old.merge_bias(parts, dtype))),
        )
        for names, move in moves:
            learned, *fixed = self._parts(names)
            if learned is None or learned not in optimizer.state:
                continue
            state = optimizer.state[learned]
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == learned.shape:
                    zeros = [None if part is None else torch.zeros_like(part) for part in fixed]
                    state[key] = move([value, *zeros], value.dtype)[names[0]]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            whole = getattr(self, name)
            if whole is not None:
                destination[prefix + name] = whole if keep_vars else whole.detach()
        # What else a module may hold: buffers and extra state.
        rest: dict[str, Any] = {}
        super()._save_to_state_dict(rest, prefix, keep_vars)
        parts = [prefix + name for name in WEIGHT_PARTS + BIAS_PARTS]
        destination.update({key: value for key, value in rest.items() if key not in parts})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Splits `weight` and `bias` before nn.Module loads the parts, and reports under the names of nn.Conv2d."""
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        refused = []
        for name, split in (("weight", self.partition.split_weight), ("bias", self.partition.split_bias)):
            current = getattr(self, name)
            if current is None or prefix + name not in own:
                continue
            whole = own.pop(prefix + name)
            if not torch.is_tensor(whole):
                refused.append(name)
                error_msgs.append(
                    f'While copying the parameter named "{prefix}{name}", expected torch.Tensor or Tensor-like object '
                    f"from checkpoint but received {type(whole)}"
                )
            elif whole.shape != current.shape:
                refused.append(name)
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {whole.shape} from checkpoint, the "
                    f"shape in current model is {current.shape}."
                )
            else:
                parts = split(whole)
                if self.frozen == "zero" and any(p is not None and p.any() for n, p in parts.items() if "frozen" in n):
                    refused.append(name)
                    error_msgs.append(
                        f"{prefix}{name} holds values other than zero where this layer learns nothing and is "
                        'frozen="zero", which never computes them; load into a layer with frozen="random" and the same '
                        'subset, or convert(..., frozen="zero") after loading, which zeroes them.'
                    )
                    continue
                own.update({prefix + part: value for part, value in parts.items() if value is not None})
        missing: list[str] = []
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        whole_of = dict.fromkeys(WEIGHT_PARTS, "weight") | dict.fromkeys(BIAS_PARTS, "bias")
        names = [key.removeprefix(prefix) for key in missing]
        wholes = dict.fromkeys(whole_of.get(name, name) for name in names)
        missing_keys += [prefix + name for name in wholes if name not in refused]
