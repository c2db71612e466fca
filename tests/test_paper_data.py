"""The paper's data: official CIFAR files of a few records, hostile ones, the digits, augmentation and batches."""

import builtins
import collections
import os
import pickle
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rwn_ext.paper import data

TRAIN, TEST = 7, 5  # records a file
PICKLED = {"cifar-10-batches-py": b"labels", "cifar-100-python": b"fine_labels"}
PYTHON2 = "as written by Python 2"


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
    layouts = {
        folder: replace(layout, train=dict.fromkeys(layout.train, TRAIN), test=dict.fromkeys(layout.test, TEST))
        for folder, layout in data.LAYOUTS.items()
    }
    monkeypatch.setattr(data, "LAYOUTS", layouts)


def official_files(folder):
    if folder.startswith("cifar-100"):
        names = [("train", TRAIN), ("test", TEST)]
    else:
        names = [(f"data_batch_{i}", TRAIN) for i in range(1, 6)] + [("test_batch", TEST)]
    suffix = ".bin" if folder in ("cifar-10-batches-bin", "cifar-100-binary") else ""
    return [(name + suffix, records) for name, records in names]


def planes(pictures):
    """Pictures (N, 32, 32, RGB) as the official bytes: the red plane row by row, then green, then blue."""
    return [b"".join(picture[:, :, channel].tobytes() for channel in range(3)) for picture in pictures]


def python2_pickle(array, label_key, labels, *, shape=None, dtype=b"u1"):
    """The opcodes of Python 2's cPickle at protocol 2: str keys and str pixels, NumPy's old module names."""

    def string(text):
        return b"U" + bytes([len(text)]) + text

    shape = array.shape if shape is None else shape
    raw = array.tobytes()
    return b"".join(
        [
            b"\x80\x02}(" + string(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R",
            b"(K\x01" + b"".join(b"J" + struct.pack("<i", size) for size in shape) + b"\x86",
            b"cnumpy\ndtype\n" + string(dtype) + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNN",
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(raw)) + raw + b"tb",
            string(label_key) + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu.",
        ]
    )


