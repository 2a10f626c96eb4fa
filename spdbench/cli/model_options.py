"""The options that say what to measure: model, drafters, backend options, dtype, devices, threads. Shared by commands.

Only parses and checks words; must not load a model.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from spdbench.errors import InputError, did_you_mean

DTYPES = ("bfloat16", "float32", "float16")
LABEL = re.compile(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*")


@dataclass(frozen=True)
class ModelOptions:
    """MODEL-OPTIONS as given; `model` and `devices` None mean the default."""

    model: str | None
    drafters: tuple[str, ...]
    options: tuple[str, ...]
    dtype: str
    devices: tuple[str, ...] | None
    threads: int


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds MODEL-OPTIONS to a command, which gets them as one argument, `chosen`."""

    @target_options("the suite's, else smollm2")
    @click.option(
        "--drafter",
        "drafters",
        metavar="[LABEL=]WHAT",
        multiple=True,
        help="auto, a path, oracle:P, forced:P or random. [default: auto]",
    )
    @click.option(
        "-o",
        "options",
        metavar="LABEL.KEY=VALUE",
        multiple=True,
        help="An option of a backend; `spdbench backends` lists them.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any, chosen: ModelOptions, drafters: tuple[str, ...], options: tuple[str, ...], **rest: Any
    ) -> Any:
        return function(*args, chosen=replace(chosen, drafters=drafters, options=options), **rest)

    return wrapper


def target_options(default_model: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds those of MODEL-OPTIONS that are about the target alone; the command gets them as `chosen`, too."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @click.option(
            "-m", "--model", metavar="MODEL", help=f"Hub id, local folder or GGUF file. [default: {default_model}]"
        )
        @click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="bfloat16",
            show_default=True,
            help="Precision of weights and arithmetic.",
        )
        @click.option(
            "--devices", metavar="LIST", help="cpu, or cuda:0,cuda:1,... [default: cuda:0 if there is one, else cpu]"
        )
        @click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. [default: one a usable core]")
        @functools.wraps(function)
        def wrapper(
            *args: Any, model: str | None, dtype: str, devices: str | None, threads: int | None, **rest: Any
        ) -> Any:
            names = tuple(name.strip() for name in devices.split(",")) if devices else None
            chosen = ModelOptions(model, (), (), dtype, names, threads or len(os.sched_getaffinity(0)))
            return function(*args, chosen=chosen, **rest)

        return wrapper

    return add


class FiniteRange(click.FloatRange):
    """A number in a range; `nan` and `inf`, which compare oddly, are no numbers here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


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
        label, _, name = word.rpartition("=")
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
    """`--drafter [LABEL=]WHAT` words as label -> what, for every label; the last word for a label wins."""
    common, own = "auto", {}
    for word in words:
        label, equals, what = word.partition("=")
        if equals and label in labels:
            own[label] = what
        elif equals and LABEL.fullmatch(label) and not os.path.exists(word):
            raise InputError(f"--drafter {word}: no backend here has the label '{label}'{did_you_mean(label, labels)}")
        else:
            common = word
    return {label: own.get(label, common) for label in labels}


def parse_backend_options(words: Sequence[str], labels: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """`-o LABEL.KEY=VALUE` words as label -> {key: value}, for every label.

    Raises:
        InputError: a word of another form, or a label that no backend here has.
    """
    options: dict[str, dict[str, str]] = {label: {} for label in labels}
    for word in words:
        left, equals, value = word.partition("=")
        label, dot, key = left.rpartition(".")
        if not equals or not dot or not key:
            raise InputError(f"-o {word}: expected LABEL.KEY=VALUE, LABEL being one of: {', '.join(labels)}")
        if label not in options:
            raise InputError(f"-o {word}: no backend here has the label '{label}'{did_you_mean(label, labels)}")
        options[label][key] = value
    return dict(options)
