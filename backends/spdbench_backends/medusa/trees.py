"""Medusa's trees by name or from a file: lists of paths of ranks, every path's parent among them.

Must not know heads or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import yaml

from spdbench.decoding.tree import Path, sorted_paths
from spdbench.errors import InputError, did_you_mean

NAMED: Mapping[str, Mapping[str, int]] = {
    "mc_sim_7b_63": {
        "": 10,
        "0": 10,
        "1": 7,
        "2": 3,
        "3": 2,
        "4": 1,
        "5": 1,
        "6": 1,
        "7": 1,
        "8": 1,
        "9": 1,
        "00": 10,
        "01": 3,
        "02": 2,
        "03": 1,
        "04": 1,
        "05": 1,
        "06": 1,
        "07": 1,
        "10": 2,
        "20": 1,
        "000": 2,
    }
}
"""Trees of the reference implementation as numbers of children: "02" is the third choice behind the first."""


def find_tree(name: str) -> list[Path]:
    """The tree of that name, or the one that a JSON or YAML file of that path lists.

    Raises:
        InputError: neither of the two, or no tree; says which path is wrong.
    """
    if name in NAMED:
        return sorted_paths(
            [(*map(int, parent), rank) for parent, count in NAMED[name].items() for rank in range(count)]
        )
    file = FilePath(name).expanduser()
    if not file.is_file():
        known = ("auto", "chain", *NAMED)
        raise InputError(f"no tree of that name and no file{did_you_mean(name, known)}. Known: {', '.join(known)}.")
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    return _checked(content, file)


def check_levels(paths: Sequence[Path], num_heads: int) -> None:
    """Raises `InputError` for a tree with more levels than there are heads to fill them."""
    deepest = max(paths, key=len)
    if len(deepest) > num_heads:
        raise InputError(f"path {list(deepest)} has {len(deepest)} levels, but there are {num_heads} heads")


def _checked(content: Any, file: FilePath) -> list[Path]:
    if not isinstance(content, list) or not content:
        raise InputError(f"{file}: has to be a list of paths, such as [[0], [1], [0, 0]]")
    paths: set[Path] = set()
    for entry in content:
        if (
            not isinstance(entry, list)
            or not entry
            or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in entry)
        ):
            raise InputError(f"{file}: {entry!r} is no path: a list of ranks, whole numbers from 0 on")
        if tuple(entry) in paths:
            raise InputError(f"{file}: path {entry} is there twice")
        paths.add(tuple(entry))
    for path in sorted_paths(list(paths)):
        if len(path) > 1 and path[:-1] not in paths:
            raise InputError(f"{file}: path {list(path)} has no parent: {list(path[:-1])} is missing")
    return sorted_paths(list(paths))
