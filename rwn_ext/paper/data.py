"""The paper's image sets as uint8 tensors on the training device, and their augmentation a batch at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rwn_ext.paper import imagenet
from rwn_ext.paper.pickles import WAY_OUT, DataError, bytes_of, read_inert


@dataclass(frozen=True, eq=False)
class Split:
    """The images of a training or test set and their labels, on one device."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set and how it is augmented: mean and std of pixels in 0..1, mirroring or not, padding of the crop."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    padding: int

    def to(self, device: torch.device | str) -> ImageSet:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load(folder: str | Path | None, *, image_size: int | None = None) -> ImageSet:
    """CIFAR-10 or CIFAR-100 from an official folder or the folder above it; without one, scikit-learn's digits.

    Also downsampled ImageNet and folders of classes, see `rwn_ext.paper.imagenet`: these are read lazily from one file
    into which they are once converted. Nothing else is written, and nothing downloaded. `image_size` is of the digits
    (default 32), which are upsampled from 8x8, and of folders of classes (default 64). The files are not trusted:
    sizes, shapes and labels are checked and a pickle cannot run code. Raises DataError for a folder or file that cannot
    be used, ValueError for an impossible `image_size`, RuntimeError without a package that is needed.
    """
    if folder is None:
        return _digits(32 if image_size is None else image_size)
    try:
        large = imagenet.read(Path(folder).expanduser(), image_size)
        if large is not None:
            return _large(large)
        if image_size not in (None, 32):
            raise ValueError(f"image_size={image_size}: CIFAR images are 32x32; leave image_size out or give no folder")
        place, layout = _find(Path(folder).expanduser())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check the path and its permissions") from None
    return ImageSet(
        name=layout.name,
        train=_read_split(place, layout, layout.train),
        test=_read_split(place, layout, layout.test),
        num_classes=layout.num_classes,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        flip=True,
        padding=4,
    )


def _large(found: imagenet.Images) -> ImageSet:
    train, test = (Split(*part) for part in (found.train, found.test))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    padding = train.images.size(-1) // 8
    return ImageSet(found.name, train, test, found.num_classes, mean, std, flip=True, padding=padding)


def split_classes(images: ImageSet, tasks: int) -> list[ImageSet]:
    """As many image sets, each of consecutive classes, numbered anew from 0. The first may have one more."""
    if not 2 <= tasks <= images.num_classes // 2:
        raise ValueError(f"split={tasks} must leave each of 2 or more tasks 2 of the {images.num_classes} classes")
    classes = torch.arange(images.num_classes).tensor_split(tasks)

    def chosen(split: Split, first: int, last: int) -> Split:
        rows = ((split.labels >= first) & (split.labels <= last)).nonzero().flatten()
        return Split(split.images[rows], split.labels[rows] - first)

    return [
        replace(
            images, name=f"{images.name}-{first}-{last}", num_classes=last - first + 1,
            train=chosen(images.train, first, last), test=chosen(images.test, first, last),
        )
        for first, last in ((int(group[0]), int(group[-1])) for group in classes)
    ]  # fmt: skip


