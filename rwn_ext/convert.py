"""Whole models: their layers to partly learned ones, and back; subsets, and the two forms of state dicts."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rwn_ext.budget import Budget, fit
from rwn_ext.describe import describe, table
from rwn_ext.draw import draw_
from rwn_ext.frozen_norm import freeze_norms, unfreeze_norms
from rwn_ext.lean import explain, make_lean, undo_lean
from rwn_ext.modules import PARTIAL
from rwn_ext.partial_layer import PartialLayer
from rwn_ext.partition import PARTS
from rwn_ext.planner import requested
from rwn_ext.scores import gradient_norms_of, magnitudes
from rwn_ext.subsets import choose

NORMS = ("train", "frozen")
SCORES = ("magnitude", "gradient")


def convert(
    model: nn.Module,
    trainable: Any = None,
    *,
    budget: int | str | float | None = None,
    optimizer_states: int = 1,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: Iterable[Any] = (),
    trainable_inputs: Any = None,
    trainable_bias: str = "with_filters",
    select: str | None = None,
    seed: int | torch.Generator | None = None,
    frozen: str = "random",
    algorithm: str | None = None,
    draw_seed: int | None = None,
    linear: bool = False,
    norm: str = "train",
    lean: bool = False,
    skip: str | Iterable[str] = (),
    verbose: bool = False,
    example: Tensor | None = None,
) -> nn.Module:
    """Replaces, in place, every `nn.Conv2d` by a `PartialConv2d` that computes the same, every `nn.Conv1d` by a
    `PartialConv1d` and, if asked for, every `nn.Linear` by a `PartialLinear`. Returns the model.

    Weights, hooks, dtype, device and training flag are kept; a module used in several places stays one module.

    Args:
        trainable: one choice for all layers (see `PartialConv2d`), or a dict from name patterns to choices, such as
            `{"layer1.*": 0, "layer4.*": 0.5, "*.downsample.*": 1.0}`. The last pattern that matches a layer's name
            decides; a layer that none matches stays as it is.
        budget, optimizer_states, loss, batches: instead of `trainable`, what training may cost; the filters are those
            of `plan_budget`, which says more. Needs `example`.
        select: as for `PartialConv2d`, default "last"; with a budget "magnitude" or "gradient".
        draw_seed: give the converted layers new initial values, drawn from this seed by `rwn_ext.draw_`, for which a
            compact checkpoint needs no more than the seed; default: they keep their values.
        trainable_inputs: as for `PartialConv2d`; of a depthwise convolution, which has one input channel a filter, it
            chooses among all of the layer's input channels, and the filters of the others learn nothing.
        linear: convert linear layers, too. A classifier of few classes among them is better left to learn all:
            `skip="fc"`.
        norm: "train" leaves every BatchNorm as it is; "frozen" fixes running statistics, gamma and beta, also in
            training mode.
        lean: keep for backward only what the learned part needs, by rewriting the model's forward (see
            `rwn_ext.lean.make_lean`); outputs and gradients stay the same, on a CPU bit for bit.
        skip: names or patterns of layers to leave as they are.
        verbose: print a table of the layers; with `example`, an input of the model, also the planned algorithms; with
            a budget, also how it is spent.
        (the others as for `PartialConv2d`; one `seed` draws all layers, each differently)

    Layers that cannot be converted without losing something (subclasses, such as the output projection of
    nn.MultiheadAttention; tied or parametrised weights; hooks on the weight itself) stay as they are and are listed in
    a warning.

    Raises ValueError or TypeError naming the layer for a choice that does not fit it, and for a pattern that matches no
    layer; the model is then unchanged.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    plan = None
    if budget is not None:
        if trainable is not None:
            raise ValueError(f"give trainable={trainable!r} or budget={budget!r}, not both")
        plan = plan_budget(
            model, budget, example=example, select=select or "magnitude", optimizer_states=optimizer_states, loss=loss,
            batches=batches, trainable_inputs=trainable_inputs, trainable_bias=trainable_bias, frozen=frozen,
            draw_seed=draw_seed, linear=linear, norm=norm, skip=skip,
        )  # fmt: skip
        trainable, select = plan.filters, "magnitude"
    select = select or "last"
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    options = {"trainable_bias": trainable_bias, "select": select, "seed": generator, "frozen": frozen}
    requested(algorithm)
    kinds = tuple(kind for kind in PARTIAL if linear or kind is not nn.Linear)
    # Of a shared module all its names count.
    named = model.named_modules(remove_duplicate=False)
    convs = {name: module for name, module in named if isinstance(module, kinds)}
    skip = [skip] if isinstance(skip, str) else list(skip)
    _check_patterns([*skip, *(trainable if isinstance(trainable, Mapping) else ())], convs)
    replacements: dict[nn.Module, nn.Module] = {}
    left: dict[str, str] = {}
    owners = _owners(model)
    skipped = {conv for name, conv in convs.items() if _matches(name, skip)}
    for name, conv in convs.items():
        choice = _choice(trainable, name)
        if conv in skipped or conv in replacements or choice is _NO_CHOICE:
            continue
        obstacle = _obstacle(conv, owners)
        if obstacle:
            left[name] = obstacle
            continue
        try:
            chosen = _both_choices(conv, choice, trainable_inputs, select, generator)
            own = {} if isinstance(conv, nn.Linear) else {"algorithm": algorithm}
            new = PARTIAL[type(conv)].from_plain(
                conv, trainable=chosen[0], trainable_inputs=chosen[1], **options, **own
            )
            replacements[conv] = _with_hooks(new, conv)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    if left:
        listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in left.items())
        warnings.warn(f"left as they are, learning all they learned before: {listed}", stacklevel=2)
    if norm == "frozen":
        freeze_norms(model)
    model = _replace(model, replacements)
    if draw_seed is not None:
        draw_(model, draw_seed, layers=[name for name, conv in convs.items() if conv in replacements])
    if lean:
        _make_lean(model)
    if verbose:
        print(describe(model, example))
        if lean:
            print(table(["layer", "kept for backward"], [(name, text) for name, text in explain(model).items()]))
        if plan is not None:
            print(plan)
    return model


