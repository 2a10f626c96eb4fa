"""One comparison as one HTML page: everything it needs is in it, and it asks no network for anything.

Names, answers and values come from files that others wrote. In the page they are text: the template escapes what it
inserts, data for scripts are JSON in which no `<` is left, and the page's security policy runs the two scripts below by
their hashes and no other. The library that draws the charts is packed: the page unpacks it, and its hash is that of the
unpacked script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from spdbench.judge.comparison.compare import Table
from spdbench.judge.comparison.pairing import conversation_rates
from spdbench.judge.conclusion import Conclusion, conclusions
from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.judge.results.embedded import EmbeddedFile, embed
from spdbench.judge.results.schema import UNKNOWN, ModelInfo
from spdbench.render.columns import Column, columns_for, harmless, title
from spdbench.render.notes import details, methods, sentence
from spdbench.render.report import vega
from spdbench.render.report.answers import answers, by_column
from spdbench.render.report.chart import Chart, Panel, Shown, overall, to_csv
from spdbench.render.report.style import DARK, LIGHT, config, css_properties, page_palette

SCRIPT_END = "</script"
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


class Heading(NamedTuple):
    """A column's name, and whether its cells are words, which may wrap, unlike numbers."""

    name: str
    is_words: bool


class Figure(NamedTuple):
    """A chart as the page shows it: an element of its own for each of `panels`."""

    chart: Chart[Any]
    panels: list[Panel]
    alt: str
    csv: str
    command: str


class Numbers(NamedTuple):
    """A table as `plain.html` shows it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Warned(NamedTuple):
    """A flag by its name, the labels that it concerns, and its first remedy. `reasons` are those of the labels."""

    name: str
    remedy: str
    labels: list[str]
    reasons: list[str]
    disqualifies: bool


def to_html(table: Table, sources: Sequence[EmbeddedFile], name: str) -> str:
    """The page of `table`, which was compared by category. `sources` are the result files; `name` is the page's own."""
    label, *others = columns_for(table, details=True)
    columns = [label, *sorted(others, key=_is_words)]
    figures = [figure(chart, table, command(name, chart.name)) for chart in vega.CHARTS.values()]
    return fill(
        "page.html",
        figures,
        embed(sources),
        missing=_missing(figures[1:]),
        question="Does it pay?",
        title=title(table),
        created=table.head.created,
        verdicts=[_verdict(each) for each in conclusions(table)],
        columns=[Heading(column.name, _is_words(column)) for column in columns],
        meanings=[f"{column.name}: {column.meaning}" for column in columns if column.meaning],
        rows=[[column.cell(row) for column in columns] for row in overall(table)],
        best=[row.best for row in overall(table)],
        warnings=_warnings(table),
        notes=table.notes,
        methods=methods(table),
        details=details(table),
        prompts=_prompts(table),
        labels=[row.label for row in overall(table)],
        environment=environment(table),
        answers=_packed(by_column(answers(table))),
    )


def _verdict(found: Conclusion) -> tuple[str, str, str]:
    """The outcome, the label, and what is said of it: apart, as right-to-left letters would turn the rest around."""
    label = harmless(found.label)
    return found.outcome, label, sentence(found).removeprefix(label)


def fill(template: str, figures: Sequence[Figure], results: str, **content: Any) -> str:
    """The page that `template` makes of `content`, with the charts `figures`. `results` is the script element that
    holds the result files; empty for a page without them."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_asset)
    )
    environment.filters["harmless"] = lambda value: harmless(str(value))
    environment.filters["prose"] = _prose
    library, page_script = vega.script(), _script(_asset("page.js"))
    specs = {each.chart.name: [panel.spec for panel in each.panels] for each in figures}
    return environment.get_template(template).render(
        style=Markup(_style()),
        policy=_policy(library, page_script),
        charts=_json({"specs": specs, "config": config(page_palette())}),
        library=_packed_text(library),
        page_script=page_script,
        figures=figures,
        results=Markup(results),
        **{"answers": _packed({"texts": [], "prompts": {}}), **content},
    )


def _prose(text: object) -> Markup:
    """`text` for the page, in which no line ends within the name of an option."""
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', escape(harmless(str(text)), quote=False)))


def _is_words(column: Column) -> bool:
    return not column.numeric


def _missing(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    """Why there is nothing to show, with the titles of the charts that it concerns."""
    found: dict[str, list[str]] = {}
    for each in figures:
        if not each.panels:
            found.setdefault(each.chart.missing, []).append(each.chart.title)
    return [(", ".join(titles), why) for why, titles in found.items()]


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _style() -> str:
    dark = css_properties(DARK)
    light = css_properties(LIGHT)
    return (
        f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
        + _asset("page.css")
    )


def _policy(*scripts: str) -> str:
    """Nothing is loaded from anywhere, and only `scripts` run."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def _script(source: str) -> Markup:
    """`source` for a script element: what would end the element is written in another way."""
    return Markup(source.replace(SCRIPT_END, "<\\/script").replace("<!--", "<\\!--"))


