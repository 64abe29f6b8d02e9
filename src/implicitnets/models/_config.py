"""Checks of the configurations of models."""

from typing import Any

from .._internal.checks import (
    as_integer,
    check_integer,
    check_part,
    check_value,
    Part,
)


def check_config(model: Any, config: Any, kind: type) -> None:
    """Check what a model is made from."""
    part = Part(f"an `implicitnets.models.{kind.__name__}(...)`", kind)
    check_part(model, "config", config, part)


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """Check fields that are integers, and make them Python's."""
    for name in names:
        size = check_integer(config, name, getattr(config, name), least)
        # The configurations are frozen.
        object.__setattr__(config, name, size)


def check_tuple(config: Any, name: str, allowed: str, length: int | None = None) -> int:
    """Check a field of positive integers, make it a tuple, and return its length."""
    given = getattr(config, name)
    sizes = tuple(map(as_integer, given)) if isinstance(given, list | tuple) else ()
    valid = all(type(size) is int and size >= 1 for size in sizes)
    valid = valid and (length is None or len(sizes) == length)
    check_value(config, name, given, valid and isinstance(given, list | tuple), allowed)
    object.__setattr__(config, name, sizes)
    return len(sizes)
