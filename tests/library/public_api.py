"""`python -m tests.library.public_api`: write the public names and signatures down."""

import dataclasses
import inspect
import pathlib
from collections.abc import Iterator
from types import ModuleType

import implicitnets as inn
from implicitnets import plot


PATH = pathlib.Path(__file__).with_suffix(".txt")


def describe() -> str:
    """Every public name in a line of its own, with what it may be called with."""
    modules = (inn, inn.nn, inn.models, plot)
    return "".join(f"{line}\n" for module in modules for line in _module(module))


def _module(module: ModuleType) -> Iterator[str]:
    for name, value in sorted(vars(module).items()):
        ours = getattr(value, "__module__", "").startswith("implicitnets")
        elsewhere = module is not inn and getattr(inn, name, None) is value
        if name.startswith("_") or not ours or elsewhere:
            continue
        yield f"{module.__name__}.{name}{_signature(value)}"
        if inspect.isclass(value):
            for method in _methods(value):
                yield f"    .{method}{_signature(getattr(value, method))}"


def _methods(cls: type) -> list[str]:
    """What a class can do, but for what the libraries underneath prescribe."""
    theirs = (b for b in cls.__mro__ if not b.__module__.startswith("implicitnets"))
    prescribed = {name for base in theirs for name in vars(base)}
    fields = {field.name for field in dataclasses.fields(cls)}
    return sorted(
        name
        for name in dir(cls)
        if (name == "__call__" or not name.startswith("_"))
        and name not in prescribed | fields
        and inspect.isroutine(inspect.getattr_static(cls, name))
    )


def _signature(value) -> inspect.Signature:
    signature = inspect.signature(value)
    parameters = [_plain(p) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if default not in (parameter.empty, None) and not isinstance(
        default, int | float | str | tuple
    ):
        default = _Dots()
    return parameter.replace(annotation=parameter.empty, default=default)


class _Dots:
    def __repr__(self):
        return "..."


if __name__ == "__main__":
    PATH.write_text(describe())
