"""Fields of modules, and checks of what modules and functions are given.

`owner` is the module, or the name of the function. Numbers and what they say together
are checked by value, a `ValueError`; parts by kind, a `TypeError`. Both name the owner,
the field or argument, what is allowed and what was given.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jax.core import Tracer

from .types import Solver


def keyword(default: Any) -> Any:
    return eqx.field(default=default, kw_only=True)


def integer(default: Any, **options: Any) -> Any:
    """A field of an integer that decides what is compiled."""
    return eqx.field(default=default, converter=as_integer, **options)


def as_integer(value: Any) -> Any:
    """An integer of NumPy or JAX as Python's; all else as it is, for `check_integer`.

    An array would be traced, and cannot be hashed.
    """
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


class Range(NamedTuple):
    """Which numbers are allowed. NaN never is."""

    text: str
    holds: Callable[[float], bool]


NUMBER = Range("a finite number", math.isfinite)
POSITIVE = Range("a finite positive number", lambda x: 0 < x < math.inf)
NON_NEGATIVE = Range("a finite non-negative number", lambda x: 0 <= x < math.inf)
# Of a limit, which may be none.
LIMIT = Range("a non-negative number or infinity", lambda x: x >= 0)
# Of a step or a draw: what may be left out, but not all of it.
FRACTION = Range("a number in the interval [0, 1)", lambda x: 0 <= x < 1)
PROPER_FRACTION = Range("a number in the interval (0, 1)", lambda x: 0 < x < 1)
PROBABILITY = Range("a number in the interval [0, 1]", lambda x: 0 <= x <= 1)


class Part(NamedTuple):
    """A kind of object, what to say of it, and what to say of others meant for it."""

    text: str
    kinds: Any
    # A message has `{name}` for the class of the object.
    near_misses: Mapping[Any, str] = {}


FUNCTION = Part("a function", Callable)
SOLVER = Part(
    "an Optimistix solver, such as `implicitnets.AndersonAcceleration(1e-4, 1e-6)`",
    Solver,
    {dfx.AbstractSolver: "`implicitnets.SteadyState({name}(...))` makes one of it."},
)
LINEAR_SOLVER = Part(
    "a Lineax solver, such as `lineax.GMRES(1e-3, 1e-3)`",
    lx.AbstractLinearSolver,
    {
        optx.AbstractFixedPointSolver | optx.AbstractRootFinder: (
            "`implicitnets.FixedPointLinearSolver({name}(...))` makes one of it."
        ),
    },
)
ADJOINT = Part(
    "an Optimistix adjoint, such as `implicitnets.ImplicitAdjoint()`",
    optx.AbstractAdjoint,
    {
        dfx.AbstractAdjoint: "Diffrax' adjoints are for `implicitnets.NeuralODE`.",
        lx.AbstractLinearSolver: (
            "`implicitnets.ImplicitAdjoint({name}(...))` makes one of it."
        ),
    },
)
STEP_SIZE_CONTROLLER = Part(
    "a Diffrax step-size controller, such as `diffrax.PIDController(1e-3, 1e-6)`",
    dfx.AbstractStepSizeController,
)


def check_value(
    owner: Any, name: str, value: Any, valid: bool, allowed: str, hint: str = ""
) -> None:
    """A `ValueError` unless `valid`."""
    if not valid:
        raise ValueError(_refusal(owner, name, value, allowed, hint))


def check_number(
    owner: Any, name: str, value: Any, allowed: Range, *, optional: bool = False
) -> None:
    """A real number, of Python, NumPy or JAX; only one that is traced is not known."""
    if isinstance(value, Tracer) or (optional and value is None):
        return
    number = _as_number(value)
    valid = number is not None and not math.isnan(number) and allowed.holds(number)
    check_value(owner, name, value, valid, allowed.text + " or `None`" * optional)


def check_integer(
    owner: Any,
    name: str,
    value: Any,
    least: int,
    *,
    optional: bool = False,
    traced: bool = False,
) -> Any:
    """An integer, returned as one of Python, but for an array that may be traced."""
    allowed = f"an integer of at least {least}" + " or `None`" * optional
    if optional and value is None:
        return value
    if isinstance(value, Tracer):
        hint = "It decides what is compiled, and cannot be traced."
        check_value(owner, name, value, traced, allowed, hint)
        return value
    number = as_integer(value)
    valid = isinstance(number, int) and not isinstance(number, bool)
    check_value(owner, name, value, valid and number >= least, allowed)
    return value if traced and eqx.is_array(value) else number


def check_flag(owner: Any, name: str, value: Any, *, optional: bool = False) -> None:
    """`True` or `False`."""
    valid = isinstance(value, bool) or (optional and value is None)
    allowed = "`True`, `False` or `None`" if optional else "`True` or `False`"
    check_value(owner, name, value, valid, allowed)


def check_part(
    owner: Any, name: str, value: Any, part: Part, *, optional: bool = False
) -> None:
    """A `TypeError` unless the value is an instance of a kind of object."""
    if optional and value is None:
        return
    is_class = isinstance(value, type)
    if isinstance(value, part.kinds) and not is_class:
        return
    hint = ""
    if is_class and (issubclass(value, part.kinds) or part is FUNCTION):
        hint = f"This is the class: give an instance, `{value.__name__}(...)`."
    kind = value if is_class else type(value)
    for kinds, message in part.near_misses.items():
        if issubclass(kind, kinds):
            hint = message.format(name=kind.__name__)
    allowed = part.text + " or `None`" * optional
    raise TypeError(_refusal(owner, name, value, allowed, hint))


def check_needs_no_bounds(solver: Any) -> None:
    """A `TypeError` for a solver between bounds, which only `options` can give it."""
    if isinstance(solver, optx.Bisection | optx.GoldenSearch):
        raise TypeError(
            f"`optimistix.{type(solver).__name__}` needs bounds of a scalar. Only "
            "Optimistix' own functions take them, as their `options`. Use "
            "`optimistix.Newton` or `implicitnets.Broyden`."
        )


def check_options(owner: Any, options: dict[str, Any], *allowed: str) -> None:
    """A `ValueError` for an option that a solver does not know."""
    for name in options:
        if name not in allowed:
            known = ", ".join(f"`{option}`" for option in allowed) or "none"
            raise ValueError(
                f"`{type(owner).__name__}` has no option `{name}`; allowed: {known}."
            )


def check_tolerances(owner: Any) -> None:
    """The `rtol` and `atol` of a solver."""
    check_number(owner, "rtol", owner.rtol, NON_NEGATIVE)
    check_number(owner, "atol", owner.atol, NON_NEGATIVE)


def check_stopping_rule(owner: Any) -> None:
    """The `rtol`, `atol` and `norm` of a solver."""
    check_tolerances(owner)
    check_part(owner, "norm", owner.norm, FUNCTION)


def _as_number(value: Any) -> int | float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    if is_array and value.shape == () and not isinstance(value, Tracer):
        is_real = any(
            jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating)
        )
        return float(jax.device_get(value)) if is_real else None
    return None


def _refusal(owner: Any, name: str, value: Any, allowed: str, hint: str = "") -> str:
    owner = owner if isinstance(owner, str) else type(owner).__name__
    if isinstance(value, type):
        given = f"the class `{value.__name__}`"
    elif _as_number(value) is not None:
        given = repr(value)
    elif isinstance(value, eqx.Module):
        given = f"`{type(value).__name__}(...)`"
    else:
        given = eqx.tree_pformat(value)
    message = f"`{owner}({name}=...)` must be {allowed}; got {given}."
    return f"{message} {hint}" if hint else message