def rotated(images: ImageSet, quarters: int) -> ImageSet:
    """The same images turned by 90 degrees, counterclockwise, this many times."""

    def turned(split: Split) -> Split:
        return Split(split.images.rot90(quarters, (2, 3)).contiguous(), split.labels)

    name = f"{images.name}-{90 * quarters}deg"
    return replace(images, name=name, train=turned(images.train), test=turned(images.test))


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels) on the split's device: shuffled by one draw from `generator`, else in order.

    The permutation is drawn at the call. `batch_size` is global: of each batch a rank takes `batch[rank::world_size]`,
    so ranks must hold equal generators. Every rank gets equally many, equally long batches: the up to
    `world_size - 1` rows that would make the last one uneven are left out, so evaluate with `world_size=1`.
    """
    parts = batch_rows(split, batch_size, generator=generator, drop_last=drop_last, rank=rank, world_size=world_size)
    return ((split.images.index_select(0, rows), split.labels.index_select(0, rows)) for rows in parts)


def batch_rows(
    split: Split, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False, rank: int = 0,
    world_size: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Which rows of the split the batches of an epoch hold, see `batches`."""
    if batch_size < 1 or world_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of world_size={world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is outside 0..{world_size - 1} (world_size={world_size})")
    device = split.images.device
    if generator is None:
        order = torch.arange(len(split), device=device)
    else:
        order = torch.randperm(len(split), generator=generator, device=generator.device).to(device)
    end = len(split) - len(split) % (batch_size if drop_last else world_size)
    # Batches start at multiples of world_size, so striding the whole order strides each batch.
    return [rows for rows in order[:end][rank::world_size].split(batch_size // world_size) if len(rows)]


def random_crop_flip(images: Tensor, generator: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """Each image padded with zeros, cropped to its size at its own random offset, mirrored with probability 1/2.

    images (N, C, H, W); the result has their shape, dtype, device and memory format. `generator` lives on the same
    device, and the host never waits. The paper's augmentation of CIFAR: padding 4, mirrored.
    """
    return crop_flip(images, draws(len(images), generator, padding=padding, flip=flip), padding=padding)


def draws(count: int, generator: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """The random numbers of `random_crop_flip` for so many images, (3, count) int64: rows and columns by which they are
    shifted, in 0..2 padding, and whether they are mirrored."""
    if padding < 0:
        raise ValueError(f"padding={padding} must not be negative; 0 leaves images where they are")

    def draw(limit: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator, device=generator.device)

    rows, cols = draw(2 * padding + 1), draw(2 * padding + 1)
    return torch.stack([rows, cols, draw(2) if flip else torch.zeros_like(rows)])


def crop_flip(images: Tensor, draws: Tensor, *, padding: int) -> Tensor:
    """What `random_crop_flip` does, given its random numbers: the same bits on every device, by one gather."""
    n, c, h, w = images.shape
    top, left, mirrored = draws[:, :, None]  # (N, 1) each
    rows = top + torch.arange(h, device=images.device)  # (N, H)
    cols = left + torch.arange(w, device=images.device)  # (N, W)
    cols = torch.where(mirrored == 1, cols.flip(1), cols)
    padded = F.pad(images, (padding, padding, padding, padding))
    pixels = rows[:, :, None] * padded.shape[3] + cols[:, None, :]  # (N, H, W)
    crops = padded.flatten(2).gather(2, pixels.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return crops.contiguous(memory_format=torch.channels_last) if channels_last else crops


def normalize(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`((images / 255 - mean) / std).to(dtype)` by channel, computed in float32, in the images' memory format."""

    own_mean, own_std = (_by_channel(values, images.device) for values in (mean, std))
    return images.to(torch.float32, copy=True).div_(255).sub_(own_mean).div_(own_std).to(dtype)


@lru_cache(maxsize=64)
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once for each device: a copy from the host would make it wait, and a CUDA graph cannot hold one."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Layout:
    """An official distribution of a CIFAR set: its files with their numbers of records, and where labels are.

    `label` is how many label bytes open a binary record (the last one counts), or the key of a pickle's label list.
    """

    name: str
    num_classes: int
    train: dict[str, int]
    test: dict[str, int]
    label: int | bytes


LAYOUTS = {
    "cifar-10-batches-bin": Layout(
        "cifar10", 10, {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, {"test_batch.bin": 10_000}, label=1
    ),
    "cifar-10-batches-py": Layout(
        "cifar10", 10, {f"data_batch_{i}": 10_000 for i in range(1, 6)}, {"test_batch": 10_000}, label=b"labels"
    ),
    "cifar-100-binary": Layout("cifar100", 100, {"train.bin": 50_000}, {"test.bin": 10_000}, label=2),
    "cifar-100-python": Layout("cifar100", 100, {"train": 50_000}, {"test": 10_000}, label=b"fine_labels"),
}
PIXELS = 3 * 32 * 32  # bytes an image: R, G, B planes, each row by row
MAX_FILE_BYTES = 512 * 2**20


def _find(folder: Path) -> tuple[Path, Layout]:
    """The one layout whose files are in the folder or in its subfolder of the official name."""
    found = [
        (place, name)
        for name, layout in LAYOUTS.items()
        for place in (folder, folder / name)
        if any((place / file).is_file() for file in (*layout.train, *layout.test))
    ]
    if not found:
        state = "holds no data set" if folder.is_dir() else "is no folder"
        raise DataError(f"{folder}: {state}; give one of {', '.join(LAYOUTS)} as officially unpacked, or its parent")
    if len(found) > 1:
        layouts = ", ".join(f"{name} in {place}" for place, name in found)
        raise DataError(f"{folder}: holds several data sets ({layouts}); pass a folder that holds one of them")
    place, name = found[0]
    return place, LAYOUTS[name]


def _read_split(place: Path, layout: Layout, files: dict[str, int]) -> Split:
    parts = [_read_file(place / file, layout, records) for file, records in files.items()]
    return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def _read_file(path: Path, layout: Layout, records: int) -> Split:
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'not a regular file' if path.exists() else 'missing file'}; {WAY_OUT}")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes found, no official file is as large; {WAY_OUT}")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from error
    if isinstance(layout.label, bytes):
        return _from_pickle(path, content, layout.label, layout.num_classes, records)
    return _from_binary(path, content, layout.label, layout.num_classes, records)


def _from_binary(path: Path, content: bytes, label_bytes: int, num_classes: int, records: int) -> Split:
    expected = records * (label_bytes + PIXELS)
    if len(content) != expected:
        raise DataError(f"{path}: {expected} bytes expected ({records} records), {len(content)} found; {WAY_OUT}")
    table = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(records, label_bytes + PIXELS)
    labels = table[:, label_bytes - 1].long()
    if labels.max() >= num_classes:
        raise DataError(f"{path}: label {int(labels.max())} found, 0..{num_classes - 1} expected; {WAY_OUT}")
    return Split(table[:, label_bytes:].reshape(records, 3, 32, 32), labels)


def _from_pickle(path: Path, content: bytes, label_key: bytes, num_classes: int, records: int) -> Split:
    batch = read_inert(path, content)
    if not isinstance(batch, dict) or not {b"data", label_key} <= batch.keys():
        raise DataError(f"{path}: a pickled dict with the keys b'data' and {label_key!r} expected; {WAY_OUT}")
    labels = batch[label_key]
    valid = isinstance(labels, list) and all(type(label) is int and 0 <= label < num_classes for label in labels)
    if not valid or len(labels) != records:
        raise DataError(
            f"{path}: {label_key!r} must be a list of {records} integers in 0..{num_classes - 1}; {WAY_OUT}"
        )
    shape, pixels = bytes_of(batch[b"data"])
    if shape != (records, PIXELS) or len(pixels) != records * PIXELS:
        raise DataError(f"{path}: b'data' must be a uint8 array of shape ({records}, {PIXELS}), C order; {WAY_OUT}")
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(records, 3, 32, 32)
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def _digits(image_size: int) -> ImageSet:
    """scikit-learn's 1797 digits, always split alike: 1437 to train, 360 to test, classes in proportion."""
    if image_size < 8:
        raise ValueError(f"image_size={image_size}: the digits are 8x8 and are not shrunk; give 8 or more")
    if importlib.util.find_spec("sklearn") is None:
        raise RuntimeError("the handwritten digits need scikit-learn: pip install 'rwn_ext[paper]', or give a folder")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    values = torch.from_numpy(digits.images)[:, None]  # (N, 1, 8, 8) in 0..16
    values = F.interpolate(values, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = (values * (255 / 16)).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    rows = train_test_split(range(len(labels)), test_size=360, stratify=labels.numpy(), random_state=0)
    train, test = (Split(images[part], labels[part]) for part in rows)
    pixels = train.images[:, 0].double() / 255
    return ImageSet(
        name="digits",
        train=train,
        test=test,
        num_classes=10,
        mean=(pixels.mean().item(),) * 3,
        std=(pixels.std().item(),) * 3,
        flip=False,
        padding=image_size // 8,
    )