def write_set(place, folder, protocol=PYTHON2):
    """Writes the files; returns what they say: pictures (N, 3, 32, 32) and labels of the training and test files."""
    rng = np.random.default_rng(0)
    place.mkdir(parents=True)
    said = {"train": ([], []), "test": ([], [])}
    num_classes = 100 if folder.startswith("cifar-100") else 10
    for name, records in official_files(folder):
        pictures = rng.integers(0, 256, (records, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, num_classes, records).tolist()
        labels[0] = num_classes - 1
        if folder in PICKLED:
            array = np.stack([np.frombuffer(row, np.uint8) for row in planes(pictures)])
            if protocol == PYTHON2:
                content = python2_pickle(array, PICKLED[folder], labels)
            else:
                batch = {b"data": array, PICKLED[folder]: labels, b"filenames": [b"x.png"] * records}
                content = pickle.dumps(batch, protocol=protocol)
        else:
            coarse = b"\x13" if num_classes == 100 else b""
            rows = zip(labels, planes(pictures), strict=True)
            content = b"".join(coarse + bytes([label]) + row for label, row in rows)
        (place / name).write_bytes(content)
        into = said["test" if name.startswith("test") else "train"]
        into[0].extend(pictures.transpose(0, 3, 1, 2))
        into[1].extend(labels)
    return {part: (torch.from_numpy(np.stack(images)), torch.tensor(labels)) for part, (images, labels) in said.items()}


def refusal(folder, *words):
    """The message of the DataError that loading raises; it must be one line that holds the words."""
    with pytest.raises(data.DataError) as caught:
        data.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


CASES = [
    ("cifar-10-batches-bin", None),
    ("cifar-100-binary", None),
    *((folder, protocol) for folder in PICKLED for protocol in (PYTHON2, 0, 2, 4, 5)),
]


@pytest.mark.parametrize("passed", ["itself", "parent", "renamed"])
@pytest.mark.parametrize(("folder", "protocol"), CASES, ids=str)
def test_official_files_are_read(tmp_path, folder, protocol, passed):
    place = tmp_path / ("my images" if passed == "renamed" else folder)
    said = write_set(place, folder, protocol)
    images = data.load(str(tmp_path) if passed == "parent" else place, image_size=32)
    assert (images.name, images.num_classes) == (("cifar100", 100) if "100" in folder else ("cifar10", 10))
    assert (images.flip, images.padding) == (True, 4)
    for split, (pictures, labels) in ((images.train, said["train"]), (images.test, said["test"])):
        assert split.images.dtype == torch.uint8 and torch.equal(split.images, pictures)
        assert split.labels.dtype == torch.int64 and torch.equal(split.labels, labels)
        assert len(split) == len(labels)


def test_python2_pickle_is_what_numpy_reads():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    batch = pickle.loads(python2_pickle(array, b"labels", [1, 2]), encoding="bytes")
    assert batch[b"labels"] == [1, 2] and np.array_equal(batch[b"data"], array)


def test_official_sizes(monkeypatch):
    monkeypatch.undo()
    for folder, layout in data.LAYOUTS.items():
        assert (sum(layout.train.values()), sum(layout.test.values())) == (50_000, 10_000), folder
        shrunk = [(name, TRAIN) for name in layout.train] + [(name, TEST) for name in layout.test]
        assert shrunk == official_files(folder)


def test_set_moves_to_a_device_whole(tmp_path):
    write_set(tmp_path / "cifar-100-binary", "cifar-100-binary")
    images = data.load(tmp_path)
    moved = images.to("meta")
    for split in (moved.train, moved.test):
        assert split.images.device.type == split.labels.device.type == "meta"
    assert images.train.images.device.type == "cpu" and moved.mean == images.mean


def test_only_the_official_image_size(tmp_path):
    write_set(tmp_path / "cifar-100-binary", "cifar-100-binary")
    with pytest.raises(ValueError, match="image_size=64"):
        data.load(tmp_path, image_size=64)


def test_folders_without_a_set_are_refused(tmp_path):
    refusal(tmp_path, tmp_path, "holds no data set", *data.LAYOUTS)
    refusal(tmp_path / "absent", tmp_path / "absent", "is no folder")
    (tmp_path / "file").write_bytes(b"")
    refusal(tmp_path / "file", "is no folder")


def test_several_sets_in_one_parent_are_refused(tmp_path):
    for folder in ("cifar-10-batches-bin", "cifar-100-python"):
        write_set(tmp_path / folder, folder)
    message = refusal(tmp_path, tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-100-python", "pass")
    assert "cifar-100-binary" not in message
    assert data.load(tmp_path / "cifar-100-python").name == "cifar100"


@pytest.mark.parametrize("folder", data.LAYOUTS)
def test_every_file_must_be_there_and_regular(tmp_path, folder):
    write_set(tmp_path / folder, folder)
    for name, _ in official_files(folder):
        path = tmp_path / folder / name
        content = path.read_bytes()
        path.unlink()
        refusal(tmp_path, path, "missing file")
        os.mkfifo(path)
        refusal(tmp_path, path, "not a regular file")
        path.unlink()
        path.write_bytes(content)
    assert len(data.load(tmp_path).test) == TEST


@pytest.mark.parametrize("folder", data.LAYOUTS)
def test_oversized_files_are_not_read(tmp_path, folder, monkeypatch):
    write_set(tmp_path / folder, folder)
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 20_000)
    refusal(tmp_path, tmp_path / folder, "bytes found")


@pytest.mark.parametrize("change", [-1, -3073, 1, 3073, -TEST * 3073])
def test_binary_of_a_wrong_length_is_refused(tmp_path, change):
    write_set(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    refusal(tmp_path, path, f"{TEST * 3073} bytes expected", f"{TEST * 3073 + change} found")


@pytest.mark.parametrize(
    ("folder", "record", "classes"), [("cifar-10-batches-bin", 3073, 10), ("cifar-100-binary", 3074, 100)]
)
def test_binary_label_out_of_range_is_refused(tmp_path, folder, record, classes):
    write_set(tmp_path / folder, folder)
    path = tmp_path / folder / official_files(folder)[-1][0]
    content = bytearray(path.read_bytes())
    content[3 * record + record - 3073] = classes
    path.write_bytes(content)
    refusal(tmp_path, path, f"label {classes} found", f"0..{classes - 1} expected")


def array(rows=TEST):
    return np.arange(rows * 3072, dtype=np.uint8).reshape(rows, 3072)


def write_test_batch(root, content):
    """A CIFAR-10 folder that is sound but for its test batch, which holds this object or these bytes."""
    folder = root / "cifar-10-batches-py"
    write_set(folder, folder.name)
    path = folder / "test_batch"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=4))
    return path


