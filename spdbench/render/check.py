"""A gate's judgements for people: a terminal table, or Markdown for a CI job's page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from spdbench.judge.comparison.pairing import concurrency, workload
from spdbench.judge.gate.calibration import WIDE, Calibration
from spdbench.judge.gate.verdict import EXIT_CODES, Finding, GateVerdict, Judgement, verdict_of
from spdbench.render.columns import (
    EMPTY,
    bullet,
    capture,
    harmless,
    loads,
    markdown,
    markdown_cell,
    markdown_line,
    plain_grid,
    tabulated,
    work,
)

NAMES = {
    "failed_runs": "failed runs",
    "paired_runs": "paired runs",
    "identical_outputs": "same outputs",
    "real_divergences": "divergences",
    "num_new_tokens": "tokens",
    "num_steps": "steps",
    "acceptance_rate": "accept",
    "acceptance_length": "tau",
    "tokens_per_cycle": "tok/cycle",
    "score": "score",
    "speedup": "speed-up",
    "decode_tokens_per_s": "tok/s",
}
QUIET = frozenset({"failed_runs", "real_divergences"})
"""Not shown while nothing is wrong."""
STYLES: dict[GateVerdict, str] = {
    "regression": "bold red",
    "not comparable": "magenta",
    "inconclusive": "yellow",
    "improved": "green",
    "pass": "",
}
NUMERIC = frozenset({"before", "now", "change"})
IN_BRACKETS = "A verdict in brackets informs and does not decide."
CHANGES = "change: now over before, with its 95 % interval (paired bootstrap over prompts) where it is of times."


def to_terminal(judgements: Sequence[Judgement], console: Console) -> str:
    """The verdict of all, one line for each label, then a table for each suite, model, dtype and decoding."""
    sections = list(_sections(judgements))
    parts: list[RenderableType] = [Text(_summary(judgements), style=STYLES[verdict_of(judgements)])]
    parts += [bullet(line) for section in sections for line in section.answers]
    for section in sections:
        grid = plain_grid([(header, header in NUMERIC) for header in section.headers])
        for column in grid.columns:
            column.overflow, column.no_wrap = "fold", column.header in ("metric", "verdict")
        for rows in section.rows:
            for cells, style in rows:
                grid.add_row(*(Text(cell, style=style) for cell in cells))
            grid.add_section()
        parts += ["", Text(section.title, style="bold"), grid, *map(bullet, section.notes)]
    return capture(console, *parts)


def to_markdown(judgements: Sequence[Judgement]) -> str:
    """The same for a page, the verdict first."""
    sections = list(_sections(judgements))
    answers = [f"- {markdown_line(line)}" for section in sections for line in section.answers]
    parts = [f"### spdbench check: {markdown_cell(_summary(judgements))}", "", *answers, ""]
    for section in sections:
        cells = [[markdown_cell(cell) for cell in row] for rows in section.rows for row, _ in rows]
        grid = tabulated(section.headers, cells, [header in NUMERIC for header in section.headers], "pipe")
        parts.append(markdown(section.title, grid, section.notes))
    return "\n".join(parts)


def calibration_to_terminal(calibration: Calibration, console: Console) -> str:
    """A row for each metric of each label, and one number for all of them."""
    loaded = any(each.requests_at_once > 1 for each in calibration.thresholds)
    columns = [("at once", True)] * loaded + [("runs", True), ("apart", True), ("max slowdown", True)]
    grid = plain_grid([("label", False), ("metric", False), *columns])
    for each in calibration.thresholds:
        numbers = str(each.num_runs), f"{each.spread:.2%}", percent(each.max_slowdown)
        load = [str(each.requests_at_once)] * loaded
        grid.add_row(Text(harmless(each.label)), NAMES[each.metric], *load, *numbers)
    wide = calibration.max_slowdown > WIDE
    return capture(
        console,
        grid,
        "apart: how far two runs of the same code lie from each other (root mean square). max slowdown: what one of "
        "two such runs exceeds once in 1,000 times.",
        f"For all labels: --max-slowdown {percent(calibration.max_slowdown)}",
        *["So much noise hides most slowdowns: measure again on an idle machine, with more prompts."] * wide,
    )


def percent(share: float) -> str:
    """A share rounded up to a tenth of a per cent, as `--max-slowdown` takes it."""
    return f"{-(-share * 1000 // 1) / 10:g}%"


@dataclass(frozen=True)
class _Section:
    """What is shown of one suite, model, dtype and decoding: by judgement a sentence, and rows of styled cells."""

    title: str
    answers: list[str]
    headers: list[str]
    rows: list[list[tuple[list[str], str]]]
    notes: list[str]


def _sections(judgements: Sequence[Judgement]) -> Iterator[_Section]:
    groups: dict[str, list[Judgement]] = {}
    for each in judgements:
        groups.setdefault(workload(each.head), []).append(each)
    several_loads = len({concurrency(each.head) for each in judgements}) > 1
    for group in groups.values():
        head = group[0].head
        labels = [f"{name} at {concurrency(head)}" if several_loads else name for name in names(group)]
        shown = [(each, name, list(_shown(each))) for each, name in zip(group, labels, strict=True)]
        by_category = any(finding.category is not None for each in group for finding in each.findings)
        category = ["category"] * by_category
        yield _Section(
            harmless(" | ".join([work(head), *loads([head])])),
            [harmless(_answer(each, name)) for each, name, _ in shown],
            ["label", *category, "metric", "before", "now", "change", "verdict"],
            [list(_rows(name, findings, by_category=by_category)) for _, name, findings in shown],
            list(map(harmless, _notes(shown))),
        )


def _summary(judgements: Sequence[Judgement]) -> str:
    """`regression (exit code 1): spd`."""
    verdict = verdict_of(judgements)
    words = f"{verdict} (exit code {EXIT_CODES[verdict]})"
    if EXIT_CODES[verdict] == 0:
        return words
    return harmless(
        f"{words}: {', '.join(dict.fromkeys(each.label for each in judgements if each.verdict == verdict))}"
    )


def _answer(judgement: Judgement, name: str) -> str:
    """`eagle: regression; speed-up: slower by 20.0%, and 5.0% is allowed`."""
    return "; ".join(filter(None, [f"{name}: {judgement.verdict}", because(judgement)]))


def because(judgement: Judgement) -> str:
    """`speed-up: slower by 20.0%, and 5.0% is allowed`, the first finding of the verdict; for a pass how the speed
    compares with before. Empty where there is nothing to say."""
    deciding = [finding for finding in judgement.findings if finding.decides and finding.category is None]
    if judgement.verdict in ("pass", "improved"):
        found = next((finding for finding in deciding if finding.interval is not None), None)
        return f"{NAMES[found.metric]} {_change(found)} times the former" if found else ""
    found = next((finding for finding in deciding if finding.verdict == judgement.verdict), None)
    return f"{NAMES[found.metric]}: {found.reason}" if found else ""


def _shown(judgement: Judgement) -> Iterator[Finding]:
    """All over all prompts, then category by category."""
    order = {name: place for place, name in enumerate(dict.fromkeys(each.category for each in judgement.findings))}
    for finding in sorted(judgement.findings, key=lambda each: order[each.category]):
        if finding.verdict != "pass" or finding.metric not in QUIET:
            yield finding


def names(group: Sequence[Judgement]) -> list[str]:
    """Labels, with what distinguishes the files where several results share one."""
    files: dict[str, list[str]] = {}
    for each in group:
        files.setdefault(each.label, []).extend([each.file] if each.file else [])
    short = {label: _apart(some) for label, some in files.items()}
    labels = [each.label for each in group]
    return [
        f"{each.label} ({short[each.label][each.file]})" if labels.count(each.label) > 1 and each.file else each.label
        for each in group
    ]


def _apart(files: Sequence[str]) -> dict[str, str]:
    """By file the end of its name in which it differs from the others; all of it where names are the same."""
    stems = [Path(file).stem for file in files]
    if len(set(stems)) < len(stems):
        return {file: file for file in files}
    shared, separator, _ = os.path.commonprefix(stems).rpartition("__")  # noqa: RUF071 - of names, not of paths
    return {file: stem[len(shared + separator) :] for file, stem in zip(files, stems, strict=True)}


def _rows(name: str, findings: Sequence[Finding], *, by_category: bool) -> Iterator[tuple[list[str], str]]:
    for number, finding in enumerate(findings):
        category = [harmless(finding.category or "all")] * by_category
        values = NAMES[finding.metric], _number(finding.before), _number(finding.now), _change(finding)
        yield [harmless(name) if number == 0 else "", *category, *values, _verdict(finding)], STYLES[finding.verdict]


def _verdict(finding: Finding) -> str:
    return finding.verdict if finding.decides else f"({finding.verdict})"


def _number(value: float | None) -> str:
    if value is None:
        return EMPTY
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _change(finding: Finding) -> str:
    if finding.change is None:
        return EMPTY
    if finding.interval is None:
        return f"{finding.change:.3f}"
    return f"{finding.change:.3f} [{finding.interval[0]:.3f}, {finding.interval[1]:.3f}]"


def _notes(shown: Sequence[tuple[Judgement, str, Sequence[Finding]]]) -> Iterator[str]:
    """What else is not a plain pass, in words; notes; how to read the table. Each judgement with its name and
    findings."""
    for each, name, findings in shown:
        answer = _answer(each, name)
        for finding in findings:
            if finding.verdict != "pass" and finding.category is None and finding.reason not in answer:
                yield f"{name}, {NAMES[finding.metric]}: {_verdict(finding)}. {finding.reason}."
    for note in dict.fromkeys(note for each, _, _ in shown for note in each.notes):
        noted = [name for each, name, _ in shown if note in each.notes]
        yield f"{', '.join(noted)}: {note}."
    all_findings = [finding for _, _, findings in shown for finding in findings]
    if any(finding.interval for finding in all_findings):
        yield CHANGES
    if any(not finding.decides for finding in all_findings):
        yield IN_BRACKETS
