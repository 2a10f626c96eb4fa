"""`constraints.txt` pins every package that `make test` and `make docs` install, as far as metadata here can tell."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.packages import closure

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINNED = {
    canonicalize_name(line.partition("==")[0])
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if "==" in line and not line.startswith("#")
}


def installed_by_make() -> set[str]:
    """The extras that the Makefile installs."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return {extra for found in re.findall(r"--editable '\.\[(.*?)\]'", makefile) for extra in found.split(",")}


def test_every_package_that_make_installs_is_pinned() -> None:
    extras = installed_by_make()
    assert {"dev", "docs", "report"} <= extras
    words = [*PROJECT["dependencies"], *(word for extra in extras for word in PROJECT["optional-dependencies"][extra])]
    missing = {name for name, exact in closure([*words, "torch"]).items() if not exact} - PINNED
    assert not missing, "pin in constraints.txt: " + ", ".join(sorted(missing))


def test_a_package_that_is_not_pinned_is_found() -> None:
    assert "typing-extensions" in closure(["torch"])
    assert "pytest" in closure(["pytest-xdist>=3"])
