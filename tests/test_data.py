import doctest
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from bnnbook import data, training

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]  # fmt: skip
DIGITS_SHA256 = "46b4678879661d3b5c922b5e50bbf2bc9fe5b474e38bd4a0d647f06da998ba42"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches beyond this machine, and no test sees the user's own data."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise OSError("the network is blocked in tests")
        return connect(self, address)

    def no_names(host, *arguments, **keywords):
        if host in ("127.0.0.1", "localhost"):
            return lookup(host, *arguments, **keywords)
        raise socket.gaierror(-2, "Name or service not known")

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    monkeypatch.delenv("BNNBOOK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def keras_arrays(n=12, m=6, size=(4, 5), classes=3, seed=0):
    """Made-up images in Keras's layout; both parts hold every class."""
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (n, *size), dtype=np.uint8),
        "y_train": (np.arange(n) % classes).astype(np.uint8),
        "x_test": rng.integers(0, 256, (m, *size), dtype=np.uint8),
        "y_test": (np.arange(m) % classes).astype(np.uint8),
    }


def write_npz(path, **changes):
    arrays = {k: v for k, v in (keras_arrays() | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def toy(n=12, m=6, shape=(1, 4, 5), classes=3):
    generator = torch.Generator().manual_seed(0)

    def images(k):
        return torch.randint(256, (k, *shape), dtype=torch.uint8, generator=generator)

    names = tuple("abcdefgh"[:classes])
    return data.Dataset(
        images(n), torch.arange(n) % classes, images(m), torch.arange(m) % classes, names
    )


# --- Dataset -----------------------------------------------------------------------------------


def test_doctests():
    result = doctest.testmod(data)
    assert result.attempted >= 6
    assert result.failed == 0


def test_importing_is_cheap():
    code = (
        "import sys, bnnbook.data, bnnbook.records, bnnbook.claims;"
        "heavy = {'torchvision', 'sklearn', 'pandas', 'IPython'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_repr_is_one_short_line():
    assert repr(toy()) == "Dataset('unnamed': 12 train + 6 test, 1×4×5, 3 classes, cpu)"


FIELDS = {
    "train_images": [
        (torch.zeros(12, 1, 4, 5), "train_images must be a uint8 tensor"),
        (torch.zeros(12, 4, 5, dtype=torch.uint8), r"train_images .*\(12, 4, 5\)"),
        (np.zeros((12, 1, 4, 5), np.uint8), "train_images .*ndarray"),
        (torch.zeros(0, 1, 4, 5, dtype=torch.uint8), "train_images is empty"),
        (torch.zeros(11, 1, 4, 5, dtype=torch.uint8), "train_labels has 12 entries for 11"),
    ],
    "test_images": [
        (torch.zeros(6, 3, 4, 5, dtype=torch.uint8), "test_images and train_images differ"),
        (torch.zeros(6, 1, 0, 5, dtype=torch.uint8), "test_images is empty"),
        (None, "test_images must be .*NoneType"),
    ],
    "train_labels": [
        (torch.zeros(12), "train_labels must be an int64"),
        (torch.zeros(12, 1, dtype=torch.int64), "train_labels must be an int64"),
        (torch.full((12,), 3), "train_labels holds labels 3 to 3; 3 classes allow 0 to 2"),
        (torch.full((12,), -1), "train_labels holds labels -1"),
    ],
    "test_labels": [(torch.zeros(5, dtype=torch.int64), "test_labels has 5 entries for 6")],
    "classes": [
        ((), "classes is empty"),
        (("a", "b"), "2 classes allow 0 to 1"),
        (3, "classes must be the classes' names, .*, not 3$"),
        (None, "classes must be .*, not None$"),
    ],
    "validation_images": [(torch.zeros(2, 1, 4, 5, dtype=torch.uint8), "together")],
    "validation_labels": [(torch.zeros(2, dtype=torch.int64), "together")],
}


@pytest.mark.parametrize(
    ("field", "value", "message"), [(f, v, m) for f, cases in FIELDS.items() for v, m in cases]
)
def test_dataset_refuses_what_does_not_fit_and_names_the_field(field, value, message):
    names = ("train_images", "train_labels", "test_images", "test_labels", "classes")
    good = {name: getattr(toy(), name) for name in names}
    data.Dataset(**good)
    with pytest.raises(ValueError, match=message):
        data.Dataset(**good | {field: value})


def test_whatever_names_the_classes_names_them():
    d = toy()
    for classes in (range(3), np.arange(3), (str(i) for i in range(3)), [0, "1", 2]):
        assert replace(d, classes=classes).classes == ("0", "1", "2")


def test_dataset_is_frozen():
    with pytest.raises(AttributeError):
        toy().name = "other"


def test_sha256_is_the_documented_one_and_sees_every_bit():
    d = toy()
    digest = hashlib.sha256()
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(d, name).numpy()
        dtype = "uint8" if name.endswith("images") else "int64"
        digest.update(f"{name} {dtype} {tuple(array.shape)}\n".encode() + array.tobytes())
    assert d.sha256 == digest.hexdigest()
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        fresh = toy()
        value = getattr(fresh, name)
        value.view(-1)[-1] = (value.view(-1)[-1] + 1) % 3
        assert data.fingerprint(fresh) != d.sha256, name
    assert data.fingerprint(d) == d.sha256


def test_to_moves_every_tensor_and_keeps_the_rest(monkeypatch):
    d, moved = toy().hold_out(2), []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device: moved.append(t) or real(t, device))
    other = d.to("cpu")
    assert len(moved) == 6
    assert other.sha256 == d.sha256
    assert repr(other) == repr(d)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_and_augmentation_on_a_gpu_equal_those_on_the_cpu():
    d = toy(n=40).hold_out(8)
    gpu = d.to("cuda")
    assert gpu.validation_images.device.type == "cuda"
    both = [
        data.batches(s.train_images, s.train_labels, 5, torch.Generator().manual_seed(3))
        for s in (d, gpu)
    ]
    for (x, y), (u, v) in zip(*both, strict=True):
        assert u.device.type == "cuda"
        assert torch.equal(x, u.cpu())
        assert torch.equal(y, v.cpu())
    offsets = torch.tensor([0, 1, 4]), torch.tensor([4, 0, 2]), torch.tensor([True, False, True])
    on_gpu = data.crop(gpu.train_images[:3], *(t.cuda() for t in offsets), 2)
    assert torch.equal(on_gpu.cpu(), data.crop(d.train_images[:3], *offsets, 2))
    assert data.crop_flip(2)(gpu.train_images).device.type == "cuda"
    for make in (data.standardize, data.subtract_mean_image):
        assert torch.equal(make(gpu)(d.train_images), make(d)(d.train_images))
        assert make(d)(gpu.train_images).device.type == "cuda"


def test_hold_out_takes_the_last_images_and_leaves_the_original_alone():
    d = toy()
    held = d.hold_out(5)
    assert torch.equal(held.train_images, d.train_images[:7])
    assert torch.equal(held.validation_images, d.train_images[7:])
    assert torch.equal(held.validation_labels, d.train_labels[7:])
    assert torch.equal(held.test_images, d.test_images)
    assert held.sha256 == d.sha256
    assert d.validation_images is None
    assert len(d.train_images) == 12
    assert repr(held) == "Dataset('unnamed': 7 train + 5 valid. + 6 test, 1×4×5, 3 classes, cpu)"


@pytest.mark.parametrize("n", [0, -1, 12, 13])
def test_hold_out_out_of_range(n):
    with pytest.raises(ValueError, match="between 1 and 11"):
        toy().hold_out(n)


def test_hold_out_twice():
    with pytest.raises(ValueError, match="already has a validation set"):
        toy().hold_out(2).hold_out(2)


def test_hold_out_of_one_image_a_class_needs_no_seed(tmp_path):
    write_npz(tmp_path / "few.npz", y_train=np.arange(12))
    assert data.load("few", tmp_path).hold_out(1).validation_labels.tolist() == [11]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_hold_out_of_a_set_ordered_by_class_needs_a_seed(tmp_path, order):
    labels = np.repeat(order, 4)
    write_npz(tmp_path / "ordered.npz", y_train=labels)
    d = data.load("ordered", tmp_path)
    with pytest.raises(ValueError, match="seed=0"):
        d.hold_out(4)
    held = d.hold_out(4, seed=0)
    again = d.hold_out(4, seed=0)
    assert torch.equal(held.validation_images, again.validation_images)
    assert not torch.equal(held.validation_images, d.hold_out(4, seed=1).validation_images)
    pairs = [*zip(held.train_images, held.train_labels, strict=True)]
    pairs += [*zip(held.validation_images, held.validation_labels, strict=True)]
    of = {x.numpy().tobytes(): int(y) for x, y in zip(d.train_images, d.train_labels, strict=True)}
    assert {x.numpy().tobytes(): int(y) for x, y in pairs} == of


# --- digits ------------------------------------------------------------------------------------


def test_digits_are_embedded_and_always_the_same(tmp_path, monkeypatch):
    write_npz(tmp_path / "digits.npz")  # never shadows the embedded set
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path))
    d = data.load("digits")
    assert d.sha256 == DIGITS_SHA256
    assert d.train_images.shape == (1300, 1, 8, 8)
    assert d.test_images.shape == (497, 1, 8, 8)
    assert d.classes == tuple("0123456789")
    assert set(d.train_labels.tolist()) == set(d.test_labels.tolist()) == set(range(10))
    levels = {round(v * 255 / 16) for v in range(17)}
    assert set(d.train_images.unique().tolist()) == levels


