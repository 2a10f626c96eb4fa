"""Calls the command line in this process and keeps what it said."""

from __future__ import annotations

import io
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from spdbench.cli.main import main


class Said(NamedTuple):
    code: int
    out: str
    err: str


def spdbench(*words: str | Path) -> Said:
    """`spdbench WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["spdbench", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
            main()
    finally:
        sys.argv = before
    code = exit_info.value.code
    return Said(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Files of this process may hold no more than `num_bytes`, which is an error like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_suite(folder: Path, num_prompts: int = 4, turns: int = 1, name: str = "mini", **changes: object) -> Path:
    """An inline suite of short prompts in two categories."""
    prompts = [
        {"id": f"p{i}", "category": ("maths", "code")[i % 2], "turns": [f"Say {i}{t}." for t in range(turns)]}
        for i in range(num_prompts)
    ]
    suite = {
        "name": name,
        "version": 1,
        "description": "For tests.",
        "prompts": {"source": [{"inline": prompts}]},
        "decoding": {"max_new_tokens": 12, "temperature": 0},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(suite), encoding="utf-8")
    return path
