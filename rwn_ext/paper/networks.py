"""The paper's networks: WRN-D-K, DenseNet-BC-L-k, VGG and AlexNet for small images, wholly or partly learned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwn_ext.convert import convert
from rwn_ext.draw import draw, draw_
from rwn_ext.lean import make_lean
from rwn_ext.paper.slices import slice_
from rwn_ext.subsets import choose
from rwn_ext.zeroed import fold

NAMES = (
    "wrn-D-K (wrn-28-10), wrn-D-K-imagenet (for 64x64), densenet-bc-L-k (densenet-bc-100-12), vgg11-bn, vgg19-bn, "
    "vgg19, alexnet"
)
FROZEN = ("random", "zero", "he", "orthogonal", "signed")
BN = ("learned", "frozen", "none")
GAMMA = ("ones", "uniform")


def build(
    name: str,
    num_classes: int,
    part: Any = None,
    frozen: str = "random",
    only: str | None = None,
    bn: str = "learned",
    dropout: float | None = None,
    seed: int | None = None,
    lean: bool = False,
    *,
    dim: int = 0,
    select: str = "last",
    gamma: str = "ones",
    start: Mapping[str, Tensor] | None = None,
) -> Network:
    """A network of the paper with the paper's initialisation, of which only a part is learned.

    Args:
        name: wrn-D-K, wrn-D-K-imagenet, densenet-bc-L-k, vgg11-bn, vgg19-bn, vgg19 or alexnet.
        part: what every convolution learns, as `trainable` of `PartialConv2d`: a fraction, a count of filters, ...;
            None: everything, in plain `nn.Conv2d`.
        frozen: fixed weights keep their random values ("random") or are zero ("zero"), and are then not computed. With
            "he", "orthogonal" or "signed" they are random too, all weights of convolutions being drawn so at the start
            (see `rwn_ext.draw_`, and `save_compact(..., init=network.init)`).
        only: learn one part of the network (conv1, block1, ..., fc; see `parts` of the network), several ("conv1+fc"),
            or "nothing"; the classifier stays random unless it is among them. `part` then says how much of each
            convolution in them.
        bn: gamma and beta of every BatchNorm are "learned" or "frozen", running statistics being updated in either
            case; "none": the network has no BatchNorm.
        dropout: of WRN between the convolutions of a unit; None is the paper's: 0.3 for wrn-28-10, else 0.
        seed: initial values are drawn from it by `rwn_ext.draw_`, the same on every machine, leaving torch's global
            generator as it was; None draws from the global.
        lean: keep for backward only what the learned part needs (see `rwn_ext.convert`).
        dim: the dimension of a weight along which `part` chooses: 0 filters; or 1 input channels, 2 rows or 3 columns
            of the kernel (see `rwn_ext.paper.slices`), of these at least one, as in the authors' experiments.
        select: which filters or input channels a fraction or a count takes: "last" (the paper's), "first", "random",
            "magnitude".
        gamma: initial gamma of BatchNorm: 1 ("ones") or drawn from U(0, 1) ("uniform"; Frankle et al. 2020).
        start: a state dict of such a network whose values it begins with instead; of a classifier for other classes
            alone the drawn ones stay.

    Raises ValueError for an unknown name or part, and for a choice that leaves nothing to learn.
    Source: sections 3 and 4; without `only` the "fractional" experiments, with it the "integral" ones.
    """
    for what, value, known in (("frozen", frozen, FROZEN), ("bn", bn, BN), ("gamma", gamma, GAMMA)):
        if value not in known:
            raise ValueError(f"{what}={value!r} is unknown; choose one of {', '.join(known)}")
    make = _maker(name, num_classes, dropout)
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        network = make()
    if frozen not in ("random", "zero"):
        network.init, frozen = frozen, "random"
        seed = int(torch.randint(2**62, ())) if seed is None else seed
    if seed is not None:
        draw_(network, seed, init=network.init)
    _normalize(network, bn, gamma, seed)
    if start is not None:
        _begin_with(network, start)
    _fix(network, _Choice(part, dim, select, seed), frozen, only)
    if frozen == "zero" and not lean:
        fold(network)
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"part={part!r}, only={only!r}, bn={bn!r} leave nothing of {name} to learn")
    if lean:
        make_lean(network)
    return network


def _maker(name: str, num_classes: int, dropout: float | None) -> Callable[[], Network]:
    wrn = re.fullmatch(r"wrn-(\d{1,4})-(\d{1,4})(-imagenet)?", name)
    if wrn:
        depth, width = int(wrn[1]), int(wrn[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"{name}: a wide residual network has depth 6n + 4 (10, 16, 28, ...) and width 1 or more")
        rate = (0.3 if name == "wrn-28-10" else 0.0) if dropout is None else dropout
        if not 0 <= rate < 1:
            raise ValueError(f"dropout={dropout} is no probability below 1")
        if wrn[3]:
            return lambda: ImageNetWideResNet(depth, width, num_classes, rate, first_stride=2)
        return lambda: WideResNet(depth, width, num_classes, rate)
    if dropout:
        raise ValueError(f"dropout={dropout}: only wide residual networks (wrn-D-K) have dropout in the paper")
    densenet = re.fullmatch(r"densenet-bc-(\d{1,4})-(\d{1,4})", name)
    if densenet:
        depth, growth = int(densenet[1]), int(densenet[2])
        if depth < 10 or (depth - 4) % 6 or growth < 1:
            raise ValueError(f"{name}: a DenseNet-BC has depth 6n + 4 (22, 40, 100, ...) and growth rate 1 or more")
        return lambda: DenseNetBC(depth, growth, num_classes)
    if name in ("vgg11-bn", "vgg19-bn", "vgg19"):
        return lambda: VGG(_VGG_BLOCKS[name.removesuffix("-bn")], name.endswith("-bn"), num_classes)
    if name == "alexnet":
        return lambda: AlexNet(num_classes)
    raise ValueError(f"there is no network {name!r}; choose {NAMES}")


def _normalize(network: Network, bn: str, gamma: str, seed: int | None) -> None:
    """Freezes or removes every BatchNorm, or gives it another gamma."""
    for name, norm in list(network.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        if gamma == "uniform":
            drawn = torch.empty_like(norm.weight).uniform_(-1, 1)
            if seed is not None:
                drawn = draw(seed, f"{name}.weight", tuple(norm.weight.shape)).to(drawn.device)
            with torch.no_grad():
                norm.weight.copy_((drawn + 1) / 2)
        if bn == "frozen":
            norm.requires_grad_(False)
        if bn == "none":
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, nn.Identity())


def _begin_with(network: Network, start: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    chosen = {key: start[key] for key in own if key in start}
    for key, value in own.items():
        if key in chosen and chosen[key].shape != value.shape and key.startswith("fc."):
            del chosen[key]
        elif key not in chosen or chosen[key].shape != value.shape:
            shape = tuple(chosen[key].shape) if key in chosen else None
            raise ValueError(f"start is of another network: its {key} has shape {shape}, not {tuple(value.shape)}")
    network.load_state_dict(own | chosen)


class _Choice(NamedTuple):
    """How much of a convolution is learned, along which dimension of its weight, and which of it."""

    part: Any
    dim: int
    select: str
    seed: int | None


def _fix(network: Network, choice: _Choice, frozen: str, only: str | None) -> None:
    """Fixes what the choice and `only` do not let learn."""
    part = choice.part
    if choice.dim not in range(4):
        raise ValueError(f"dim={choice.dim} is no dimension of a convolution's weight; choose 0, 1, 2 or 3")
    if part is None and choice.dim:
        raise ValueError(f"dim={choice.dim} needs to know how much is learned along it: give part")
    if choice.dim > 1 and choice.select != "last":
        raise ValueError(f"select={choice.select!r} chooses filters or input channels; with dim={choice.dim} leave it")
    names = [name for name, _ in _convolutions(network)]
    if only is None:
        if part is not None:
            _convert(network, names, choice, frozen)
        elif frozen != "random":
            raise ValueError(f"frozen={frozen!r} needs something fixed: give part or only")
        return
    chosen = [] if only == "nothing" else only.split("+")
    for name in chosen:
        if name not in network.parts:
            raise ValueError(
                f"only={only!r} is no part of this network; choose {', '.join(network.parts)}, several joined by + "
                "(conv1+fc), or nothing"
            )
    inside = [name for name in names if name.split(".")[0] in chosen]
    if part is not None and not inside:
        raise ValueError(f"part={part!r} chooses filters, and only={only!r} has no convolution; leave one of them out")
    _convert(network, [name for name in names if name not in inside], _Choice(0, 0, "last", None), frozen)
    if part is not None:
        _convert(network, inside, choice, frozen)
    network.fc.requires_grad_("fc" in chosen)


def _convert(network: Network, names: list[str], choice: _Choice, frozen: str) -> None:
    """Lets these convolutions learn what the choice says."""
    part, dim, select, seed = choice
    if dim > 1:
        slice_(network, names, dim, part, frozen)
    elif dim == 1:
        convs = dict(_convolutions(network))
        # Of the three channels of the images a tenth is none.
        none = [name for name in names if not len(choose(part, convs[name].weight.size(1), what="part"))]
        for chosen, inputs in ((none, 1), ([name for name in names if name not in none], part)):
            if chosen:
                every = dict.fromkeys(chosen, 1.0)
                convert(network, every, trainable_inputs=inputs, select=select, seed=seed, frozen=frozen)
    elif names:
        convert(network, dict.fromkeys(names, part), select=select, seed=seed, frozen=frozen)


def _convolutions(network: Network) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def _draw_normal(network: Network) -> None:
    for _, conv in _convolutions(network):
        nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels)))


class Network(nn.Module):
    """What the paper's networks share: named parts, the last of them the classifier."""

    parts: ClassVar[tuple[str, ...]]
    init: str = "uniform"
    """How convolutions are initialised: one of `rwn_ext.draw.INITS`."""
    fc: nn.Linear


class WideResNet(Network):
    """WRN-depth-width (Zagoruyko & Komodakis 2016), pre-activation: (N, 3, H, W) -> (N, classes)."""

    parts = ("conv1", "block1", "block2", "block3", "fc")

    def __init__(self, depth: int, width: int, num_classes: int, dropout: float, first_stride: int = 1) -> None:
        super().__init__()
        units, widths = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _wide_block(widths[0], widths[1], units, first_stride, dropout)
        self.block2 = _wide_block(widths[1], widths[2], units, 2, dropout)
        self.block3 = _wide_block(widths[2], widths[3], units, 2, dropout)
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


class ImageNetWideResNet(WideResNet):
    """The same for 64x64 ImageNet: stride 2 in all three blocks, normal initial values."""

    init = "normal"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _draw_normal(self)


def _wide_block(in_channels: int, out_channels: int, units: int, stride: int, dropout: float) -> nn.Sequential:
    first = WideUnit(in_channels, out_channels, stride, dropout)
    return nn.Sequential(first, *(WideUnit(out_channels, out_channels, 1, dropout) for _ in range(units - 1)))


class WideUnit(nn.Module):
    """norm - relu - conv - norm - relu - dropout - conv, added to the input or to its 1x1 projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(F.relu(self.bn2(self.conv1(y))))
        return shortcut + self.conv2(y)


class DenseNetBC(Network):
    """DenseNet-BC (Huang et al. 2017) for small images, compression 0.5: (N, 3, H, W) -> (N, classes)."""

    parts = ("conv1", "block1", "block2", "block3", "fc")
    init = "normal"

    def __init__(self, depth: int, growth: int, num_classes: int) -> None:
        super().__init__()
        units, channels = (depth - 4) // 6, 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.block1 = _dense_block(channels, growth, units)
        channels += units * growth
        self.transition1 = Transition(channels, channels // 2)
        self.block2 = _dense_block(channels // 2, growth, units)
        channels = channels // 2 + units * growth
        self.transition2 = Transition(channels, channels // 2)
        self.block3 = _dense_block(channels // 2, growth, units)
        channels = channels // 2 + units * growth
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        _draw_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def _dense_block(channels: int, growth: int, units: int) -> nn.Sequential:
    return nn.Sequential(*(DenseUnit(channels + i * growth, growth) for i in range(units)))


class DenseUnit(nn.Module):
    """norm - relu - 1x1 conv to 4k - norm - relu - 3x3 conv to k, concatenated to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


class Transition(nn.Module):
    """norm - relu - 1x1 conv - 2x2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


_VGG_BLOCKS = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg19": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(Network):
    """VGG (Simonyan & Zisserman 2015) with one linear layer as its head: (N, 3, 32, 32) -> (N, classes)."""

    parts = ("block1", "block2", "block3", "block4", "block5", "fc")

    def __init__(self, blocks: tuple[tuple[int, ...], ...], batch_norm: bool, num_classes: int) -> None:
        super().__init__()
        channels = 3
        for i, widths in enumerate(blocks, 1):
            layers: list[nn.Module] = []
            for width in widths:
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            self.add_module(f"block{i}", nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts[:-1]:
            x = self.get_submodule(part)(x)
        return self.fc(x.mean((2, 3)))


class AlexNet(Network):
    """AlexNet for CIFAR, without normalisation: (N, 3, 32, 32) -> (N, classes)."""

    parts = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc")

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4, padding=5)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 2)
        return self.fc(x.mean((2, 3)))
