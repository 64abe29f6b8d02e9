"""The rules that the code base keeps: see CONTRIBUTING.md."""

import abc
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
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

    return [c for c in {*descendants(eqx.Module)} if is_ours(c)]


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("implicitnets.")


def parents(cls: type) -> list[type[eqx.Module]]:
    found = [c for c in cls.__mro__[1:] if issubclass(c, eqx.Module)]
    return [c for c in found if c is not eqx.Module]


def abstract_attributes(cls: type[eqx.Module]) -> frozenset[str]:
    return cls.__abstractvars__ | cls.__abstractclassvars__


def is_abstract(cls: type[eqx.Module]) -> bool:
    return inspect.isabstract(cls) or bool(abstract_attributes(cls))


def own_names(cls: type) -> set[str]:
    """What a class defines itself, but for what Python and Equinox make."""
    return {
        name
        for name in vars(cls)
        if name == "__call__" or not (name.startswith("__") or name == "_abc_impl")
    }


def concrete_names(cls: type[eqx.Module]) -> set[str]:
    methods = {
        name
        for name in own_names(cls)
        if not getattr(vars(cls)[name], "__isabstractmethod__", False)
    }
    return methods - abstract_attributes(cls)


def not_abstract_or_final(
    classes: Iterable[type[eqx.Module]],
    is_bound: Callable[[type], bool] = is_ours,
) -> Iterator[str]:
    """Concrete classes that are subclassed, and what is defined more than once.

    Other libraries have defaults that are there to be overridden, hence `is_bound`.
    """
    for cls in classes:
        for parent in parents(cls):
            if not is_abstract(parent):
                yield f"{cls.__name__} subclasses the concrete {parent.__name__}"
            if is_bound(parent):
                for name in sorted(own_names(cls) & concrete_names(parent)):
                    yield f"{cls.__name__}.{name} overrides that of {parent.__name__}"


def test_abstract_or_final():
    assert list(not_abstract_or_final(all_modules())) == []


class _AbstractShape(eqx.Module):
    sides: eqx.AbstractVar[int]

    @abc.abstractmethod
    def area(self) -> float: ...

    def describe(self) -> str:
        return f"{self.sides} sides, area {self.area()}"


class _Square(_AbstractShape):
    sides: int = 4

    def area(self) -> float:
        return 1.0


class _Loud(_AbstractShape):
    sides: int = 3

    def area(self) -> float:
        return 2.0

    def describe(self) -> str:
        return "!"


# A parent with nothing annotated, and nothing overridden.
class _Unit(_Square):
    def side(self):
        return 1.0


def test_what_is_not_abstract_or_final_is_found():
    found = not_abstract_or_final((_Square, _Loud, _Unit), lambda _: True)
    assert list(found) == [
        "_Loud.describe overrides that of _AbstractShape",
        "_Unit subclasses the concrete _Square",
    ]


def unannotated_overrides(classes: Iterable[type[eqx.Module]]) -> Iterator[str]:
    """Overrides, of other libraries' methods too, that the type check does not see."""
    for cls in classes:
        inherited = {
            name
            for parent in parents(cls)
            for name in own_names(parent) | abstract_attributes(parent)
        }
        for name in sorted(own_names(cls) & inherited):
            member = vars(cls)[name]
            if isinstance(member, property):
                member = member.fget
            if inspect.isfunction(member):
                signature = inspect.signature(member)
                _, *arguments = signature.parameters.values()
                annotations = [argument.annotation for argument in arguments]
                if inspect.Signature.empty in (
                    *annotations,
                    signature.return_annotation,
                ):
                    yield f"{cls.__name__}.{name}"


def test_overrides_are_annotated():
    assert list(unannotated_overrides(all_modules())) == []


class _Circle(_AbstractShape):
    @property
    def sides(self):
        return 0

    def area(self, scale=1.0) -> float:
        return 3.0 * scale

    def radius(self):
        return 1.0


def test_unannotated_overrides_are_found():
    found = unannotated_overrides((_Square, _Unit, _Circle))
    assert list(found) == ["_Circle.area", "_Circle.sides"]


def public_values() -> dict[str, Any]:
    return {
        name: value
        for package in (inn, inn.nn, inn.models)
        for name, value in vars(package).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("implicitnets.")
    }


def undocumented_fields(cls: type) -> list[str]:
    if not dataclasses.is_dataclass(cls):
        return []
    source = inspect.getsource(cls)
    return [
        field.name
        for field in dataclasses.fields(cls)
        if not re.search(rf'^    {field.name}: .*\n    """', source, re.MULTILINE)
    ]


@pytest.mark.parametrize("name", public_values())
def test_public_docstrings(name):
    """A summary line, and the arguments of what takes any, there or at each field."""
    value = public_values()[name]
    doc = inspect.getdoc(value)
    assert doc is not None
    summary, *rest = doc.split("\n")
    assert summary.endswith(".") and (not rest or rest[0] == "")
    if inspect.isclass(value):
        lists_fields = "**Arguments:**" in doc or "**Attributes:**" in doc
        assert lists_fields or not undocumented_fields(value)
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
