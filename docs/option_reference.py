"""Writes `docs/options.md`: every option of every command, backend and training method, from the code.

python -m docs.option_reference          rewrites the page
python -m docs.option_reference --check  exits 1 if the page differs from the code
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from spdbench.backend import installed_backends
from spdbench.cli.listings import default_text, listing, option_facts
from spdbench.cli.main import COMMANDS, spdbench
from spdbench.plugins import installed
from spdbench.training.recipe import ENTRY_POINT_GROUP, find_recipe

PAGE = Path(__file__).resolve().parent / "options.md"
INTRODUCTION = """# Options

Made from the code by `python -m docs.option_reference`. `spdbench COMMAND --help` and `spdbench backends NAME` print
the same, but for the options of training methods, at the end of the page.
"""


def page() -> str:
    """The page's Markdown."""
    parts = [
        *_commands(),
        "## Options of backends",
        "",
        *_backends(),
        "## Options of training methods",
        "",
        *_recipes(),
    ]
    return "\n".join([INTRODUCTION, *parts]).rstrip() + "\n"


def _commands() -> Iterator[str]:
    with click.Context(spdbench, info_name="spdbench") as outer:
        for name in COMMANDS:
            command = spdbench.get_command(outer, name)
            assert command is not None
            context = click.Context(command, info_name=name, parent=outer)
            yield from (f"## `{command.get_usage(context).removeprefix('Usage: ')}`", "")
            yield from (_paragraphs(command.help or ""), "")
            records = (param.get_help_record(context) for param in command.params)
            yield from _table(("option", "meaning"), (record for record in records if record and record[1]))


def _backends() -> Iterator[str]:
    for backend in map(listing, installed_backends().values()):
        if not backend["package"].startswith("spdbench "):
            continue
        yield from (f"### {backend['name']}", "", backend["description"], "")
        yield from _options(f"{backend['name']}.", backend["options"])


def _recipes() -> Iterator[str]:
    yield from ("`spdbench train METHOD -o KEY=VALUE`", "")
    for name, point in installed(ENTRY_POINT_GROUP).items():
        if point.dist is not None and point.dist.name == "spdbench":
            yield from (f"### train {name}", "")
            yield from _options("", [option_facts(*each) for each in find_recipe(name).Options.model_fields.items()])


def _options(prefix: str, facts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    rows = [
        (f"{prefix}{each['key']}={each['type']}", f"{each['help']} {default_text(each)}".rstrip()) for each in facts
    ]
    yield from _table(("`-o`", "meaning"), rows)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    found = [(_cell(f"`{left}`"), _cell(right.replace("<", "&lt;"))) for left, right in rows]
    if found:
        yield f"| {head[0]} | {head[1]} |"
        yield "|---|---|"
        yield from (f"| {left} | {right} |" for left, right in found)
        yield ""


def _cell(text: str) -> str:
    """A cell's Markdown. A bar in code is written as HTML: MkDocs shows the backslash that GitHub wants before it."""
    code = re.sub(r"`([^`]*\|[^`]*)`", lambda found: f"<code>{found[1].replace('|', '&#124;')}</code>", text)
    return code.replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
