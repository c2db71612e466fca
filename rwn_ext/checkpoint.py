"""Compact checkpoints: what was learned, and from what the rest is made again.

The fixed part of a network is a seed (`rwn_ext.draw_`, `rwn_ext.paper.networks.build(..., seed=)`), zeros, or a
backbone that many tasks share. A file holds the rest, in safetensors, which runs no code when it is read:

* for each weight and bias of a partly learned layer, the smallest block of filters and input channels outside of which
  it is, bit for bit, what its origin says: that is the learned block, and more only if other filters were learned
  before;
* everything else of the state dict (normalisation, classifier, other layers) whole;
* as JSON in its metadata: the source, the subsets, and for each block where it belongs and a SHA-256 of all around it.

Nothing is loaded that does not prove to be the network that was saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rwn_ext.convert import set_subsets_, subsets
from rwn_ext.draw import INITS, VERSION, draw
from rwn_ext.files import replacing
from rwn_ext.partial_layer import PartialLayer
from rwn_ext.partition import PARTS
from rwn_ext.subsets import Subset

FORMAT = "rwn_ext compact checkpoint 1"
State = Mapping[str, Tensor]


def save_compact(
    model: nn.Module, path: str | Path, *, seed: int | None = None, init: str = "uniform", base: State | None = None
) -> None:
    """Writes what `model` has learned to `path`, a safetensors file.

    Args:
        seed: the fixed weights are what `draw_(model, seed, init=init)` draws.
        init: likewise; `paper.networks` draws DenseNet's as "normal", the others' as "uniform".
        base: instead of a seed, the state dict of the backbone that the fixed weights are from. It must be at hand
            again when the file is loaded: one backbone and N tasks are one large file and N small ones.

    Raises ValueError if neither or both are given, and if the fixed weights are not from there; nothing is then
    written. Fixed weights that were learned before a `set_trainable_` are no obstacle: they are stored.
    """
    if (seed is None) == (base is None):
        raise ValueError("give the seed that the fixed weights were drawn from, or the backbone as base=, not both")
    source = Source(seed, init, base)
    state = _tensors(model)
    stored, blocks = {}, {}
    fixed, found = False, False
    for key, value in state.items():
        layer = _layer(model, key)
        if layer is None:
            stored[key] = value.contiguous()
            continue
        zero = layer.frozen == "zero"
        learned, around = _blocks(layer, value, source.origin(key, state, value.dtype, zero))
        blocks[key] = around.entry(value, zero)
        stored[key] = value[around.index].contiguous()
        if not zero and not learned.is_whole and value.dim() > 1:
            fixed, found = True, found or not around.is_whole
    if fixed and not found:
        raise ValueError(
            f"nothing of the fixed weights is what {source} says; give the seed and init that the network was drawn "
            "with, or the backbone as base="
        )
    layout = json.dumps({"source": source.entry(), "subsets": subsets(model), "blocks": blocks})
    metadata = {"format": FORMAT, "layout": layout, "sha256": _content_hash(stored, layout)}
    with replacing(Path(path)) as unfinished:
        _safetensors().torch.save_file(stored, unfinished, metadata)


def load_compact(
    model: nn.Module, path: str | Path, *, seed: int | None = None, base: State | None = None
) -> nn.Module:
    """Makes `model` what was saved: its weights, and its subsets where it has partly learned layers. Returns the model.

    `model` has the architecture that was saved, of torch's layers or partly learned ones, with any values.

    Args:
        seed: the seed that the file must be of; default: whatever it says.
        base: the state dict of the backbone, if the file was saved with one; default: the model's own weights.

    Raises ValueError, saying what differs, for a file that is damaged or no compact checkpoint, for another network,
    another seed or another backbone; the model is then unchanged.
    """
    stored, layout = _read(path)
    state = _tensors(model)
    _check_network(path, state, stored, layout["blocks"])
    source = Source.of(layout["source"], state if base is None else base)
    if seed is not None and source.seed != seed:
        raise ValueError(f"{path} is of {source}, not of seed={seed}")
    whole = {}
    for key, value in stored.items():
        entry = layout["blocks"].get(key)
        if entry is None:
            whole[key] = value
            continue
        block = Block.of(entry)
        origin = source.origin(key, state, value.dtype, entry["zero"])
        if block.hash_around(origin) != entry["around"]:
            raise ValueError(f"{path}: what is fixed of {key} was not {source} when it was saved")
        whole[key] = origin.index_put(block.index, value)
    own = {name for name, module in model.named_modules() if isinstance(module, PartialLayer)}
    set_subsets_(model, {name: choice for name, choice in layout["subsets"].items() if name in own})
    model.load_state_dict(whole)
    return model


@dataclass(frozen=True)
class Source:
    """Where fixed weights are from: a seed, or the state dict of a backbone."""

    seed: int | None
    init: str
    base: State | None

    def __str__(self) -> str:
        return "that of this backbone" if self.seed is None else f"seed={self.seed} with init={self.init!r}"

    def entry(self) -> dict[str, Any]:
        return {"seed": self.seed, "init": self.init, "version": VERSION}

    @classmethod
    def of(cls, entry: dict[str, Any], base: State) -> Source:
        if entry["version"] != VERSION or entry["init"] not in INITS:
            raise ValueError(f"the file is of {entry}, which this version of rwn_ext cannot draw; update rwn_ext")
        return cls(entry["seed"], entry["init"], base)

    def origin(self, key: str, state: State, dtype: torch.dtype, zero: bool) -> Tensor:
        """What the entry `key` of such a state dict was before anything was learned; zeros if its layer fixes so."""
        shape = state[key].shape
        if zero:
            return torch.zeros(shape, dtype=dtype)
        if self.seed is None:
            assert self.base is not None
            if key not in self.base or self.base[key].shape != shape:
                raise ValueError(f"the backbone has no {key} of shape {tuple(shape)}")
            return self.base[key].detach().to("cpu", dtype)
        weight = key.removesuffix("bias") + "weight" if key.endswith("bias") else key
        return draw(self.seed, key, shape, weight_shape=state[weight].shape, init=self.init).to(dtype)


@dataclass(frozen=True)
class Block:
    """Some filters of a weight or bias, and of a weight some input channels of them."""

    filters: Subset
    inputs: Subset | None

    @property
    def index(self) -> tuple[Tensor, ...]:
        rows = torch.tensor(self.filters.indices, dtype=torch.int64)
        if self.inputs is None:
            return (rows,)
        return (rows[:, None], torch.tensor(self.inputs.indices, dtype=torch.int64))

    @property
    def is_whole(self) -> bool:
        return self.filters.is_full and (self.inputs is None or self.inputs.is_full)

    def hash_around(self, whole: Tensor) -> str:
        """A hash of the values, the block's own blanked out."""
        return _hash(whole.index_put(self.index, torch.zeros((), dtype=whole.dtype)))

    def entry(self, whole: Tensor, zero: bool) -> dict[str, Any]:
        return {
            "shape": list(whole.shape), "filters": self.filters.runs,
            "inputs": None if self.inputs is None else self.inputs.runs,
            "zero": zero, "around": self.hash_around(whole),
        }  # fmt: skip

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Block:
        inputs = None if entry["inputs"] is None else Subset(entry["shape"][1], tuple(entry["inputs"]))
        return cls(Subset(entry["shape"][0], tuple(entry["filters"])), inputs)


