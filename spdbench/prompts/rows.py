"""Rows of any origin, checked and turned into prompts; an error names the row's place and value.

sources.py has the places that rows come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spdbench.chat_rows import CONTENTS, NAMES, OddRowError, message_of
from spdbench.console import say
from spdbench.errors import InputError, did_you_mean, short_repr
from spdbench.input_files import parse_json
from spdbench.types import Message, Prompt, encodable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

COLUMN_IN_TEMPLATE = re.compile(r"\{([A-Za-z_]\w*)\}")
PYTHON_LIST = re.compile(rf"\s*\[\s*\{{\s*'({'|'.join((*NAMES, *CONTENTS))})'\s*:")
"""How a cell begins that pandas wrote of a list of messages: as a prompt, it would be asked with all its brackets."""
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
    if isinstance(value, float) and not math.isfinite(value):  # what pandas writes for what is missing
        raise ValueError("must be text or a finite number")
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


@dataclass(frozen=True)
class Conversation:
    """A list of messages as a prompt: what is given, and the user's turns that the model answers."""

    context: tuple[Message, ...]
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """How rows are read. With `own_answers` the model answers every user message of a conversation itself; without,
    the answers in it are given. At most `max_turns` turns are asked. With `skip_odd`, rows that are no conversation are
    counted and left out. A turn that begins with `placeholder` is one that its data set has not filled in; `origin`
    says how that is done."""

    own_answers: bool = False
    max_turns: int | None = None
    skip_odd: bool = False
    placeholder: str | None = None
    origin: str | None = None


def split_messages(messages: Sequence[Any], where: str, *, own_answers: bool = False) -> Conversation:
    """A list of messages as a prompt. An answer after the last user message is left out.

    Raises:
        OddRowError: a message that no chat template takes, or none of a user's to answer; begins with `where`.
    """
    found = [message_of(message, f"{where}.{number}") for number, message in enumerate(messages)]
    while found and found[-1]["role"] != "user":
        found.pop()
    if not found:
        raise OddRowError(f"{where}: has no message of a user to answer")
    if any(not message["content"].strip() for message in found if message["role"] == "user"):
        raise OddRowError(f"{where}: has an empty message of a user")
    if own_answers:
        found = [message for message in found if message["role"] != "assistant"]
    start = len(found)
    while start and found[start - 1]["role"] == "user":
        start -= 1
    return Conversation(tuple(found[:start]), tuple(message["content"] for message in found[start:]))


def _as_conversation(value: object) -> Conversation:
    if not isinstance(value, list):
        raise ValueError("must be a list of messages, each with role and content")
    try:
        return split_messages(value, "messages")
    except OddRowError as error:
        raise ValueError(str(error).removeprefix("messages: ")) from None


MAX_TURNS = 1000
"""Of a conversation: each turn renders all before it, so that their time grows with the square of their number."""


class Row(Part):
    """One conversation from any source: the user's turns, or a list of messages. `id` and `reference` may be numbers,
    which become text."""

    id: Annotated[Text, BeforeValidator(_number_as_text)]
    turns: list[Text] = Field(min_length=1, max_length=MAX_TURNS)
    category: Text | None = None
    system: Text | None = Field(None, description="a system prompt of the row's own; beats the suite's")
    messages: Annotated[Any, AfterValidator(_as_conversation)] = Field(
        None, description="messages with role and content, in place of `turns`; the answers in it are given"
    )
    reference: Annotated[list[Annotated[str, AfterValidator(encodable)]] | None, BeforeValidator(_as_texts)] = None

    @model_validator(mode="before")
    @classmethod
    def _turns_of_messages(cls, data: Any) -> Any:
        """Without `turns`, those of `messages`: if these are wrong, the error is that of `messages` alone."""
        if not isinstance(data, dict) or "messages" not in data:
            return data
        if "turns" in data:
            raise ValueError("must have either turns or messages, not both")
        turns = ["-"]
        with suppress(ValueError):
            turns = list(_as_conversation(data["messages"]).turns)
        return {**data, "turns": turns}

    def prompt(self, category: str, max_turns: int | None = None) -> Prompt:
        """The row as a prompt; `category` is the default for a row that names none."""
        reference = None if self.reference is None else tuple(self.reference)
        context = () if self.messages is None else self.messages.context
        if self.system is not None:
            rest = context[1:] if context and context[0]["role"] == "system" else context
            context = ({"role": "system", "content": self.system}, *rest)
        return Prompt(self.id, self.category or category, tuple(self.turns[:max_turns]), reference, context)


