"""The training script's data: what is read, in which order, and what is refused."""

import dataclasses
import functools as ft
import gzip
import http.client
import pickle
import struct
import zlib
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from benchmarks.training.data import (
    DataOptions,
    Examples,
    IGNORED,
    labelled,
    load,
    Text,
)
from benchmarks.training.data.samples import shift_and_mirror
from benchmarks.training.errors import DataError


pytestmark = pytest.mark.one_precision


def refused(sentence, **options):
    with pytest.raises(DataError, match=sentence) as error:
        load(DataOptions(**options))
    assert "\n" not in str(error.value)


# The order of the data.


def make_examples(size):
    return Examples(
        np.arange(size, dtype=np.float32)[:, None], np.arange(size, dtype=np.int32)
    )


def epoch_of(examples, epoch, seed=0):
    steps = range(4 * epoch, 4 * (epoch + 1))
    return np.concatenate([examples.training_batch(s, 5, seed)[1] for s in steps])


def test_epoch_has_every_example_once():
    examples = make_examples(23)
    assert examples.steps_per_epoch(5) == 4
    orders = [epoch_of(examples, 0), epoch_of(examples, 1), epoch_of(examples, 0, 1)]
    for order in orders:
        assert len(set(order)) == 20
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    # A run that starts at a later step sees what it would have seen.
    np.testing.assert_array_equal(epoch_of(make_examples(23), 1), orders[1])


def test_last_test_batch_is_filled_with_ignored_examples():
    inputs, targets = zip(*make_examples(7).test_batches(3), strict=True)
    assert {x.shape for x in inputs} == {(3, 1)}
    targets = np.concatenate(targets)
    np.testing.assert_array_equal(targets, [0, 1, 2, 3, 4, 5, 6, IGNORED, IGNORED])


def test_rest_of_an_epoch():
    examples = dataclasses.replace(make_examples(23), keep_rest=True)
    assert examples.steps_per_epoch(5) == 5
    batches = [examples.training_batch(step, 5, 0) for step in range(5)]
    assert {inputs.shape for inputs, _ in batches} == {(5, 1)}
    targets = np.concatenate([targets for _, targets in batches])
    np.testing.assert_array_equal(np.sort(targets[:23]), np.arange(23))
    np.testing.assert_array_equal(targets[23:], [IGNORED, IGNORED])
    np.testing.assert_array_equal(examples.targets, np.arange(23))


def test_too_few_examples():
    with pytest.raises(DataError, match="7 examples, fewer than one batch of 8"):
        make_examples(7).steps_per_epoch(8)


def test_streams_of_text_go_on_where_they_stopped():
    text = Text(np.arange(32, dtype=np.int32), length=5)
    assert text.steps_per_epoch(3) == 2
    first, second, again = (text.training_batch(step, 3, 0) for step in range(3))
    np.testing.assert_array_equal(first[0][:, 0], [0, 10, 20])
    np.testing.assert_array_equal(second[0][:, 0], first[1][:, -1])
    np.testing.assert_array_equal(second[1], second[0] + 1)
    np.testing.assert_array_equal(first, again)
    with pytest.raises(DataError, match="32 tokens, too few"):
        text.steps_per_epoch(7)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_token_is_tested_once(batch_size):
    text = Text(np.arange(30, dtype=np.int32), length=4)
    inputs, targets = zip(*text.test_batches(batch_size), strict=True)
    inputs, targets = np.concatenate(inputs), np.concatenate(targets)
    counts = targets != IGNORED
    np.testing.assert_array_equal(np.sort(targets[counts]), np.arange(1, 30))
    np.testing.assert_array_equal(inputs[counts] + 1, targets[counts])


# Images.


def test_digits():
    digits = load(DataOptions(train_size=100))
    assert digits.input_shape == (1, 8, 8) and digits.target_shape == ()
    assert len(digits.train) == 100 and len(digits.test) == 360
    assert digits.num_classes == 10
    images, labels = digits.test.numbers()
    assert images.min() == 0 and images.max() == 1
    assert set(np.bincount(labels)) <= {35, 36, 37}
    other = load(DataOptions(train_size=99))
    assert digits.facts() != other.facts()
    assert digits.facts() == load(DataOptions(train_size=100)).facts()


