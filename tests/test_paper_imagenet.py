"""Downsampled ImageNet in its official files, and folders of classes: tiny ones, damaged ones, what is kept of them."""

import os
import pickle

import numpy as np
import pytest
import torch

from rwn_ext.paper import data, imagenet
from rwn_ext.paper.__main__ import main

SIZE = 8


def write_official(folder, kind, protocol=2, size=SIZE):
    """Ten training files of 3 images and one of 4; returns what they say."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    said = {"train": [], "test": []}
    for name in (*imagenet.TRAIN_FILES, imagenet.TEST_FILE):
        count = 4 if name == imagenet.TEST_FILE else 3
        pixels = rng.integers(0, 256, (count, 3 * size * size), dtype=np.uint8)
        labels = rng.integers(1, 1001, count)
        labels[0], labels[1] = 1, 1000
        if kind == "npz":
            np.savez(folder / f"{name}.npz", data=pixels, labels=labels, mean=pixels.mean(0))
        else:
            batch = {"data": pixels, "labels": labels.tolist(), "mean": pixels.mean(0)}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
        said["test" if name == imagenet.TEST_FILE else "train"].append((pixels, labels))
    return {
        part: (np.concatenate([p for p, _ in files]).reshape(-1, 3, size, size), np.concatenate([q for _, q in files]))
        for part, files in said.items()
    }


def assert_says(images, said):
    assert images.num_classes == 1000 and images.flip and images.padding == 1
    for split, (pixels, labels) in ((images.train, said["train"]), (images.test, said["test"])):
        assert torch.equal(split.images, torch.from_numpy(pixels)) and split.images.dtype == torch.uint8
        assert split.labels.tolist() == (labels - 1).tolist()


@pytest.mark.parametrize(("kind", "protocol"), [("npz", None), ("pickle", 2), ("pickle", 4), ("pickle", 5)])
def test_official_files_are_converted_once(tmp_path, monkeypatch, kind, protocol, capsys):
    said = write_official(tmp_path, kind, protocol)
    images = data.load(tmp_path)
    assert images.name == "imagenet8" and "once" in capsys.readouterr().err
    assert_says(images, said)
    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "_convert", None)
        assert_says(data.load(tmp_path, image_size=8), said)
    # Other files are converted anew.
    path = next(tmp_path.glob("val_data*"))
    os.utime(path, ns=(1, 1))
    assert_says(data.load(tmp_path), said)
    assert "once" in capsys.readouterr().err
    assert sorted(entry.name for entry in (tmp_path / "rwn_ext-8").iterdir()) == [
        "sources", "test.images", "test.labels", "train.images", "train.labels",
    ]  # fmt: skip


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    said = write_official(tmp_path, "npz")
    read, calls = imagenet._batch, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(imagenet, "_batch", interrupted)
        data.load(tmp_path)
    assert not list(tmp_path.glob("rwn_ext*"))
    assert_says(data.load(tmp_path), said)


def test_folder_that_cannot_be_written_to_is_converted_elsewhere(tmp_path, monkeypatch):
    said = write_official(tmp_path / "images", "npz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(imagenet.os, "access", lambda path, mode: False)
    assert_says(data.load(tmp_path / "images"), said)
    assert (
        not list((tmp_path / "images").glob("rwn_ext*")) and len(list((tmp_path / "cache" / "rwn_ext").iterdir())) == 1
    )


def test_full_disk_is_told(tmp_path, monkeypatch):
    write_official(tmp_path, "npz")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imagenet.os, "fsync", full)
    with pytest.raises(data.DataError, match="rwn_ext-8: cannot be written"):
        data.load(tmp_path)
    assert not list(tmp_path.glob("rwn_ext*"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": np.zeros((2, 192), np.uint8), "labels": [1]}, "are no images"),
        ({"data": np.zeros((2, 190), np.uint8), "labels": [1, 2]}, "are no images"),
        ({"data": np.zeros((2, 192), np.float32), "labels": [1, 2]}, "uint8 array"),
        ({"data": np.zeros((2, 192), np.uint8), "labels": [0, 2]}, "integers in 1..1000"),
        ({"data": np.zeros((2, 192), np.uint8), "labels": [1, 1001]}, "1..1000 expected"),
        ({"data": np.zeros((2, 192), np.uint8)}, "'labels' must be a list"),
        ([1, 2], "'data' must be"),
        ({"data": np.zeros((2, 192), np.uint8), "labels": [1, 2], "x": print}, "forbidden global"),
        ({"data": np.zeros((2, 768), np.uint8), "labels": [1, 2]}, "other sizes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_files_are_refused_and_nothing_stays(tmp_path, batch, message):
    write_official(tmp_path, "pickle")
    (tmp_path / "train_data_batch_7").write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.raises(data.DataError, match=message) as refusal:
        data.load(tmp_path)
    assert "train_data_batch_7" in str(refusal.value) and not list(tmp_path.glob("rwn_ext*"))


def test_missing_and_damaged_files_and_other_sizes_are_refused(tmp_path):
    write_official(tmp_path, "npz")
    with pytest.raises(ValueError, match="image_size=64"):
        data.load(tmp_path, image_size=64)
    path = tmp_path / "train_data_batch_3.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(data.DataError, match=r"train_data_batch_3\.npz: no archive"):
        data.load(tmp_path)
    path.unlink()
    with pytest.raises(data.DataError, match="train_data_batch_3: missing file"):
        data.load(tmp_path)


@pytest.fixture
def tree(tmp_path):
    """Two classes of colours, in sizes that are averaged over boxes of whole pixels."""
    pil = pytest.importorskip("PIL.Image")
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("blue", "red")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                picture = np.zeros((32, 16, 3), np.uint8)
                picture[:16, :, 2 * (1 - label)] = 200 + i
                pil.fromarray(picture).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_folders_of_classes(tree):
    images = data.load(tree, image_size=8)
    assert images.num_classes == 2 and len(images.train) == 12 and images.test.labels.tolist() == [0, 0, 1, 1]
    assert images.train.images.shape == (12, 3, 8, 8)
    first = images.train.images[7]
    assert (first[0, :4] == 201).all() and not first[1:].any() and not first[0, 4:].any()
    assert data.load(tree, image_size=16).train.images.shape[-1] == 16
    assert data.load(tree).train.images.shape[-1] == 64


def test_wrong_trees_are_refused(tree):
    (tree / "val" / "green").mkdir()
    with pytest.raises(data.DataError, match="val/green: train has no class"):
        data.load(tree, image_size=8)
    (tree / "val" / "green").rmdir()
    (tree / "train" / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(data.DataError, match=r"red/0\.png: no picture"):
        data.load(tree, image_size=8)
    with pytest.raises(ValueError, match="image_size=4"):
        data.load(tree, image_size=4)
    assert not list(tree.glob("rwn_ext*"))


def test_network_for_imagenet_trains_on_a_tree(tree):
    arguments = ["--net", "wrn-10-1-imagenet", "--part", "0.1", "--epochs", "1", "--image-size", "16"]
    assert main(["train", *arguments, "--data", str(tree), "--out", str(tree / "run")]) == 0
