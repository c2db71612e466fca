"""The normalisations a lean block knows: what each keeps, its forward pass and its gradients, to the bit torch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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

    def forward(self, z: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, list[Any]]:
        """The normalised input, and what its gradients need besides it."""
        normed, *state = torch.ops.aten._batch_norm_impl_index(
            z, *parameters, self.batch_statistics, self.momentum, self.eps, torch.backends.cudnn.enabled
        )
        return normed, state

    def again(self, z: Tensor, parameters: Sequence[Tensor | None], state: Sequence[Any]) -> Tensor:
        """What an earlier `forward` made of z, to the bit, without touching the running statistics.

        From the statistics kept, in one pass, where that gives the same bits; else by the call of the first time.
        """
        if not self.batch_statistics:
            return self.forward(z, parameters)[0]
        gamma, beta, *_ = parameters
        if gamma is not None and beta is not None and _can_be_scaled(z, gamma):
            return _scaled(z, *self.affine(parameters, state))
        return self.forward(z, (gamma, beta, None, None))[0]

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

    def forward(self, z: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, list[Any]]:
        z, gamma, beta = _dense(z), *parameters[:2]
        normed, *state = torch.native_group_norm(z, gamma, beta, *_sizes(z), self.groups, self.eps)
        return normed, state

    def again(self, z: Tensor, parameters: Sequence[Tensor | None], state: Sequence[Any]) -> Tensor:
        return self.forward(z, parameters)[0]

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

    def forward(self, z: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, list[Any]]:
        return z, []

    def again(self, z: Tensor, parameters: Sequence[Tensor | None], state: Sequence[Any]) -> Tensor:
        return z

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


def _scaled(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The last step of torch's batch norm on a CPU, where a product is not rounded before it is added."""
    return torch.addcmul(shift[:, None, None], z, scale[:, None, None])


def _can_be_scaled(z: Tensor, gamma: Tensor) -> bool:
    """Whether `_scaled` has the bits of torch's batch norm here. It has no derivative by the statistics."""
    if type(z) is not Tensor or z.device.type != "cpu" or not z.dtype == gamma.dtype == torch.float32:
        return False
    contiguous, channels_last = z.is_contiguous(), z.is_contiguous(memory_format=torch.channels_last)
    return contiguous != channels_last and not torch.is_grad_enabled() and _adds_unrounded_products(channels_last)


@lru_cache
def _adds_unrounded_products(channels_last: bool) -> bool:
    """Whether this build of torch, on this processor, contracts products and sums in both: tried, on odd sizes."""
    z, gamma, beta = (torch.arange(size, dtype=torch.float32, device="cpu").sin() for size in (2 * 27 * 5 * 7, 27, 27))
    z = z.view(2, 27, 5, 7).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    normed, *statistics = torch.native_batch_norm(z, gamma, beta, None, None, True, 0.0, 1e-5)
    norm = BatchNorm(batch_statistics=True, momentum=0.0, eps=1e-5)
    return torch.equal(_scaled(z, *norm.affine((gamma, beta, None, None), statistics)), normed)


def _affine(module: nn.Module) -> list[Tensor | None]:
    return [getattr(module, "weight", None), getattr(module, "bias", None)]


def _dense(z: Tensor) -> Tensor:
    return z.contiguous(memory_format=memory_format(z))


def _sizes(z: Tensor) -> tuple[int, int, int]:
    return z.size(0), z.size(1), z.size(2) * z.size(3)
