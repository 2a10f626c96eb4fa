"""Parameters of commands and their types beyond click's own: no empty words, and words of files with paths in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from spdbench.errors import InputError

HEAD = re.compile(r"([A-Za-z0-9.+_-]+=)?((oracle|forced):)?")
"""What may stand before the path in a word: `LABEL=`, `LABEL.KEY=`, and the kind of a synthetic drafter."""


class _NotEmpty(click.Parameter):
    """A parameter without empty words, which a shell makes of a variable that is not set. Taken as they are, they would
    mean the default or the current folder."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        if not ctx.resilient_parsing and "" in (value if isinstance(value, list | tuple) else [value]):
            name = self.opts[0] if self.param_type_name == "option" else str(self.metavar).strip("[].")
            raise InputError(f"{name}: is empty; give a value, or leave it out")
        return super().type_cast_value(ctx, value)


class Option(_NotEmpty, click.Option):
    """An option that takes no empty word."""


class Argument(_NotEmpty, click.Argument):
    """An argument that takes no empty word."""


class KeyedOption(Option):
    """An option that is given once a key, such as `-o LABEL.KEY=VALUE`. What is typed is added behind what a file sets,
    so that it beats the file key by key: of two words for one key the last one counts."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        if source is ParameterSource.COMMANDLINE and self.name is not None:
            value = [*(ctx.lookup_default(self.name) or ()), *value]
        return value, source


class Word(click.ParamType[str]):
    """A text, unchanged: one of a file stays a `FileWord`."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002
        return value if isinstance(value, str) else str(value)


class PathWord(Word):
    """A text that names a file, a folder, or something else.

    `names` are what the option knows words without `/` and `.` by, in place of paths; None: none of these is a path.
    `is_there` says of a path that counts from here whether it is one.
    """

    def __init__(self, names: Collection[str] | None = (), is_there: Callable[[str], bool] = os.path.exists) -> None:
        self._names, self._is_there = names, is_there

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type="file")]

    def seen_from(self, prefix: str, word: str) -> str:
        """`word` of a file whose folder is at `prefix`, with a relative path in it as it is seen from here.

        A path begins with `./` or `../`, or is there; a name, such as a hub id, is left as it is.
        """
        if self._is_there(os.path.join(prefix, word)) and self.may_be_path(word):
            return os.path.join(prefix, word)
        found = HEAD.match(word)
        head = found[0] if found else ""
        path = word[len(head) :]
        is_there = self.may_be_path(path) and self._is_there(os.path.join(prefix, path.partition("#")[0]))
        if is_there or path in (".", "..") or path.startswith(("./", "../")):
            return head + os.path.join(prefix, path)
        return word

    def may_be_path(self, word: str) -> bool:
        """True unless `word` is a name that this option knows."""
        return bool(word) and ("/" in word or "." in word or (self._names is not None and word not in self._names))


class FilesWord(PathWord):
    """A text that names files or folders, by a pattern it may be."""

    def seen_from(self, prefix: str, word: str) -> str:
        return os.path.join(prefix, os.path.expanduser(word))


MODEL = PathWord(["smollm2"])
CHAT_TEMPLATE = PathWord(["vicuna", "llama-2", "chatml", "zephyr"])
DRAFTER = PathWord(["auto", "random"])
LABEL_OR_FILE = PathWord(None, os.path.isfile)
KEY_VALUE = PathWord(None, lambda _: False)
"""A value may be a name that a server knows, such as `Qwen/Qwen3-8B`, whatever lies in a folder of that name."""
FILES = FilesWord()


def seen_from(prefix: str, kind: click.ParamType[Any], word: str) -> str:
    """`word` of a file whose folder is at `prefix`, for an option of this `kind`: a relative path in it as it is seen
    from here."""
    if isinstance(kind, PathWord):
        return kind.seen_from(prefix, word)
    return os.path.join(prefix, os.path.expanduser(word)) if isinstance(kind, click.Path) else word


def prefix_of(folder: Path, here: Path) -> str:
    """What a path that counts from `folder` begins with here; nothing where that is the same."""
    return "" if folder == here else os.path.relpath(folder, here)
