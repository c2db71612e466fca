"""Whole models: every nn.Conv2d to a PartialConv2d, and back; which subsets a model has, and setting them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwn_ext.describe import describe, table
from rwn_ext.frozen_norm import freeze_norms, unfreeze_norms
from rwn_ext.lean import explain, make_lean, undo_lean
from rwn_ext.modules import PartialConv2d
from rwn_ext.subsets import choose

NORMS = ("train", "frozen")


def convert(
    model: nn.Module,
    trainable: Any,
    *,
    trainable_inputs: Any = None,
    trainable_bias: str = "with_filters",
    select: str = "last",
    seed: int | torch.Generator | None = None,
    frozen: str = "random",
    algorithm: str | None = None,
    norm: str = "train",
    lean: bool = False,
    skip: str | Iterable[str] = (),
    verbose: bool = False,
    example: Tensor | None = None,
) -> nn.Module:
    """Replaces, in place, every `nn.Conv2d` by a `PartialConv2d` that computes the same. Returns the model.

    Weights, hooks, dtype, device and training flag are kept; a module used in several places stays one module.

    Args:
        trainable: one choice for all layers (see `PartialConv2d`), or a dict from name patterns to choices, such as
            `{"layer1.*": 0, "layer4.*": 0.5, "*.downsample.*": 1.0}`. The last pattern that matches a layer's name
            decides; a layer that none matches stays an nn.Conv2d.
        trainable_inputs: as for `PartialConv2d`; of a depthwise convolution, which has one input channel a filter, it
            chooses among all of the layer's input channels, and the filters of the others learn nothing.
        norm: "train" leaves every BatchNorm as it is; "frozen" fixes running statistics, gamma and beta, also in
            training mode.
        lean: keep for backward only what the learned part needs, by rewriting the model's forward (see
            `rwn_ext.lean.make_lean`); outputs and gradients stay the same, on a CPU bit for bit.
        skip: names or patterns of layers to leave as they are.
        verbose: print a table of the layers; with `example`, an input of the model, also the planned algorithms.
        (the others as for `PartialConv2d`; one `seed` draws all layers, each differently)

    Layers that cannot be converted without losing something (subclasses of nn.Conv2d, tied or parametrised weights,
    hooks on the weight itself) stay as they are and are listed in a warning.

    Raises ValueError or TypeError naming the layer for a choice that does not fit it, and for a pattern that matches no
    layer; the model is then unchanged.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    make = partial(
        PartialConv2d.from_conv2d, trainable_bias=trainable_bias, select=select, seed=generator, frozen=frozen,
        algorithm=algorithm,
    )  # fmt: skip
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    skip = [skip] if isinstance(skip, str) else list(skip)
    _check_patterns([*skip, *(trainable if isinstance(trainable, Mapping) else ())], convs)
    replacements: dict[nn.Module, nn.Module] = {}
    left: dict[str, str] = {}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, conv in convs.items():
        choice = _choice(trainable, name)
        if _matches(name, skip) or choice is _NO_CHOICE:
            continue
        obstacle = _obstacle(conv, owners)
        if obstacle:
            left[name] = obstacle
            continue
        try:
            chosen = _both_choices(conv, choice, trainable_inputs, select, generator)
            replacements[conv] = _with_hooks(make(conv, trainable=chosen[0], trainable_inputs=chosen[1]), conv)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    if left:
        listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in left.items())
        warnings.warn(f"left as they are, learning all they learned before: {listed}", stacklevel=2)
    if norm == "frozen":
        freeze_norms(model)
    model = _replace(model, replacements)
    if lean:
        _make_lean(model)
    if verbose:
        print(describe(model, example))
        if lean:
            print(table(["layer", "kept for backward"], [(name, text) for name, text in explain(model).items()]))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Replaces, in place, every `PartialConv2d` by an `nn.Conv2d` that computes the same. Returns the model.

    Undoes `lean` and `norm="frozen"` too.
    """
    unfreeze_norms(undo_lean(model))
    return _replace(model, {module: _with_hooks(module.to_conv2d(), module) for module in _partial(model).values()})


def subsets(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """What each PartialConv2d of the model learns: {name: (filters, input channels)}.

    Belongs into a checkpoint beside `state_dict()`, which holds the weights alone; `set_subsets_` restores it.
    """
    return {
        name: (list(module.filters.indices), list(module.inputs.indices)) for name, module in _partial(model).items()
    }


def set_subsets_(
    model: nn.Module,
    subsets: Mapping[str, tuple[Any, Any]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Makes the model's layers learn what `subsets(model)` said. Returns the model, which computes what it did.

    Values are anything `PartialConv2d` takes as (trainable, trainable_inputs); layers not named keep theirs.
    `optimizer` as for `PartialConv2d.set_trainable_`. Raises ValueError for a name that is no PartialConv2d, and what
    `set_trainable_` raises, naming the layer; the model is then unchanged.
    """
    layers = _partial(model)
    unknown = [name for name in subsets if name not in layers]
    if unknown:
        raise ValueError(f"no PartialConv2d is named {', '.join(map(repr, unknown))}; there are {', '.join(layers)}")
    partitions = {}
    for name, choice in subsets.items():
        try:
            filters, inputs = choice
            partitions[name] = layers[name].partition_for(filters, inputs, optimizer=optimizer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    for name, partition in partitions.items():
        layers[name].set_partition_(partition, optimizer=optimizer)
    return model


_NO_CHOICE = object()


def _choice(trainable: Any, name: str) -> Any:
    if not isinstance(trainable, Mapping):
        return trainable
    return next(
        (choice for pattern, choice in reversed(list(trainable.items())) if fnmatchcase(name, pattern)), _NO_CHOICE
    )


def _both_choices(
    conv: nn.Conv2d, trainable: Any, trainable_inputs: Any, select: str, generator: torch.Generator | None
) -> tuple[Any, Any]:
    """(trainable, trainable_inputs) for this layer: input channels of a depthwise one are chosen by their filters."""
    channels, groups = conv.in_channels, conv.groups
    if trainable_inputs is None or groups == 1 or groups != channels:
        return trainable, trainable_inputs
    by_channel = conv.weight.reshape(channels, -1, *conv.kernel_size)
    chosen = choose(
        trainable_inputs, channels, what="trainable_inputs", policy=select, weight=by_channel, seed=generator
    )
    filters = choose(trainable, conv.out_channels, policy=select, weight=conv.weight, seed=generator)
    inside = set(chosen.indices)
    return [k for k in filters.indices if k * channels // conv.out_channels in inside], None


def _make_lean(model: nn.Module) -> None:
    make_lean(model)
    stopped = [f"{name} ({text})" for name, text in explain(model).items() if text.startswith("not traced")]
    if stopped:
        warnings.warn(f"kept as they are, but for what is inside them: {'; '.join(stopped)}", stacklevel=3)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: Iterable[str], convs: Iterable[str]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{pattern!r} is no name pattern; give a string such as 'layer1.*'")
        if not any(fnmatchcase(name, pattern) for name in convs):
            raise ValueError(f"pattern {pattern!r} matches no nn.Conv2d; there are {', '.join(convs) or 'none'}")


def _obstacle(conv: nn.Conv2d, owners: Counter[int]) -> str | None:
    """What would be lost by converting this layer; None if nothing."""
    if type(conv) is not nn.Conv2d:
        return f"a subclass of nn.Conv2d, {type(conv).__name__}"
    if set(conv._parameters) != {"weight", "bias"} or conv._buffers:
        return "its weight is computed from other tensors"
    if "forward" in vars(conv):
        return "its forward has been replaced"
    for name, parameter in conv._parameters.items():
        if parameter is None:
            continue
        if owners[id(parameter)] > 1:
            return f"its {name} is shared with another module"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"there is a hook on its {name}"
    return None


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` with the hooks of `old`: the very dicts, so that the handles people hold still remove them."""
    vars(new).update({name: value for name, value in vars(old).items() if "hook" in name})
    return new


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _partial(model: nn.Module) -> dict[str, PartialConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PartialConv2d)}
