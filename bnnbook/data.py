"""Data sets as uint8 tensors, and their batches, augmentation and scaling on the device.

A data set is small enough to live on the device as uint8; a batch is one indexing operation there,
and only the batch becomes floating point. There are no worker processes and no per-image
transforms.

Where a set comes from, in this order: ``digits`` is embedded in scikit-learn; ``NAME.npz`` under
the root; torchvision's own layout under the root; a download into that layout. The root is the
argument ``root``, else the environment variable ``BNNBOOK_DATA``, else ``~/.cache/bnnbook``.
"""

import contextlib
import functools
import hashlib
import math
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Our name -> the name of torchvision's class.
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
NAMES = ("digits", *TORCHVISION)
DIGITS = tuple("0123456789")
TIMEOUT = 60.0  # seconds without a byte after which a download is given up
SLOW_TO_WHITEN = 1000  # values per image from which on a whitening is cached in a file
NPZ_LAYOUT = (
    "x_train, y_train, x_test, y_test and, optionally, classes; "
    "uint8 images (N, H, W) or (N, H, W, C) with C = 1 or 3, integer labels (N,) or (N, 1)"
)


class DataError(RuntimeError):
    """A data set is absent and cannot be downloaded, or one of its files is damaged."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels of one data set, all on one device.

    Images are uint8 of shape (N, C, H, W), labels int64 of shape (N,), from 0 to the number of
    ``classes`` minus 1. ``sha256`` identifies what was loaded (see `fingerprint`); it does not
    change when the set is moved to a device or a part of it is held out. Raises ValueError, naming
    the field, for a wrong shape, dtype, length or label.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    name: str = "unnamed"
    sha256: str = ""
    validation_images: Tensor | None = None
    validation_labels: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _names(self.classes))
        if not self.classes:
            raise ValueError("classes is empty: name at least one class")
        if (self.validation_images is None) != (self.validation_labels is None):
            raise ValueError("give validation_images and validation_labels together, or neither")
        for part in ("train", "test", "validation"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if part != "validation" or images is not None:
                _check_images(f"{part}_images", images, self.train_images)
                _check_labels(part, images, labels, len(self.classes))
        if not self.sha256:
            object.__setattr__(self, "sha256", fingerprint(self))

    def __repr__(self) -> str:
        held = "" if self.validation_images is None else f" + {len(self.validation_images)} valid."
        shape = "×".join(str(n) for n in self.train_images.shape[1:])
        return (
            f"Dataset({self.name!r}: {len(self.train_images)} train{held} + "
            f"{len(self.test_images)} test, {shape}, {len(self.classes)} classes, "
            f"{self.train_images.device})"
        )

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the same data set with all tensors on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: t.to(device) for k, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    def hold_out(self, n: int, seed: int | None = None) -> "Dataset":
        """Return a data set whose last ``n`` training images are the validation set.

        With a ``seed`` the training images are shuffled first. A set that is ordered by class
        needs this, because its last images all belong to the last classes. Raises ValueError for
        such a set without a seed, for a set that already has a validation set, and unless ``n``
        leaves at least one training image.

        >>> load("digits").hold_out(300)
        Dataset('digits': 1000 train + 300 valid. + 497 test, 1×8×8, 10 classes, cpu)
        """
        total, labels = len(self.train_images), self.train_labels
        if self.validation_images is not None:
            raise ValueError("this data set already has a validation set")
        if not 1 <= n < total:
            raise ValueError(f"hold_out(n={n}): n must lie between 1 and {total - 1}")
        if seed is None:
            classes, changes = len(labels.unique()), int((labels[1:] != labels[:-1]).sum())
            if 0 < changes == classes - 1 < total - 1:  # each class stands in one place
                raise ValueError(
                    "the training images are ordered by class, so the last ones would hold only "
                    "the last classes: hold_out(n, seed=0) draws them at random"
                )
            train, held = slice(0, total - n), slice(total - n, total)
        else:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(total, generator=generator, device="cpu")
            train, held = order.to(labels.device).split([total - n, n])
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=labels[train],
            validation_images=self.train_images[held],
            validation_labels=labels[held],
        )


def _names(classes: object) -> tuple[str, ...]:
    try:
        return tuple(str(c) for c in classes)
    except TypeError:  # a number of classes, most likely
        raise ValueError(
            f"classes must be the classes' names, such as ('cat', 'dog') or range(10), "
            f"not {classes!r}"
        ) from None


def _check_images(field: str, images: Tensor, like: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"{field} must be a uint8 tensor (N, C, H, W), not {_kind(images)}")
    if 0 in images.shape:
        raise ValueError(f"{field} is empty: {tuple(images.shape)}")
    if images.shape[1:] != like.shape[1:]:
        shapes = f"{tuple(images.shape[1:])}, not {tuple(like.shape[1:])}"
        raise ValueError(f"{field} and train_images differ in shape: {shapes}")


def _check_labels(part: str, images: Tensor, labels: Tensor, classes: int) -> None:
    field = f"{part}_labels"
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise ValueError(f"{field} must be an int64 tensor (N,), not {_kind(labels)}")
    if len(labels) != len(images):
        raise ValueError(f"{field} has {len(labels)} entries for {len(images)} {part}_images")
    if labels.device != images.device:
        raise ValueError(f"{field} is on {labels.device}, {part}_images on {images.device}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{field} holds labels {low} to {high}; {classes} classes allow 0 to {classes - 1}"
        )


def _kind(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)} ({type(value).__name__})"
    return type(value).__name__


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256 of the data set's four arrays, as hexadecimal digits.

    Hashed in this order: train_images, train_labels, test_images, test_labels; of each array the
    line ``name dtype shape`` and then its bytes (C order, labels as little-endian int64). It does
    not depend on the file format that the arrays came from.
    """
    digest = hashlib.sha256()
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(dataset, name).cpu().numpy()
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def load(name: str, root: str | os.PathLike | None = None) -> Dataset:
    """Load a data set by name: digits, mnist, fashion-mnist, cifar10, cifar100, svhn or your own.

    ``digits`` is always scikit-learn's: 1797 images of 8×8 with values scaled from 0–16 to 0–255,
    1300 for training and 497 for testing (a fixed permutation). The others are looked for under
    ``root`` (else ``BNNBOOK_DATA``, else ``~/.cache/bnnbook``), first as NAME.npz in Keras's
    layout (x_train, y_train, x_test, y_test), then in torchvision's own layout, and are downloaded
    there if absent. A download goes to a temporary folder and is moved into place once its
    checksum is right, so an interrupted one is never taken for the whole.

    Raises ValueError for an unknown name, and DataError if the set cannot be downloaded or a file
    is damaged; damaged files are named and left as they are.

    >>> digits = load("digits")
    >>> digits
    Dataset('digits': 1300 train + 497 test, 1×8×8, 10 classes, cpu)
    >>> digits.train_images.dtype, int(digits.train_images.max())
    (torch.uint8, 255)
    """
    name, folder = name.removesuffix(".npz"), root_folder(root)
    if name == "digits":
        return _digits()
    if Path(name).name == name and (folder / f"{name}.npz").is_file():
        return _read_npz(name, folder / f"{name}.npz")
    if name in TORCHVISION:
        return _read_torchvision(name, folder)
    own = ", ".join(found(folder)) or "none"
    raise ValueError(
        f"unknown data set {name!r}; known: {', '.join(NAMES)}; "
        f"NAME.npz files under {folder}: {own}"
    )


