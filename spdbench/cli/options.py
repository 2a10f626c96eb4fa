"""Options of commands: declared once, as the fields of a frozen dataclass, with the types that they share.

    @dataclass(frozen=True, kw_only=True)
    class DistillOptions(TargetOptions):
        seed: int = option("--seed", WHOLE, "S", "Seed of all draws.", default=0)

    @click.command("distill")
    @takes(DistillOptions)
    def command(options: DistillOptions) -> None: ...

Only parses and checks words; loads no model.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from spdbench.cli.parameters import CHAT_TEMPLATE, DRAFTER, KEY_VALUE, MODEL, Argument, KeyedOption, Option, Word
from spdbench.console import say
from spdbench.errors import FileWord, InputError, did_you_mean, given_by
from spdbench.processors import usable_cores

DTYPES = ("bfloat16", "float32", "float16")
LABEL = re.compile(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*")
MAX_NUMBER = 2**63 - 1
"""The largest whole number that options take: files, arrays and torch's seeds hold 64 bits."""
BYTES = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def option(names: str, kind: Any, metavar: str | None, text: str | None, default: Any = None, **more: Any) -> Any:
    """A field of a command's options: `names` as typed (`-b --backend`), and what click shows and checks."""
    if default is not None:  # click 8.3 and later take None for a value, which a required option then has
        more = {"default": default, "show_default": True, **more}
    return field(metadata={"option": (names.split(), {"type": kind, "cls": Option, **more}, metavar, text)})


def keyed(names: str, metavar: str, text: str, kind: Word) -> Any:
    """An option that is given once a key: words in the order in which they count, those of a file first."""
    return option(names, kind, metavar, text, multiple=True, cls=KeyedOption)


def flag(name: str, text: str) -> Any:
    """An option without a value: true where it is given."""
    return option(name, None, None, text, False, is_flag=True, show_default=False)


def argument(metavar: str, **more: Any) -> Any:
    """A word without an option's name; `more` is what click knows of arguments, such as how many there are."""
    return field(metadata={"argument": {"metavar": metavar, "cls": Argument, **more}})


