"""Options that a file sets: `spdbench.toml`, or `[tool.spdbench]` in `pyproject.toml`, with one table a command.

    [run]                                  # in pyproject.toml: [tool.spdbench.run]
    model = "./my-model"
    backend = ["vanilla", "eagle"]
    max-new-tokens = 128

The nearest file counts, from the current folder upwards. The command line beats the file, and the file beats the suite.
An option that is given once a key (`-o`, `--drafter`, `--template-arg`) is beaten key by key. Relative paths count from
the folder of the file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click

from spdbench.cli.options import OUTPUT
from spdbench.cli.parameters import KeyedOption, prefix_of, seen_from
from spdbench.errors import FileWord, InputError, did_you_mean

OWN_FILE, PROJECT_FILE = "spdbench.toml", "pyproject.toml"
MAX_BYTES = 1 << 20
ONLY_TYPED = frozenset(
    [
        *("allow_code_execution", "force", "resume", "calibrate", "include_path", "delete", "yes", "log"),
        *("events", "out", "json_file", "junit", "summary", "benchmark_json"),
    ]
)
"""What a file cannot set, as it may lie in a folder that others made: permissions, and files that are written."""
ADDRESS = re.compile(r"[^=]*\.base_url=")
"""A server's address: prompts and the key of the environment go there."""


def file_options(command: click.Command, name: str, known: Collection[str]) -> dict[str, Any]:
    """The values of `command`'s options that the nearest file sets, by parameter, for click's `default_map`.

    Raises:
        InputError: the file cannot be read, or has an unknown table or key, or a value that the option does not take;
            names file and key.
    """
    try:
        here = Path.cwd()
    except OSError:  # the folder was deleted, or may not be read: what needs none still works
        return {}
    path, tables = _nearest(here)
    if path is None:
        return {}
    for table in tables:
        if table not in known:
            raise InputError(f"{path}: unknown table '{table}'{did_you_mean(table, known)}")
    words = tables.get(name, {})
    if not isinstance(words, dict):
        raise InputError(f"{path}: '{name}' is {type(words).__name__}, expected a table of options")
    prefix = prefix_of(path.parent, here)
    return dict(_checked(command, key, value, f"{path}: {name}.{key}", prefix) for key, value in words.items())


def _nearest(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    for place in (folder, *folder.parents):
        for file, keys in ((OWN_FILE, ()), (PROJECT_FILE, ("tool", "spdbench"))):
            found = _read(place / file)
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, dict):
                return place / file, found
    return None, {}


def _read(path: Path) -> dict[str, Any] | None:
    """The file's content; None if there is no such file. A pipe or a device is none."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
    if path.name == PROJECT_FILE and b"spdbench" not in content:
        return None  # another project's, right or wrong
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not TOML ({error})") from None


def _checked(command: click.Command, key: str, value: Any, where: str, prefix: str) -> tuple[str, Any]:
    """The parameter that `key` names, and `value` as its option takes it, with paths that begin at `prefix`."""
    options = {
        word.lstrip("-"): param
        for param in command.params
        if isinstance(param, click.Option) and param.name not in ONLY_TYPED and param.type is not OUTPUT
        for word in param.opts
    }
    param = options.get(key)
    if param is None or param.name is None:
        raise InputError(f"{where}: not an option that a file can set{did_you_mean(key, options)}")
    many = isinstance(value, list)
    if many and not param.multiple:
        raise InputError(f"{where}: takes one value, not a list")
    parts = value if many else [value]
    if any(isinstance(part, list | dict) for part in parts) or (param.is_flag and not isinstance(value, bool)):
        raise InputError(f"{where}: {value!r} is not {'true or false' if param.is_flag else 'a value of this option'}")
    if not param.is_flag:
        if any(isinstance(part, bool) for part in parts):
            raise InputError(f"{where}: takes a value, not true or false")
        parts = [str(part) for part in parts]
        if any("\0" in part for part in parts):
            raise InputError(f"{where}: holds a NUL character, which no option does")
        if "" in parts:
            raise InputError(f"{where}: is empty; give a value, or leave it out")
        parts = [seen_from(prefix, param.type, part) for part in parts]
    if param.name == "options" and any(map(ADDRESS.match, parts)):
        raise InputError(f"{where}: the address of a server is taken from the command line only")
    if isinstance(param, KeyedOption):
        parts = [FileWord(part, where) for part in parts]
    given = parts if param.multiple else parts[0]
    try:
        param.type_cast_value(click.Context(command), given)
    except click.BadParameter as error:
        raise InputError(f"{where}: {error.message}") from None
    return param.name, given