def root_folder(root: str | os.PathLike | None = None) -> Path:
    """Return the folder of the data sets: ``root``, else BNNBOOK_DATA, else ~/.cache/bnnbook."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root or os.environ.get("BNNBOOK_DATA") or Path(cache) / "bnnbook").expanduser()


def found(root: str | os.PathLike | None = None) -> list[str]:
    """Return the names of the NAME.npz files under the root."""
    return sorted(path.stem for path in root_folder(root).glob("*.npz"))


def found_in_layout(root: str | os.PathLike | None = None) -> list[str]:
    """Return the names of the sets whose files lie under the root in torchvision's layout.

    The files may be unpacked or still archives: `load` downloads neither. They are not opened, so
    damage goes unnoticed.
    """
    from torchvision import datasets

    kinds = {name: getattr(datasets, kind) for name, kind in TORCHVISION.items()}
    layouts = {name: _layout(kind, root_folder(root)) for name, kind in kinds.items()}
    return [
        name
        for name, each in layouts.items()
        if any(paths and all(path.is_file() for path in paths) for paths in each)
    ]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    # RandomState, because NumPy guarantees that its stream never changes.
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:1300], order[1300:]
    arrays = images[train], raw.target[train], images[test], raw.target[test]
    return _dataset("digits", *arrays, DIGITS)


def _dataset(name, x_train, y_train, x_test, y_test, classes) -> Dataset:
    """Build a Dataset from arrays in Keras's layout: (N, H, W) or (N, H, W, C)."""
    tensors = []
    for images, labels in ((x_train, y_train), (x_test, y_test)):
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        tensors.append(torch.from_numpy(np.ascontiguousarray(images)))
        tensors.append(torch.from_numpy(labels.astype(np.int64).reshape(-1)))
    return Dataset(*tensors, tuple(classes), name=name)