def test_digits_split_partitions_scikit_learns_images():
    from sklearn.datasets import load_digits

    raw, d = load_digits(), data.load("digits")
    images = torch.cat([d.train_images, d.test_images]).flatten(1).double() * 16 / 255
    ours = np.column_stack([images.round().numpy(), torch.cat([d.train_labels, d.test_labels])])
    theirs = np.column_stack([raw.data, raw.target])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


# --- NAME.npz ----------------------------------------------------------------------------------


def test_npz_of_grey_images(tmp_path):
    path = write_npz(tmp_path / "mine.npz")
    d = data.load("mine", tmp_path)
    arrays = np.load(path)
    assert d.train_images.shape == (12, 1, 4, 5)
    assert np.array_equal(d.train_images[:, 0], arrays["x_train"])
    assert np.array_equal(d.test_images[:, 0], arrays["x_test"])
    assert np.array_equal(d.train_labels, arrays["y_train"])
    assert np.array_equal(d.test_labels, arrays["y_test"])
    assert d.train_labels.dtype == torch.int64
    assert d.classes == ("0", "1", "2")
    assert d.name == "mine"
    assert data.load("mine.npz", str(tmp_path)).sha256 == d.sha256


def test_npz_of_colour_images_with_column_labels_and_names(tmp_path):
    arrays = keras_arrays(size=(4, 5, 3))
    arrays["y_train"] = arrays["y_train"][:, None].astype(np.int32)
    write_npz(tmp_path / "mine.npz", **arrays, classes=np.array(["ant", "bee", "cat"]))
    d = data.load("mine", tmp_path)
    assert d.classes == ("ant", "bee", "cat")
    assert d.train_images.shape == (12, 3, 4, 5)
    assert d.train_images.is_contiguous()
    for channel in range(3):
        assert np.array_equal(d.train_images[:, channel], arrays["x_train"][..., channel])
    assert d.train_labels.shape == (12,)


def test_npz_with_a_channel_axis_of_one_and_compressed_is_the_same_set(tmp_path):
    arrays = keras_arrays()
    write_npz(tmp_path / "plain.npz")
    for part in ("x_train", "x_test"):
        arrays[part] = arrays[part][..., None]
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    assert data.load("packed", tmp_path).sha256 == data.load("plain", tmp_path).sha256


def test_bytes_and_numbers_are_good_class_names(tmp_path):
    write_npz(tmp_path / "b.npz", classes=np.array([b"x", b"y", b"z"]))
    write_npz(tmp_path / "n.npz", classes=np.array([5, 6, 7]))
    assert data.load("b", tmp_path).classes == ("x", "y", "z")
    assert data.load("n", tmp_path).classes == ("5", "6", "7")


def test_where_the_root_is(tmp_path, monkeypatch):
    assert data.root_folder() == tmp_path / "cache" / "bnnbook"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.root_folder() == Path.home() / ".cache" / "bnnbook"
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path / "env"))
    assert data.root_folder() == tmp_path / "env"
    assert data.root_folder(tmp_path / "here") == tmp_path / "here"
    assert data.root_folder("~/sets") == Path.home() / "sets"


def test_environment_variable_serves_load_and_the_argument_wins(tmp_path, monkeypatch):
    for name, seed in (("env", 1), ("here", 2)):
        (tmp_path / name).mkdir()
        write_npz(tmp_path / name / "mine.npz", **keras_arrays(seed=seed))
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path / "env"))
    one, other = data.load("mine"), data.load("mine", tmp_path / "here")
    assert one.sha256 != other.sha256
    assert np.array_equal(other.train_images[:, 0], keras_arrays(seed=2)["x_train"])


@pytest.mark.parametrize("name", ["cifar11", "", "../mine", "sub/mine"])
def test_unknown_name_lists_the_known_ones_and_the_files_found(tmp_path, name):
    (tmp_path / "sub").mkdir()
    write_npz(tmp_path / "sub" / "mine.npz")
    write_npz(tmp_path / "bees.npz")
    write_npz(tmp_path / "ants.npz")
    with pytest.raises(ValueError, match="unknown data set") as caught:
        data.load(name, tmp_path)
    text = str(caught.value)
    assert all(known in text for known in data.NAMES)
    assert "ants, bees" in text
    assert str(tmp_path) in text


def test_unknown_name_where_there_is_no_root(tmp_path):
    with pytest.raises(ValueError, match=r"none$"):
        data.load("cifar11", tmp_path / "absent")


