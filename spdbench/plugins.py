"""Classes that installed packages offer under an entry point group, and their typed `-o` options.

The harness finds backends here, and training its recipes. Importing this module loads none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from spdbench.errors import InputError, did_you_mean, first_problem, given_by


class PluginOptions(BaseModel):
    """Base of a class's `Options`: frozen, typed, and strict about unknown keys. Texts are converted.

    Give every field a default and a `description`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


Chosen = TypeVar("Chosen", bound=PluginOptions)


def installed(group: str) -> dict[str, EntryPoint]:
    """The group's entry points by name, sorted. Nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def find_class(what: str, name: str, points: Mapping[str, EntryPoint]) -> Any:
    """The class called `name` among `points`; messages call it a `what`.

    Raises:
        InputError: no class has that name, or its package cannot be imported.
    """
    if name not in points:
        raise InputError(f"unknown {what} '{name}'{did_you_mean(name, points)}")
    try:
        return points[name].load()
    except Exception as error:  # a third party's package may fail in any way
        raise InputError(
            f"{what} '{name}' ({points[name].value}) cannot be imported: {type(error).__name__}: {error}"
        ) from error


def parse_keys(prefix: str, options: type[Chosen], given: Mapping[str, str]) -> Chosen:
    """`given`, the texts after `-o {prefix}KEY=`, as typed options.

    Raises:
        InputError: a key that is not known, or a value of the wrong type; names both and what is allowed.
    """
    known = options.model_fields
    for key in given:
        if key not in known:
            raise InputError(f"{given_by(given[key], '-o')} {prefix}{key}: unknown option{did_you_mean(key, known)}")
    try:
        return options.model_validate(dict(given))
    except ValidationError as error:
        loc, reason = first_problem(error)
        key = loc[0] if loc else "?"
        value = given.get(key, "")
        raise InputError(f"{given_by(value, '-o')} {prefix}{key}={value}: {reason}") from None
