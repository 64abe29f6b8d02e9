"""What ends a run with one sentence, and the checks of options that raise it."""

import re
from collections.abc import Callable
from typing import Any


class CheckpointError(Exception):
    """Why a run cannot go on from a checkpoint."""


class DataError(Exception):
    """What keeps the data from being read."""


class OptionError(Exception):
    """Which options are wrong, or do not go together."""


def check_fields(
    options: Any, allowed: str, is_valid: Callable[[Any], bool], *names: str
) -> None:
    """Raise a `ValueError` for the first field that is neither `None` nor valid."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"`{name}` must be {allowed}; got {value}.")


def check_positive(options: Any, *names: str) -> None:
    """As `check_fields`, for numbers above zero."""
    check_fields(options, "positive", lambda value: value > 0, *names)


def check_non_negative(options: Any, *names: str) -> None:
    """As `check_fields`, for numbers that are at least zero."""
    check_fields(options, "non-negative", lambda value: value >= 0, *names)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def with_flags(error: ValueError) -> str:
    """What an error says of a field, said of its flag on the command line."""

    def flag(match: re.Match) -> str:
        return "--" + match[1].replace("_", "-")

    # `width`, or `TanhConfig(width=...)`, as the library's own classes say.
    return re.sub(r"`(?:\w+\()?(\w+)(?:=\.\.\.\))?`", flag, first_line(error))
