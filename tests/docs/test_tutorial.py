"""The tutorial's data handling; `.ci/run` and the documentation run the whole of it."""

import gzip
import struct
import typing
from urllib.error import URLError

import equinox as eqx
import jax
import jax.random as jr
import mnist
import numpy as np
import pytest


pytestmark = pytest.mark.one_precision


def idx(array):
    header = struct.pack(f">I{array.ndim}I", 0x800 | array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, size in (("train", 5), ("t10k", 3)):
        pixels = rng.integers(0, 256, (size, 28, 28), np.uint8)
        labels = rng.integers(0, 10, size, np.uint8)
        images_path = tmp_path / f"{split}-images-idx3-ubyte"
        images_path.write_bytes(idx(pixels))
        labels_path = tmp_path / f"{split}-labels-idx1-ubyte.gz"
        labels_path.write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_digits():
    train, test = mnist.load(mnist.Config(train_size=100))
    assert train.images.shape == (100, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert test.images.min() == 0 and test.images.max() == 1
    assert set(np.bincount(test.labels)) <= {35, 36, 37}


def test_folder(folder):
    config = mnist.Config(dataset="mnist", data_dir=folder, test_size=2)
    train, test = mnist.load(config)
    assert train.images.shape == (5, 1, 28, 28)
    assert test.images.shape == (2, 1, 28, 28)
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int32
    content = (folder / "train-images-idx3-ubyte").read_bytes()
    assert train.images[0, 0, 0, 0] == np.float32(content[16] / 255)


def test_emnist_folder(folder):
    for path in list(folder.iterdir()):
        name = path.name.replace("t10k", "test")
        path.rename(folder / f"emnist-balanced-{name}")
    train, test = mnist.load(mnist.Config(dataset="emnist", data_dir=folder))
    assert len(train) == 5 and len(test) == 3


def damage_nothing_there(folder):
    (folder / "train-images-idx3-ubyte").unlink()


def damage_truncated(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"")


def damage_other_format(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x89PNG" + 100 * b"\0")


def damage_truncated_gzip(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-4])


def damage_no_gzip(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>404</html>")


def damage_counts(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))


def damage_all(folder):
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (damage_nothing_there, "has no file train-images-idx3-ubyte"),
        (damage_truncated, "is damaged: its header promises 3920 bytes"),
        (damage_empty, "is not a file of bytes in MNIST's format"),
        (damage_other_format, "is not a file of bytes in MNIST's format"),
        (damage_truncated_gzip, "cannot be read"),
        (damage_no_gzip, "cannot be read"),
        (damage_counts, "has 5 train images but 4 labels"),
        (damage_all, "has no file train-images-idx3-ubyte"),
    ],
)
def test_damaged_folder(folder, damage, sentence):
    damage(folder)
    with pytest.raises(mnist.DataError, match=sentence) as error:
        mnist.load(mnist.Config(dataset="mnist", data_dir=folder))
    assert "\n" not in str(error.value)


def test_fetched(monkeypatch):
    def fetch_openml(name, **options):
        assert name == "Fashion-MNIST"
        return np.full((14, 784), 255.0), np.array(["3"] * 14)

    monkeypatch.setattr(mnist, "fetch_openml", fetch_openml)
    train, test = mnist.load(mnist.Config(dataset="fashion_mnist"))
    assert train.images.shape == (12, 1, 28, 28) and test.images.max() == 1
    assert list(test.labels) == [3, 3]


def test_no_network(monkeypatch):
    def fetch_openml(name, **options):
        raise URLError("no network")

    monkeypatch.setattr(mnist, "fetch_openml", fetch_openml)
    with pytest.raises(mnist.DataError, match="give a folder of its files") as error:
        mnist.load(mnist.Config(dataset="mnist"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"epochs": -1}, {"batch_size": 0}, {"train_size": 0}, {"channels": 0}],
)
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        mnist.Config(**options)


@pytest.mark.parametrize(
    "model_type, count",
    [("deq", 177_738), ("skipdeq", 214_666), ("skipregdeq", 177_738)],
)
def test_published_parameter_count(model_type, count):
    config = mnist.Config(model_type=model_type)
    model = mnist.Classifier(config, image_size=28, classes=10, key=jr.key(0))
    parameters = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert sum(x.size for x in parameters) == count


def test_solver_names_match():
    assert set(mnist.SOLVERS) == set(typing.get_args(mnist.SolverName))
