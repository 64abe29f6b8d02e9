"""Data in memory, and the order in which a training goes through them.

A training batch is a function of the seed and of the step alone, so that a run that was
interrupted goes on exactly as it would have.
"""

import dataclasses
import functools as ft
import math
import zlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int, Int32, Shaped

from ..errors import DataError


# A target that no loss and no accuracy counts.
IGNORED = -1

Batch: TypeAlias = tuple[
    Float32[np.ndarray, "batch ..."] | Int32[np.ndarray, "batch ..."],
    Int32[np.ndarray, "batch ..."],
]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples that do not depend on each other, in a random order every epoch.

    Images are kept as they were read, and turned into numbers batch by batch: bytes
    take a quarter of the memory.

    **Arguments:**

    - `inputs`, `targets`: the examples.
    - `mean`, `std`: of the inputs, which their numbers are relative to.
    - `augment`: by how many pixels to shift, at the most, what is trained on, besides
        mirroring it; `None` to do neither.
    - `keep_rest`: whether an epoch ends with a batch of what is left over, which is
        filled up with ignored examples, and not with the last full batch.
    """

    inputs: Shaped[np.ndarray, "example ..."]
    targets: Int32[np.ndarray, "example ..."]
    mean: np.ndarray | float = 0.0
    std: np.ndarray | float = 1.0
    augment: int | None = None
    keep_rest: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: slice | np.ndarray) -> "Examples":
        return dataclasses.replace(
            self, inputs=self.inputs[rows], targets=self.targets[rows]
        )

    def numbers(self) -> Batch:
        """All of them in their order, as a model takes them."""
        if self.inputs.dtype == np.int32:  # tokens
            return self.inputs, self.targets
        inputs = (self.inputs - self.mean) / self.std
        return inputs.astype(np.float32), self.targets

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
        batch = self._filled_up(order[start * batch_size :][:batch_size], batch_size)
        if self.augment is not None:
            rng = np.random.default_rng((seed, 1, step))
            inputs, targets = shift_and_mirror(
                batch.inputs, batch.targets, self.augment, rng
            )
            batch = dataclasses.replace(batch, inputs=inputs, targets=targets)
        return batch.numbers()

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """All the examples in their order; the last batch is filled up with ignored
        ones: one shape, one compilation."""
        order = np.arange(len(self))
        for start in range(0, len(self), batch_size):
            rows = order[start : start + batch_size]
            yield self._filled_up(rows, batch_size).numbers()

    def _filled_up(self, rows: np.ndarray, size: int) -> "Examples":
        batch = self[np.resize(rows, size)]
        batch.targets[len(rows) :] = IGNORED
        return batch


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
        """What tells one training set from another."""
        sample, checksum = self.train, 0
        is_text = isinstance(sample, Text)
        for array in [sample.tokens] if is_text else [sample.inputs, sample.targets]:
            checksum = zlib.crc32(array.tobytes(), checksum)
        return {
            "train_size": len(sample),
            "num_classes": self.num_classes,
            "checksum": checksum,
        }


@ft.lru_cache(maxsize=1)
def _order(size: int, seed: int, epoch: int) -> Int[np.ndarray, " example"]:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


def shift_and_mirror(
    images: Shaped[np.ndarray, "batch channel height width"],
    targets: Int32[np.ndarray, "batch ..."],
    most: int,
    rng: np.random.Generator,
) -> tuple[
    Shaped[np.ndarray, "batch channel height width"], Int32[np.ndarray, "batch ..."]
]:
    """Shift images by at most so many pixels, black coming in, and mirror every other.

    Masks move with their images, and what comes in is ignored; labels stay.
    """
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