BAD_ARRAYS = {
    "missing array": ({"x_test": None}, "no array x_test"),
    "float images": ({"x_train": np.zeros((12, 4, 5))}, "x_train is float64, must be uint8"),
    "flat images": ({"x_train": np.zeros((12, 20), np.uint8)}, r"x_train has shape \(12, 20\)"),
    "channels first": ({"x_train": np.zeros((12, 3, 4, 5), np.uint8)}, "x_train has shape"),
    "float labels": ({"y_train": np.zeros(12)}, "y_train is float64, must be integers"),
    "one-hot labels": ({"y_test": np.zeros((6, 3), np.uint8)}, r"y_test has shape \(6, 3\)"),
    "too few labels": ({"y_train": np.zeros(11, np.uint8)}, "12 images for 11 labels"),
    "no images": (
        {"x_test": np.zeros((0, 4, 5), np.uint8), "y_test": np.zeros(0, np.uint8)},
        "x_test has 0 images",
    ),
    "negative label": ({"y_test": np.array([0, 1, 2, 0, 1, -1])}, "test_labels holds labels -1"),
    "too few classes": ({"classes": np.array(["a", "b"])}, "2 classes allow 0 to 1"),
    "sizes differ": ({"x_test": np.zeros((6, 5, 5), np.uint8)}, "test_images and train_images"),
    "object arrays": ({"classes": np.array(["a", "b", None], dtype=object)}, "allow_pickle"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_malformed_npz_is_named_and_left_alone(tmp_path, case):
    changes, message = BAD_ARRAYS[case]
    path = write_npz(tmp_path / "mine.npz", **changes)
    before = path.read_bytes()
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("mine", tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_cut_anywhere_is_refused(tmp_path, compressed):
    path = tmp_path / "mine.npz"
    (np.savez_compressed if compressed else np.savez)(path, **keras_arrays())
    whole = path.read_bytes()
    for size in [0, 1, 3, 50, *range(100, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(data.DataError, match="cannot be used") as caught:
            data.load("mine", tmp_path)
        assert str(path) in str(caught.value)
        assert path.stat().st_size == size
    path.write_bytes(whole)
    assert len(data.load("mine", tmp_path).train_images) == 12


def test_a_flipped_byte_inside_an_array_is_refused(tmp_path):
    path = write_npz(tmp_path / "mine.npz")
    raw = bytearray(path.read_bytes())
    place = raw.index(keras_arrays()["x_train"].tobytes()) + 7
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(data.DataError, match="CRC"):
        data.load("mine", tmp_path)


@pytest.mark.parametrize("content", [b"not a zip file", b"PK\x03\x04garbage", b"\x80\x04K\x01."])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(data.DataError, match=r"mine\.npz cannot be used"):
        data.load("mine", tmp_path)


def test_a_single_array_is_refused(tmp_path):
    with (tmp_path / "mine.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(data.DataError, match=r"single \.npy array"):
        data.load("mine", tmp_path)


# --- torchvision's layout ----------------------------------------------------------------------
# The files are made up and torchvision's lists of MD5 sums are replaced by theirs; its integrity
# check, its readers, and in the download tests its downloader, are the real ones.


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def fake_mnist(root, monkeypatch, kind=datasets.MNIST, archives=False):
    arrays = keras_arrays(size=(28, 28), classes=10, n=20, m=10)
    raw = root / kind.__name__ / "raw"
    raw.mkdir(parents=True)
    keys = ("x_train", "y_train", "x_test", "y_test")
    sums = []
    for (name, _), key in zip(kind.resources, keys, strict=True):
        (raw / name).write_bytes(gzip.compress(idx(arrays[key])))
        sums.append((name, md5(raw / name)))
        if not archives:
            (raw / name).unlink()
            (raw / name).with_suffix("").write_bytes(idx(arrays[key]))
    monkeypatch.setattr(kind, "resources", sums)
    return arrays


class AsPython2(pickle.Pickler):
    """Spells a dtype as Python 2's NumPy did in the real files."""

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:], 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


# torchvision unpacks archives (after checking their MD5) without tarfile's filter argument.
old_tar = pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter extracted tar")


def fake_cifar(root, monkeypatch, kind=datasets.CIFAR10, archive=False):
    fine = kind is datasets.CIFAR100
    classes = 100 if fine else 10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lists, images, labels = {}, {}, {}
    for which in ("train_list", "test_list"):
        lists[which], images[which], labels[which] = [], [], []
        for name, _ in getattr(kind, which):
            x = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
            y = rng.integers(0, classes, 20).tolist()
            entry = {"data": x, "fine_labels" if fine else "labels": y}
            with (folder / name).open("wb") as file:
                AsPython2(file, protocol=2).dump(entry)
            lists[which].append([name, md5(folder / name)])
            images[which].append(x.reshape(20, 3, 32, 32))
            labels[which] += y
    meta = folder / kind.meta["filename"]
    names = [f"class {i}" for i in range(classes)]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: names}))
    for which, entries in lists.items():
        monkeypatch.setattr(kind, which, entries)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    if archive:
        with tarfile.open(root / kind.filename, "w:gz") as tar:
            tar.add(folder, kind.base_folder)
        monkeypatch.setattr(kind, "tgz_md5", md5(root / kind.filename))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    arrays = [np.concatenate(images[w]) for w in ("train_list", "test_list")]
    return *arrays, labels["train_list"], labels["test_list"]


def fake_svhn(root, monkeypatch):
    root.mkdir(parents=True, exist_ok=True)
    splits, made = dict(datasets.SVHN.split_list), {}
    for split, n in (("train", 20), ("test", 10)):
        url, name, _ = splits[split]
        x = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        y = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]  # SVHN writes the digit 0 as 10
        scipy.io.savemat(root / name, {"X": x, "y": y})
        splits[split], made[split] = [url, name, md5(root / name)], (x, y)
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    return made


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", datasets.MNIST), ("fashion-mnist", datasets.FashionMNIST)]
)
def test_mnist_in_torchvisions_layout(tmp_path, monkeypatch, name, kind):
    arrays = fake_mnist(tmp_path, monkeypatch, kind)
    d = data.load(name, tmp_path)
    assert np.array_equal(d.train_images[:, 0], arrays["x_train"])
    assert np.array_equal(d.test_images[:, 0], arrays["x_test"])
    assert np.array_equal(d.train_labels, arrays["y_train"])
    assert np.array_equal(d.test_labels, arrays["y_test"])
    assert d.classes == tuple("0123456789") if name == "mnist" else "Trouser" in d.classes
    np.savez(tmp_path / "copy.npz", **arrays)
    assert data.load("copy", tmp_path).sha256 == d.sha256  # the format does not matter
    assert not list(tmp_path.glob(".*"))


def test_mnist_from_archives_is_unpacked_without_a_download(tmp_path, monkeypatch):
    arrays = fake_mnist(tmp_path, monkeypatch, archives=True)
    d = data.load("mnist", tmp_path)
    assert np.array_equal(d.train_images[:, 0], arrays["x_train"])
    names = {path.name for path in (tmp_path / "MNIST" / "raw").iterdir()}
    assert len(names) == 8  # four archives, which are still there, and what was in them
    assert not any(path.is_symlink() for path in (tmp_path / "MNIST" / "raw").iterdir())
    assert not list(tmp_path.glob(".*"))
    assert data.load("mnist", tmp_path).sha256 == d.sha256