def _blocks(layer: PartialLayer, value: Tensor, origin: Tensor) -> tuple[Block, Block]:
    """What is learned of this weight or bias, and the smallest block of that and of all that is not the origin."""
    if value.dim() == 1:
        learned = Block(layer.partition.bias_filters, None)
        cells = (_bits(value) != _bits(origin))[:, None]
    else:
        learned = Block(layer.partition.block, layer.partition.inputs)
        cells = (_bits(value) != _bits(origin)).reshape(*value.shape[:2], -1).any(2)
    cells[learned.index] = True
    filters, inputs = (
        Subset.from_indices(cells.size(axis), cells.any(1 - axis).nonzero().flatten().tolist()) for axis in (0, 1)
    )
    return learned, Block(filters, None if value.dim() == 1 else inputs)


def _layer(model: nn.Module, key: str) -> PartialLayer | None:
    """The layer whose weight or bias this entry of the state dict is."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner) if name in PARTS else None
    return module if isinstance(module, PartialLayer) else None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PartialLayer) and f"{name}.weight".removeprefix(".") not in state:
            raise ValueError(f"{name} is sharded, parametrized or pruned; a compact checkpoint takes whole weights")
    return {key: value.detach().cpu() for key, value in state.items() if torch.is_tensor(value)}


def _check_network(path: str | Path, state: State, stored: State, blocks: dict[str, Any]) -> None:
    missing, unknown = sorted(set(state) - set(stored)), sorted(set(stored) - set(state))
    if missing or unknown:
        raise ValueError(
            f"{path} is of another network: it lacks {', '.join(missing) or 'nothing'}, and holds "
            f"{', '.join(unknown) or 'nothing'} that the model has not"
        )
    for key, value in stored.items():
        shape = tuple(blocks[key]["shape"]) if key in blocks else tuple(value.shape)
        if shape != tuple(state[key].shape):
            raise ValueError(
                f"{path} is of another network: {key} has shape {shape} there, {tuple(state[key].shape)} in the model"
            )


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the layout of a file that is whole."""
    library = _safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no compact checkpoint of this version: its format is {metadata.get('format')!r}")
    if _content_hash(stored, metadata["layout"]) != metadata["sha256"]:
        raise ValueError(f"{path} is damaged: its content is not what its hash says")
    return stored, json.loads(metadata["layout"])


def _content_hash(stored: State, layout: str) -> str:
    whole = hashlib.sha256(layout.encode())
    for key in sorted(stored):
        whole.update(f"{key} {_hash(stored[key])} ".encode())
    return whole.hexdigest()


def _hash(tensor: Tensor) -> str:
    """SHA-256 of type, shape and bytes in C order."""
    head = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    head.update(_bits(tensor).contiguous().flatten().view(torch.uint8).numpy().data)
    return head.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    """The same bits as whole numbers: NaN equals itself, and 0 is not -0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise RuntimeError("compact checkpoints need safetensors: pip install 'rwn_ext[checkpoint]'") from None
    return safetensors
