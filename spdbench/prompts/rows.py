"""Rows of any origin, checked and turned into prompts; an error names the row's place and value.

sources.py has the places that rows come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from spdbench.errors import InputError, did_you_mean
from spdbench.types import Prompt, encodable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

COLUMN_IN_TEMPLATE = re.compile(r"\{([A-Za-z_]\w*)\}")
TYPE_WORDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "too_short": "must not be empty",
}


class SourceUnavailable(Exception):  # noqa: N818 - not an error: the next source is tried
    """A source that is not present on this machine: `reason`, and the `command` that would fetch it."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.command = command


class Part(BaseModel):
    """Base of all parts of a suite file: frozen, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return encodable(text)


def _number_as_text(value: object) -> object:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    try:
        return str(value)
    except ValueError:
        raise ValueError("must be text or a number of reasonable length") from None


def _as_texts(value: object) -> object:
    """A reference as a list of texts, "" for a turn that has none; None for an empty list."""
    if isinstance(value, list):
        return ["" if item is None else _number_as_text(item) for item in value] or None
    return value if value is None else [_number_as_text(value)]


Text = Annotated[str, AfterValidator(_not_blank)]


class Row(Part):
    """One conversation from any source. `id` and `reference` may be numbers, which become text."""

    id: Annotated[Text, BeforeValidator(_number_as_text)]
    turns: list[Text] = Field(min_length=1)
    category: Text | None = None
    reference: Annotated[list[Annotated[str, AfterValidator(encodable)]] | None, BeforeValidator(_as_texts)] = None

    def prompt(self, category: str) -> Prompt:
        """The row as a prompt; `category` is the default for a row that names none."""
        reference = None if self.reference is None else tuple(self.reference)
        return Prompt(self.id, self.category or category, tuple(self.turns), reference)


def problem(details: ErrorDetails) -> str:
    """Pydantic's finding in spdbench's wording, with the value; the caller adds the place."""
    kind, value = details["type"], details["input"]
    if kind == "missing":
        return "is missing"
    reason = TYPE_WORDS.get(kind) or details["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "must be").replace("String should match", "must match")
    return f"{reason}, not {_short_repr(value)}"


def _short_repr(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def rows_to_prompts(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Mapping[str, str],
    name: str,
    category: str,
    optional: frozenset[str] = frozenset(),
    unjudged: Callable[[str], bool] = lambda _: False,
) -> tuple[Prompt, ...]:
    """Prompts from pairs of place and row.

    `columns` maps a field of `Row` to its column; those in `optional` may be absent. Without a column for ids, rows are
    numbered from 0. `name` is that of the whole source, for a message if it is empty. In categories that are `unjudged`
    a reference that is no list of texts is dropped: nothing asks for it.

    Raises:
        InputError: no rows, a missing column, a value of the wrong type, or an id that occurs twice.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        fields: dict[str, Any] = {"id": number} if "id" not in columns else {}
        for field, column in columns.items():
            if column in row:
                fields[field] = row[column]
            elif field not in optional:
                raise InputError(f"{where}: has no '{column}'{did_you_mean(column, row)}")
        asked = not unjudged(str(fields.get("category") or category))
        prompt = _checked_row(fields, where, columns, asked=asked).prompt(category)
        if prompt.id in places:
            raise InputError(f"{where}: {columns['id']} '{prompt.id}' is already that of {places[prompt.id]}")
        places[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{name}: holds no prompts")
    return tuple(prompts)


def columns_in(template: str) -> tuple[str, ...]:
    """The columns that a reference needs: those in braces, or the one column that `template` names."""
    return tuple(dict.fromkeys(COLUMN_IN_TEMPLATE.findall(template))) or (template,)


def with_reference(
    rows: Iterable[tuple[str, Mapping[str, Any]]], template: str | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`rows` with a column more if `template` has columns in braces: named `template`, and filled in from it.

    Raises:
        InputError: a row lacks one of them.
    """
    if template is None or columns_in(template) == (template,):
        yield from rows
        return
    for where, row in rows:
        yield where, {**row, template: filled(template, row, where)}


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with the names in braces replaced by the values of `row`'s columns.

    Raises:
        InputError: the row, whose place is `where`, lacks one of them.
    """
    for name in COLUMN_IN_TEMPLATE.findall(template):
        if name not in row:
            raise InputError(f"{where}: has no '{name}'{did_you_mean(name, row)}")
    return COLUMN_IN_TEMPLATE.sub(lambda found: str(row[found[1]]), template)


def _checked_row(fields: Mapping[str, Any], where: str, columns: Mapping[str, str], *, asked: bool) -> Row:
    """`fields` as a `Row`; a single text is one turn. Errors name `where` and the column, unless it is that of a
    reference that is not `asked` for."""
    turns = fields["turns"]
    if not isinstance(turns, str | list):
        raise InputError(f"{where}: {columns['turns']}: must be text or a list of texts, not {_short_repr(turns)}")
    try:
        return Row.model_validate({**fields, "turns": [turns] if isinstance(turns, str) else turns})
    except ValidationError as error:
        first = error.errors()[0]
        field, *rest = (str(part) for part in first["loc"])
        if field == "reference" and not asked:  # the last field, so all else is as it should be
            return _checked_row({**fields, "reference": None}, where, columns, asked=asked)
        raise InputError(f"{where}: {'.'.join([columns.get(field, field), *rest])}: {problem(first)}") from None