# --- NAME.npz ----------------------------------------------------------------------------------


def _read_npz(name: str, path: Path) -> Dataset:
    """Read one NAME.npz; anything wrong with it becomes a DataError that names the file."""
    try:
        arrays = _npz_arrays(path)
        classes = arrays.pop("classes", None)
        if classes is None:
            top = max(int(arrays["y_train"].max()), int(arrays["y_test"].max()))
            classes = np.arange(top + 1)
        classes = [c.decode() if isinstance(c, bytes) else str(c) for c in classes.reshape(-1)]
        return _dataset(name, **arrays, classes=classes)
    except DataError:
        raise
    # a damaged archive can fail anywhere in zipfile, zlib or NumPy's parser
    except Exception as error:
        raise DataError(
            f"{path} cannot be used: {type(error).__name__}: {error}. It was left as it is; "
            f"a {name}.npz holds {NPZ_LAYOUT}."
        ) from error


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    # opened here, because NumPy would leave a file of its own open if the archive is damaged
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("this is a single .npy array, not an .npz archive")
        wanted = ("x_train", "y_train", "x_test", "y_test")
        missing = [key for key in wanted if key not in archive.files]
        if missing:
            raise ValueError(
                f"no array {', '.join(missing)} (it holds {', '.join(archive.files)})"
            )
        arrays = {key: archive[key] for key in (*wanted, "classes") if key in archive.files}
    for part in ("train", "test"):
        _check_npz_part(part, arrays[f"x_{part}"], arrays[f"y_{part}"])
    return arrays