@pytest.mark.parametrize(
    ("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)]
)
@pytest.mark.parametrize("archive", [False, True])
@old_tar
def test_cifar_in_torchvisions_layout(tmp_path, monkeypatch, name, kind, archive):
    x_train, x_test, y_train, y_test = fake_cifar(tmp_path, monkeypatch, kind, archive)
    d = data.load(name, tmp_path)
    assert np.array_equal(d.train_images, x_train)
    assert np.array_equal(d.test_images, x_test)
    assert d.train_labels.tolist() == y_train
    assert d.test_labels.tolist() == y_test
    assert d.classes[1] == "class 1"
    assert len(d.classes) == (100 if name == "cifar100" else 10)


def test_cifar_is_silent_where_numpy_warns_about_its_old_pickles(tmp_path, monkeypatch):
    fake_cifar(tmp_path, monkeypatch)
    real, calls = pickle.load, []

    def load_as_numpy_2_4_0(file, **options):
        calls.append(file)
        message = "dtype(): align should be passed as Python or NumPy boolean but got `align=0`."
        warnings.warn(message, np.exceptions.VisibleDeprecationWarning, stacklevel=2)
        return real(file, **options)

    monkeypatch.setattr(pickle, "load", load_as_numpy_2_4_0)
    data.load("cifar10", tmp_path)
    assert calls


def test_svhn_in_torchvisions_layout(tmp_path, monkeypatch):
    made = fake_svhn(tmp_path, monkeypatch)
    d = data.load("svhn", tmp_path)
    x, y = made["train"]
    assert d.train_images.shape == (20, 3, 32, 32)
    assert np.array_equal(d.train_images[7], x[:, :, :, 7].transpose(2, 0, 1))
    assert d.train_labels.tolist() == (y[:, 0] % 10).tolist()
    assert d.test_images.shape == (10, 3, 32, 32)


@pytest.mark.parametrize(("name", "make"), [
    ("mnist", fake_mnist),
    ("mnist", functools.partial(fake_mnist, archives=True)),
    ("fashion-mnist", functools.partial(fake_mnist, kind=datasets.FashionMNIST)),
    ("cifar10", fake_cifar),
    ("cifar10", functools.partial(fake_cifar, archive=True)),
    ("cifar100", functools.partial(fake_cifar, kind=datasets.CIFAR100)),
    ("svhn", fake_svhn),
])  # fmt: skip
@old_tar
def test_what_lies_in_torchvisions_layout_is_found(tmp_path, monkeypatch, name, make):
    assert data.found_in_layout(tmp_path) == data.found_in_layout(tmp_path / "absent") == []
    make(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    assert data.found_in_layout(tmp_path) == [name]
    assert data.found(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setenv("BNNBOOK_DATA", str(tmp_path))
    assert data.found_in_layout() == [name]
    last = [path for path in before if path.is_file()][-1]
    content = last.read_bytes()
    last.unlink()
    assert data.found_in_layout() == []  # what is lacking would be downloaded
    last.write_bytes(content)
    data.load(name)  # without the network


def test_npz_comes_before_torchvisions_layout(tmp_path, monkeypatch):
    fake_mnist(tmp_path, monkeypatch)
    other = data.load("mnist", tmp_path)
    write_npz(tmp_path / "mnist.npz")
    assert data.load("mnist", tmp_path).train_images.shape == (12, 1, 4, 5)
    assert other.train_images.shape == (20, 1, 28, 28)


@pytest.mark.parametrize(
    "file", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
)
@pytest.mark.parametrize("size", [0, 3, 10, -1])
def test_a_cut_mnist_file_is_named_and_left_alone(tmp_path, monkeypatch, file, size):
    fake_mnist(tmp_path, monkeypatch)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:size])
    before = path.read_bytes()
    with pytest.raises(data.DataError, match="damaged file") as caught:
        data.load("mnist", tmp_path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("ubyte") == 1  # the good files are not blamed
    assert path.read_bytes() == before


def test_mnist_labels_that_do_not_belong_to_the_images(tmp_path, monkeypatch):
    fake_mnist(tmp_path, monkeypatch)
    raw = tmp_path / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(19, np.uint8)))
    with pytest.raises(data.DataError, match="train_labels has 19 entries for 20"):
        data.load("mnist", tmp_path)


def test_a_changed_cifar_file_is_named_and_left_alone(tmp_path, monkeypatch):
    fake_cifar(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    with pytest.raises(data.DataError, match="data_batch_3") as caught:
        data.load("cifar10", tmp_path)
    assert "data_batch_2" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_changed_svhn_file_is_named(tmp_path, monkeypatch):
    fake_svhn(tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(data.DataError, match=r"test_32x32\.mat"):
        data.load("svhn", tmp_path)
    assert path.stat().st_size == 100


# --- Download ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("fashion-mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_offline_says_where_to_put_the_files(tmp_path, name, file):
    root = tmp_path / "sets"
    with pytest.raises(data.DataError, match="could not be downloaded") as caught:
        data.load(name, root)
    text = str(caught.value)
    assert file in text
    assert str(root) in text
    for word in (f"{name}.npz", "x_train", "BNNBOOK_DATA", "root="):
        assert word in text, word
    assert list(root.iterdir()) == []  # nothing half-made is left


def test_a_root_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="BNNBOOK_DATA"):
        data.load("mnist", tmp_path / "file" / "below")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """Serve tmp_path/"remote" on this machine; yields (folder, address)."""
    folder = tmp_path / "remote"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_a_download_lands_in_torchvisions_layout(tmp_path, monkeypatch, server):
    folder, address = server
    arrays = fake_mnist(folder, monkeypatch, archives=True)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address + "MNIST/raw/"])
    root = tmp_path / "sets"
    d = data.load("mnist", root)
    assert np.array_equal(d.train_images[:, 0], arrays["x_train"])
    assert sorted(p.name for p in (root / "MNIST" / "raw").iterdir()) == sorted(
        name.removesuffix(".gz") for name, _ in datasets.MNIST.resources
    )
    assert [p.name for p in root.iterdir()] == ["MNIST"]
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    assert data.load("mnist", root).sha256 == d.sha256  # not downloaded again


@old_tar
def test_svhn_and_cifar_downloads(tmp_path, monkeypatch, server):
    folder, address = server
    fake_svhn(folder, monkeypatch)
    fake_cifar(folder, monkeypatch, archive=True)
    splits = {k: [address + n, n, s] for k, (_, n, s) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    monkeypatch.setattr(datasets.CIFAR10, "url", address + datasets.CIFAR10.filename)
    root = tmp_path / "sets"
    assert len(data.load("svhn", root).train_images) == 20
    assert len(data.load("cifar10", root).train_images) == 100
    assert sorted(p.name for p in root.iterdir()) == [
        "cifar-10-batches-py",
        "test_32x32.mat",
        "train_32x32.mat",
    ]


def test_a_download_with_a_wrong_checksum_is_refused_and_leaves_nothing(
    tmp_path, monkeypatch, server
):
    folder, address = server
    fake_mnist(folder, monkeypatch, archives=True)
    archive = folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-10])
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address + "MNIST/raw/"])
    with pytest.raises(data.DataError, match="corrupted"):
        data.load("mnist", tmp_path / "sets")
    assert list((tmp_path / "sets").iterdir()) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(url, filename, *arguments):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", tmp_path / "sets")
    assert list((tmp_path / "sets").iterdir()) == []


def test_files_in_place_are_never_overwritten_by_a_download(tmp_path, monkeypatch, server):
    folder, address = server
    fake_mnist(folder, monkeypatch, archives=True)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address + "MNIST/raw/"])
    mine = tmp_path / "sets" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(data.DataError, match="train-labels-idx1-ubyte"):
        data.load("mnist", tmp_path / "sets")
    assert mine.read_bytes() == b"mine"


