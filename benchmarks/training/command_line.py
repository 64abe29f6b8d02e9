"""Options from a command line.

The options of a model are the fields of its configuration in the library, without
those that follow from the data, and their help is that of the fields.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from .errors import OptionError, with_flags
from .networks import ModelConfig, option_names


_Options = TypeVar("_Options")
_REGISTRY = ConstructorRegistry()
_MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes)


@_REGISTRY.struct_rule
def _from_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Every dataclass starts from its default, and a wrong value names its flag."""
    # tyro wraps what it is given into dataclasses of its own.
    is_ours = dataclasses.is_dataclass(info.type) and "tyro" not in info.type.__module__
    if not is_ours or not isinstance(info.default, info.type):
        return None
    if info.type in typing.get_args(ModelConfig):
        names = option_names(info.type)
    else:
        names = [field.name for field in dataclasses.fields(info.type)]
    types = typing.get_type_hints(info.type, include_extras=True)
    parsed = docstring_parser.parse_from_object(info.type).params
    help_of = {p.arg_name: " ".join((p.description or "").split()) for p in parsed}

    def instantiate(**values: Any) -> Any:
        try:
            return dataclasses.replace(info.default, **values)
        except ValueError as error:
            raise OptionError(with_flags(error)) from error

    return StructConstructorSpec(
        instantiate,
        tuple(
            StructFieldSpec(
                name, types[name], getattr(info.default, name), help_of.get(name)
            )
            for name in names
        ),
    )


def parse_recipe(
    recipes: Mapping[str, tuple[str, _Options]],
    description: str,
    args: Sequence[str] | None = None,
) -> _Options:
    """A recipe with what a command line changes of it."""
    return tyro.extras.overridable_config_cli(
        recipes,
        args=args,
        description=description,
        config=_MARKERS,
        registry=_REGISTRY,
    )


def parse_settings(default: _Options, args: Sequence[str] | None = None) -> _Options:
    """As `parse_recipe`, for a script with one set of options, each with a prefix."""
    return tyro.cli(
        type(default),
        default=default,
        args=args,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_REGISTRY,
    )