def test_mnist_subset():
    mnist = load(DataOptions("mnist_subset"))
    assert mnist.input_shape == (1, 28, 28) and mnist.num_classes == 10
    assert len(mnist.train) == 4000 and len(mnist.test) == 1000
    np.testing.assert_array_equal(np.bincount(mnist.train.targets), [400] * 10)
    np.testing.assert_array_equal(np.bincount(mnist.test.targets), [100] * 10)
    images, labels = mnist.test.numbers()
    assert images.dtype == np.float32 and images.min() == 0 and images.max() == 1
    # Mixed, where the package has them by their labels; and each with its own.
    assert set(labels[:100]) == set(range(10))
    ones, zeros = (images[labels == label].mean(0)[0] for label in (1, 0))
    assert ones[14, 14] > 0.5 > zeros[14, 14]
    # No image is in both parts.
    train, test = (
        {image.tobytes() for image in part.inputs} for part in (mnist.train, mnist.test)
    )
    assert not train & test


def test_standardise():
    digits = load(DataOptions(standardise=True))
    images, _ = digits.train.training_batch(0, len(digits.train), 0)
    assert images.dtype == np.float32
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-4)


def test_shift_and_mirror():
    rng = np.random.default_rng(0)
    images = rng.random((40, 2, 6, 5))
    # A mask that says which pixel it is, in the first of the channels.
    masks = np.arange(images[:, 0].size, dtype=np.int32).reshape(40, 6, 5)
    images[:, 0] = 1 + masks
    moved, moved_masks = shift_and_mirror(images, masks, 4, rng)
    assert moved.shape == images.shape
    np.testing.assert_array_equal(moved[:, 0], 1 + moved_masks)
    assert np.min(moved_masks) == IGNORED
    mirrored = 0
    for image, result in zip(images, moved, strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
        windows = [padded[:, i : i + 6, j : j + 5] for i in range(9) for j in range(9)]
        straight = any(np.array_equal(result, window) for window in windows)
        flipped = any(np.array_equal(result, window[..., ::-1]) for window in windows)
        assert straight or flipped
        mirrored += flipped
    assert 10 < mirrored < 30


@pytest.mark.parametrize("option", ["augment", "standardise"])
def test_only_images_are_augmented_and_standardised(tmp_path, option):
    (path := tmp_path / "text").write_text("hello\nworld\n" * 5)
    for options in (dict(dataset="copy_memory"), dict(dataset="text", data_dir=path)):
        refused("Only images can be", **options, **{option: True})


def test_augmentation_depends_on_the_step_alone():
    digits = load(DataOptions(augment=4)).train
    one, again = digits.training_batch(50, 8, 0)[0], digits.training_batch(50, 8, 0)[0]
    np.testing.assert_array_equal(one, again)


# MNIST's format.


def idx(array):
    header = struct.pack(f">I{array.ndim}I", 0x800 | array.ndim, *array.shape)
    return header + array.tobytes()


def write_mnist(folder, size=28):
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("t10k", 3)):
        pixels = rng.integers(0, 256, (count, size, size), np.uint8)
        labels = rng.integers(0, 10, count, np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels))
        labels_path = folder / f"{split}-labels-idx1-ubyte.gz"
        labels_path.write_bytes(gzip.compress(idx(labels)))


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


def test_folder(mnist):
    images = load(DataOptions("mnist", mnist, test_size=2))
    assert images.input_shape == (1, 28, 28)
    assert len(images.train) == 5 and len(images.test) == 2
    inputs, targets = images.train.numbers()
    assert inputs.dtype == np.float32 and targets.dtype == np.int32
    content = (mnist / "train-images-idx3-ubyte").read_bytes()
    assert inputs[0, 0, 0, 0] == np.float32(content[16] / 255)


def test_emnist_folder(mnist):
    for path in list(mnist.iterdir()):
        name = path.name.replace("t10k", "test")
        path.rename(mnist / f"emnist-balanced-{name}")
    images = load(DataOptions("emnist", mnist))
    assert len(images.train) == 5 and len(images.test) == 3
    assert images.num_classes == 47