LABELS = [0, 1, 2, 3, 9]


def test_sound_batch_is_accepted(tmp_path):
    """The batch that the refused ones below are made from."""
    write_test_batch(tmp_path, {b"data": array(), b"labels": LABELS})
    assert data.load(tmp_path).test.labels.tolist() == LABELS


@pytest.mark.parametrize(
    "pixels",
    [
        array().astype(object),
        array().astype(np.int64),
        array().astype(np.int8),
        array(TEST + 1),
        array(TEST - 1),
        array().reshape(TEST, 3, 32, 32),
        array().T,
        np.asfortranarray(array()),
        array().tobytes(),
        array().tolist(),
        None,
    ],
    ids=["object", "int64", "int8", "long", "short", "4d", "transposed", "fortran", "bytes", "lists", "none"],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_pixels_must_be_the_official_array(tmp_path, pixels, protocol):
    path = write_test_batch(tmp_path, pickle.dumps({b"data": pixels, b"labels": LABELS}, protocol=protocol))
    refusal(tmp_path, path, "b'data' must be a uint8 array of shape (5, 3072)")


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (TEST, 2**31 - 1)},
        {"shape": (TEST + 1, 3072)},
        {"shape": (-TEST, -3072)},
        {"dtype": b"O8"},
        {"dtype": b"V1"},
    ],
    ids=str,
)
def test_forged_array_headers_are_refused(tmp_path, lie):
    path = write_test_batch(tmp_path, python2_pickle(array(), b"labels", LABELS, **lie))
    refusal(tmp_path, path, "uint8 array of shape")


def test_claimed_shape_must_be_backed_by_bytes(tmp_path):
    path = write_test_batch(tmp_path, python2_pickle(array(TEST - 1), b"labels", LABELS, shape=(TEST, 3072)))
    refusal(tmp_path, path, "uint8 array of shape")


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[:-1],
        [*LABELS, 0],
        [0, 1, 2, 3, 10],
        [0, 1, 2, 3, -1],
        [0, 1, 2, 3, 2**80],
        [0, 1, 2, 3, True],
        [0, 1, 2, 3, 4.0],
        [0, 1, 2, 3, "4"],
        tuple(LABELS),
        bytes(LABELS),
        np.array(LABELS),
        None,
    ],
    ids=repr,
)
def test_pickled_labels_must_be_classes(tmp_path, labels):
    path = write_test_batch(tmp_path, {b"data": array(), b"labels": labels})
    refusal(tmp_path, path, "b'labels' must be a list of 5 integers in 0..9")


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": array(), b"fine_labels": LABELS},
        {b"pixels": array(), b"labels": LABELS},
        {"data": array(), "labels": LABELS},
        [array(), LABELS],
        None,
    ],
    ids=["label_key", "data_key", "text_keys", "list", "none"],
)
def test_pickle_must_be_a_dict_with_the_official_keys(tmp_path, batch):
    path = write_test_batch(tmp_path, batch)
    refusal(tmp_path, path, "keys b'data' and b'labels'")


@pytest.mark.parametrize("index", [2**24, 2**31])
def test_a_pickle_cannot_claim_memory(tmp_path, index):
    """Eight bytes that make an ordinary unpickler set aside 16 bytes for each number below `index`."""
    path = write_test_batch(tmp_path, b"\x80\x02Nr" + index.to_bytes(4, "little") + b".")
    assert "numbers an object" in refusal(tmp_path, path, "not a pickle that can be read safely")


