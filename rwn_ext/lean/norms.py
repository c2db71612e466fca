"""The normalisations a lean block knows: what each keeps, its forward pass and its gradients, call for call torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwn_ext.frozen_norm import FrozenBatchNorm2d, FrozenSyncBatchNorm
from rwn_ext.functional import autocast_dtype
from rwn_ext.ops import memory_format

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class BatchNorm(NamedTuple):
    """`F.batch_norm`, by the statistics of the batch or by the running ones."""

    batch_statistics: bool
    momentum: float
    eps: float

    def keeps_input(self, gamma_learned: bool) -> bool:
        """Batch statistics depend on every input; fixed ones leave only gamma's gradient to need it."""
        return self.batch_statistics or gamma_learned

    def kept(self, parameters: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Which of gamma, beta, running mean and variance backward needs; the rest cut off."""
        return parameters[:2] if self.batch_statistics else parameters

    def forward(self, z: Tensor, parameters: Sequence[Tensor | None], *, again: bool) -> tuple[Tensor, list[Any]]:
        """The normalised input, and what its gradients need besides it.

        `again` repeats an earlier call without touching the running statistics. With batch statistics it is the very
        call of the first time: no other expression gives the same bits on a CPU.
        """
        gamma, beta, mean, var = parameters
        if self.batch_statistics and again:
            mean = var = None
        normed, *state = torch.ops.aten._batch_norm_impl_index(
            z, gamma, beta, mean, var, self.batch_statistics, self.momentum, self.eps, torch.backends.cudnn.enabled
        )
        return normed, state

    def affine(self, parameters: Sequence[Tensor | None], state: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """float32 scale and shift by channel: the normalised input is `z * scale + shift`, but for rounding."""
        gamma, beta, mean, var = parameters
        if self.batch_statistics:
            mean, invstd = state[0].float(), state[1].float()
        else:
            mean, invstd = mean.float(), (var.float() + self.eps).rsqrt()
        scale = invstd if gamma is None else gamma.float() * invstd
        shift = torch.zeros_like(scale) if beta is None else beta.float()
        return scale, torch.addcmul(shift, mean, scale, value=-1)

    def backward(
        self, grad: Tensor, z: Tensor | None, parameters: Sequence[Tensor | None], state: Sequence[Any],
        needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        gamma, _, mean, var = parameters
        save_mean, save_invstd, reserve, index = state[:4]
        # With fixed statistics only gamma's gradient looks at the input's values.
        z = grad if z is None else z
        return torch.ops.aten._batch_norm_impl_index_backward(
            index, z, grad, gamma, mean, var, save_mean, save_invstd, self.batch_statistics, self.eps, list(needs),
            reserve,
        )  # fmt: skip


class GroupNorm(NamedTuple):
    """`F.group_norm`."""

    groups: int
    eps: float

    def keeps_input(self, gamma_learned: bool) -> bool:
        return True

    def kept(self, parameters: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return parameters[:2]

    def forward(self, z: Tensor, parameters: Sequence[Tensor | None], *, again: bool) -> tuple[Tensor, list[Any]]:
        z, gamma, beta = _dense(z), *parameters[:2]
        normed, *state = torch.native_group_norm(z, gamma, beta, *_sizes(z), self.groups, self.eps)
        return normed, state

    def backward(
        self, grad: Tensor, z: Tensor | None, parameters: Sequence[Tensor | None], state: Sequence[Any],
        needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        assert z is not None
        z, (mean, invstd) = _dense(z), state[:2]
        grad = grad.contiguous(memory_format=memory_format(z))
        return torch.ops.aten.native_group_norm_backward(
            grad, z, mean, invstd, parameters[0], *_sizes(z), self.groups, list(needs)
        )


class NoNorm(NamedTuple):
    """The input as it is."""

    def keeps_input(self, gamma_learned: bool) -> bool:
        return False

    def kept(self, parameters: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return ()

    def forward(self, z: Tensor, parameters: Sequence[Tensor | None], *, again: bool) -> tuple[Tensor, list[Any]]:
        return z, []

    def backward(
        self, grad: Tensor, z: Tensor | None, parameters: Sequence[Tensor | None], state: Sequence[Any],
        needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        return grad, None, None


Norm = BatchNorm | GroupNorm | NoNorm


BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, FrozenSyncBatchNorm)


def begin(module: nn.Module | None, z: Tensor) -> tuple[Norm, list[Tensor | None]] | None:
    """What this module does now, with gamma, beta, running mean and variance; None: something else than a block can.

    A BatchNorm in training counts the batch, as its own forward does, unless the answer is None.
    """
    if module is None:
        return NoNorm(), [None] * 4
    if type(module) is nn.GroupNorm:
        # Autocast has rules of its own for it.
        return None if autocast_dtype(z) else (GroupNorm(module.num_groups, module.eps), [*_affine(module), None, None])
    if type(module) not in BATCH_NORMS:
        return None
    assert isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
    by_batch = module.training or module.running_mean is None
    several = isinstance(module, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()
    if by_batch and (several or z.numel() == z.size(1)):
        return None
    tracks = not module.training or module.track_running_stats
    statistics = [module.running_mean, module.running_var] if tracks else [None, None]
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    return BatchNorm(by_batch, momentum, module.eps), [*_affine(module), *statistics]


def _affine(module: nn.Module) -> list[Tensor | None]:
    return [getattr(module, "weight", None), getattr(module, "bias", None)]


def _dense(z: Tensor) -> Tensor:
    return z.contiguous(memory_format=memory_format(z))


def _sizes(z: Tensor) -> tuple[int, int, int]:
    return z.size(0), z.size(1), z.size(2) * z.size(3)
