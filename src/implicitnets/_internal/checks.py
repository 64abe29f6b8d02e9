"""Fields of modules, and checks of the values that they are given."""

from collections.abc import Callable
from typing import Any

import equinox as eqx


def keyword(default: Any) -> Any:
    return eqx.field(default=default, kw_only=True)


def check_hyperparameter(owner: Any, name: str, valid: bool, allowed: str) -> None:
    """Raise a `ValueError` that names a field, its value and what is allowed."""
    if not valid:
        value = getattr(owner, name)
        raise ValueError(
            f"`{type(owner).__name__}({name}=...)` must be {allowed}; got {value!r}."
        )


def check_integer(owner: Any, name: str, least: int) -> None:
    """Check a field that is to be an integer."""
    value = getattr(owner, name)
    valid = isinstance(value, int) and value >= least
    check_hyperparameter(owner, name, valid, f"an integer of at least {least}")


def check_number(
    owner: Any, name: str, is_valid: Callable[[float], bool], allowed: str
) -> None:
    """Check a field that is to be a number; one that is traced passes unchecked."""
    value = getattr(owner, name)
    if isinstance(value, int | float):
        check_hyperparameter(owner, name, is_valid(value), allowed)


def check_argument(name: str, value: Any, valid: bool, allowed: str) -> None:
    """Raise a `ValueError` that names a function's argument and what is allowed."""
    if not valid:
        raise ValueError(f"`{name}` must be {allowed}; got {value!r}.")


def check_options(owner: Any, options: dict[str, Any], *allowed: str) -> None:
    """Raise a `ValueError` for an option that a solver does not know."""
    for name in options:
        if name not in allowed:
            known = ", ".join(f"`{option}`" for option in allowed) or "none"
            raise ValueError(
                f"`{type(owner).__name__}` has no option `{name}`; allowed: {known}."
            )


def check_tolerances(owner: Any) -> None:
    """Check the `rtol` and `atol` of a solver; traced ones pass unchecked."""
    for name in ("rtol", "atol"):
        check_number(owner, name, lambda x: x >= 0, "non-negative")
