"""`docs/architecture.md` says what the code is: its module map is made from it, and the files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

from docs import module_map

PAGE = module_map.PAGE.read_text(encoding="utf-8")


def test_module_map_is_what_the_docstrings_say() -> None:
    assert module_map.with_map(PAGE) == PAGE, "stale: run `python docs/module_map.py`"


def test_every_module_has_a_sentence() -> None:
    assert not [line for line in module_map.module_map().splitlines() if re.fullmatch(r"- `.*`: \W*", line)]


def test_files_that_the_prose_names_exist() -> None:
    prose = PAGE.partition(module_map.BEGIN)[0]
    roots = (module_map.ROOT, *module_map.PACKAGES)
    named = set(re.findall(r"`((?:\w+/)*\w+(?:/|\.py))`", prose))
    assert {"measure/clock.py", "judge/results/"} <= named
    assert not {name for name in named if not any((Path(root) / name).exists() for root in roots)}