@pytest.fixture
def silent(monkeypatch):
    """The address of a server that takes every request and says nothing for 4 seconds."""

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            over.wait(4)

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *arguments):
            pass

    over = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        over.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch, silent, name):
    monkeypatch.setattr(data, "TIMEOUT", 0.2)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [silent])
    monkeypatch.setattr(datasets.CIFAR10, "url", silent + "cifar-10-python.tar.gz")
    began = time.monotonic()
    with pytest.raises(data.DataError, match=r"could not be downloaded \(.*timed out.*Try again"):
        data.load(name, tmp_path / "sets")
    assert time.monotonic() - began < 3
    assert list((tmp_path / "sets").iterdir()) == []
    assert socket.getdefaulttimeout() is None  # others may wait as long as they like


def test_of_two_processes_one_downloads(tmp_path, monkeypatch, server):
    """The other waits for its turn, and finds the files."""
    _, address = server
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address + "nothing-is-here/"])
    root, loaded = tmp_path / "sets", []
    root.mkdir()
    thread = threading.Thread(target=lambda: loaded.append(data.load("mnist", root)))
    with data._turn(root):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        fake_mnist(root, monkeypatch)
    thread.join(30)
    assert [len(each.train_images) for each in loaded] == [20]


def test_what_fails_in_a_download_names_the_set_and_the_files(tmp_path):
    words = r"svhn\+extra is not under .* could not be downloaded \(cut\).* as x\.mat"
    with (
        pytest.raises(data.DataError, match=words),
        data.downloading("svhn+extra", tmp_path / "sets", "as x.mat"),
    ):
        raise OSError("cut")


# --- Batches -----------------------------------------------------------------------------------


def numbered(n):
    labels = torch.arange(n)
    return labels.to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous(), labels


def test_batches_in_order_without_a_generator():
    images, labels = numbered(10)
    sizes = [len(y) for _, y in data.batches(images, labels, 4)]
    assert sizes == [4, 4, 2]
    assert torch.cat([y for _, y in data.batches(images, labels, 4)]).tolist() == list(range(10))
    assert [len(y) for _, y in data.batches(images, labels, 4, drop_last=True)] == [4, 4]
    assert [len(y) for _, y in data.batches(images, labels, 5, drop_last=True)] == [5, 5]


def test_batches_follow_one_permutation_of_the_generator():
    images, labels = numbered(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    seen = [*data.batches(images, labels, 8, generator)]
    assert torch.equal(torch.cat([y for _, y in seen]), order)
    for x, y in seen:
        assert x.dtype == torch.uint8
        assert torch.equal(x[:, 0, 0, 0].long(), y)
    second = torch.cat([y for _, y in data.batches(images, labels, 8, generator)])
    assert not torch.equal(second, order)  # the next epoch has another order
    assert sorted(second.tolist()) == list(range(50))
    short = [*data.batches(images, labels, 8, torch.Generator().manual_seed(7), drop_last=True)]
    assert torch.equal(torch.cat([y for _, y in short]), order[:48])


def test_batches_refuse_at_once_what_cannot_work():
    images, labels = numbered(10)
    with pytest.raises(ValueError, match="at least 1"):
        data.batches(images, labels, 0)
    with pytest.raises(ValueError, match="10 images for 9 labels"):
        data.batches(images, labels[:9], 2)
    with pytest.raises(ValueError, match="no full batch"):
        data.batches(images, labels, 11, drop_last=True)
    meta = type("Generator", (), {"device": torch.device("cuda")})()
    with pytest.raises(ValueError, match="CPU generator"):
        data.batches(images, labels, 2, meta)


# --- Augmentation and scaling ------------------------------------------------------------------


def crop_twin(images, tops, lefts, flips, padding):
    """The same, one pixel after the other."""
    n, c, h, w = images.shape
    out = np.zeros_like(images)
    for i in range(n):
        for k in range(c):
            for row in range(h):
                for column in range(w):
                    y = row + tops[i] - padding
                    x = (w - 1 - column if flips[i] else column) + lefts[i] - padding
                    if 0 <= y < h and 0 <= x < w:
                        out[i, k, row, column] = images[i, k, y, x]
    return out


@pytest.mark.parametrize(("shape", "padding"), [((9, 3, 6, 5), 2), ((25, 1, 4, 4), 0)])
def test_crop_equals_the_loop_over_pixels(shape, padding):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, shape, dtype=np.uint8)
    tops, lefts = rng.integers(0, 2 * padding + 1, (2, shape[0]))
    flips = rng.random(shape[0]) < 0.5
    ours = data.crop(*map(torch.from_numpy, (images, tops, lefts, flips)), padding)
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours, crop_twin(images, tops, lefts, flips, padding))


def test_crop_at_the_centre_is_the_identity():
    images = toy().train_images
    middle, no = torch.full((12,), 3), torch.zeros(12, dtype=torch.bool)
    assert torch.equal(data.crop(images, middle, middle, no, 3), images)
    assert torch.equal(data.crop(images, middle, middle, ~no, 3), images.flip(3))


def test_crop_flip_draws_every_offset_and_both_sides():
    # One bright pixel in the middle of each image tells which window was cut.
    images = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 3] = 255
    torch.manual_seed(0)
    out = data.crop_flip(padding=2)(images)
    assert out.shape == images.shape
    _, _, rows, columns = out.nonzero(as_tuple=True)
    assert len(rows) == 4000
    assert set(rows.tolist()) == set(range(2, 7))
    # Unflipped, the pixel lands in columns 1 to 5, flipped in 3 to 7.
    counts = torch.bincount(columns, minlength=9).tolist()
    expected = [0, 1, 1, 2, 2, 2, 1, 1, 0]
    for count, tenths in zip(counts, expected, strict=True):
        assert abs(count - 400 * tenths) < 5 * (400 * max(tenths, 0.01)) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(data.crop_flip(padding=2)(images), out)
    assert not torch.equal(data.crop_flip(padding=2)(images), out)


def test_crop_flip_without_flip_and_bad_padding():
    images = toy(shape=(1, 5, 5)).train_images
    assert torch.equal(data.crop_flip(padding=0, flip=False)(images), images)
    with pytest.raises(ValueError, match="padding"):
        data.crop_flip(padding=-1)


