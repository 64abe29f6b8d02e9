"""The data that the training script reads: images, masks, text, and synthetic tasks.

Whatever the data, a training batch is a function of the seed and of the step alone, so
that a run that was interrupted goes on exactly as it would have. What cannot be read is
a `DataError` of one sentence that names the file.
"""

import collections
import contextlib
import dataclasses
import functools as ft
import math
import pickle
import warnings
import zlib
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, Int, Int32, Shaped
from PIL import Image
from sklearn.datasets import fetch_openml

from ..tutorial import mnist


DataError = mnist.DataError

# A target that no loss and no accuracy counts.
IGNORED = -1

Batch: TypeAlias = tuple[
    Float32[np.ndarray, "batch ..."] | Int32[np.ndarray, "batch ..."],
    Int32[np.ndarray, "batch ..."],
]

DatasetName = Literal[
    "digits",
    "mnist",
    "kmnist",
    "emnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "segmentation",
    "copy_memory",
    "text",
    "wikitext103",
]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn."""

    dataset: DatasetName = "digits"
    """`digits` come with scikit-learn and `copy_memory` is synthetic; the others are
    read from `data_dir`, or, if they are images to classify, fetched from OpenML."""
    data_dir: Path | None = None
    """The folder of the data set's files; of `text`, a file will do."""
    train_size: int | None = None
    """Train on so many examples, or tokens of text, only."""
    test_size: int | None = None
    """Test on so many examples, or tokens of text, only."""
    standardise: bool = False
    """Images: to zero mean and unit variance of every channel of the training set."""
    augment: bool = False
    """Images: train on them shifted by up to four pixels, and mirrored."""
    keep_rest: bool = False
    """Train on what is left over of an epoch's full batches too, as a smaller batch."""
    image_size: tuple[int, int] | None = None
    """Segmentation: the height and width to resize to."""
    level: Literal["word", "character"] = "word"
    """Text: what a token is."""
    sequence_length: int = 128
    """Text: how many tokens a training step sees of every stream."""
    delay: int = 100
    """Copy memory: how long to remember."""

    def __post_init__(self):
        for name in ("train_size", "test_size", "sequence_length", "delay"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be positive; got {value}.")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples that do not depend on each other, in a random order every epoch.

    Images are kept as they were read, and turned into numbers batch by batch: bytes
    take a quarter of the memory.

    **Arguments:**

    - `inputs`, `targets`: the examples.
    - `mean`, `std`: of the inputs, which their numbers are relative to.
    - `augment`: whether to shift and mirror what is trained on.
    - `keep_rest`: whether an epoch ends with a batch of what is left over, which is
        filled up with ignored examples, and not with the last full batch.
    """

    inputs: Shaped[np.ndarray, "example ..."]
    targets: Int32[np.ndarray, "example ..."]
    mean: np.ndarray | float = 0.0
    std: np.ndarray | float = 1.0
    augment: bool = False
    keep_rest: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: slice) -> "Examples":
        return dataclasses.replace(
            self, inputs=self.inputs[rows], targets=self.targets[rows]
        )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches, and one of what is left over if that is not to wait for another
        epoch's order."""
        if self.keep_rest:
            return math.ceil(len(self) / batch_size)
        if len(self) < batch_size:
            raise DataError(
                f"The training set has {len(self)} examples, fewer than one batch of "
                f"{batch_size}."
            )
        return len(self) // batch_size

    def training_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of one step, counted through all the epochs."""
        epoch, start = divmod(step, self.steps_per_epoch(batch_size))
        order = _order(len(self), seed, epoch)
        chosen = order[start * batch_size :][:batch_size]
        rows = np.resize(chosen, batch_size)
        inputs, targets = self.inputs[rows], self.targets[rows]
        targets[len(chosen) :] = IGNORED
        if self.augment:
            rng = np.random.default_rng((seed, 1, step))
            inputs, targets = shift_and_mirror(inputs, targets, rng)
        return self._numbers(inputs), targets

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """All the examples in their order; the last batch is filled up with ignored
        ones: one shape, one compilation."""
        for start in range(0, len(self), batch_size):
            rows = np.arange(start, start + batch_size)
            targets = self.targets[rows % len(self)]
            targets[rows >= len(self)] = IGNORED
            yield self._numbers(self.inputs[rows % len(self)]), targets

    def _numbers(self, inputs: np.ndarray) -> np.ndarray:
        if inputs.dtype == np.int32:  # tokens
            return inputs
        return ((inputs - self.mean) / self.std).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Text:
    """One long text, cut into as many streams as a batch has rows.

    A batch is the next segment of every stream, so that a model may remember the
    segment before. The targets are the tokens that follow.
    """

    tokens: Int32[np.ndarray, " position"]
    length: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, positions: slice) -> "Text":
        return Text(self.tokens[positions], self.length)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full segments; the few tokens at the end of every stream are left out."""
        if (steps := (len(self) - 1) // batch_size // self.length) == 0:
            raise DataError(
                f"The training text has {len(self)} tokens, too few for one batch of "
                f"{batch_size} segments of {self.length}."
            )
        return steps

    def training_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of one step, counted through all the epochs."""
        del seed  # Text has an order of its own.
        segment = step % self.steps_per_epoch(batch_size)
        return self._segment(segment, (len(self) - 1) // batch_size, batch_size)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every token of the text but the first is a target once."""
        width = math.ceil((len(self) - 1) / batch_size)
        for segment in range(math.ceil(width / self.length)):
            yield self._segment(segment, width, batch_size)

    def _segment(self, segment: int, width: int, batch_size: int) -> Batch:
        in_stream = segment * self.length + np.arange(self.length)
        position = width * np.arange(batch_size)[:, None] + in_stream
        inside = (in_stream < width) & (position < len(self) - 1)
        position = np.where(inside, position, 0)
        return self.tokens[position], np.where(
            inside, self.tokens[position + 1], np.int32(IGNORED)
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """A training set and a test set, with how many values a target can have."""

    train: Examples | Text
    test: Examples | Text
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        if isinstance(self.train, Text):
            return (self.train.length,)
        return self.train.inputs.shape[1:]

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of the targets of one input."""
        if isinstance(self.train, Text):
            return (self.train.length,)
        return self.train.targets.shape[1:]

    def facts(self) -> dict[str, Any]:
        """What tells one set of data from another."""
        checksum = 0
        for sample in (self.train, self.test):
            arrays = (
                [sample.tokens]
                if isinstance(sample, Text)
                else [sample.inputs, sample.targets]
            )
            for array in arrays:
                checksum = zlib.crc32(array.tobytes(), checksum)
        return {
            "train_size": len(self.train),
            "test_size": len(self.test),
            "num_classes": self.num_classes,
            "checksum": checksum,
        }


@ft.lru_cache(maxsize=1)
def _order(size: int, seed: int, epoch: int) -> Int[np.ndarray, " example"]:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


def shift_and_mirror(
    images: Shaped[np.ndarray, "batch channel height width"],
    targets: Int32[np.ndarray, "batch ..."],
    rng: np.random.Generator,
) -> tuple[
    Shaped[np.ndarray, "batch channel height width"], Int32[np.ndarray, "batch ..."]
]:
    """Shift images by up to four pixels, black coming in, and mirror every other.

    Masks move with their images, and what comes in is ignored; labels stay.
    """
    most = 4
    batch, _, height, width = images.shape
    down, right = rng.integers(0, 2 * most + 1, (2, batch, 1))
    columns = np.arange(width)
    columns = np.where(rng.random((batch, 1)) < 0.5, columns, columns[::-1]) + right
    rows = np.arange(height) + down

    def move(arrays, fill):
        edges = (most, most)
        padded = np.pad(arrays, ((0, 0), (0, 0), edges, edges), constant_values=fill)
        return padded[
            np.arange(batch)[:, None, None, None],
            np.arange(arrays.shape[1])[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    if targets.ndim == 3:
        targets = move(targets[:, None], IGNORED)[:, 0]
    return move(images, 0), targets


def load(options: DataOptions, seed: int = 0) -> Data:
    """Read a data set.

    **Arguments:**

    - `options`: which, and from where.
    - `seed`: of synthetic data.

    **Returns:**

    A `Data`.

    **Raises:**

    `DataError` with one sentence.
    """
    data = _read(options, seed)
    train, test = data.train[: options.train_size], data.test[: options.test_size]
    for name, sample in (("training", train), ("test", test)):
        if len(sample) < (2 if isinstance(sample, Text) else 1):
            raise DataError(f"The {name} set of {options.dataset} is empty.")
        if isinstance(sample, Examples) and (sample.targets == IGNORED).all():
            raise DataError(f"The {name} set of {options.dataset} has no target.")
    if (options.augment or options.standardise) and len(data.input_shape) != 3:
        raise DataError("Only images can be augmented or standardised.")
    if isinstance(train, Examples) and isinstance(test, Examples):
        train = dataclasses.replace(
            train, augment=options.augment, keep_rest=options.keep_rest
        )
        if options.standardise:
            train, test = _standardised(train, test)
    return Data(train, test, data.num_classes)


def _read(options: DataOptions, seed: int) -> Data:
    match options.dataset:
        case "copy_memory":
            return copy_memory(options, seed)
        case "cifar10" | "cifar100":
            return load_cifar(options.dataset, options.data_dir)
        case "segmentation":
            return load_segmentation(_required(options), options.image_size)
        case "text" | "wikitext103":
            return load_text(_required(options), options)
        case _:
            return load_grey(options.dataset, options.data_dir)


def _required(options: DataOptions) -> Path:
    if options.data_dir is None:
        raise DataError(f"Say where the files of {options.dataset} are by --data-dir.")
    return options.data_dir


def _standardised(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    axes = (0, 2, 3)
    mean = train.inputs.mean(axes, keepdims=True, dtype=np.float64)[0]
    std = train.inputs.std(axes, keepdims=True, dtype=np.float64)[0]
    std = np.where(std > 0, std, 1.0)
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    return (
        dataclasses.replace(train, mean=mean, std=std),
        dataclasses.replace(test, mean=mean, std=std),
    )


# Grey images, by the tutorial's reader of MNIST's format.


def load_grey(
    name: Literal["digits", "mnist", "kmnist", "emnist", "fashion_mnist"],
    folder: Path | None,
) -> Data:
    """Grey images of 8 x 8 or 28 x 28 pixels to classify."""
    with _fetching(name):
        train, test = mnist.load(mnist.Config(dataset=name, data_dir=folder))
    num_classes = 47 if name == "emnist" else 10
    size = 8 if name == "digits" else 28
    for sample in (train, test):
        height, width = sample.images.shape[2:]
        if (height, width) != (size, size):
            raise DataError(
                f"{folder} has images of {height} x {width} pixels, where {name} has "
                f"{size} x {size}."
            )
        _check_labels(sample.labels, num_classes, folder or name)
    return Data(
        Examples(train.images, train.labels),
        Examples(test.images, test.labels),
        num_classes,
    )


def _check_labels(labels: np.ndarray, num_classes: int, source: Path | str) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(
            f"{source} has labels from {labels.min()} to {labels.max()}, where there "
            f"are {num_classes} classes."
        )


# CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html describes both formats.

_CIFAR_SHAPE = (3, 32, 32)


@dataclasses.dataclass(frozen=True)
class _Cifar:
    num_classes: int
    train: tuple[str, ...]
    test: str
    labels: bytes  # in the dictionaries of the Python version
    label_bytes: int  # in front of an image of the binary version; the last one counts
    openml: int


_CIFAR = {
    "cifar10": _Cifar(
        num_classes=10,
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        labels=b"labels",
        label_bytes=1,
        openml=40927,
    ),
    "cifar100": _Cifar(
        num_classes=100,
        train=("train",),
        test="test",
        labels=b"fine_labels",
        label_bytes=2,
        openml=41983,
    ),
}


def load_cifar(name: Literal["cifar10", "cifar100"], folder: Path | None) -> Data:
    """Colour images of 32 x 32 pixels, from the Python or the binary version."""
    kind = _CIFAR[name]
    if folder is None:
        return _fetch_cifar(name, kind)

    def read(files: Iterable[str]) -> Examples:
        parts = [_read_cifar(folder, file, kind) for file in files]
        inputs, targets = map(np.concatenate, zip(*parts, strict=True))
        return Examples(inputs, targets, std=255.0)

    return Data(read(kind.train), read([kind.test]), kind.num_classes)


def _read_cifar(folder: Path, name: str, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    if (path := folder / name).exists():
        pixels, labels = _read_cifar_pickle(path, kind)
    elif (path := folder / f"{name}.bin").exists():
        pixels, labels = _read_cifar_binary(path, kind)
    else:
        raise DataError(f"{folder} has no file {name} or {name}.bin.")
    _check_labels(labels, kind.num_classes, path)
    return pixels.reshape(-1, *_CIFAR_SHAPE), labels.astype(np.int32)


def _read_cifar_binary(path: Path, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(_read_bytes(path), np.uint8)
    record = kind.label_bytes + math.prod(_CIFAR_SHAPE)
    if len(content) == 0 or len(content) % record:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes are not a whole number of images "
            f"of {record} bytes."
        )
    records = content.reshape(-1, record)
    return records[:, kind.label_bytes :], records[:, kind.label_bytes - 1]


def _read_cifar_pickle(path: Path, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings(action="ignore"):  # that the files' NumPy was older
        try:
            with path.open("rb") as file:
                content = _ArrayUnpickler(file, encoding="bytes").load()
            pixels = np.asarray(content[b"data"])
            labels = np.asarray(content[kind.labels])
        # Damaged pickles raise almost anything.
        except Exception as error:
            raise DataError(f"{path} cannot be read ({_first_line(error)}).") from error
    expected = (len(labels) if labels.ndim else 0, math.prod(_CIFAR_SHAPE))
    if pixels.shape != expected or pixels.dtype != np.uint8 or labels.dtype.kind != "i":
        raise DataError(
            f"{path} has images of shape {pixels.shape} and labels of shape "
            f"{labels.shape}, where {math.prod(_CIFAR_SHAPE)} bytes and a number for "
            "each image are expected."
        )
    return pixels, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle may otherwise run any program."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("_codecs", "encode"):
            return super().find_class(module_name, global_name)
        if module_name.split(".")[0] == "numpy" and global_name in (
            "_reconstruct",
            "dtype",
            "ndarray",
        ):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no array")


def _fetch_cifar(name: str, kind: _Cifar) -> Data:
    with _fetching(name):
        pixels, labels = fetch_openml(
            data_id=kind.openml, as_frame=False, return_X_y=True, n_retries=1
        )
        examples = Examples(
            pixels.astype(np.uint8).reshape(-1, *_CIFAR_SHAPE),
            np.asarray(labels).astype(np.int32),
            std=255.0,
        )
    # OpenML joins the two sets in their order; each test set is a sixth of the whole.
    split = len(examples) * 5 // 6
    return Data(examples[:split], examples[split:], kind.num_classes)


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Says in a sentence what is wrong with the network, or with what came of it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of retries: the error says it
            yield
    except (OSError, EOFError, ValueError, zlib.error, HTTPException) as error:
        raise DataError(
            f"{name} could not be fetched ({_first_line(error)}); where there is no "
            "network, give the folder of its files by --data-dir."
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({_first_line(error)}).") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# Segmentation: folders `train` and `test`, each with `images` and, of the same names,
# `masks`, whose pixels are the class numbers.

_UNLABELLED = 255


def load_segmentation(folder: Path, image_size: tuple[int, int] | None) -> Data:
    """Images and masks of the classes of their pixels; 255 is no class."""
    train, test = (_read_split(folder / name, image_size) for name in ("train", "test"))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise DataError(
            f"{folder} has training images of shape {train.inputs.shape[1:]} but test "
            f"images of shape {test.inputs.shape[1:]}; give one by --image-size."
        )
    num_classes = int(train.targets.max()) + 1
    if test.targets.max() >= num_classes:
        raise DataError(
            f"{folder / 'test'} has a class {test.targets.max()}, where the training "
            f"masks have {num_classes} classes."
        )
    return Data(train, test, num_classes)


def _read_split(folder: Path, image_size: tuple[int, int] | None) -> Examples:
    masks = {path.stem: path for path in sorted((folder / "masks").glob("*"))}
    paths = sorted((folder / "images").glob("*"))
    if not paths:
        raise DataError(f"{folder / 'images'} has no images.")
    inputs, targets = [], []
    for path in paths:
        if path.stem not in masks:
            raise DataError(f"{folder / 'masks'} has no mask for {path.name}.")
        image = _read_image(path, image_size, "RGB", Image.Resampling.BILINEAR)
        mask_path = masks[path.stem]
        mask = _read_image(mask_path, image_size, None, Image.Resampling.NEAREST)
        if mask.ndim != 2:
            raise DataError(f"{mask_path} has colours, where a mask has class numbers.")
        if mask.shape != image.shape[:2]:
            raise DataError(f"{mask_path} is not of the size of its image {path.name}.")
        if inputs and image.shape != inputs[0].shape:
            raise DataError(
                f"{path} is not of the size of {paths[0].name}; give one by "
                "--image-size."
            )
        inputs.append(image)
        mask = mask.astype(np.int32)
        targets.append(np.where(mask == _UNLABELLED, np.int32(IGNORED), mask))
    images = np.stack(inputs).transpose(0, 3, 1, 2)
    return Examples(images, np.stack(targets), std=255.0)


def _read_image(
    path: Path,
    size: tuple[int, int] | None,
    mode: str | None,
    resampling: Image.Resampling,
) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image = image.convert(mode) if mode else image
            if size is not None:
                height, width = size
                image = image.resize((width, height), resampling)
            return np.asarray(image)
    # Pillow raises a `SyntaxError` for some broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({_first_line(error)})."
        ) from error


# Text.


def load_text(path: Path, options: DataOptions) -> Data:
    """Text to predict token by token.

    A folder has `train.txt` and `test.txt`, or the files of WikiText; of a single file,
    the last tenth of the lines is the test set. The vocabulary is that of the training
    text, from the most frequent token to the rarest.
    """
    train_lines, test_lines = _read_texts(path, options)
    counts = collections.Counter(_tokens(train_lines, options.level))
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    vocabulary = {token: number for number, token in enumerate(ordered)}
    unknown = vocabulary.setdefault("<unk>", len(vocabulary))

    def encode(lines: list[str]) -> Text:
        numbers = (vocabulary.get(t, unknown) for t in _tokens(lines, options.level))
        return Text(np.fromiter(numbers, np.int32), options.sequence_length)

    return Data(encode(train_lines), encode(test_lines), len(vocabulary))


def _tokens(lines: list[str], level: str) -> Iterator[str]:
    for line in lines:
        if level == "character":
            yield from line
        else:
            yield from line.split()
            yield "<eos>"


def _read_texts(path: Path, options: DataOptions) -> tuple[list[str], list[str]]:
    if options.dataset == "wikitext103":
        ending = "tokens" if options.level == "word" else "raw"
        names = [f"wiki.{split}.{ending}" for split in ("train", "test")]
    elif path.is_dir():
        names = ["train.txt", "test.txt"]
    else:
        lines = _read_lines(path)
        split = math.ceil(0.9 * len(lines))
        return lines[:split], lines[split:]
    return _read_lines(path / names[0]), _read_lines(path / names[1])


def _read_lines(path: Path) -> list[str]:
    try:
        return _read_bytes(path).decode().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}).") from error


def copy_memory(options: DataOptions, seed: int) -> Data:
    """Ten symbols to write down again after a delay.

    As in Bai et al., *Deep Equilibrium Models*, 2019, section 4.1: the symbols 1 to 8,
    blanks for the delay, and eleven markers, of which the first says that it is over.
    """
    num_symbols, marker = 10, 9
    rng = np.random.default_rng((seed, 2))

    def sample(size: int) -> Examples:
        symbols = rng.integers(1, marker, (size, num_symbols), np.int32)
        blanks = np.zeros((size, options.delay + num_symbols), np.int32)
        markers = np.full((size, num_symbols + 1), marker, np.int32)
        inputs = np.concatenate([symbols, blanks[:, : options.delay - 1], markers], 1)
        return Examples(inputs, np.concatenate([blanks, symbols], 1))

    train, test = (
        sample(options.train_size or 20_000),
        sample(options.test_size or 2_000),
    )
    return Data(train, test, marker + 1)