def test_grey_images_of_a_wrong_size(tmp_path):
    write_mnist(tmp_path, size=20)
    sentence = r"images of shape \(20, 20\), where \(28, 28\) is expected"
    refused(sentence, dataset="mnist", data_dir=tmp_path)


def damage_nothing_there(folder):
    (folder / "train-images-idx3-ubyte").unlink()


def damage_shortened(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"")


def damage_magic_number(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x89PNG" + 100 * b"\0")


def damage_truncated_gzip(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-4])


def damage_no_gzip(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>404</html>")


def damage_counts(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))


def damage_labels(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(5, 10, np.uint8))))


def damage_all(folder):
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (damage_nothing_there, "has no file train-images-idx3-ubyte"),
        (damage_shortened, "is damaged: its header promises 3920 bytes"),
        (damage_empty, "is not a file of bytes in MNIST's format"),
        (damage_magic_number, "is not a file of bytes in MNIST's format"),
        (damage_truncated_gzip, "cannot be read"),
        (damage_no_gzip, "cannot be read"),
        (damage_counts, "has 5 train images but 4 labels"),
        (damage_labels, "labels from 10 to 10"),
        (damage_all, "has no file train-images-idx3-ubyte"),
    ],
)
def test_damaged_folder(mnist, damage, sentence):
    damage(mnist)
    refused(sentence, dataset="mnist", data_dir=mnist)


@pytest.mark.parametrize("name", ["digits", "mnist_subset", "copy_memory"])
def test_no_folder(tmp_path, name):
    with pytest.raises(ValueError, match=f"`dataset` {name}, which reads no files"):
        DataOptions(name, data_dir=tmp_path)


# CIFAR.

CIFAR10 = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 2, 3072), np.uint8)


@pytest.fixture
def cifar10(tmp_path, pixels):
    for name, images in zip(CIFAR10, pixels, strict=True):
        content = {b"data": images, b"labels": [3, 9]}
        (tmp_path / name).write_bytes(pickle.dumps(content))
    return tmp_path


def test_cifar10(cifar10, pixels):
    images = load(DataOptions("cifar10", cifar10))
    assert images.input_shape == (3, 32, 32) and images.num_classes == 10
    assert len(images.train) == 10 and len(images.test) == 2
    inputs, targets = next(images.test.test_batches(2))
    np.testing.assert_allclose(inputs.reshape(2, -1), pixels[5] / 255, rtol=1e-6)
    np.testing.assert_array_equal(targets, [3, 9])
    # The binary version has the same content.
    for name, part in zip(CIFAR10, pixels, strict=True):
        records = np.concatenate([np.uint8([[3], [9]]), part], axis=1)
        (cifar10 / name).unlink()
        (cifar10 / f"{name}.bin").write_bytes(records.tobytes())
    assert load(DataOptions("cifar10", cifar10)).facts() == images.facts()


def test_cifar100(tmp_path, pixels):
    content = {b"data": pixels[0], b"fine_labels": [3, 99], b"coarse_labels": [1, 2]}
    (tmp_path / "train").write_bytes(pickle.dumps(content))
    records = np.concatenate([np.uint8([[1, 3], [2, 99]]), pixels[0]], axis=1)
    (tmp_path / "test.bin").write_bytes(records.tobytes())
    images = load(DataOptions("cifar100", tmp_path))
    assert images.num_classes == 100
    np.testing.assert_array_equal(images.train.targets, images.test.targets)
    np.testing.assert_array_equal(images.train.inputs, images.test.inputs)


class Mischief:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def cifar_content(images=((0,) * 3072,) * 2, labels=(3, 9)):
    return {b"data": np.array(images, np.uint8), b"labels": list(labels)}


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "has no file data_batch_2 or data_batch_2.bin"),
        (b"", "data_batch_2 cannot be read"),
        (pickle.dumps(cifar_content())[:-100], "data_batch_2 cannot be read"),
        (b"<html>404</html>", "data_batch_2 cannot be read"),
        (pickle.dumps(Mischief()), "exec is no array"),
        (pickle.dumps({b"data": np.zeros(3)}), "data_batch_2 cannot be read"),
        (pickle.dumps(cifar_content(labels=[1])), "has images of shape"),
        (pickle.dumps(cifar_content(images=[[0]])), "has images of shape"),
        (pickle.dumps(cifar_content(labels=[1, 10])), "labels from 1 to 10"),
    ],
)
def test_damaged_cifar(cifar10, content, sentence):
    (path := cifar10 / "data_batch_2").unlink()
    if content is not None:
        path.write_bytes(content)
    refused(sentence, dataset="cifar10", data_dir=cifar10)