def test_random_crop_cuts_windows_of_its_size():
    """A window's place and side, read off two gradients of brightness."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
    image = torch.stack([rows, columns]).to(torch.uint8)
    images = image.expand(6000, 2, 12, 10)
    torch.manual_seed(0)
    out = data.random_crop(8)(images)
    assert out.shape == (6000, 2, 8, 8)
    assert out.dtype == torch.uint8
    tops, flipped = out[:, 0, 0, 0], out[:, 1, 0, 0] > out[:, 1, 0, 1]
    lefts = out[:, 1].amin((1, 2))
    for view, top, left, flip in zip(out[:40], tops, lefts, flipped, strict=False):
        window = image[:, top : top + 8, left : left + 8]
        assert torch.equal(view, window.flip(2) if flip else window)
    places, counts = torch.stack([tops, lefts, flipped], 1).unique(dim=0, return_counts=True)
    assert len(places) == 5 * 3 * 2  # every view, equally often
    assert (counts - 200).abs().max() < 5 * 200**0.5
    torch.manual_seed(0)
    assert torch.equal(data.random_crop(8)(images), out)
    assert not torch.equal(data.random_crop(8)(images), out)
    same = data.random_crop(8, flip=False)(images)[:, 1]
    assert (same[:, :, 1:] > same[:, :, :-1]).all()


def test_224_out_of_256_gives_2178_views():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (1, 1, 256, 256), dtype=np.uint8))
    lefts = torch.arange(33).repeat(2)
    flips = torch.arange(66) >= 33
    views = set()
    for top in range(33):
        tops = torch.full((66,), top)
        cut = data.crop(image.expand(66, 1, 256, 256), tops, lefts, flips, 0, size=224)
        assert cut.shape == (66, 1, 224, 224)
        views |= {view[0, ::37, ::37].numpy().tobytes() for view in cut}
    assert len(views) == 2 * 33**2 == 2178


def test_crop_of_a_size_and_with_padding_equals_the_loop_over_pixels():
    rng = np.random.default_rng(1)
    images = rng.integers(1, 256, (20, 2, 6, 5), dtype=np.uint8)
    tops, lefts = rng.integers(0, 6 + 2 - 4 + 1, 20), rng.integers(0, 5 + 2 - 4 + 1, 20)
    flips = rng.random(20) < 0.5
    ours = data.crop(*map(torch.from_numpy, (images, tops, lefts, flips)), padding=1, size=4)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    for out, image, y, x, flip in zip(ours, padded, tops, lefts, flips, strict=True):
        window = image[:, y : y + 4, x : x + 4]
        assert np.array_equal(out, window[:, :, ::-1] if flip else window)


def test_centre_crop_is_the_identity_on_what_is_cropped_already():
    images = toy(shape=(3, 6, 9)).train_images
    middle = data.centre_crop(4)(images)
    assert torch.equal(middle, images[:, :, 1:5, 2:6])
    assert torch.equal(data.centre_crop(4)(middle), middle)
    # the middle view of the ten
    assert torch.equal(data.ten_views(images, 4)[4], middle)


def test_ten_views_are_corners_and_centre_and_their_mirrors():
    images = toy(n=5, shape=(3, 7, 6)).train_images
    views = data.ten_views(images, 4)
    assert views.shape == (10, 5, 3, 4, 4)
    x = images.numpy()
    expected = [x[:, :, :4, :4], x[:, :, :4, -4:], x[:, :, -4:, :4], x[:, :, -4:, -4:],
                x[:, :, 1:5, 1:5]]  # fmt: skip
    for i, view in enumerate(expected):
        assert np.array_equal(views[i], view)
        assert np.array_equal(views[i + 5], view[..., ::-1])
    assert len({view.numpy().tobytes() for view in views}) == 10


class Scores(torch.nn.Module):
    """Two class scores that see where a window lies and how it is turned."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2, 16, generator=GENERATOR.manual_seed(0)))

    def forward(self, x):
        return x.mean(1).flatten(1) @ self.weight.T


GENERATOR = torch.Generator()


def test_ten_view_average_is_the_mean_of_the_softmaxes():
    d = toy(n=20, m=9, shape=(3, 7, 6), classes=2)
    model, mean = Scores(), np.zeros((9, 2))
    for view in data.ten_views(d.test_images, 4).numpy() / 255:
        scores = view.mean(1).reshape(9, 16) @ model.weight.detach().numpy().T
        mean += np.exp(scores) / np.exp(scores).sum(1, keepdims=True) / 10
    averaged = data.TenViewAverage(model, 4)
    out = training.predict(averaged, d.test_images, preprocess=data.unit_range)
    np.testing.assert_allclose(out, mean, rtol=1e-5)
    np.testing.assert_allclose(out.sum(1), 1, rtol=1e-6)
    single = model(data.centre_crop(4)(data.unit_range(d.test_images))).softmax(1).detach()
    assert not np.allclose(mean, single, atol=0.01)
    accuracy = training.evaluate(averaged, d.test_images, d.test_labels)
    assert accuracy == (mean.argmax(1) == d.test_labels.numpy()).mean()


@pytest.mark.parametrize("cut", [
    lambda images, size: data.random_crop(size)(images),
    lambda images, size: data.centre_crop(size)(images),
    data.ten_views,
    lambda images, size: data.TenViewAverage(Scores(), size)(images),
])  # fmt: skip
def test_a_window_must_fit_the_images(cut):
    images = torch.zeros(2, 3, 6, 5)
    for size in (0, -1, 6, 7):
        with pytest.raises(ValueError, match=rf"cannot cut {size}×{size} .*\(2, 3, 6, 5\)"):
            cut(images, size)
    with pytest.raises(ValueError, match="images"):
        cut(images[0], 4)


def test_compose_goes_from_left_to_right():
    x = toy(shape=(3, 6, 6)).train_images
    both = data.compose(data.centre_crop(4), data.signed_range)
    assert torch.equal(both(x), data.signed_range(x[:, :, 1:5, 1:5]))
    assert data.compose()(x) is x
    assert both.__qualname__ == "compose(centre_crop.<locals>.cut, signed_range)"
    module = data.compose(torch.nn.Flatten())
    assert module(x).shape == (12, 108)
    assert module.__qualname__ == "compose(Flatten)"


# --- Colours -----------------------------------------------------------------------------------


def coloured(n=2500, size=5, seed=0):
    """Images whose three channels hang together, as those of photographs do."""
    rng = np.random.default_rng(seed)
    mixing = np.array([[60.0, 12, 3], [62, -2, -9], [64, -14, 5]])
    x = 120 + np.einsum("ij,njhw->nihw", mixing, rng.standard_normal((n, 3, size, size)))
    images = torch.from_numpy(x.round().clip(0, 255).astype(np.uint8))
    labels = torch.arange(n) % 3
    return data.Dataset(images, labels, images[:90], labels[:90], ("a", "b", "c"))


def test_colour_components_are_the_covariance_of_the_pixels():
    images = coloured().train_images
    values, vectors = data.colour_components(images)
    pixels = images.permute(1, 0, 2, 3).reshape(3, -1).numpy() / 255
    covariance = np.cov(pixels, ddof=0)
    np.testing.assert_allclose((vectors * values) @ vectors.T, covariance, atol=1e-12)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(covariance)[::-1], atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    grey = images[:, :1].expand(-1, 3, -1, -1)
    values, _ = data.colour_components(grey)
    np.testing.assert_allclose(values[1:], 0, atol=1e-12)
    assert (values >= 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_colour_noise_has_the_papers_covariance(power, device):
    d = coloured()
    values, vectors = data.colour_components(d.train_images)
    images = torch.zeros(40_000, 3, 1, 2, dtype=torch.uint8, device=device)
    torch.manual_seed(0)
    out = data.pca_colour_noise(d, power=power)(images).cpu()
    assert out.dtype == torch.float32
    assert torch.equal(out[..., 0], out[..., 1])  # one draw for all pixels of an image
    added = out[:, :, 0, 0].numpy() / 255  # on the scale [0, 1], which the components are on
    expected = np.zeros((3, 3))
    for value, p in zip(values.tolist(), vectors.T.numpy(), strict=True):
        expected += 0.01 * value ** (2 * power) * np.outer(p, p)
    assert np.abs(added.mean(0)).max() < 5 * np.sqrt(expected.diagonal().max() / 40_000)
    # along each component by itself, because the first is far larger than the last
    turn = vectors.numpy() / np.sqrt(0.01 * values.numpy() ** (2 * power))
    np.testing.assert_allclose(turn.T @ expected @ turn, np.eye(3), atol=1e-12)
    measured = turn.T @ np.cov(added.T) @ turn
    np.testing.assert_allclose(measured, np.eye(3), atol=5 * np.sqrt(2 / 40_000))


def test_colour_noise_is_added_in_pixels_to_uint8_and_float_alike():
    d = coloured(n=60)
    noise = data.pca_colour_noise(d, scale=0.5)
    torch.manual_seed(1)
    first = noise(d.train_images)
    torch.manual_seed(1)
    assert torch.equal(noise(d.train_images.float()), first)
    assert not torch.equal(noise(d.train_images), first)
    shift = first - d.train_images
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-4, rtol=0)
    assert first.min() < 0 or first.max() > 255  # neither clipped nor rounded
    assert len(shift[:, :, 0, 0].unique(dim=0)) == 60
    assert torch.equal(data.pca_colour_noise(d, scale=0)(d.train_images), d.train_images.float())
    half = data.standardize(d)(first) - data.standardize(d)(d.train_images)
    _, std = data.channel_statistics(d.train_images)
    expected = shift[:, :, 0, 0] / 255 / std.float()
    torch.testing.assert_close(half[:, :, 0, 0], expected, atol=1e-4, rtol=1e-4)