def takes(options: type[Any]) -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """Adds all fields of the dataclass `options` to a command, which is called with one object of it.

    The command's own options come first in its help, those of base classes behind them.
    """

    def add(function: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(**words: Any) -> Any:
            return function(options(**words))

        for name, metadata in reversed([*_declared(options)]):
            if "argument" in metadata:
                wrapper = click.argument(name, **metadata["argument"])(wrapper)
                continue
            names, settings, metavar, text = metadata["option"]
            wrapper = click.option(*names, name, metavar=metavar, help=text, **settings)(wrapper)
        return wrapper

    return add


def _declared(options: type[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names = [name for cls in (options, *reversed(options.__mro__[1:])) for name in vars(cls).get("__annotations__", ())]
    for name in dict.fromkeys(names):  # a redeclared one keeps its first place
        yield name, options.__dataclass_fields__[name].metadata


class FiniteRange(click.FloatRange):
    """A finite number in a range; click's range accepts `nan`, which compares false with every bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class WholeRange(click.IntRange):
    """A whole number from `min` to `MAX_NUMBER`, which is too large to be worth showing in help."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = int(super().convert(value, param, ctx))
        if number > MAX_NUMBER:
            self.fail(f"a number of {len(str(number))} digits is too large. Allowed: at most {MAX_NUMBER}.", param, ctx)
        return number


class Quantity(click.ParamType[float]):
    """A number with its unit. `value` makes it from the groups of `pattern`; None is out of range."""

    def __init__(self, name: str, pattern: str, hint: str, value: Callable[..., float | None]) -> None:
        self.name, self._pattern, self._hint, self._value = name, pattern, hint, value

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        parts = re.fullmatch(self._pattern, str(value).strip())
        found = self._value(*parts.groups()) if parts else None
        if found is None:
            self.fail(f"{value!r} is not {self._hint}", param, ctx)
        return found


def _seconds(*hours_minutes_seconds: str | None) -> float | None:
    units = (3600.0, 60.0, 1.0)
    found = sum(float(n or 0) * unit for n, unit in zip(hours_minutes_seconds, units, strict=True))
    return found if 0 < found <= MAX_NUMBER else None


def _bytes(number: str, unit: str | None) -> int | None:
    found = float(number) * BYTES[(unit or "").upper()]
    return int(found) if found <= MAX_NUMBER else None


def _share(number: str) -> float | None:
    return float(number) / 100 if float(number) < 100 else None


NUMBER = r"(\d+(?:\.\d+)?)"
DURATION = Quantity(
    "duration", rf"(?:{NUMBER}h)?(?:{NUMBER}m)?(?:{NUMBER}s)?", "a duration; write 90s, 20m or 1h30m", _seconds
)
SIZE = Quantity("size", rf"{NUMBER}\s*((?i:[KMGT]B))?", "a size; write 0, 500MB or 8GB", _bytes)
PERCENT = Quantity("percent", rf"{NUMBER}\s*%", "a share from 0% to below 100%; write 5% or 0.5%", _share)
COUNT, WHOLE = WholeRange(min=1), WholeRange(min=0)
POSITIVE = FiniteRange(min=0, min_open=True)
PATH, FOLDER = click.Path(path_type=Path), click.Path(path_type=Path, file_okay=False)
OUTPUT = click.Path(path_type=Path, dir_okay=False)


def complete_files(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem[str]]:
    """What a shell offers for a file or folder that is no `click.Path`, as patterns and names are taken as well."""
    return [CompletionItem(begun, type="file")]


MOST_AT_ONCE = 1024


def _levels(_context: click.Context, _parameter: click.Parameter, words: str | None) -> tuple[int, ...] | None:
    """`1,4,16` as numbers, ascending, each once."""
    if words is None:
        return None
    found = set()
    for word in str(words).split(","):
        if not re.fullmatch(r" *[0-9]{1,4} *", word) or not 1 <= int(word) <= MOST_AT_ONCE:
            raise click.BadParameter(f"{word!r} is no number of requests from 1 to {MOST_AT_ONCE}; write 4, or 1,4,16")
        found.add(int(word))
    return tuple(sorted(found))


def levels(name: str, text: str) -> Any:
    """An option that takes numbers of requests at once; None where it is not given."""
    return option(name, None, "N,...", text, callback=_levels)


def _names(_context: click.Context, _parameter: click.Parameter, words: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in words.split(",")) if words else None


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Those of MODEL-OPTIONS that are about the target alone; `model` and `devices` None mean the default."""

    model: str | None = option("-m --model", MODEL, "MODEL", "Hub id, local folder or GGUF file. [default: smollm2]")
    dtype: str = option("--dtype", click.Choice(DTYPES), None, "Precision of weights and arithmetic.", "bfloat16")
    devices: tuple[str, ...] | None = option(
        "--devices",
        None,
        "LIST",
        "cpu, or cuda:0,cuda:1,... [default: cuda:0 if there is one, else cpu]",
        callback=_names,
    )
    chat_template: str | None = option(
        "--chat-template",
        CHAT_TEMPLATE,
        "FILE|NAME",
        "In place of the model's chat template: a file, or vicuna, llama-2, chatml, zephyr.",
    )
    template_args: tuple[str, ...] = keyed(
        "--template-arg",
        "KEY=VALUE",
        "An argument of the model's chat template, such as enable_thinking=false.",
        Word(),
    )
    threads: int = option(
        "--threads",
        click.IntRange(1, 1024),
        None,
        "CPU threads. [default: one a usable core]",
        usable_cores,
        show_default=False,
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TargetOptions):
    """MODEL-OPTIONS as given."""

    drafters: tuple[str, ...] = keyed(
        "--drafter",
        "[LABEL=]WHAT",
        "auto, a path, random, oracle:P or forced:P; P is a rate, 0.8,0.6 by position, tau=2.5, or a file of these. "
        "[default: auto]",
        DRAFTER,
    )
    options: tuple[str, ...] = keyed(
        "-o", "LABEL.KEY=VALUE", "An option of a backend; `spdbench backends` lists them.", KEY_VALUE
    )


def check_name(name: str | None) -> None:
    """Raises `InputError` for a --name that cannot be part of a file's name."""
    if name is not None and not LABEL.fullmatch(name):
        raise InputError(f"--name {name}: may hold letters, digits and .+- with single _ between; it names a file")


def parse_labels(words: Sequence[str]) -> dict[str, str]:
    """`-b [LABEL=]BACKEND` words as label -> backend name, in order.

    Raises:
        InputError: a label twice, or one that cannot be part of a file name.
    """
    labels: dict[str, str] = {}
    for word in words:
        label, equals, name = word.rpartition("=")
        if equals and not (label and name):
            raise InputError(f"-b {word}: the {'backend' if label else 'label'} is empty; write LABEL=BACKEND")
        label = label or name
        if not LABEL.fullmatch(label):
            raise InputError(
                f"-b {word}: a label is made of letters, digits and .+- with single _ between; it names a file"
            )
        if label in labels:
            raise InputError(f"-b {word}: the label '{label}' is taken; give this one another, e.g. -b {label}2={name}")
        labels[label] = name
    return labels


def parse_drafters(words: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """`--drafter [LABEL=]WHAT` words as label -> what, for every label; the last word for a label wins. A typed word
    for all labels beats what a file says of one.

    Raises:
        InputError: a typed word has a label that no backend here has.
    """
    common, own = "auto", {}
    for word in words:
        label, equals, what = word.partition("=")
        if equals and not (label and what):
            empty = "what drafts" if label else "the label"
            raise InputError(f"{given_by(word, '--drafter')} {word}: {empty} is empty; write LABEL=WHAT")
        if equals and label in labels:
            own[label] = (what, isinstance(word, FileWord))
        elif equals and LABEL.fullmatch(label) and not os.path.exists(word):
            _unknown_label(word, "--drafter", label, labels)
        else:
            common = word
            if not isinstance(word, FileWord):
                own = {label: (what, of_file) for label, (what, of_file) in own.items() if not of_file}
    return {label: own[label][0] if label in own else str(common) for label in labels}


def parse_backend_options(words: Sequence[str], labels: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """`-o LABEL.KEY=VALUE` words as label -> {key: value}, for every label; the last word for a key wins.

    Raises:
        InputError: a word of another form, or a typed word with a label that no backend here has.
    """
    options: dict[str, dict[str, str]] = {label: {} for label in labels}
    for word in words:
        left, equals, value = word.partition("=")
        label, dot, key = left.rpartition(".")
        if not equals or not dot or not key:
            raise InputError(
                f"{given_by(word, '-o')} {word}: expected LABEL.KEY=VALUE, LABEL being one of: {', '.join(labels)}"
            )
        if label in options:
            options[label][key] = FileWord(value, word.where) if isinstance(word, FileWord) else value
        else:
            _unknown_label(word, "-o", label, labels)
    return dict(options)


def require_concurrent(concurrency: int, classes: Mapping[str, Any]) -> list[str]:
    """The labels of the backends `classes` that have an option `concurrency`.

    Raises:
        InputError: there is none.
    """
    wide = [label for label, cls in classes.items() if "concurrency" in cls.Options.model_fields]
    if not wide:
        raise InputError(
            f"--concurrency {concurrency}: {', '.join(classes)} take one request at a time; of the built-in backends "
            "only openai takes several"
        )
    return wide


def _unknown_label(word: str, option: str, label: str, labels: Sequence[str]) -> None:
    """A typed word for a label that no backend of the run has is an error. A file is written for several runs: a word
    of it is skipped, and reported only if the label looks like a mistyped one.

    Raises:
        InputError: the word is typed.
    """
    reason = f"{given_by(word, option)} {word}: no backend here has the label '{label}'"
    if not isinstance(word, FileWord):
        raise InputError(f"{reason}{did_you_mean(label, labels)}")
    from spdbench.backend import installed_backends

    known = {*labels, *installed_backends()}
    if any(re.fullmatch(rf"{re.escape(name)}([-_.+\d].*)?", label) for name in known):
        return  # another run's: a backend, or one more of a kind, such as spd2
    if close := difflib.get_close_matches(label, sorted(known), n=1, cutoff=0.6):
        say(f"NOTE: {reason}, so it is skipped; did you mean '{close[0]}'?")
