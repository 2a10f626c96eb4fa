"""Settings of `run` by name, as a sweep's file and `spdbench.run` give them: checked, and made words of a command line.

Names are those of `RunOptions`, so that each option of `run` can be given. The command's own parser checks the values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import click

from spdbench.cli.defaults import ADDRESS, ONLY_TYPED
from spdbench.cli.run.command import RunOptions, command
from spdbench.errors import InputError, did_you_mean, short_repr

Settings = Mapping[str, Any]
Given = bool | str | list[str]
SETTINGS = {name: field.metadata for name, field in RunOptions.__dataclass_fields__.items()}
OPTION = "options."
"""What begins a backend's option: `options.spd.stages`."""


def merged(where: str, fixed: Settings, own: Settings, known: Collection[str]) -> dict[str, Any]:
    """`fixed` and `own` in one, the latter winning, with all options of backends under `options`.

    Raises:
        InputError: a name that is not `known`, or no suite; names it behind `where`.
    """
    found: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in [*fixed.items(), *own.items()]:
        if key.startswith(OPTION):
            options[key.removeprefix(OPTION)] = value
        elif key == "options":
            if not isinstance(value, Mapping):
                raise InputError(f"{where}: options: has to be a mapping, such as spd.stages: 3")
            options |= value
        elif key in known:
            found[key] = value
        else:
            raise InputError(f"{where}: {key}: unknown key{did_you_mean(key, [*known, OPTION + 'LABEL.KEY'])}")
    if found.get("suite") is None:
        raise InputError(f"{where}: suite: is missing; `spdbench suites` lists those that ship")
    return {**found, "options": options}


def run_words(where: str, settings: Settings) -> Iterator[str]:
    """`settings` as words of a command line, the suite first. Raises `InputError` for what cannot be such words."""
    yield _suite(where, settings)
    for _, name, given in _given(where, settings):
        yield from _words(name, given)


def run_table(where: str, settings: Settings) -> tuple[str, list[str]]:
    """`settings` as the table `[run]` of an `spdbench.toml`, and the words behind `spdbench run` that go with it: the
    suite, and what such a file cannot set. Raises `InputError` as `run_words` does."""
    lines, words = ["[run]"], [_suite(where, settings)]
    for key, name, given in _given(where, settings):
        if key in ONLY_TYPED or (isinstance(given, list) and any(map(ADDRESS.match, given))):
            words += _words(name, given)
        else:
            lines.append(f"{name.lstrip('-')} = {json.dumps(given, ensure_ascii=False)}")
    return "\n".join([*lines, ""]), words


def _suite(where: str, settings: Settings) -> str:
    suite = str(settings["suite"])
    if suite.startswith("-"):
        raise InputError(f"{where}: suite: {suite!r} is the name of no suite; `spdbench suites` lists those that ship")
    return suite


def _given(where: str, settings: Settings) -> Iterator[tuple[str, str, Given]]:
    """Each setting that is given but the suite, its option as typed, and its value: text, a list of texts for an option
    that can be given several times, true for one without a value."""
    for key, value in settings.items():
        if key == "suite" or value is None:
            continue
        names, more, *_ = SETTINGS[key]["option"]
        if key == "options":
            if words := [f"{name}={_text(each)}" for name, each in value.items() if each is not None]:
                yield key, "-o", words
        elif more.get("is_flag"):
            if not isinstance(value, bool):
                raise InputError(f"{where}: {key}: {value!r} has to be true or false")
            if value:
                yield key, names[-1], True
        elif more.get("multiple"):
            several = value if isinstance(value, list | tuple) else [value]
            wrong = any(each is None or isinstance(each, Mapping) for each in several)
            if wrong or (key == "backends" and not several):
                raise InputError(f"{where}: {key}: {short_repr(value)} has to be a text or a list of texts")
            yield key, names[-1], [_text(each) for each in several]
        else:
            yield key, names[-1], _text(value)


def _words(name: str, given: Given) -> Iterator[str]:
    if isinstance(given, bool):
        yield name
    else:
        yield from itertools.chain.from_iterable(
            (name, each) for each in (given if isinstance(given, list) else [given])
        )


def _text(value: Any) -> str:
    """As typed on a command line: `true`, and lists with commas."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def parse_words(words: Sequence[str], defaults: Mapping[str, Any] | None = None) -> RunOptions:
    """The options of `spdbench run WORDS`, those that are not given from `defaults` first.

    Raises:
        InputError: the command does not take them.
    """
    try:
        with command.make_context("run", list(words), default_map=dict(defaults or {})) as context:
            return RunOptions(**context.params)
    except click.ClickException as error:
        raise InputError(error.format_message()) from None
