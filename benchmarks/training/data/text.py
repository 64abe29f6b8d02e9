"""Text to predict token by token."""

import collections
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import DataError, first_line
from .samples import Data, Text


Level = Literal["word", "character"]


def load_text(path: Path, dataset: str, level: Level, sequence_length: int) -> Data:
    """The tokens of a file, or of a folder with `train.txt` and `test.txt` or the files
    of WikiText.

    Of a single file, the last tenth of the lines is the test set. The vocabulary is
    that of the training text, from the most frequent token to the rarest.
    """
    train_lines, test_lines = _read_texts(path, dataset, level)
    counts = collections.Counter(_tokens(train_lines, level))
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    vocabulary = {token: number for number, token in enumerate(ordered)}
    unknown = vocabulary.setdefault("<unk>", len(vocabulary))

    def encode(lines: list[str]) -> Text:
        numbers = (vocabulary.get(token, unknown) for token in _tokens(lines, level))
        return Text(np.fromiter(numbers, np.int32), sequence_length)

    return Data(encode(train_lines), encode(test_lines), len(vocabulary))


def _tokens(lines: list[str], level: Level) -> Iterator[str]:
    for line in lines:
        if level == "character":
            yield from line
        else:
            yield from line.split()
            yield "<eos>"


def _read_texts(path: Path, dataset: str, level: Level) -> tuple[list[str], list[str]]:
    if dataset == "wikitext103":
        ending = "tokens" if level == "word" else "raw"
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
        return path.read_bytes().decode().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}).") from error