def _json(data: Any) -> Markup:
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _packed(data: Any) -> Markup:
    """`data` as JSON, packed: answers with kept drafts take a fifth of their size."""
    return _packed_text(json.dumps(data, separators=(",", ":")))


def _packed_text(text: str) -> Markup:
    """`text` in zlib's format, in base64: browsers can unpack it."""
    packed = zlib.compress(text.encode(), level=9)
    return Markup(json.dumps(base64.b64encode(packed).decode()))


def _warnings(table: Table) -> list[Warned]:
    """Every flag once, those that disqualify first."""
    found: dict[str, Warned] = {}
    for row in overall(table):
        for flag in row.flags:
            warned = found.setdefault(flag.name, Warned(flag.name, flag.remedy, [], [], flag.name in DISQUALIFYING))
            warned.labels.append(row.label)
            warned.reasons.append(flag.reason)
    return sorted(found.values(), key=lambda warned: not warned.disqualifies)


def command(name: str, chart: str) -> str:
    """What draws `chart` of the results in `name` as a file."""
    return f"spdbench report {shlex.quote(name)} --chart {chart} --format svg -o {chart}.svg"


def figure(chart: Chart[Shown], shown: Shown, command: str) -> Figure:
    """`chart` of `shown`; `command` reproduces it."""
    panels = chart.make(shown, page_palette())
    alt = chart.describe([row for panel in panels for row in panel.rows]) if panels else chart.missing
    link = "data:text/csv;charset=utf-8," + quote(to_csv(panels), safe=",") if panels else ""
    return Figure(chart, panels, alt, link, command)


class PromptLine(NamedTuple):
    """A line in the table of prompts: tokens/s of each label, blank where it has none."""

    prompt: str
    category: str
    rates: list[str]


def _prompts(table: Table) -> list[PromptLine]:
    rates = [conversation_rates(row.result.runs) for row in overall(table)]
    categories = {prompt: category for found in rates for prompt, (category, _) in found.items()}
    return [
        PromptLine(harmless(prompt), category, [_rate(found.get(prompt)) for found in rates])
        for prompt, category in categories.items()
    ]


def _rate(found: tuple[str, float | None] | None) -> str:
    return "" if found is None or found[1] is None else f"{found[1]:.1f}"


def environment(*tables: Table, leaving_out: str = "") -> list[tuple[str, str]]:
    """What was measured, and on what, as pairs of name and value: a line a label of all `tables`, in which the option
    `leaving_out`, by which these differ, is not named."""
    head = tables[0].head
    found = {
        "suite": f"{head.suite.name} v{head.suite.version} ({head.suite.source})",
        "model": model_words(head.model),
        "spdbench": " ".join(str(value) for value in head.spdbench.values() if value),
        "measured": head.created,
    }
    for row in (row for table in tables for row in overall(table)):
        backend, drafter = row.head.backend, row.head.drafter
        options = ", ".join(
            f"{name}={value}" for name, value in backend.options.items() if value is not None and name != leaving_out
        )
        drafts = f"; drafter {drafter.id}" if drafter else ""
        found[row.label] = f"{backend.name} on {', '.join(backend.devices)}; {options}{drafts}"
    return [*found.items(), *(fact(name, value) for name, value in head.environment.items() if value)]


def model_words(model: ModelInfo) -> str:
    """Its id, hash and dtype; of one that only a server has, what is unknown."""
    if model.sha256.startswith(UNKNOWN):
        return f"{model.id} (weights and dtype unknown: only its server has them)"
    return f"{model.id} (sha256 {model.sha256[:12]}), {model.dtype}"


def fact(name: str, value: Any) -> tuple[str, str]:
    """A value of an environment, and its name, in words."""
    if name == "memory_bytes" and isinstance(value, int):
        return "memory", f"{value / 2**30:.1f} GiB"
    if name == "read_bandwidth_bytes_per_s" and isinstance(value, int | float):
        return "read bandwidth", f"{value / 1e9:.1f} GB/s"
    return {"fingerprint": "machine id"}.get(name, name.replace("_", " ")), words(value)


def words(value: Any) -> str:
    """A value of an environment in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(each)}" for name, each in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(words, value)) if isinstance(value, list) else str(value)
