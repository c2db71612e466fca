"""BatchNorm whose running statistics and affine parameters stay as they are, also in training mode."""

from __future__ import annotations

from typing import Any

from torch import nn


class _Frozen(nn.modules.batchnorm._BatchNorm):
    """Equals the BatchNorm it was, in evaluation mode: `train()` reaches it only once it is a BatchNorm again."""

    _when_thawed: tuple[bool, list[bool]]
    """Its training flag, and whether gamma and beta are learned."""

    def train(self, mode: bool = True) -> Any:
        self._when_thawed = mode, self._when_thawed[1]
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """`nn.BatchNorm1d(...).eval()` that stays so, with gamma and beta fixed."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """`nn.BatchNorm2d(...).eval()` that stays so, with gamma and beta fixed."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """`nn.BatchNorm3d(...).eval()` that stays so, with gamma and beta fixed."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm(...).eval()` that stays so, with gamma and beta fixed."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def freeze_norms(model: nn.Module) -> None:
    """Makes every BatchNorm of the model a frozen one, in place: the same modules, parameters, buffers and hooks.

    Raises ValueError, before anything changes, for one without running statistics.
    """
    norms = {name: module for name, module in model.named_modules() if type(module) in _FROZEN}
    for name, norm in norms.items():
        if norm.running_mean is None:
            raise ValueError(f"{name or 'the model'} has no running statistics to freeze: track_running_stats=False")
    for norm in norms.values():
        norm._when_thawed = norm.training, [p is not None and p.requires_grad for p in (norm.weight, norm.bias)]
        norm.__class__ = _FROZEN[type(norm)]
        norm.train(norm.training).requires_grad_(False)


def unfreeze_norms(model: nn.Module) -> None:
    """Undoes `freeze_norms`: training flags are as last set, what was learned is as it was."""
    thawed = {frozen: plain for plain, frozen in _FROZEN.items()}
    for norm in model.modules():
        if type(norm) in thawed:
            norm.__class__ = thawed[type(norm)]
            norm.training, learned = vars(norm).pop("_when_thawed")
            for parameter, requires_grad in zip((norm.weight, norm.bias), learned, strict=True):
                if parameter is not None:
                    parameter.requires_grad_(requires_grad)
