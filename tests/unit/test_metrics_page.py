"""`docs/metrics.md` defines every metric, column and dialect of the code, with its formula, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import pipeline_pictures
from docs.pipeline_bubble import bubble_picture
from spdbench.cli.sweep.best import OF_COMPARISONS
from spdbench.judge.gate import counterpart, exact, served
from spdbench.judge.gate.timing import SPEED, SPEEDUP
from spdbench.judge.metrics.definitions import COUNTS, RATIOS
from spdbench.judge.metrics.dialects import DIALECTS
from spdbench.judge.metrics.metrics import METRICS
from spdbench.judge.results.table import COLUMN, PARTS
from spdbench.render.columns import COLUMNS
from spdbench.render.load import COLUMNS as LOAD_COLUMNS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
VARIANTS = re.compile(r"_ci$|_macro$|_without_degenerate$")
"""Defined once for all ratios: the page's parts on intervals and averages."""
ONLY_COMPARED = {*OF_COMPARISONS, "goodput", "num_paired", "num_paired_prompts", "num_dropped"}
NOT_METRICS = {"label", "same outputs", "drafter"}
"""Columns with words or counts of their own."""


def entries() -> dict[str, str]:
    """Each metric's text, under the heading that names it."""
    found: dict[str, str] = {}
    for heading, text in re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", heading), text)
    return found


def test_every_metric_has_an_entry_and_no_entry_is_stale() -> None:
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^### (.*)$", PAGE, re.MULTILINE)))
    known = {VARIANTS.sub("", name) for name in METRICS} | ONLY_COMPARED
    assert len(named) == len(set(named))
    assert set(named) == known


@pytest.mark.parametrize("variant", ["NAME_ci", "NAME_macro", "NAME_without_degenerate"])
def test_variants_are_defined(variant: str) -> None:
    assert f"`{variant}`" in PAGE


def test_formulas_are_those_of_the_code() -> None:
    texts = entries()
    wrong = [
        ratio
        for ratio in RATIOS
        for formula in [" ".join(texts[ratio.name].split())]
        if f"sum({ratio.numerator}) / sum({ratio.denominator})" not in formula
    ]
    assert not [(ratio.name, ratio.numerator, ratio.denominator) for ratio in wrong]
    assert not [count.name for count in COUNTS if f"`sum({count.column})`" not in texts[count.name]]


def test_columns_of_formulas_are_defined() -> None:
    table = PAGE.partition("| column | meaning")[2].partition("\n\n")[0]
    defined = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")}
    used = set(re.findall(r"sum\((\w+)\)", PAGE)) - {*PARTS, "x", "N"}
    assert used <= defined <= {*COLUMN}


def test_columns_of_tables_are_named() -> None:
    assert not [
        column.name
        for column in (*COLUMNS, *LOAD_COLUMNS)
        if column.name not in NOT_METRICS
        and f"`{column.name}`" not in PAGE
        and f"`{column.name.split()[0]}`" not in PAGE
    ]


def test_every_dialect_has_a_row() -> None:
    rows = PAGE.partition("| dialect | rule")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", "".join(row.split("|")[1] for row in rows.splitlines()[2:]))) == {*DIALECTS}


def test_every_finding_of_the_gate_has_a_row() -> None:
    table = PAGE.partition("| line | value | judged by |")[2].partition("\n\n")[0]
    rows = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    code = "".join(Path(str(module.__file__)).read_text("utf-8") for module in (counterpart, exact, served))
    written = set(re.findall(r'Finding\(\w+, "(\w+)"|Finding\("exact", "(\w+)"', code))
    assert rows == {name for pair in written for name in pair if name} | {*exact.ACCEPTANCE, "score", SPEED, SPEEDUP}


def test_pictures_of_the_pipeline_are_what_the_schedule_does() -> None:
    drawn = pipeline_pictures.pictures()
    stale = [name for name, text in drawn.items() if (pipeline_pictures.IMAGES / name).read_text("utf-8") != text]
    assert not stale, "stale: run `python -m docs.pipeline_pictures`"
    page = (pipeline_pictures.IMAGES.parent / "how-pipelines-work.md").read_text("utf-8")
    assert set(re.findall(r"!\[[^\]]{20,}\]\(images/(.*?)\)", page)) == {*drawn}


def test_pictures_lose_as_many_cycles_as_the_formula_says() -> None:
    frames = pipeline_pictures.simulate(4, 9, pipeline_pictures.chain([3]))
    verdicts = [frame.verdict for frame in frames]
    rejections = verdicts[: len(verdicts) - 1].count("no")
    assert verdicts[-1] == "yes"
    assert rejections == 1
    assert len(frames) == sum(verdict != "none" for verdict in verdicts) + 3 * (1 + rejections)


def test_a_bubble_that_is_drawn_otherwise_than_counted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docs.pipeline_bubble.FIELDS", {"known": "wasted", "drop": "useful", "late": "draft"})
    with pytest.raises(ValueError, match="drawn"):
        bubble_picture(pipeline_pictures.simulate(3, 7, pipeline_pictures.chain([3])))


def test_sections_that_docstrings_name_are_on_the_page() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [file for folder in ("spdbench", "backends", "tests") for file in (root / folder).rglob("*.py")]
    named = {
        section
        for file in files
        for group in re.findall(r'metrics\.md, ("[\w ]+"(?: and "[\w ]+")*)', file.read_text("utf-8"))
        for section in re.findall(r'"([\w ]+)"', group)
    }
    assert len(named) >= 8
    assert named <= set(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
