"""What can be set of an engine: a struct, of which the command line's arguments are made too."""

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from qwen_jax import trace_command
from stages.errors import UserError


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of an engine, every one with a default and, as its type's ``Meta``, a
    description. Choices are a ``Literal``; a bool that is True by default has a ``--no-NAME``."""


Chosen = TypeVar("Chosen", bound=Options)


def names(of: type[Options]) -> tuple[str, ...]:
    """The options, in order."""
    return tuple(each.name for each in _fields(of))


def checked(of: type[Chosen], given: Mapping[str, Any]) -> Chosen:
    """The options with these values.

    Raises:
        UserError: no such option, or a value that it does not have.
    """
    if unknown := [name for name in given if name not in names(of)]:
        raise UserError(f"no option {unknown[0]!r}; this engine has {', '.join(names(of))}")
    try:
        return msgspec.convert(dict(given), of)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`")
        told = next(each for each in _fields(of) if each.name == name)
        kind, _ = _of_values(told.type)
        if isinstance(kind, inspect.LiteralType):
            what = f"expected one of {', '.join(map(str, kind.values))}"
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} {given[name]}: {what.replace('`', '')}") from None


def _fields(of: type[Options]) -> tuple[inspect.Field, ...]:
    told = inspect.type_info(of)
    assert isinstance(told, inspect.StructType)
    return told.fields


def add_arguments(parser: argparse.ArgumentParser, of: type[Options]) -> None:
    """An argument for each option."""
    for field in _fields(of):
        kind, says = _of_values(field.type)
        flag, default = field.name.replace("_", "-"), field.default
        add = parser.add_argument
        if isinstance(kind, inspect.BoolType) and default:
            add(f"--no-{flag}", dest=field.name, action="store_false", help=says)
        elif isinstance(kind, inspect.BoolType):
            add(f"--{flag}", action="store_true", help=says)
        elif isinstance(kind, inspect.LiteralType) and set(kind.values) <= set(
            trace_command.DTYPES.values()
        ):
            add(f"--{flag}", type=trace_command.dtype, default=default, metavar="DTYPE", help=says)
        elif isinstance(kind, inspect.LiteralType):
            of_values = type(kind.values[0])
            add(f"--{flag}", type=of_values, choices=kind.values, default=default, help=says)
        else:
            number = isinstance(kind, inspect.IntType)
            of_values, word = (int, "N") if number else (str, "NAME")
            add(f"--{flag}", type=of_values, default=default, metavar=word, help=says)


def _of_values(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """The type that values have, None aside, and what is said of it."""
    says = ""
    if isinstance(kind, inspect.Metadata):
        says = (kind.extra_json_schema or {}).get("description", "")
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        kind = next(each for each in kind.types if not isinstance(each, inspect.NoneType))
    return kind, says