SOUND = python2_pickle(array(), b"labels", LABELS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        SOUND[:-1],
        SOUND[: len(SOUND) // 2],
        SOUND[:3],
        np.random.default_rng(0).bytes(1000),
        b"<!DOCTYPE html><title>404</title>",
        b"\x1f\x8b\x08\x00" + bytes(100),
        b"\x80\xff.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02}]K\x00s.",
        b"\x80\x02K\x00K\x00\x85R.",
        b"\x80\x02K\x00}b.",
        b"\x80\x02X\x00\x00\x00\x00Q.",
        b"I" + b"x" * 10_000 + b"\n.",
    ],
    ids=[
        "empty",
        "cut",
        "half",
        "start",
        "noise",
        "html",
        "gzip",
        "protocol",
        "length",
        "bytearray",
        "unhashable",
        "call",
        "build",
        "persistent",
        "int",
    ],
)
def test_damaged_pickles_are_refused(tmp_path, content):
    path = write_test_batch(tmp_path, content)
    assert len(refusal(tmp_path, path, "not a pickle that can be read safely")) < 600


class Hostile:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", [b"data", b"labels", b"batch_label"])
@pytest.mark.parametrize(("function", "name"), [(os.system, "system"), (builtins.exec, "exec")], ids=["system", "exec"])
def test_hostile_pickle_runs_nothing(tmp_path, function, name, where, protocol):
    mark = tmp_path / "ran"
    argument = f"echo > '{mark}'" if function is os.system else f"open({str(mark)!r}, 'w')"
    batch = {b"data": array(), b"labels": LABELS, where: Hostile(function, argument)}
    content = pickle.dumps(batch, protocol=protocol)
    path = write_test_batch(tmp_path, content)
    refusal(tmp_path, path, "forbidden global", f".{name}'")
    assert not mark.exists()