def test_damaged_binary_cifar(cifar10):
    (cifar10 / "data_batch_1").unlink()
    (cifar10 / "data_batch_1.bin").write_bytes(bytes(3072))
    refused("not a whole number of images", dataset="cifar10", data_dir=cifar10)


@pytest.mark.parametrize(
    "dataset, source, size, num_train",
    [
        ("cifar10", {"data_id": 40927}, 12, 10),
        ("fashion_mnist", {"name": "Fashion-MNIST", "version": 1}, 14, 12),
    ],
)
def test_fetched(monkeypatch, dataset, source, size, num_train):
    def fetch_openml(**options):
        assert options.items() >= source.items()
        num_pixels = 3072 if dataset == "cifar10" else 784
        return np.full((size, num_pixels), 255.0), np.array(["3"] * size)

    monkeypatch.setattr(labelled, "fetch_openml", fetch_openml)
    images = load(DataOptions(dataset))
    assert len(images.train) == num_train and len(images.test) == 2
    inputs, targets = images.test.numbers()
    assert inputs.max() == 1 and list(targets) == [3, 3]


@pytest.mark.parametrize(
    "error",
    [
        URLError("no network"),
        EOFError("the compressed file ended"),
        zlib.error("invalid stored block lengths"),
        http.client.IncompleteRead(b""),
        ValueError("a checksum is wrong"),
    ],
)
def test_no_network_or_a_damaged_download(monkeypatch, error):
    def fetch_openml(**options):
        raise error

    monkeypatch.setattr(labelled, "fetch_openml", fetch_openml)
    sentence = "kmnist could not be fetched .* give the folder of its files"
    refused(sentence, dataset="kmnist")


def test_download_of_another_shape(monkeypatch):
    def fetch_openml(**options):
        return np.zeros((2, 3071)), np.array(["3", "3"])

    monkeypatch.setattr(labelled, "fetch_openml", fetch_openml)
    refused("cifar10 could not be fetched", dataset="cifar10")


# Segmentation.


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def masks(tmp_path):
    rng = np.random.default_rng(0)
    for split, size in (("train", 3), ("test", 2)):
        for i in range(size):
            image = rng.integers(0, 256, (6, 8, 3), np.uint8)
            mask = rng.integers(0, 4, (6, 8), np.uint8)
            mask[0, :2] = 255, 3
            save(tmp_path / split / "images" / f"{i}.png", image)
            save(tmp_path / split / "masks" / f"{i}.png", mask)
    return tmp_path


def test_segmentation(masks):
    pairs = load(DataOptions("segmentation", masks))
    assert pairs.input_shape == (3, 6, 8) and pairs.target_shape == (6, 8)
    assert len(pairs.train) == 3 and len(pairs.test) == 2
    assert pairs.num_classes == 4
    assert set(pairs.train.targets[:, 0, 0]) == {IGNORED}
    image = np.asarray(Image.open(masks / "test" / "images" / "1.png"))
    np.testing.assert_array_equal(pairs.test.inputs[1], image.transpose(2, 0, 1))
    resized = load(DataOptions("segmentation", masks, image_size=(3, 4)))
    assert resized.input_shape == (3, 3, 4)
    assert set(np.unique(resized.train.targets)) <= set(range(-1, 4))


def test_masks_without_a_class(masks):
    for path in (masks / "test" / "masks").iterdir():
        save(path, np.full((6, 8), 255, np.uint8))
    refused(
        "test set of segmentation has no target",
        dataset="segmentation",
        data_dir=masks,
    )


def damage_no_mask(folder):
    (folder / "masks" / "1.png").unlink()


def damage_no_images(folder):
    for path in (folder / "images").iterdir():
        path.unlink()


def damage_truncated(folder):
    path = folder / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:-40])


