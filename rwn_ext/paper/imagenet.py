"""Image sets too large to read at every start: downsampled ImageNet and folders of classes, converted to one file once.

The official downsampled ImageNet (Chrabaszcz et al. 2017) is `train_data_batch_1` .. `_10` and `val_data`: pickled
dicts, or .npz archives, of `data` (N, 3 S S) uint8 and `labels` in 1..1000. A folder of classes is
`train/CLASS/*.png` and `val/CLASS/*.png` (or jpg, ...; `test` for `val`), whose images are resized to squares.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwn_ext.paper.pickles import WAY_OUT, DataError, bytes_of, read_inert

TRAIN_FILES = tuple(f"train_data_batch_{i}" for i in range(1, 11))
TEST_FILE = "val_data"
NUM_CLASSES = 1000
MAX_FILE_BYTES = 4 * 2**30
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
FORMAT = 1
Part = tuple[Tensor, Tensor]  # (N, 3, S, S) uint8, (N,) int64


@dataclass(frozen=True)
class Images:
    """The images and labels of training and test set, mapped into memory: read from disk when they are used."""

    name: str
    num_classes: int
    train: Part
    test: Part


def read(folder: Path, image_size: int | None) -> Images | None:
    """The set in this folder; None if it holds none of these kinds.

    Its images are converted once, into `rwn_ext-SIZE` in the folder, or below ~/.cache/rwn_ext (XDG_CACHE_HOME) where
    the folder cannot be written to; again, when the files have changed.
    """
    names = [*TRAIN_FILES, TEST_FILE]
    official = {name: path for name in names for path in (folder / name, folder / f"{name}.npz") if path.is_file()}
    if official:
        return _official(folder, official, image_size)
    tests = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and tests:
        return _tree(folder, tests[0], 64 if image_size is None else image_size)
    return None


def _official(folder: Path, files: dict[str, Path], image_size: int | None) -> Images:
    for name in (*TRAIN_FILES, TEST_FILE):
        if name not in files:
            raise DataError(f"{folder / name}: missing file; {WAY_OUT}")
    first, _ = _batch(files[TEST_FILE])
    size = isqrt(first.size(1) // 3)
    if image_size not in (None, size):
        raise ValueError(f"image_size={image_size}: the images in {folder} are {size}x{size}; leave image_size out")

    def batches(names: tuple[str, ...]) -> Iterator[Part]:
        for name in names:
            pixels, labels = _batch(files[name])
            if pixels.size(1) != 3 * size * size:
                raise DataError(f"{files[name]}: images of other sizes than {files[TEST_FILE].name}'s; {WAY_OUT}")
            yield pixels.view(-1, 3, size, size), labels

    sources = {path.name: _stamp(path) for path in files.values()}
    parts = {"train": lambda: batches(TRAIN_FILES), "test": lambda: batches((TEST_FILE,))}
    return _converted(folder, f"imagenet{size}", size, sources, parts, NUM_CLASSES)


def _batch(path: Path) -> Part:
    """Pixels (N, 3 S S) and labels from 0 of one official file."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path}: {path.stat().st_size} bytes found, no official file is as large; {WAY_OUT}")
    pixels, labels = (_from_npz if path.suffix == ".npz" else _from_pickle)(path)
    size = isqrt(pixels.size(1) // 3)
    if len(labels) != len(pixels) or size < 1 or 3 * size * size != pixels.size(1):
        raise DataError(f"{path}: {tuple(pixels.shape)} pixels and {len(labels)} labels are no images; {WAY_OUT}")
    if len(labels) and not (labels.min() >= 1 and labels.max() <= NUM_CLASSES):
        raise DataError(f"{path}: labels in 1..{NUM_CLASSES} expected; {WAY_OUT}")
    return pixels, labels - 1


def _from_pickle(path: Path) -> Part:
    batch = read_inert(path, path.read_bytes())
    entries = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    shape, pixels = bytes_of(entries.get("data"))
    labels = entries.get("labels")
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] < 1 or shape[0] * shape[1] != len(pixels):
        raise DataError(f"{path}: 'data' must be a uint8 array of two dimensions; {WAY_OUT}")
    if not isinstance(labels, list) or any(type(label) is not int or not 0 < label < 2**31 for label in labels):
        raise DataError(f"{path}: 'labels' must be a list of integers in 1..{NUM_CLASSES}; {WAY_OUT}")
    table = torch.frombuffer(pixels if isinstance(pixels, bytearray) else bytearray(pixels), dtype=torch.uint8)
    return table.view(shape), torch.tensor(labels, dtype=torch.int64)


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _from_npz(path: Path) -> Part:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels, labels = archive["data"], archive["labels"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no archive of the arrays 'data' and 'labels' ({error}); {WAY_OUT}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: 'data' must be uint8 of two dimensions, 'labels' integers of one; {WAY_OUT}")
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64))


