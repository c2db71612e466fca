"""PartialConv2d, PartialConv1d, PartialLinear: layers of torch of which a chosen block of the weight is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rwn_ext import zeroed
from rwn_ext.autograd import Layer
from rwn_ext.functional import constants, convolved, partial_conv2d, partial_linear, weight_grad_problem
from rwn_ext.ops import Pair
from rwn_ext.partial_layer import PartialLayer
from rwn_ext.partition import BIAS_PARTS, WEIGHT_PARTS, Partition
from rwn_ext.planner import Problem, requested


class _PartialConv(PartialLayer):
    """What convolutions have in common: their geometry, and the algorithm of their weight gradient."""

    # The repr reads output_padding too.
    _ATTRIBUTES = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        "output_padding",
    )  # fmt: skip

    in_channels: int
    out_channels: int
    groups: int
    padding_mode: str
    algorithm: str | None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.algorithm is None else f"{text}, algorithm={self.algorithm}"

    def _adopt(self, layer: Any, *, algorithm: str | None = None, **choice: Any) -> None:
        requested(algorithm)
        self.algorithm = algorithm
        super()._adopt(layer, **choice)

    def _weight_size(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size  # type: ignore[misc]

    def _new_plain(self, make: Callable[..., nn.Module]) -> Any:
        return make(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self._shape("bias") is not None, self.padding_mode, device=self._like.device,
            dtype=self._like.dtype,
        )  # fmt: skip


class PartialConv2d(_PartialConv):
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

    plain = nn.Conv2d
    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    _known: tuple[Partition, tuple[Any, ...], Layer] | None = None

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
        self._adopt(
            conv, trainable=trainable, trainable_inputs=trainable_inputs, trainable_bias=trainable_bias, select=select,
            seed=seed, frozen=frozen, algorithm=algorithm,
        )  # fmt: skip

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **choice: Any) -> PartialConv2d:
        """A copy of `conv` that computes the same and learns the chosen part. `conv` and its gradients stay untouched.

        Takes the keywords of the constructor. What is learned is what they say, whether or not `conv.weight` requires
        a gradient.
        """
        return cls.from_plain(conv, **choice)

    def to_conv2d(self) -> nn.Conv2d:
        """An `nn.Conv2d` that computes the same, all of it learnable."""
        return self.to_plain()

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen == "zero":
            return zeroed.conv2d(
                input, self.weight_trainable, self.bias_trainable, self.kernel_size, self.stride, self.padding,
                self.dilation, self.padding_mode, partition=self.partition, dtype=self._like.dtype,
            )  # fmt: skip
        input = zeroed.dense(input)
        self._note_capture(input)
        weights, biases = self._parts(WEIGHT_PARTS), self._parts(BIAS_PARTS)
        return convolved(input, weights, biases, self._constants(), self.partition)

    def _constants(self) -> Layer:
        """Remembered while nothing that they depend on changes: small layers feel the look-up."""
        choices = (self.stride, self.padding, self.dilation, self.padding_mode, requested(self.algorithm))
        if torch.compiler.is_compiling():
            return constants(self.partition, self.kernel_size, *choices)
        if self._known is None or self._known[0] is not self.partition or self._known[1] != choices:
            self._known = self.partition, choices, constants(self.partition, self.kernel_size, *choices)
        return self._known[2]

    def problem(self, input: Tensor) -> Problem:
        """The weight gradient this layer computes for such an input, for `rwn_ext.planner.explain`."""
        return weight_grad_problem(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode,
            partition=self.partition,
        )  # fmt: skip


class PartialConv1d(_PartialConv):
    """`nn.Conv1d` of which only some filters, or some input channels of them, are learned.

    Equivalent to `F.conv1d(x, weight, bias, ...)` of which only `weight[filters][:, inputs]` ever receives a gradient.
    Arguments, parts and state dict are as for `PartialConv2d`, with weights (K, C / groups, S). It is computed as a
    convolution of images of height 1.

    Shapes as for `nn.Conv1d`: (N, C, L) or (C, L) in, (N, K, M) or (K, M) out.
    """

    plain = nn.Conv1d
    kernel_size: tuple[int]
    stride: tuple[int]
    padding: tuple[int] | str
    dilation: tuple[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] | str = 0,
        dilation: int | tuple[int] = 1,
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
        conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._adopt(
            conv, trainable=trainable, trainable_inputs=trainable_inputs, trainable_bias=trainable_bias, select=select,
            seed=seed, frozen=frozen, algorithm=algorithm,
        )  # fmt: skip

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d, **choice: Any) -> PartialConv1d:
        """A copy of `conv` that computes the same and learns the chosen part, as `PartialConv2d.from_conv2d`."""
        return cls.from_plain(conv, **choice)

    def to_conv1d(self) -> nn.Conv1d:
        """An `nn.Conv1d` that computes the same, all of it learnable."""
        return self.to_plain()

    def forward(self, input: Tensor) -> Tensor:
        image, (kernel_size, stride, padding, dilation) = self._image(input), self._geometry()
        bias_learned, bias_fixed = self._parts(BIAS_PARTS)
        learned, fixed, fixed_inputs = (
            None if part is None else part.unsqueeze(2) for part in self._parts(WEIGHT_PARTS)
        )
        if self.frozen == "zero":
            output = zeroed.conv2d(
                image, learned, bias_learned, kernel_size, stride, padding, dilation, self.padding_mode,
                partition=self.partition, dtype=self._like.dtype,
            )  # fmt: skip
            return zeroed.dense(output).squeeze(-2)
        self._note_capture(input)
        output = partial_conv2d(
            image, learned, fixed, fixed_inputs, bias_learned, bias_fixed, stride, padding, dilation,
            self.padding_mode, partition=self.partition, algorithm=self.algorithm,
        )  # fmt: skip
        return output.squeeze(-2)

    def problem(self, input: Tensor) -> Problem:
        """The weight gradient this layer computes for such an input, for `rwn_ext.planner.explain`."""
        return weight_grad_problem(self._image(input), *self._geometry(), self.padding_mode, partition=self.partition)

    def _image(self, input: Tensor) -> Tensor:
        """The input as images of height 1."""
        if input.dim() not in (2, 3) or input.size(-2) != self.in_channels:
            raise RuntimeError(
                f"expected an input of shape (N, {self.in_channels}, L) or ({self.in_channels}, L), "
                f"got {tuple(input.shape)}"
            )
        return input.unsqueeze(-2)

    def _geometry(self) -> tuple[Pair, Pair, Pair | str, Pair]:
        """Kernel size, stride, padding and dilation for such images."""
        padding = self.padding if isinstance(self.padding, str) else (0, self.padding[0])
        return (1, self.kernel_size[0]), (1, self.stride[0]), padding, (1, self.dilation[0])


class PartialLinear(PartialLayer):
    """`nn.Linear` of which only some rows of the weight, or some columns of them, are learned.

    Equivalent to `F.linear(x, weight, bias)` of which only `weight[filters][:, inputs]` ever receives a gradient: the
    output features `filters`, as functions of the input features `inputs`. Parts and state dict are as for
    `PartialConv2d`, with weights (out_features, in_features).

    Args (after those of `nn.Linear`, by keyword):
        trainable: which output features are learned: a fraction (float), a count (int), indices, or a bool mask.
        trainable_inputs: of which input features; default all. Of an input that is kept for backward only these are.
        trainable_bias, select, seed, frozen: as for `PartialConv2d`.

    Shapes as for `nn.Linear`: (..., in_features) in, (..., out_features) out.
    """

    plain = nn.Linear
    _ATTRIBUTES = ("in_features", "out_features")
    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        trainable: Any,
        trainable_inputs: Any = None,
        trainable_bias: str = "with_filters",
        select: str = "last",
        seed: int | torch.Generator | None = None,
        frozen: str = "random",
    ) -> None:
        super().__init__()
        self._adopt(
            nn.Linear(in_features, out_features, bias, device, dtype), trainable=trainable,
            trainable_inputs=trainable_inputs, trainable_bias=trainable_bias, select=select, seed=seed, frozen=frozen,
        )  # fmt: skip

    @classmethod
    def from_linear(cls, linear: nn.Linear, **choice: Any) -> PartialLinear:
        """A copy of `linear` that computes the same and learns the chosen part, as `PartialConv2d.from_conv2d`."""
        return cls.from_plain(linear, **choice)

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` that computes the same, all of it learnable."""
        return self.to_plain()

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen == "zero":
            return zeroed.linear(input, self.weight_trainable, self.bias_trainable, partition=self.partition)
        self._note_capture(input)
        return partial_linear(input, *self._parts(WEIGHT_PARTS + BIAS_PARTS), partition=self.partition)

    def _weight_size(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _new_plain(self, make: Callable[..., nn.Module]) -> Any:
        return make(
            self.in_features, self.out_features, self._shape("bias") is not None, device=self._like.device,
            dtype=self._like.dtype,
        )  # fmt: skip


PARTIAL: dict[type[nn.Module], type[PartialLayer]] = {
    kind.plain: kind for kind in (PartialConv2d, PartialConv1d, PartialLinear)
}
"""The partly learned form of each layer of torch that has one."""
