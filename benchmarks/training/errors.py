"""What ends a run with one sentence, and the checks of options that raise it."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class RunError(Exception):
    """What ends a run with one sentence, and the exit status of its process."""

    status: int = 1


class CheckpointError(RunError):
    """Why a run cannot go on from a checkpoint."""


class DataError(RunError):
    """What keeps the data from being read."""


class DivergedError(RunError):
    """Where a training ceased to be finite."""


class OptionError(RunError):
    """Which options are wrong, or do not go together."""


class OutputError(RunError):
    """What keeps a run from writing its results, or from reading them again."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says of a full disk, or of a folder that is none, which file it was."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder} cannot be written "
            f"({error.strerror or first_line(error)})."
        ) from error


def check_fields(
    options: Any, allowed: str, is_valid: Callable[[Any], bool], *names: str
) -> None:
    """Raise a `ValueError` for the first field that is neither `None` nor valid."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"`{name}` must be {allowed}; got {value}.")


def check_positive(options: Any, *names: str) -> None:
    """As `check_fields`, for finite numbers above zero."""
    check_fields(
        options, "positive and finite", lambda value: 0 < value < math.inf, *names
    )


def check_non_negative(options: Any, *names: str) -> None:
    """As `check_fields`, for finite numbers that are at least zero."""
    check_fields(
        options, "non-negative and finite", lambda value: 0 <= value < math.inf, *names
    )


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def with_flags(error: ValueError) -> str:
    """What an error says of a field, said of its flag on the command line."""

    def flag(match: re.Match) -> str:
        return "--" + match[1].replace("_", "-")

    # `width`, or `TanhConfig(width=...)`, as the library's own classes say.
    return re.sub(r"`(?:\w+\()?(\w+)(?:=\.\.\.\))?`", flag, first_line(error))