def plan_budget(
    model: nn.Module,
    budget: int | str | float,
    *,
    example: Tensor | None = None,
    select: str = "magnitude",
    optimizer_states: int = 1,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: Iterable[Any] = (),
    **options: Any,
) -> Budget:
    """The filters that `convert(model, budget=...)` lets learn, and what they cost: printed, a table; `model` stays.

    What a training step takes beside parameters and buffers (kept for backward, gradients, optimizer state; what
    `rwn_ext.report.memory` measures) stays within the budget, and as much score² per byte as a greedy choice finds is
    learned for it. `convert(model, plan.filters)` does what was planned.

    Args:
        budget: bytes, as an int or a text such as "2 GB" or "512 MiB"; or, as a float, the share of the convertible
            layers' weights that is learned, whatever is kept for backward.
        example: an input of the model, with the batch size of training; a budget of bytes needs it.
        select: the score of a filter: "magnitude", its own L2 norm, or "gradient", that of its gradient summed over
            `batches`, with `loss(model, batch)` as for `rwn_ext.gradient_norms`.
        optimizer_states: how many numbers the optimizer keeps for a learned one: SGD 0, with momentum 1, Adam 2.
        options: of `convert`. What `lean` saves is not counted on.

    Copies of the model run the example once for each layer. Raises ValueError for a budget that is none, and for one
    that the model exceeds with no filter learned, naming the least possible.
    """
    if select not in SCORES:
        raise ValueError(f"select={select!r} gives filters no score; with a budget choose one of {', '.join(SCORES)}")
    if select == "gradient" and (loss is None or not (batches := list(batches))):
        raise ValueError("select='gradient' needs loss=, a function of the model and a batch, and batches=")
    already = _partial(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said when the model itself is converted
        probe = convert(copy.deepcopy(model), 1, select="magnitude", **options)
    dense = restore(copy.deepcopy(probe))
    layers = {name: dense.get_submodule(name) for name in _partial(probe) if name not in already}
    if loss is None or select == "magnitude":
        scores = magnitudes(layers)
    else:
        scores = gradient_norms_of(dense, layers, loss, batches)
    return fit(probe, budget, example, scores, optimizer_states)


def restore(model: nn.Module) -> nn.Module:
    """Replaces, in place, every partly learned layer by the layer of torch that computes the same. Returns the model.

    Undoes `lean` and `norm="frozen"` too.
    """
    unfreeze_norms(undo_lean(model))
    return _replace(model, {module: _with_hooks(module.to_plain(), module) for module in _partial(model).values()})


def subsets(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """What each partly learned layer of the model learns: {name: (filters, input channels)}.

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
    `optimizer` as for `PartialConv2d.set_trainable_`. Raises ValueError for a name that is no partly learned layer
    and for a layer that shares a Parameter with another, and what `set_trainable_` raises, naming the layer; the model
    is then unchanged.
    """
    layers = _partial(model)
    owners = _owners(model)
    unknown = [name for name in subsets if name not in layers]
    if unknown:
        raise ValueError(
            f"no partly learned layer is named {', '.join(map(repr, unknown))}; there are {', '.join(layers)}"
        )
    partitions = {}
    for name, choice in subsets.items():
        try:
            filters, inputs = choice
            partitions[name] = layers[name].partition_for(filters, inputs, optimizer=optimizer)
            shared = [part for part, value in layers[name]._parameters.items() if owners[id(value)] > 1]
            if shared and partitions[name] != layers[name].partition:
                raise ValueError(
                    f"its {', '.join(shared)} are shared with another module, which would not follow; "
                    "use one module in both places instead"
                )
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    for name, partition in partitions.items():
        layers[name].set_partition_(partition, optimizer=optimizer)
    return model


def merge_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of parts (`conv.weight_trainable`, ...) with the whole `conv.weight` and `conv.bias` instead.

    A sharded model (FSDP2) has the first form, a plain model, converted or not, the second. `model` says how its layers
    split, so its `subsets` must be those that the state dict was made with; sharded values (DTensor) are gathered, for
    which every process must call. Entries of anything else pass through.

    Raises ValueError for a part that is missing or has another shape than in `model`, naming it.
    """
    merged = dict(state_dict)
    for name, layer in _partial(model).items():
        prefix = f"{name}." if name else ""
        for whole, parts in PARTS.items():
            found = {part: merged[prefix + part] for part in parts if prefix + part in merged}
            if not found:
                continue
            for part in parts:
                expected, value = getattr(layer, part), found.get(part)
                if (expected is None) != (value is None) or (value is not None and value.shape != expected.shape):
                    shapes = [None if x is None else tuple(x.shape) for x in (value, expected)]
                    raise ValueError(
                        f"{prefix}{part} has shape {shapes[0]} in the state dict, {shapes[1]} in the model; set the "
                        "model's subsets to those it was made with, and load all parts"
                    )
            values = [_gathered(found.get(part)) for part in parts]
            dtype = next(value.dtype for value in values if value is not None)
            merge = layer.partition.merge_weight if whole == "weight" else layer.partition.merge_bias
            entries = {prefix + whole: merge(values, dtype)}
            merged = _exchange(merged, [prefix + part for part in found], entries)
    return merged


def split_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `merge_state_dict`: parts under their own names, as a sharded `model` loads them.

    Raises ValueError for a `weight` or `bias` of another shape than in `model`, naming it.
    """
    divided = dict(state_dict)
    for name, layer in _partial(model).items():
        prefix = f"{name}." if name else ""
        for whole in PARTS:
            value = divided.get(prefix + whole)
            if value is None:
                continue
            shape = layer._shape(whole)
            if shape is None or value.shape != shape:
                raise ValueError(
                    f"{prefix}{whole} has shape {tuple(value.shape)} in the state dict, "
                    f"{shape and tuple(shape)} in the model"
                )
            parts = layer.partition.split_weight(value) if whole == "weight" else layer.partition.split_bias(value)
            entries = {prefix + part: value for part, value in parts.items() if value is not None}
            divided = _exchange(divided, [prefix + whole], entries)
    return divided


def _gathered(value: Tensor | None) -> Tensor | None:
    return value.full_tensor() if value is not None and hasattr(value, "full_tensor") else value


def _exchange(entries: dict[str, Any], old: list[str], new: dict[str, Any]) -> dict[str, Any]:
    """`entries` with `new` in the place of the first of `old`, and without the rest of `old`."""
    result: dict[str, Any] = {}
    for key, value in entries.items():
        if key == old[0]:
            result.update(new)
        elif key not in old:
            result[key] = value
    return result


_NO_CHOICE = object()


def _choice(trainable: Any, name: str) -> Any:
    if not isinstance(trainable, Mapping):
        return trainable
    return next(
        (choice for pattern, choice in reversed(list(trainable.items())) if fnmatchcase(name, pattern)), _NO_CHOICE
    )


def _both_choices(
    conv: Any, trainable: Any, trainable_inputs: Any, select: str, generator: torch.Generator | None
) -> tuple[Any, Any]:
    """(trainable, trainable_inputs) for this layer: input channels of a depthwise one are chosen by their filters."""
    if trainable_inputs is None or isinstance(conv, nn.Linear) or conv.groups == 1 or conv.groups != conv.in_channels:
        return trainable, trainable_inputs
    channels = conv.in_channels
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
            raise ValueError(
                f"pattern {pattern!r} matches no layer that could be converted; there are {', '.join(convs) or 'none'}"
            )


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each Parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _obstacle(conv: nn.Module, owners: Counter[int]) -> str | None:
    """What would be lost by converting this layer; None if nothing."""
    if type(conv) not in PARTIAL:
        plain = next(kind for kind in PARTIAL if isinstance(conv, kind))
        return f"a subclass of nn.{plain.__name__}, {type(conv).__name__}"
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
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]
    return new


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _partial(model: nn.Module) -> dict[str, PartialLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PartialLayer)}
