"""Finds recipes by name, through the entry point group `spdbench.recipes`, and reads their options.

Must know no recipe by name; importing it loads none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from pydantic import ValidationError

from spdbench.errors import InputError, did_you_mean, first_problem
from spdbench.training.recipe import Recipe, RecipeOptions

ENTRY_POINT_GROUP = "spdbench.recipes"


def installed_recipes() -> dict[str, EntryPoint]:
    """Entry points of every installed recipe by name, sorted. Nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name)}


def find_recipe(name: str) -> type[Recipe]:
    """The class of the recipe called `name`.

    Raises:
        InputError: no recipe has that name, or its package cannot be imported.
    """
    installed = installed_recipes()
    if name not in installed:
        raise InputError(f"unknown method '{name}'{did_you_mean(name, installed)}")
    try:
        return cast("type[Recipe]", installed[name].load())
    except Exception as error:  # somebody else's package, which may fail in any way
        raise InputError(
            f"method '{name}' ({installed[name].value}) cannot be imported: {type(error).__name__}: {error}"
        ) from error


def parse_recipe_options(words: Sequence[str], options: type[RecipeOptions]) -> RecipeOptions:
    """`-o KEY=VALUE` words as the recipe's typed options; the last word for a key wins.

    Raises:
        InputError: a word of another form, a key that is not known, or a value of the wrong type.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"-o {word}: expected KEY=VALUE. Known: {', '.join(sorted(options.model_fields))}.")
        if key not in options.model_fields:
            raise InputError(f"-o {key}: unknown option{did_you_mean(key, options.model_fields)}")
        given[key] = value.strip()
    return checked_options(options, given)


def checked_options(options: type[RecipeOptions], given: Mapping[str, str]) -> RecipeOptions:
    """The options that the text in `given` means.

    Raises:
        InputError: a value of the wrong type; names it.
    """
    try:
        return options.model_validate(dict(given))
    except ValidationError as error:
        loc, reason = first_problem(error)
        key = loc[0] if loc else "?"
        raise InputError(f"-o {key}={given.get(key, '')}: {reason}") from None


def check_layout(recipe: type[Recipe], layout: str) -> None:
    """Raises `InputError` for a --format that the recipe does not write."""
    if layout not in recipe.formats:
        raise InputError(f"--format {layout}: {recipe.method} is written as {' or '.join(recipe.formats)}")
