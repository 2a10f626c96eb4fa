"""README and the pages of `docs/`: generated parts are current, links lead somewhere, and every page is in the menu."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from docs import option_reference
from spdbench import errors
from spdbench.cli.main import COMMANDS
from spdbench.errors import SpdbenchError
from spdbench.prompts.suite import shipped_suites

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["spdbench.backends"]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_option_reference_is_what_the_code_says() -> None:
    assert option_reference.PAGE.read_text(encoding="utf-8") == option_reference.page(), (
        "stale: run `python -m docs.option_reference`"
    )


def local_links(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", text) + re.findall(r'<img src="([^"]*)"', text)
    return [target for target in found if not target.startswith(("http:", "https:"))]


def test_there_are_links_to_follow() -> None:
    assert sum(len(local_links(page)) for page in (ROOT / "README.md", *PAGES)) >= 40


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in local_links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8").lower(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}, target


def test_every_page_is_in_the_menu_once() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named: list[str] = []
    for entry in menu:
        named += [page for pages in entry.values() for page in pages] if isinstance(entry, dict) else [entry]
    assert sorted(named) == [page.name for page in PAGES]


def test_every_command_backend_and_suite_is_explained_in_prose() -> None:
    prose = "".join(
        page.read_text(encoding="utf-8") for page in PAGES if page.name not in ("options.md", "architecture.md")
    )
    known = [*(f"`spdbench {name}" for name in COMMANDS), *(f"`{name}`" for name in (*shipped_suites(), *SHIPPED))]
    assert not [name for name in known if name not in prose]


def kinds_of(error: type[SpdbenchError]) -> list[type[SpdbenchError]]:
    return [error, *(kind for each in error.__subclasses__() for kind in kinds_of(each))]


def test_every_kind_of_error_has_a_section_of_its_own() -> None:
    known = [kind for kind in kinds_of(SpdbenchError) if kind.__module__ == errors.__name__]
    headings = re.findall(r"^## (.*)$", (ROOT / errors.TROUBLESHOOTING).read_text("utf-8").lower(), re.MULTILINE)
    sections = [heading.replace(" ", "-") for heading in headings]
    anchors = [kind.anchor for kind in known]
    assert len(set(anchors)) == len(anchors) == 7
    assert not set(anchors) - set(sections)
    assert SpdbenchError("reason").see == "docs/troubleshooting.md#something-failed"


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        phrase for bold in re.findall(r"^\*\*(`.*?)\*\*", page, re.MULTILINE) for phrase in re.findall("`(.*?)`", bold)
    ]
    files = [*(ROOT / "spdbench").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert len(quoted) >= 8
    # What a message fills in stands as `...` on the page and as `{name}` in the code.
    assert not [
        phrase for phrase in quoted if not re.search(re.escape(phrase).replace(re.escape("..."), r"\{\w+\}"), code)
    ]


def test_pages_that_docstrings_name_exist() -> None:
    files = [file for folder in ("spdbench", "backends") for file in (ROOT / folder).rglob("*.py")]
    named = {page for file in files for page in re.findall(r"(?:docs/[\w-]+|\b[A-Z_]+)\.md\b", file.read_text("utf-8"))}
    assert "docs/metrics.md" in named
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


def test_third_party_notices_name_every_package_that_is_depended_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = {None: project["dependencies"], **project["optional-dependencies"]}
    del asked["dev"]  # what only developers install
    packages = {re.split(r"[<>=!~\[]", word)[0] for words in asked.values() for word in words}
    text = (ROOT / "THIRD_PARTY.md").read_text("utf-8")
    assert not [package for package in packages if f"| {package} |" not in text]