def test_hostile_pickle_would_run(tmp_path):
    """The control of the test above: an ordinary unpickler is caught by it."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Hostile(os.system, f"echo > '{mark}'")))
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["numpy\nload", "numpy\nndarray.tofile", "numpy.core.multiarray\nfromfile", "_codecs\ndecode"]
)
def test_other_names_of_allowed_modules_are_forbidden(tmp_path, name):
    path = write_test_batch(tmp_path, b"\x80\x04c" + name.encode() + b"\n.")
    refusal(tmp_path, path, f"forbidden global '{name.replace(chr(10), '.')}'")


def test_state_set_on_allowed_names_does_not_outlive_the_file(tmp_path):
    forged = b"\x80\x02" + b"".join(
        b"c" + name + b"\nN}U\x08__call__K\x00s\x86b0" for name in (b"numpy\ndtype", b"_codecs\nencode")
    )
    path = write_test_batch(tmp_path, forged + b"N.")
    refusal(tmp_path, path, "keys b'data'")
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({b"data": array(), b"labels": LABELS}, protocol=protocol))
        assert torch.equal(data.load(tmp_path).test.images.flatten(1), torch.from_numpy(array()))


@pytest.fixture(scope="module")
def load_digits():
    return pytest.importorskip("sklearn.datasets").load_digits


def test_digits_are_split_without_loss_or_overlap(load_digits):
    images = data.load(None, image_size=8)
    rows = collections.Counter()
    for split, size in ((images.train, 1437), (images.test, 360)):
        assert split.images.shape == (size, 3, 8, 8) and split.images.dtype == torch.uint8
        assert split.labels.shape == (size,) and split.labels.dtype == torch.int64
        assert torch.equal(split.images[:, 0], split.images[:, 1]) and torch.equal(
            split.images[:, 0], split.images[:, 2]
        )
        # 17 grey levels survive the scaling to 0..255.
        levels = split.images[:, 0].double().mul(16 / 255).round().to(torch.uint8)
        rows.update((row.numpy().tobytes(), int(label)) for row, label in zip(levels, split.labels, strict=True))
    digits = load_digits()
    expected = zip(digits.images.astype(np.uint8), digits.target.tolist(), strict=True)
    assert rows == collections.Counter((row.tobytes(), label) for row, label in expected)


def test_digits_split_is_stratified_and_fixed(load_digits):
    images, again = data.load(None), data.load(None)
    share = images.test.labels.bincount() / images.train.labels.bincount()
    assert (share - 360 / 1437).abs().max() < 0.01
    assert torch.equal(images.train.images, again.train.images) and torch.equal(images.test.labels, again.test.labels)


@pytest.mark.parametrize("size", [8, 13, 32])
def test_digits_are_upsampled_bilinearly(load_digits, size):
    """Against the product with a matrix of triangle weights between pixel centres."""
    position = ((np.arange(size) + 0.5) * 8 / size - 0.5).clip(0, 7)
    weights = (1 - np.abs(position[:, None] - np.arange(8))).clip(0)
    expected = weights @ load_digits().images @ weights.T * 255 / 16
    images = data.load(None, image_size=size)
    assert (images.name, images.num_classes, images.flip, images.padding) == ("digits", 10, False, size // 8)
    have = np.concatenate([images.train.images[:, 0].numpy(), images.test.images[:, 0].numpy()])
    assert have.shape == expected.shape
    # The order differs: sorting each pixel's values over the set compares them all the same.
    assert np.abs(np.sort(have, axis=0) - np.sort(expected, axis=0)).max() <= 0.5 + 1e-9


def test_digits_default_size_and_statistics(load_digits):
    images = data.load(None)
    assert images.train.images.shape == (1437, 3, 32, 32)
    normal = data.normalize(images.train.images, images.mean, images.std).double()
    assert normal.mean((0, 2, 3)).abs().max() < 1e-5 and (normal.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_digits_errors(monkeypatch):
    with pytest.raises(ValueError, match="image_size=7"):
        data.load(None, image_size=7)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(RuntimeError, match=r"pip install 'rwn_ext\[paper\]'"):
        data.load(None)


def random_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "padding"), [((1200, 3, 5, 7), 1), ((1200, 3, 7, 5), 2)])
def test_crops_are_shifted_mirrored_inputs_all_about_equally_often(shape, padding, flip, layout):
    images = random_images(*shape)
    crops = data.random_crop_flip(images.contiguous(memory_format=layout), rng(), padding=padding, flip=flip)
    assert crops.shape == shape and crops.dtype == torch.uint8 and crops.is_contiguous(memory_format=layout)
    padded = F.pad(images, [padding] * 4)
    n, _, h, w = shape
    counts = []
    for y in range(2 * padding + 1):
        for x in range(2 * padding + 1):
            window = padded[:, :, y : y + h, x : x + w]
            for candidate in (window, window.flip(3)) if flip else (window,):
                counts.append((crops == candidate).flatten(1).all(1).sum().item())
    assert sum(counts) == n
    mean = n / len(counts)
    assert all(abs(count - mean) < 4.5 * mean**0.5 for count in counts)


def test_crops_follow_the_generator():
    images = random_images(64, 3, 8, 8)
    generator = rng(3)
    first, second = (data.random_crop_flip(images, generator, padding=2, flip=True) for _ in range(2))
    assert torch.equal(first, data.random_crop_flip(images, rng(3), padding=2, flip=True))
    assert not torch.equal(first, second)


def test_crops_are_what_their_draws_say():
    images, draws = random_images(30, 3, 6, 9), data.draws(30, rng(4), padding=2, flip=True)
    crops = data.crop_flip(images, draws, padding=2)
    assert torch.equal(crops, data.random_crop_flip(images, rng(4), padding=2, flip=True))
    padded = F.pad(images, [2] * 4)
    for image, crop, (top, left, mirrored) in zip(padded, crops, draws.t().tolist(), strict=True):
        window = image[:, top : top + 6, left : left + 9]
        assert torch.equal(crop, window.flip(2) if mirrored else window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_a_gpu_augments_as_the_cpu_does_bit_for_bit(layout):
    images = random_images(64, 3, 32, 32).contiguous(memory_format=layout)
    draws = data.draws(64, rng(), padding=4, flip=True)
    here = data.crop_flip(images, draws, padding=4)
    there = data.crop_flip(images.cuda(), draws.cuda(), padding=4)
    assert torch.equal(here, there.cpu())
    settings = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    torch.testing.assert_close(data.normalize(here, *settings), data.normalize(there, *settings).cpu())


def test_crop_without_padding_or_mirror_is_identity():
    images = random_images(5, 3, 8, 8)
    assert torch.equal(data.random_crop_flip(images, rng(), padding=0, flip=False), images)
    with pytest.raises(ValueError, match="padding=-1"):
        data.random_crop_flip(images, rng(), padding=-1, flip=False)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_normalize(dtype, layout):
    images = random_images(4, 3, 5, 7).contiguous(memory_format=layout)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.7)
    result = data.normalize(images, mean, std, dtype)
    expected = torch.stack([(images[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    assert result.dtype == dtype and result.is_contiguous(memory_format=layout)
    # One rounding to the dtype, three in float32 before it.
    tolerance = torch.finfo(dtype).eps + 3 * torch.finfo(torch.float32).eps
    error = (result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < tolerance


def test_normalize_leaves_its_input_alone():
    images = random_images(2, 3, 5, 7).float()
    before = images.clone()
    data.normalize(images, (0.1, 0.5, 0.9), (0.2, 0.3, 0.7))
    assert torch.equal(images, before)


def numbered(n):
    """A split whose image i is filled with i and labelled i."""
    return data.Split(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 2, 2), torch.arange(n))


def epoch(*args, **kwargs):
    result = []
    for images, labels in data.batches(*args, **kwargs):
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, 2, 2)
        assert (images == labels.view(-1, 1, 1, 1)).all()
        result.append(labels.tolist())
    return result


def test_batches_in_order():
    assert epoch(numbered(7), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert epoch(numbered(7), 3, drop_last=True) == [[0, 1, 2], [3, 4, 5]]
    assert epoch(numbered(2), 3) == [[0, 1]] and epoch(numbered(2), 3, drop_last=True) == epoch(numbered(0), 3) == []


def test_batches_are_shuffled_by_their_generator():
    generator = rng(5)
    first, second = (epoch(numbered(50), 8, generator=generator) for _ in range(2))
    assert first == epoch(numbered(50), 8, generator=rng(5)) != second
    rows = [row for batch in first for row in batch]
    assert sorted(rows) == list(range(50)) != rows


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 40),
    local=st.integers(1, 6),
    world_size=st.integers(1, 5),
    seed=st.none() | st.integers(0, 9),
    drop_last=st.booleans(),
)
def test_ranks_share_each_batch_evenly(n, local, world_size, seed, drop_last):
    def run(**kwargs):
        generator = None if seed is None else rng(seed)
        return epoch(numbered(n), local * world_size, generator=generator, drop_last=drop_last, **kwargs)

    whole = run()
    ranks = [run(rank=rank, world_size=world_size) for rank in range(world_size)]
    expected = [batch[: len(batch) - len(batch) % world_size] for batch in whole]
    for rank, batches in enumerate(ranks):
        assert batches == [batch[rank::world_size] for batch in expected if batch]


@pytest.mark.parametrize(
    ("batch_size", "rank", "world_size"), [(0, 0, 1), (-2, 0, 1), (5, 0, 2), (4, 2, 2), (4, -1, 2), (4, 0, 0)]
)
def test_batches_reject_impossible_shares_at_the_call(batch_size, rank, world_size):
    with pytest.raises(ValueError, match=f"world_size={world_size}"):
        data.batches(numbered(8), batch_size, rank=rank, world_size=world_size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_augmentation_on_the_gpu_never_waits():
    images = random_images(64, 3, 32, 32).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    split = data.Split(images, torch.arange(64, device="cuda"))
    epoch = data.batches(split, 24, generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch, _ in epoch:
            crops = data.random_crop_flip(batch, generator, padding=4, flip=True)
            data.normalize(crops, (0.1, 0.5, 0.9), (0.2, 0.3, 0.7), torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