def test_colour_noise_refuses_other_than_three_channels_and_other_powers():
    d = coloured(n=60)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), not \(12, 1, 4, 5\)"):
        data.pca_colour_noise(toy())
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), not \(12, 1, 4, 5\)"):
        data.pca_colour_noise(d)(toy().train_images)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        data.colour_components(d.train_images[0])
    with pytest.raises(ValueError, match=r"power must be 1 \(the paper\) or 0\.5"):
        data.pca_colour_noise(d, power=2)


def test_alexnets_augmentation_from_training_to_the_ten_view_test():
    """Crops and colours in training; the centre, then the ten views, in testing."""
    d, seen = coloured(n=90, size=6).hold_out(30), []
    model = Scores()
    model.weight = torch.nn.Parameter(torch.zeros(3, 16))
    model.register_forward_pre_hook(lambda m, x: seen.append((m.training, *x[0].shape)))
    augment = data.compose(data.random_crop(4), data.pca_colour_noise(d))
    standardize = data.standardize(d)
    history = training.train(
        model, d, torch.optim.SGD(model.parameters(), 0.1), epochs=2, batch_size=20,
        augment=augment, preprocess=data.compose(data.centre_crop(4), standardize),
    )  # fmt: skip
    assert len(history.rows) == 2
    assert set(seen) == {(True, 20, 3, 4, 4), (False, 30, 3, 4, 4), (False, 90, 3, 4, 4)}
    accuracy = training.evaluate(
        data.TenViewAverage(model, 4), d.test_images, d.test_labels, preprocess=standardize
    )
    assert 0 <= accuracy <= 1
    assert len(seen) == 2 * (3 + 1 + 1) + 10


def test_ranges():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit, signed = data.unit_range(x), data.signed_range(x)
    assert unit.dtype == signed.dtype == torch.float32
    assert (unit.min(), unit.max()) == (0, 1)
    assert (signed.min(), signed.max()) == (-1, 1)
    torch.testing.assert_close(signed, 2 * unit - 1, atol=1e-6, rtol=0)


def test_subtract_mean_image_uses_the_training_images_only():
    d = toy(n=2500, shape=(3, 4, 5))
    preprocess = data.subtract_mean_image(d)
    x = d.train_images.double() / 255
    torch.testing.assert_close(
        preprocess(d.train_images).double(), x - x.mean(0), atol=1e-6, rtol=0
    )
    assert preprocess(d.test_images).dtype == torch.float32
    assert preprocess(d.train_images).double().mean(0).abs().max() < 1e-6