def problem(details: ErrorDetails) -> str:
    """Pydantic's finding in spdbench's wording, with the value; the caller adds the place."""
    kind, value = details["type"], details["input"]
    if kind == "missing":
        return "is missing"
    reason = TYPE_WORDS.get(kind) or details["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "must be").replace("String should match", "must match")
    return f"{reason}, not {short_repr(value)}"


def rows_to_prompts(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Mapping[str, str],
    name: str,
    category: str,
    optional: frozenset[str] = frozenset(),
    unjudged: Callable[[str], bool] = lambda _: False,
    reading: Reading = Reading(),
    skipped: list[str] | None = None,
) -> tuple[Prompt, ...]:
    """Prompts from pairs of place and row. A column of turns may hold a text, a list of texts or a list of messages.

    `columns` maps a field of `Row` to its column; those in `optional` may be absent. Without a column for ids, rows are
    numbered from 0. `name` is that of the whole source, for a message if it is empty. In categories that are `unjudged`
    a reference that is no list of texts is dropped: nothing asks for it. `skipped` has the reasons of rows that are
    left out while `rows` are read.

    Raises:
        InputError: no rows, a missing column, a value of the wrong type, or an id that occurs twice.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    skipped = [] if skipped is None else skipped
    for number, (where, row) in enumerate(rows):
        try:
            fields = _fields(row, where, columns, optional) | ({"id": number} if "id" not in columns else {})
            asked = not unjudged(str(fields.get("category") or category))
            row_read = _checked_row(fields, where, columns, reading, asked=asked)
        except OddRowError as error:
            if not reading.skip_odd:
                raise
            skipped.append(str(error))
            continue
        prompt = row_read.prompt(category, reading.max_turns)
        if prompt.id in places:
            raise InputError(f"{where}: {columns['id']} '{prompt.id}' is already that of {places[prompt.id]}")
        places[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InputError(skipped[0] if skipped else f"{name}: holds no prompts")
    if skipped:
        total = len(prompts) + len(skipped)
        say(f"NOTE: {name}: {len(skipped):,} of {total:,} rows are no conversation. The first: {skipped[0]}")
    return tuple(prompts)


def _fields(row: Mapping[str, Any], where: str, columns: Mapping[str, str], optional: frozenset[str]) -> dict[str, Any]:
    """The values of `columns` by field.

    Raises:
        OddRowError: the row lacks one that is not `optional`.
    """
    missing = next((name for field, name in columns.items() if name not in row and field not in optional), None)
    if missing is not None:
        raise OddRowError(f"{where}: has no '{missing}'{did_you_mean(missing, row)}")
    return {field: row[column] for field, column in columns.items() if column in row}


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


def _checked_row(
    fields: Mapping[str, Any], where: str, columns: Mapping[str, str], reading: Reading, *, asked: bool
) -> Row:
    """`fields` as a `Row`; a single text is one turn. Errors name `where` and the column, unless it is that of a
    reference that is not `asked` for.

    Raises:
        OddRowError: it is none.
        InputError: its turns are not filled in yet.
    """
    turns, column = _messages_in_text(fields["turns"], only=reading.skip_odd), f"{where}: {columns['turns']}"
    if isinstance(turns, str) and PYTHON_LIST.match(turns):
        raise OddRowError(f"{column}: is a list of messages as Python prints it; write it as JSON (json.dumps)")
    if not isinstance(turns, str | list):
        raise OddRowError(f"{column}: must be text or a list of texts, not {short_repr(turns)}")
    if isinstance(turns, list) and (any(isinstance(turn, dict) for turn in turns) or (not turns and reading.skip_odd)):
        conversation = split_messages(turns, column, own_answers=reading.own_answers)
        # The answers that are not given have been taken out, so that `Row` reads it in its only way.
        asked_for = [{"role": "user", "content": turn} for turn in conversation.turns]
        given: dict[str, Any] = {"messages": [*map(dict, conversation.context), *asked_for]}
    else:
        given = {"turns": [turns] if isinstance(turns, str) else turns}
    try:
        row = Row.model_validate({**{key: value for key, value in fields.items() if key != "turns"}, **given})
    except ValidationError as error:
        first = error.errors()[0]
        field, *rest = (str(part) for part in first["loc"])
        if field == "reference" and not asked:  # the last field, so all else is as it should be
            return _checked_row({**fields, "reference": None}, where, columns, reading, asked=asked)
        raise OddRowError(f"{where}: {'.'.join([columns.get(field, field), *rest])}: {problem(first)}") from None
    if reading.placeholder is not None and any(turn.startswith(reading.placeholder) for turn in row.turns):
        how = "" if reading.origin is None else f"; {reading.origin}"
        raise InputError(f"{column}: has not been filled in yet ({short_repr(reading.placeholder)}){how}")
    return row


def _messages_in_text(value: Any, *, only: bool) -> Any:
    """The list of messages that `value` is the JSON of, as tables without nested types keep them; else `value`. With
    `only`, where nothing but conversations is meant, also a list that holds none, or nulls."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError):
            found = parse_json(value)
            named = [isinstance(each, dict) and {*each} & {*NAMES} and {*each} & {*CONTENTS} for each in found]
            if (named or only) and all(
                is_one or (only and not each) for is_one, each in zip(named, found, strict=True)
            ):
                return found
    return value
