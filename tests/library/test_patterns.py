"""The rules that the code base keeps: see CONTRIBUTING.md."""

import importlib
import inspect
import pkgutil
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
import pytest

import implicitnets as inn


pytestmark = pytest.mark.one_precision


def all_modules() -> list[type[eqx.Module]]:
    for info in pkgutil.walk_packages(inn.__path__, "implicitnets."):
        importlib.import_module(info.name)

    def descendants(cls):
        for child in cls.__subclasses__():
            yield child
            yield from descendants(child)

    found = {c for c in descendants(eqx.Module) if c.__module__.startswith("implicitn")}
    return sorted(found, key=lambda cls: cls.__qualname__)


def is_abstract(cls: type) -> bool:
    return inspect.isabstract(cls) or bool(getattr(cls, "__abstractvars__", ()))


@pytest.mark.parametrize("cls", all_modules(), ids=lambda cls: cls.__name__)
def test_abstract_or_final(cls):
    for parent in cls.__mro__[1:]:
        if issubclass(parent, eqx.Module) and parent is not eqx.Module:
            assert is_abstract(parent) or not vars(parent).get("__annotations__"), (
                f"{cls.__name__} subclasses the concrete {parent.__name__}"
            )


def public_values() -> dict[str, Any]:
    return {
        name: value
        for package in (inn, inn.nn, inn.models)
        for name, value in vars(package).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("implicitnets.")
    }


@pytest.mark.parametrize("name", public_values())
def test_public_docstrings(name):
    """A summary line, the arguments of what takes any, and methods' own docstrings."""
    value = public_values()[name]
    doc = inspect.getdoc(value)
    assert doc is not None
    summary, *rest = doc.split("\n")
    assert summary.endswith(".") and (not rest or rest[0] == "")
    if inspect.isclass(value):
        has_fields = bool(vars(value).get("__annotations__"))
        assert not has_fields or "**Arguments:**" in doc or "**Attributes:**" in doc
    else:
        has_arguments = bool(inspect.signature(value).parameters)
        assert ("**Arguments:**" in doc) == has_arguments and "**Returns:**" in doc


@pytest.mark.parametrize(
    "solver",
    (
        inn.AndersonAcceleration(1e-3, 0.0),
        inn.Broyden(1e-3, 0.0),
        inn.NewtonKrylov(1e-3, 0.0),
        inn.ReversibleFixedPoint(1e-3, 0.0),
        inn.SteadyState(dfx.Euler()),
        inn.ForwardBackward(1e-3, 0.0),
        inn.PeacemanRachford(1e-3, 0.0),
        inn.GivensGMRES(1e-3, 0.0),
        inn.FixedPointLinearSolver(inn.AndersonAcceleration(1e-3, 0.0)),
        inn.NeumannSeries(),
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_unknown_options_are_refused(solver):
    y, options = jnp.ones(2), {"preconditoner": None}
    with pytest.raises(ValueError, match="has no option `preconditoner`; allowed: "):
        if isinstance(solver, lx.AbstractLinearSolver):
            operator = lx.DiagonalLinearOperator(y)
            lx.linear_solve(operator, y, solver, options=options)
        else:
            optx.fixed_point(lambda z, _: 0.5 * z, solver, y, options=options)
