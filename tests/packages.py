"""Which packages others bring along, by the metadata of what is installed. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(words: Iterable[str]) -> dict[str, bool]:
    """The packages that the requirements `words` bring along; True for those that another package names at one version,
    as torch does."""
    todo, seen, found = [(Requirement(word), "") for word in words], set[tuple[str, str]](), dict[str, bool]()
    while todo:
        asked, extra = todo.pop()
        if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(asked.name)
        exact = any(part.operator == "==" for part in asked.specifier)
        found[name] = found.get(name, True) and exact
        for wanted in {"", *asked.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(word), wanted) for word in _requirements(name)]
    return found


def _requirements(name: str) -> list[str]:
    """What a package asks for; unknown, so nothing, where it is not installed."""
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


def link_packages(names: Iterable[str], folder: Path) -> None:
    """Fills the new `folder` with links to the modules of the packages `names`, as if only these were installed."""
    folder.mkdir()
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists() and not top.endswith(".pth"):
                link.symlink_to(Path(str(found.locate_file(top))))