def test_standardize_gives_each_channel_mean_0_and_deviation_1():
    d = toy(n=2500, shape=(3, 4, 5))
    d.train_images[:, 1] //= 3
    mean, std = data.channel_statistics(d.train_images)
    x = d.train_images.double() / 255
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), atol=1e-12, rtol=0)
    torch.testing.assert_close(std, x.std((0, 2, 3), correction=0), atol=1e-12, rtol=0)
    z = data.standardize(d)(d.train_images)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_a_constant_channel_cannot_be_standardized():
    d = toy(shape=(3, 4, 5))
    d.train_images[:, 2] = 9
    with pytest.raises(ValueError, match="channel 2 is constant"):
        data.standardize(d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_channel_statistics_are_those_of_uint8_images_only(dtype):
    with pytest.raises(ValueError, match=f"must be uint8, from 0 to 255, not {dtype}"):
        data.channel_statistics(toy().train_images.to(dtype))


def contrast_twin(images, scale=55.0, epsilon=1e-8):
    """Global contrast normalisation, one image after the other, in float64."""
    rows = []
    for image in images.reshape(len(images), -1).astype(np.float64):
        centred = image - image.mean()
        divisor = np.sqrt((centred**2).sum()) / scale
        rows.append(centred / (divisor if divisor >= epsilon else 1))
    return np.array(rows)


def zca_twin(train, images, bias=0.1):
    """BinaryConnect's CIFAR-10 pipeline: contrast, centre, whiten with train's statistics."""
    x = contrast_twin(train)
    mean = x.mean(0)
    covariance = sum(np.outer(row, row) for row in x - mean) / len(x)
    values, vectors = np.linalg.eigh(covariance + bias * np.eye(len(mean)))
    matrix = sum(np.outer(u, u) / np.sqrt(v) for v, u in zip(values, vectors.T, strict=True))
    return (contrast_twin(images) - mean) @ matrix


def test_contrast_normalize_gives_each_image_mean_0_and_length_55():
    x = toy(shape=(3, 4, 5)).train_images
    x[3] = 77  # no contrast: nothing to divide by
    z = data.contrast_normalize(x)
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.flatten(1), contrast_twin(x.numpy()), atol=1e-4)
    torch.testing.assert_close(z.mean((1, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    length = torch.full((12,), 55.0)
    length[3] = 0
    torch.testing.assert_close(z.flatten(1).norm(dim=1), length, atol=1e-3, rtol=0)
    assert data.contrast_normalize(x.double()).dtype == torch.float64
    # brightness and contrast of the whole image do not matter
    other = [i for i in range(12) if i != 3]
    changed = data.contrast_normalize(x[other] / 255 - 3)
    torch.testing.assert_close(changed, z[other], atol=1e-3, rtol=1e-4)
    assert data.contrast_normalize(x, epsilon=1e6).abs().max() > 80  # centred, not divided
    # of one colour, at CIFAR's size: no rounding is left over that would be blown up
    flat = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, 32, 32)
    assert not data.contrast_normalize(flat).any()


@pytest.mark.parametrize("number", [0, -1.0, float("nan"), float("inf")])
def test_contrast_and_whitening_refuse_a_scale_or_a_bias_that_is_not_positive(number):
    d = toy()
    message = f"must be positive and finite, not {number}"
    with pytest.raises(ValueError, match=f"scale {message}"):
        data.contrast_normalize(d.train_images, scale=number)
    with pytest.raises(ValueError, match=f"scale {message}"):
        data.zca_whiten(d, scale=number)
    with pytest.raises(ValueError, match=f"bias {message}"):
        data.zca_whiten(d, bias=number)


@pytest.mark.parametrize("device", DEVICES)
def test_zca_whiten_is_binaryconnects_pipeline(device):
    d = coloured(n=1500, size=4)
    train, test = d.train_images.numpy(), d.test_images.numpy()[:20]
    z = data.zca_whiten(d.to(device))(d.test_images[:20].to(device))
    assert z.device.type == device
    assert z.dtype == torch.float32
    assert z.shape == (20, 3, 4, 4)
    np.testing.assert_allclose(z.cpu().flatten(1), zca_twin(train, test), atol=2e-4)
    strong = data.zca_whiten(d, bias=10.0)(d.test_images[:20])
    np.testing.assert_allclose(strong.flatten(1), zca_twin(train, test, 10.0), atol=2e-4)


def test_zca_whitens_up_to_its_bias():
    """The whitened covariance has the eigenvalues v/(v + bias), v those before."""
    d = coloured(n=2000, size=4)
    z = data.zca_whiten(d)(d.train_images).double().flatten(1)
    assert z.mean(0).abs().max() < 1e-4
    before = np.linalg.eigvalsh(np.cov(contrast_twin(d.train_images.numpy()).T, ddof=0))
    after = np.linalg.eigvalsh(np.cov(z.numpy().T, ddof=0))
    np.testing.assert_allclose(after, before / (before + 0.1), atol=1e-4)
    assert after[0] < 1e-6  # contrast normalisation has taken out one direction: the mean


def test_zca_is_fitted_on_the_held_out_images_too_unless_told_otherwise():
    d = coloured(n=400, size=3)
    held, x = d.hold_out(100), d.test_images[:5]
    everything = data.zca_whiten(d)(x)
    torch.testing.assert_close(data.zca_whiten(held)(x), everything, atol=1e-4, rtol=0)
    without = data.zca_whiten(held, with_validation=False)(x)
    assert (without - everything).abs().max() > 0.01
    twin = zca_twin(d.train_images.numpy()[:300], x.numpy())
    np.testing.assert_allclose(without.flatten(1), twin, atol=2e-4)
    with pytest.raises(ValueError, match=r"fitted on images \(3, 3, 3\), not \(1, 4, 5\)"):
        data.zca_whiten(d)(toy().train_images)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A function that whitens some images, with a folder in which even small fits are kept."""
    monkeypatch.setattr(data, "SLOW_TO_WHITEN", 10)

    def whiten(d, **options):
        return data.zca_whiten(d, **{"root": tmp_path} | options)(d.test_images[:20])

    return whiten


def kept_files(tmp_path):
    return sorted((tmp_path / "whitening").iterdir())


@pytest.mark.parametrize("device", DEVICES)
def test_a_whitening_is_kept_and_found_to_the_last_bit(tmp_path, monkeypatch, kept, device):
    d = coloured(n=400, size=3).hold_out(100).to(device)
    with monkeypatch.context() as patch:
        patch.setattr(data, "SLOW_TO_WHITEN", 1000)
        without = kept(d)
        assert not list(tmp_path.iterdir())  # what takes no time is not kept
    assert torch.equal(kept(d), without)
    (file,) = kept_files(tmp_path)
    assert data.found(tmp_path) == []
    monkeypatch.setattr(data, "_contrast_statistics", lambda *_: pytest.fail("fitted again"))
    again = kept(d)
    assert torch.equal(again, without)
    assert again.device == d.test_images.device
    assert kept_files(tmp_path) == [file]


def test_a_whitening_is_kept_for_these_images_and_settings_only(tmp_path, monkeypatch, kept):
    d = coloured(n=400, size=3).hold_out(100)
    kept(d)
    threads = torch.get_num_threads()
    others = [replace(d, train_images=d.train_images[:200], train_labels=d.train_labels[:200]),
              replace(d, train_images=d.train_images.sqrt().to(torch.uint8))]  # fmt: skip
    assert {other.sha256 for other in others} == {d.sha256}  # which cannot tell them apart
    options = {"with_validation": False}, {"bias": 1.0}, {"scale": 9.0}
    cases = [*((other, {}) for other in others), *((d, option) for option in options)]
    for number, (other, options) in enumerate(cases, 2):
        expected = kept(other, **options, root=tmp_path / "empty")
        assert torch.equal(kept(other, **options), expected)
        assert len(kept_files(tmp_path)) == number
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)  # sums round differently
    kept(d)
    assert len(kept_files(tmp_path)) == 7


def flip(raw, place):
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:200], lambda raw: raw[:-1], lambda raw: b"not an archive",
    lambda raw: flip(raw, len(raw) // 3), lambda raw: flip(raw, len(raw) - 400),
], ids=["empty", "cut", "last byte", "foreign", "flipped", "flipped late"])  # fmt: skip
def test_a_damaged_whitening_is_made_anew(tmp_path, kept, damage):
    d = coloured(n=400, size=3)
    expected = kept(d)
    (file,) = kept_files(tmp_path)
    whole = file.read_bytes()
    assert len(whole) > 1000
    file.write_bytes(damage(whole))
    assert torch.equal(kept(d), expected)
    assert np.array_equal(np.load(file)["rows"], np.load(io.BytesIO(whole))["rows"])
    assert kept_files(tmp_path) == [file]


@pytest.mark.parametrize("rows", [np.zeros((27, 27), np.float32), np.zeros((28, 27))])
def test_a_whitening_of_another_form_is_made_anew(tmp_path, kept, rows):
    d = coloured(n=400, size=3)
    expected = kept(d)
    (file,) = kept_files(tmp_path)
    np.savez(file, rows=rows)
    assert torch.equal(kept(d), expected)


def test_a_whitening_that_cannot_be_kept_is_made_all_the_same(tmp_path, monkeypatch, kept):
    d = coloured(n=400, size=3)
    expected = kept(d)
    (tmp_path / "file").touch()
    assert torch.equal(kept(d, root=tmp_path / "file"), expected)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space is left")

    monkeypatch.setattr(np, "savez", full)
    assert torch.equal(kept(d, root=tmp_path / "other"), expected)
    assert kept_files(tmp_path / "other") == []


@pytest.mark.skipif("BNNBOOK_TEST_DATA" not in os.environ, reason="BNNBOOK_TEST_DATA is not set")
def test_the_real_mnist_and_cifar10():
    root = os.environ["BNNBOOK_TEST_DATA"]
    mnist, cifar = data.load("mnist", root), data.load("cifar10", root)
    assert mnist.train_images.shape == (60000, 1, 28, 28)
    assert cifar.train_images.shape == (50000, 3, 32, 32)
    mean, std = data.channel_statistics(mnist.train_images)
    assert [round(float(v), 4) for v in (mean, std)] == [0.1307, 0.3081]
    mean, std = data.channel_statistics(cifar.train_images)
    assert [round(v, 3) for v in mean.tolist()] == [0.491, 0.482, 0.447]
    assert [round(v, 3) for v in std.tolist()] == [0.247, 0.243, 0.262]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrast_normalize_does_not_overflow_in_half_precision(dtype):
    images = (255 * torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    normalized = data.contrast_normalize(images)
    assert normalized.dtype == dtype
    lengths = normalized.float().flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((3,), 55.0), rtol=0.01, atol=0)
