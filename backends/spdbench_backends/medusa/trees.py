"""The tree that a user asks Medusa for: by name, or from a file; checked against the drafter.

A tree is a list of paths; a path lists the rank taken at each level.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path as FilePath

from spdbench.decoding.tree import CHILDREN, Path, named_tree, sorted_paths
from spdbench.errors import InputError, did_you_mean, short_repr
from spdbench.input_files import parse_json, parse_yaml, read_input
from spdbench.models.checkpoints.folders import typed_path

MAX_PATHS = 1024
MAX_RANK = 2**31


def find_tree(text: str) -> tuple[Path, ...]:
    """The published tree called `text`, or the one in the file `text`.

    Raises:
        InputError: neither, or the file holds no tree.
    """
    if text in CHILDREN:
        return named_tree(text)
    file = typed_path(text)
    if not os.path.exists(file):  # Path.exists raises for names too long to be one
        raise InputError(f"no tree of that name, and no such file{did_you_mean(text, ('auto', 'chain', *CHILDREN))}")
    return read_tree_file(file)


def read_tree_file(file: FilePath) -> tuple[Path, ...]:
    """The tree in a JSON or YAML file that lists paths, such as `[[0], [1], [0, 0]]`, in any order.

    Raises:
        InputError: it cannot be read, or is no tree; names the path at fault.
    """
    try:
        text = read_input(file)
        content = parse_json(text) if file.suffix == ".json" else parse_yaml(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read as a tree ({reason})") from None
    if not isinstance(content, list) or not content:
        raise InputError(f"{file}: a tree is a list of paths, such as [[0], [1], [0, 0]], and has at least one")
    if len(content) > MAX_PATHS:
        raise InputError(f"{file}: a tree of {len(content)} paths; at most {MAX_PATHS} are supported")
    seen: set[Path] = set()
    for entry in content:
        path = _path(file, entry)
        if path in seen:
            raise InputError(f"{file}: path {entry} is there twice")
        seen.add(path)
    paths = sorted_paths(list(seen))
    if orphan := next((path for path in paths if path[:-1] and path[:-1] not in seen), None):
        raise InputError(f"{file}: path {list(orphan)} has no parent, {list(orphan[:-1])} is missing")
    return tuple(paths)


def _path(file: FilePath, entry: object) -> Path:
    if (
        not isinstance(entry, list)
        or not entry
        or not all(type(rank) is int and 0 <= rank < MAX_RANK for rank in entry)
    ):
        raise InputError(
            f"{file}: {short_repr(entry)} is not a path: a list of ranks, whole numbers from 0 on, at least one"
        )
    return tuple(entry)


def check_levels(paths: Sequence[Path], num_heads: int) -> None:
    """Raises `InputError` for a tree that is deeper than there are heads, each of which drafts one level."""
    deepest = max(paths, key=len)
    if len(deepest) > num_heads:
        raise InputError(
            f"the tree has {len(deepest)} levels, e.g. path {list(deepest)}, but there are only {num_heads} heads"
        )


def check_ranks(paths: Sequence[Path], vocab_size: int) -> None:
    """Raises `InputError` for a tree that asks for more choices than there are tokens to draft."""
    widest = max(paths, key=max)
    if max(widest) >= vocab_size:
        raise InputError(f"path {list(widest)} asks for rank {max(widest)}, but only {vocab_size} tokens are drafted")