def _tree(folder: Path, test: Path, size: int) -> Images:
    if size < 8:
        raise ValueError(f"image_size={size} is too small for a network; give 8 or more")
    if importlib.util.find_spec("PIL") is None:
        raise RuntimeError("folders of pictures need Pillow: pip install pillow")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DataError(
            f"{folder / 'train'}: {len(classes)} classes found; it must hold a folder for each of 2 or more"
        )
    pictures = {"train": _pictures(folder / "train", classes), "test": _pictures(test, classes)}
    sources = {str(path.relative_to(folder)): _stamp(path) for part in pictures.values() for path, _ in part}

    def reader(part: list[tuple[Path, int]]) -> Callable[[], Iterator[Part]]:
        return lambda: ((_picture(path, size)[None], torch.tensor([label])) for path, label in part)

    parts = {name: reader(part) for name, part in pictures.items()}
    return _converted(folder, f"{folder.resolve().name}{size}", size, sources, parts, len(classes))


def _pictures(place: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The files of pictures below the folders of the classes, and the number of the class."""
    others = sorted(path.name for path in place.iterdir() if path.is_dir() and path.name not in classes)
    if others:
        raise DataError(f"{place / others[0]}: train has no class of this name; the same folders belong into both")
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((place / name).glob("**/*"))
        if path.suffix.lower() in PICTURES and path.is_file()
    ]
    if not found:
        raise DataError(f"{place}: no pictures ({', '.join(PICTURES)}) in its folders")
    return found


def _picture(path: Path, size: int) -> Tensor:
    """(3, size, size): the whole picture, averaged over boxes as downsampled ImageNet is."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB").resize((size, size), Image.Resampling.BOX))
    # A damaged picture can raise anything.
    except Exception as error:
        raise DataError(f"{path}: no picture that can be read ({type(error).__name__}); remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _converted(
    folder: Path, name: str, size: int, sources: dict[str, list[int]], parts: dict[str, Callable[[], Iterator[Part]]],
    num_classes: int,
) -> Images:  # fmt: skip
    """The set from its one file for each part, which are first made if they are not there or of other sources."""
    content = json.dumps([FORMAT, name, size, sorted(sources.items())])
    stamp = hashlib.sha256(content.encode()).hexdigest()
    place = _place(folder, size)
    if _stamp_in(place) != stamp:
        print(f"{folder}: converting images to {place}, once", file=sys.stderr)
        _convert(place, parts, stamp)
    counts = {part: (place / f"{part}.labels").stat().st_size // 8 for part in parts}
    mapped = {}
    for part, count in counts.items():
        images = torch.from_file(str(place / f"{part}.images"), size=count * 3 * size * size, dtype=torch.uint8)
        labels = torch.from_file(str(place / f"{part}.labels"), size=count, dtype=torch.int64)
        mapped[part] = images.view(count, 3, size, size), labels
    return Images(name, num_classes, mapped["train"], mapped["test"])


def _place(folder: Path, size: int) -> Path:
    beside = folder / f"rwn_ext-{size}"
    if beside.is_dir() or os.access(folder, os.W_OK | os.X_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwn_ext"
    return cache / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}-{size}"


def _convert(place: Path, parts: dict[str, Callable[[], Iterator[Part]]], stamp: str) -> None:
    """Writes images and labels beside `place` and puts them there when all is on disk."""
    unfinished = place.with_name(f"{place.name}.part-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        for part, batches in parts.items():
            with (
                (unfinished / f"{part}.images").open("wb") as images,
                (unfinished / f"{part}.labels").open("wb") as labels,
            ):
                for pixels, classes in batches():
                    images.write(pixels.contiguous().numpy().data)
                    labels.write(classes.numpy().data)
                for file in (images, labels):
                    file.flush()
                    os.fsync(file.fileno())
        (unfinished / "sources").write_text(stamp)
        shutil.rmtree(place, ignore_errors=True)
        try:
            unfinished.rename(place)
        except OSError:
            # Another process was faster.
            if _stamp_in(place) != stamp:
                raise
    except OSError as error:
        raise DataError(f"{place}: cannot be written ({error.strerror}); it needs as much room as the images") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _stamp_in(place: Path) -> str | None:
    return (place / "sources").read_text() if (place / "sources").is_file() else None


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]