def damage_other_format(folder):
    (folder / "images" / "1.png").write_text("<html>404</html>")


def damage_colours(folder):
    save(folder / "masks" / "1.png", np.zeros((6, 8, 3), np.uint8))


def damage_mask_size(folder):
    save(folder / "masks" / "1.png", np.zeros((6, 7), np.uint8))


def damage_sizes(folder):
    for kind, shape in (("images", (5, 8, 3)), ("masks", (5, 8))):
        save(folder / kind / "1.png", np.zeros(shape, np.uint8))


def damage_classes(folder):
    save(folder / "masks" / "1.png", np.full((6, 8), 9, np.uint8))


def damage_values(folder, value, dtype):
    (folder / "masks" / "1.png").unlink()
    Image.fromarray(np.full((6, 8), value, dtype)).save(folder / "masks" / "1.tiff")


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (
            ft.partial(damage_values, value=-3.5, dtype=np.float32),
            "masks/1.tiff has the values -3.5 to -3.5; a mask has class numbers from 0",
        ),
        (
            ft.partial(damage_values, value=70_000, dtype=np.int32),
            "masks/1.tiff has the values 70000 to 70000; a mask has class numbers",
        ),
        (damage_no_mask, "masks has no mask for 1.png"),
        (damage_no_images, "images has no images"),
        (damage_truncated, "images/1.png cannot be read as an image"),
        (damage_other_format, "images/1.png cannot be read as an image"),
        (damage_colours, "masks/1.png has colours"),
        (damage_mask_size, "masks/1.png is not of the size of its image"),
        (damage_sizes, "images/1.png is not of the size of 0.png"),
        (damage_classes, "has a class 9, where the training masks have 4"),
    ],
)
def test_damaged_segmentation(masks, damage, sentence):
    damage(masks / "test")
    refused(sentence, dataset="segmentation", data_dir=masks)


# Text.


def test_characters(tmp_path):
    (path := tmp_path / "text").write_text("hello\nworld\n" * 5)
    text = load(DataOptions("text", path, level="character", sequence_length=3))
    assert len(text.train) == 54 and len(text.test) == 6
    # d, e, h, l, o, r, w, the end of a line, and the unknown.
    assert text.num_classes == 9
    # By frequency, and then by the alphabet: l, the end of a line, o, e, h.
    np.testing.assert_array_equal(text.train.tokens[:6], [4, 3, 0, 0, 2, 1])


def test_words(tmp_path):
    (tmp_path / "train.txt").write_text("a b a\nc a <unk>\n")
    (tmp_path / "test.txt").write_text("a d\n")
    text = load(DataOptions("text", tmp_path))
    assert text.num_classes == 5  # <eos> and <unk> among them
    a, unknown, end = text.test.tokens
    assert a == 0 and end == 1 and text.train.tokens[-2] == unknown
    for split in ("train", "test"):
        source = tmp_path / f"{split}.txt"
        source.rename(tmp_path / f"wiki.{split}.tokens")
    same = load(DataOptions("wikitext103", tmp_path))
    assert same.facts() == text.facts()


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b"", "training set of text is empty"),
    ],
)
def test_damaged_text(tmp_path, content, sentence):
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    refused(sentence, dataset="text", data_dir=path)


def test_text_from_nowhere(tmp_path):
    refused("by --data-dir", dataset="text")
    refused(
        "wiki.train.tokens cannot be read", dataset="wikitext103", data_dir=tmp_path
    )


def test_copy_memory():
    copy = load(DataOptions("copy_memory", train_size=5, test_size=3, delay=7))
    assert len(copy.train) == 5 and copy.num_classes == 10
    inputs, targets = next(copy.test.test_batches(3))
    assert inputs.shape == targets.shape == (3, 27) and inputs.dtype == np.int32
    np.testing.assert_array_equal(inputs[:, :10], targets[:, -10:])
    assert set(np.unique(inputs[:, :10])) <= set(range(1, 9))
    assert not inputs[:, 10:16].any() and (inputs[:, 16:] == 9).all()
    assert not targets[:, :-10].any()


@pytest.mark.parametrize("name", ["train_size", "sequence_length", "delay"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match=name):
        DataOptions(**{name: 0})
