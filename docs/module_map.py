"""Writes the module map of `docs/architecture.md`: one line a module, from the modules' own docstrings.

python docs/module_map.py          rewrites the map in place
python docs/module_map.py --check  exits 1 if the page differs from the code
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = (ROOT / "spdbench", ROOT / "backends" / "spdbench_backends")
BEGIN, END = "<!-- module map: begin -->\n", "<!-- module map: end -->\n"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".") + "."


def module_map() -> str:
    """A heading a folder, followed by one line for each of its modules."""
    return "\n".join(line for package in PACKAGES for line in _folder(package))


def _folder(folder: Path) -> Iterator[str]:
    yield f"### `{folder.relative_to(ROOT)}/`"
    yield from ("", first_sentence(folder / "__init__.py"), "")
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"- `{path.name}`: {first_sentence(path)}"
    yield ""
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").exists():
            yield from _folder(inner)


def with_map(page: str) -> str:
    """`page` with the map between its two marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{module_map()}\n{END}{after}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return 0 if page == with_map(page) else 1
    PAGE.write_text(with_map(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