def _check_npz_part(part: str, x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype != np.uint8:
        raise ValueError(f"x_{part} is {x.dtype}, must be uint8 with values 0 to 255")
    if x.ndim != 3 and not (x.ndim == 4 and x.shape[3] in (1, 3)):
        raise ValueError(f"x_{part} has shape {x.shape}, must be (N, H, W) or (N, H, W, 1 or 3)")
    if y.dtype.kind not in "iu":
        raise ValueError(f"y_{part} is {y.dtype}, must be integers")
    if y.ndim != 1 and not (y.ndim == 2 and y.shape[1] == 1):
        raise ValueError(f"y_{part} has shape {y.shape}, must be (N,) or (N, 1)")
    if len(x) != len(y) or not len(x):
        raise ValueError(f"x_{part} has {len(x)} images for {len(y)} labels in y_{part}")


# --- torchvision -------------------------------------------------------------------------------


def _read_torchvision(name: str, root: Path) -> Dataset:
    """Read a set in torchvision's layout under ``root``, downloading what is missing there."""
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    files, _ = _layout(kind, root)
    if not all(path.is_file() for path in files):
        _fetch(name, kind, root)
    try:
        with warnings.catch_warnings():
            # CIFAR's pickles are from Python 2; NumPy 2.4.0 to 2.4.4 warn about their dtypes
            warnings.filterwarnings("ignore", r"dtype\(\): align should be")
            return _dataset(name, *_torchvision_arrays(name, kind, root))
    # a damaged file can fail anywhere in torchvision's readers, even in an assert
    except Exception as error:
        bad = ", ".join(str(path) for path in _damaged(name, files)) or str(root)
        raise DataError(
            f"{name}: damaged file: {bad} ({type(error).__name__}: {error}). "
            f"It was left as it is; move it away to have {name} downloaded again."
        ) from error


def _torchvision_arrays(name: str, kind, root: Path) -> tuple:
    """Return x_train, y_train, x_test, y_test and the classes, in Keras's layout."""
    if name == "svhn":
        train, test = (kind(root, split=split) for split in ("train", "test"))
        return _hwc(train.data), train.labels, _hwc(test.data), test.labels, DIGITS
    train, test = (kind(root, train=flag) for flag in (True, False))
    arrays = [np.asarray(a) for part in (train, test) for a in (part.data, part.targets)]
    return *arrays, DIGITS if name == "mnist" else train.classes


def _hwc(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def _layout(kind, root: Path) -> tuple[dict[Path, str | None], list[Path]]:
    """Return the files that torchvision reads, with their MD5 where known, and their archives."""
    if hasattr(kind, "resources"):  # MNIST and Fashion-MNIST
        archives = [root / kind.__name__ / "raw" / name for name, _ in kind.resources]
        return {path.with_suffix(""): None for path in archives}, archives
    if hasattr(kind, "split_list"):  # SVHN
        splits = (kind.split_list[split] for split in ("train", "test"))
        return {root / name: md5 for _, name, md5 in splits}, []
    listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    files = {root / kind.base_folder / name: md5 for name, md5 in listed}
    return files, [root / kind.filename]


def _damaged(name: str, files: dict[Path, str | None]) -> list[Path]:
    """Return the files that torchvision would refuse to read."""
    from torchvision.datasets.mnist import read_image_file, read_label_file
    from torchvision.datasets.utils import check_integrity

    bad = []
    for path, md5 in files.items():
        try:
            if "idx3" in path.name:
                read_image_file(str(path))
            elif "idx1" in path.name:
                read_label_file(str(path))
            elif not check_integrity(path, md5):
                bad.append(path)
        except Exception:
            bad.append(path)
    return bad


def _fetch(name: str, kind, root: Path) -> None:
    """Download and unpack a set in a temporary folder under ``root``, then move its files there.

    Archives that are already in torchvision's layout are used instead of a download; files that
    are already in place stay as they are.
    """
    files, archives = _layout(kind, root)
    wanted = ", ".join(str(path.relative_to(root)) for path in archives or files)
    places = f"either as {name}.npz ({NPZ_LAYOUT}) or in torchvision's layout ({wanted})"
    with downloading(name, root, places):
        if all(path.is_file() for path in files):
            return  # another process has downloaded it in the meantime
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
            fresh = Path(temporary)
            for ours, theirs in zip(archives, _layout(kind, fresh)[1], strict=True):
                if ours.is_file():
                    theirs.parent.mkdir(parents=True, exist_ok=True)
                    theirs.symlink_to(ours.resolve())
            _download(kind, fresh)
            for source, target in zip(_layout(kind, fresh)[0], files, strict=True):
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.replace(target)


def _download(kind, root: Path) -> None:
    """Let torchvision download a set, check its MD5 sums and unpack it, with a progress bar."""
    if hasattr(kind, "split_list"):
        for split in ("train", "test"):
            kind(root, split=split, download=True)
    else:
        kind(root, download=True)


@contextlib.contextmanager
def downloading(name: str, root: Path, places: str) -> Iterator[None]:
    """Context for a download into ``root``: one process at a time, with a network timeout.

    A failure, or a server that sends nothing for `TIMEOUT` seconds, becomes a DataError that names
    the data set and tells the user how to put it there by hand: ``places`` names the files.
    """
    before = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)  # torchvision opens its connections without a timeout
        with _turn(root):
            yield
    except (OSError, RuntimeError, HTTPException, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} is not under {root} and could not be downloaded ({reason}). "
            f"Try again, or put it there {places}; "
            "or name the folder that holds it: the environment variable BNNBOOK_DATA, or root=."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, after waiting until no other process holds it.

    Without such locks (Windows, some network file systems) nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- Batches and augmentation, on the device ---------------------------------------------------


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over (images, labels) in batches, on the device of the tensors.

    With a ``generator``, which must be on the CPU, the order is one permutation drawn from it, the
    same on every device; without, the order is that of the tensors. ``drop_last`` leaves out a
    last batch that is not full. Raises ValueError, at the call, for arguments that do not fit.

    >>> x, y = torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5)
    >>> [b.tolist() for _, b in batches(x, y, 2)]
    [[0, 1], [2, 3], [4]]
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images for {len(labels)} labels")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if drop_last and batch_size > len(images):
        raise ValueError(f"batch_size {batch_size} > {len(images)} images: no full batch is left")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError("generator must be a CPU generator, so that all devices see one order")
    return _batches(images, labels, batch_size, generator, drop_last)


def _batches(images, labels, batch_size, generator, drop_last):
    n = len(images)
    stop = n - n % batch_size if drop_last else n
    if generator is None:
        for start in range(0, stop, batch_size):
            end = min(start + batch_size, stop)
            yield images[start:end], labels[start:end]
    else:
        order = torch.randperm(n, generator=generator, device="cpu").to(images.device)
        for index in order[:stop].split(batch_size):
            yield images[index], labels[index]


def crop(images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor, padding: int,
         size: int | None = None) -> Tensor:  # fmt: skip
    """Pad with zeros, then cut a window out of each image at its (top, left), mirrored on a flip.

    ``images`` is (N, C, H, W); ``tops``, ``lefts`` and ``flips`` (bool) are (N,). Windows are
    ``size`` × ``size``, by default H × W. Tops run from 0 to H + 2·``padding`` − ``size``, and
    lefts likewise with W; without a ``size``, offsets of ``padding`` give the image itself.
    """
    n, c, h, w = images.shape
    if size is not None:
        h = w = size
    padded = F.pad(images, (padding,) * 4)
    rows = tops[:, None] + torch.arange(h, device=images.device)
    columns = lefts[:, None] + torch.arange(w, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def crop_flip(padding: int = 4, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """Return an augmentation: a random crop after zero padding, mirrored with probability 1/2.

    Each image (N, C, H, W) keeps its size; ``flip=False`` mirrors none. It works on a whole batch
    on its device and draws from that device's global generator. Raises ValueError for a negative
    ``padding``.
    """
    if padding < 0:
        raise ValueError(f"padding must be at least 0, not {padding}")

    def augment(images: Tensor) -> Tensor:
        n, device = len(images), images.device
        tops, lefts = torch.randint(2 * padding + 1, (2, n), device=device)
        flips = (torch.rand(n, device=device) < 0.5) & flip
        return crop(images, tops, lefts, flips, padding)

    return augment


def random_crop(size: int, flip: bool = True) -> Callable[[Tensor], Tensor]:
    r"""Return AlexNet's augmentation: a random ``size`` × ``size`` window, mirrored half the time.

    No padding: images (N, C, H, W) must be at least that large. Each image draws its own offset
    and flip from the global generator of its device. An image has
    :math:`2\,(H - s + 1)(W - s + 1)` views for s = ``size``: 2178 for 224 out of 256, where the
    paper counts 2048 (section 4.1). Its released code gives 32 images in a row the same offset and
    flip. Test with `centre_crop` or `TenViewAverage`. Raises ValueError for a ``size`` below 1 or
    above H or W.
    """

    def augment(images: Tensor) -> Tensor:
        _check_window(images, size)
        n, device = len(images), images.device
        tops, lefts = (torch.randint(side - size + 1, (n,), device=device)
                       for side in images.shape[2:])  # fmt: skip
        flips = (torch.rand(n, device=device) < 0.5) & flip
        return crop(images, tops, lefts, flips, padding=0, size=size)

    return augment


def centre_crop(size: int) -> Callable[[Tensor], Tensor]:
    """Return x -> its central ``size`` × ``size`` pixels; images of that size pass unchanged.

    So ``compose(centre_crop(28), standardize(dataset))`` preprocesses both the random crops of
    training and the whole images of testing. Raises ValueError for a window that does not fit.

    >>> centre_crop(2)(torch.arange(16).view(1, 1, 4, 4)).tolist()
    [[[[5, 6], [9, 10]]]]
    """

    def cut(images: Tensor) -> Tensor:
        _check_window(images, size)
        top, left = ((side - size) // 2 for side in images.shape[2:])
        return images[:, :, top : top + size, left : left + size]

    return cut


def ten_views(images: Tensor, size: int) -> Tensor:
    """Return AlexNet's ten test views of each image: the corners, the centre, and their mirrors.

    (N, C, H, W) becomes (10, N, C, ``size``, ``size``); view i + 5 mirrors view i (section 4.1).
    Raises ValueError for a window that does not fit.

    >>> ten_views(torch.arange(9).view(1, 1, 3, 3), 1).flatten().tolist()
    [0, 2, 6, 8, 4, 0, 2, 6, 8, 4]
    """
    _check_window(images, size)
    bottom, right = (side - size for side in images.shape[2:])
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    views = [images[:, :, y : y + size, x : x + size] for y, x in corners]
    return torch.stack([*views, *(view.flip(3) for view in views)])


class TenViewAverage(nn.Module):
    r"""Wrap a classifier to average its softmax outputs over `ten_views`.

    :math:`p = \frac{1}{10} \sum_{i=1}^{10} \operatorname{softmax} f(v_i)` for the ``model`` f and
    the views :math:`v_i` of ``size`` × ``size`` pixels (AlexNet, section 4.1). Input: whole
    images, preprocessed, (N, C, H, W); output: probabilities (N, classes). For example
    ``evaluate(TenViewAverage(model, 28), images, labels, preprocess=standardize(dataset))``.
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean probabilities, one view after the other to spare memory."""
        views = ten_views(images, self.size)
        return sum(self.model(view).float().softmax(1) for view in views) / len(views)


def _check_window(images: Tensor, size: int) -> None:
    if images.ndim != 4 or not 1 <= size <= min(images.shape[2:]):
        shape = tuple(images.shape)
        raise ValueError(f"cannot cut {size}×{size} from images (N, C, H, W) of shape {shape}")


def compose(*steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return x -> all steps applied in the order given; without steps, x itself.

    >>> compose(centre_crop(2), unit_range)(torch.full((1, 1, 4, 4), 51)).flatten().tolist()
    [0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]
    """

    def apply(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    # a checkpoint identifies its augmentation by this name
    names = (getattr(step, "__qualname__", type(step).__name__) for step in steps)
    apply.__qualname__ = f"compose({', '.join(names)})"
    return apply


def pca_colour_noise(dataset: Dataset, scale: float = 0.1,
                     power: float = 1.0) -> Callable[[Tensor], Tensor]:  # fmt: skip
    r"""Return AlexNet's colour augmentation: shift each image along the principal colours.

    Every RGB pixel of an image is shifted by
    :math:`[p_1\,p_2\,p_3]\,[\alpha_1\lambda_1, \alpha_2\lambda_2, \alpha_3\lambda_3]^\top` with
    :math:`\alpha_i \sim N(0,\ \sigma^2)`, :math:`\sigma` = ``scale``, drawn anew for each image
    each time (section 4.1). :math:`p_i` and :math:`\lambda_i` are the `colour_components` of the
    training pixels *in [0, 1]*. The pixels' scale matters, since :math:`\lambda` grows with its
    square, but the paper names none. Its released code appears to multiply by
    :math:`\sqrt{\lambda_i}`: ``power=0.5``.

    Images are (N, 3, H, W), uint8 or floating point from 0 to 255; the result is float32 on that
    scale, neither rounded nor clipped, so that any preprocessing accepts it in place of uint8:
    ``augment=compose(crop_flip(), pca_colour_noise(dataset))``. After a padded crop the padding is
    shifted as well. Raises ValueError for another ``power``, and unless there are three channels.
    """
    if power not in (0.5, 1.0):
        raise ValueError(f"power must be 1 (the paper) or 0.5 (its released code), not {power!r}")
    values, vectors = colour_components(dataset.train_images)
    # row i: one deviation along p_i
    constants = _on_each_device((255 * scale * values**power * vectors).T.float())

    def augment(images: Tensor) -> Tensor:
        _check_colour(images)
        (axes,) = constants(images.device)
        noise = torch.randn(len(images), 3, device=images.device) @ axes
        return images.to(torch.float32) + noise[:, :, None, None]

    return augment


def colour_components(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal colours: eigenvalues (3,), largest first, and eigenvectors (3, 3).

    They belong to the covariance of the RGB values in [0, 1] over all pixels of all images, uint8
    of shape (N, 3, H, W). Eigenvectors are columns, the entry of largest magnitude positive.
    Raises ValueError unless there are three channels.
    """
    _check_colour(images)
    count, total, square = images.numel() // 3, 0, 0
    for part in _chunks(images):
        # integers, which float64 adds exactly: the sums depend on no device or thread count
        part = part.transpose(0, 1).flatten(1).double()
        total, square = total + part.sum(1), square + part @ part.T
    mean = total.cpu() / count
    covariance = (square.cpu() / count - mean.outer(mean)) / 255**2
    values, vectors = torch.linalg.eigh(covariance)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _check_colour(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"colours need images (N, 3, H, W), not {tuple(images.shape)}")


# --- Preprocessing: from uint8 to what a network takes -----------------------------------------


def unit_range(images: Tensor) -> Tensor:
    """Scale uint8 images to float32 in [0, 1].

    >>> unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return images.to(torch.float32) / 255


def signed_range(images: Tensor) -> Tensor:
    """Scale uint8 images to float32 in [-1, 1].

    >>> signed_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([-1.0000, -0.6000,  1.0000])
    """
    return images.to(torch.float32) / 127.5 - 1


def _on_each_device(*tensors: Tensor) -> Callable[[torch.device], tuple[Tensor, ...]]:
    """Return device -> the tensors there; the copies are kept, as a CUDA graph may read them."""
    return functools.cache(lambda device: tuple(tensor.to(device) for tensor in tensors))


def subtract_mean_image(dataset: Dataset) -> Callable[[Tensor], Tensor]:
    """Return x -> x/255 − m, where m (C, H, W) is the mean training image in [0, 1]."""
    total = sum(part.sum(0, dtype=torch.int64) for part in _chunks(dataset.train_images))
    constants = _on_each_device((total.cpu().double() / (255 * len(dataset.train_images))).float())

    def preprocess(images: Tensor) -> Tensor:
        (mean,) = constants(images.device)
        return unit_range(images) - mean

    return preprocess


def standardize(dataset: Dataset) -> Callable[[Tensor], Tensor]:
    """Return x -> (x/255 − m)/s with the mean and standard deviation of each training channel.

    The constants come from sums of integers, so they depend on no device or thread count. Raises
    ValueError for a channel that is constant over the training set.
    """
    mean, std = (t.float()[:, None, None] for t in channel_statistics(dataset.train_images))
    if not bool((std > 0).all()):
        raise ValueError(f"channel {int(std.argmin())} is constant: it cannot be standardized")
    constants = _on_each_device(mean, std)

    def preprocess(images: Tensor) -> Tensor:
        mean, std = constants(images.device)
        return (unit_range(images) - mean) / std

    return preprocess


def contrast_normalize(images: Tensor, scale: float = 55.0, epsilon: float = 1e-8) -> Tensor:
    r"""Return images of mean 0 and norm ``scale``: global contrast normalisation.

    :math:`x \mapsto s\,(x - \bar x) / \lVert x - \bar x \rVert_2` for each image separately, with
    the mean :math:`\bar x` and the norm over all its channels and pixels; s = ``scale``, 55 as in
    BinaryConnect. An image with :math:`\lVert x - \bar x \rVert_2 / s` below ``epsilon`` (its
    pixels are all alike) is not divided. uint8 (N, C, H, W) becomes float32; floating point keeps
    its dtype. Raises ValueError unless ``scale`` is positive and finite.

    >>> contrast_normalize(torch.tensor([[[[3, 11]]]], dtype=torch.uint8), scale=2 ** 0.5)
    tensor([[[[-1.,  1.]]]])
    """
    _check_positive(scale=scale)
    dtype = images.dtype if images.is_floating_point() else torch.float32
    images = images.to(torch.promote_types(dtype, torch.float32))  # float16 would overflow
    centred = images - images.mean((1, 2, 3), keepdim=True)
    divisor = centred.square().sum((1, 2, 3), keepdim=True).sqrt() / scale
    return (centred / divisor.where(divisor >= epsilon, 1)).to(dtype)


def _check_positive(**numbers: float) -> None:
    for argument, number in numbers.items():
        if not 0 < number < math.inf:  # true of NaN, too
            raise ValueError(f"{argument} must be positive and finite, not {number!r}")


def zca_whiten(dataset: Dataset, scale: float = 55.0, bias: float = 0.1,
               with_validation: bool = True,
               root: str | os.PathLike | None = None) -> Callable[[Tensor], Tensor]:  # fmt: skip
    r"""Return BinaryConnect's preprocessing of CIFAR-10: `contrast_normalize`, then ZCA whitening.

    :math:`x \mapsto U \Lambda^{-1/2} U^\top (x - m)` with
    :math:`U \Lambda U^\top = \Sigma + b I`; m and :math:`\Sigma` are mean and covariance of the
    contrast-normalised training images, each a vector of C·H·W values; b = ``bias`` is added
    before the decomposition (released code, which takes these steps from pylearn2). The original
    fits on all 50 000 training images, including those it validates on; ``with_validation=False``
    leaves out those that `Dataset.hold_out` set aside.

    uint8 (N, C, H, W) becomes float32. The fit is in float64, with an eigenproblem of size C·H·W
    on the CPU: most of a minute on two cores for CIFAR-10. From `SLOW_TO_WHITEN` values per image
    on, m and the matrix are therefore cached in a file under ``root`` (as in `load`), where the
    next call with the same images and settings on the same kind of machine finds exactly the same
    numbers; a damaged file is replaced. Raises ValueError unless ``scale`` and ``bias`` are
    positive and finite: without a bias the covariance is singular, as each image has a mean of 0.
    The preprocessing raises ValueError for images of another shape.
    """
    _check_positive(scale=scale, bias=bias)
    parts = [dataset.train_images]
    if with_validation and dataset.validation_images is not None:
        parts.append(dataset.validation_images)

    def fit() -> tuple[Tensor, Tensor]:
        mean, covariance = _contrast_statistics(parts, scale)
        values, vectors = torch.linalg.eigh(
            covariance + bias * torch.eye(len(mean), dtype=torch.float64, device="cpu")
        )
        return mean.float(), ((vectors * values.rsqrt()) @ vectors.T).float()

    constants = _on_each_device(*_cached(fit, parts, (scale, bias), root_folder(root)))
    shape = parts[0].shape[1:]

    def preprocess(images: Tensor) -> Tensor:
        if images.shape[1:] != shape:
            raise ValueError(f"fitted on images {tuple(shape)}, not {tuple(images.shape[1:])}")
        mean, matrix = constants(images.device)
        centred = contrast_normalize(images, scale).to(torch.float32).flatten(1) - mean
        return (centred @ matrix).view(images.shape)

    return preprocess


def _cached(fit: Callable, parts: list[Tensor], settings: tuple, root: Path):
    """Return what ``fit`` returns, mean (D,) and matrix (D, D): from the cache, if it is there."""
    size = parts[0][0].numel()
    if size < SLOW_TO_WHITEN:
        return fit()
    path = root / "whitening" / f"{_whitening_key(parts, settings)}.npz"
    rows = _read_rows(path, (size + 1, size))
    if rows is None:
        mean, matrix = fit()
        _write_rows(path, torch.cat([mean[None], matrix]))
        return mean, matrix
    # copies, in memory aligned by torch: the alignment can change how a product is rounded
    return rows[0].clone(), rows[1:].clone()


def _whitening_key(parts: list[Tensor], settings: tuple) -> str:
    """Return the SHA-256 of all that a fit depends on, down to the last bit.

    The images themselves are hashed, because a data set keeps its ``sha256`` when a part is held
    out. How the sums are rounded depends on torch's version, its threads and the device.
    """
    device, processor = parts[0].device, torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rounding = torch.__version__, torch.get_num_threads(), processor, name
    digest = hashlib.sha256(repr((settings, rounding)).encode())
    for images in parts:
        digest.update(f"{tuple(images.shape)}\n".encode())
        digest.update(np.ascontiguousarray(images.cpu().numpy()).data)
    return digest.hexdigest()


def _read_rows(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return the float32 array in a file, or None if there is no intact one of that shape."""
    try:
        with path.open("rb") as file:
            rows = np.load(file, allow_pickle=False)["rows"]  # the archive has a checksum
    except Exception:  # a damaged archive can fail anywhere in zipfile or NumPy's parser
        return None
    return torch.from_numpy(rows) if (rows.shape, rows.dtype) == (shape, np.float32) else None


def _write_rows(path: Path, rows: Tensor) -> None:
    """Write an array, whole or not at all; where nothing can be written, go on without."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                np.savez(file, rows=rows.numpy())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _contrast_statistics(parts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and covariance (D, D) of contrast-normalised images, in float64."""
    total = square = 0
    for images in (chunk for part in parts for chunk in _chunks(part)):
        x = contrast_normalize(images.double(), scale).flatten(1)
        total, square = total + x.sum(0), square + x.T @ x
    count = sum(len(part) for part in parts)
    mean = total.cpu() / count
    return mean, square.cpu() / count - mean.outer(mean)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation (C,) of each channel of images in [0, 1].

    images: uint8 (N, C, H, W), which stand for x/255. Raises ValueError for another dtype.

    >>> channel_statistics(torch.tensor([[[[0, 51]]]], dtype=torch.uint8))
    (tensor([0.1000], dtype=torch.float64), tensor([0.1000], dtype=torch.float64))
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, not {images.dtype}")
    count = images.numel() // images.shape[1]
    total = square = 0
    for part in _chunks(images):
        part = part.transpose(0, 1).flatten(1).to(torch.int64)
        total, square = total + part.sum(1), square + (part * part).sum(1)
    mean = total.cpu().double() / count
    variance = (square.cpu().double() / count - mean * mean).clamp_min(0)
    return mean / 255, variance.sqrt() / 255


def _chunks(images: Tensor) -> tuple[Tensor, ...]:
    # statistics need wider numbers than uint8: convert a thousand images at a time
    return images.split(1000)
