"""Results of several suites as one HTML page: verdicts over all suites and in each, and a table for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spdbench.judge.comparison.compare import Table
from spdbench.judge.comparison.summary import Summary
from spdbench.judge.conclusion import conclusions
from spdbench.judge.results.embedded import EmbeddedFile, embed
from spdbench.render.columns import columns_for, title
from spdbench.render.notes import notes as notes_of
from spdbench.render.notes import sentence
from spdbench.render.report.chart import overall
from spdbench.render.report.page import Numbers, fill, model_words
from spdbench.render.summary import cells, headers, heading, notes


def to_html(summary: Summary, sources: Sequence[EmbeddedFile]) -> str:
    """The page of `summary`; `sources` are the result files, which it holds. Charts and answers are on the page of each
    suite alone."""
    head, num_suites = summary.tables[0].head, len(summary.suites)
    means = [
        f"{each.label}: {each.mean:.2f}x{_interval(each.interval)} over {num_suites} suites (geometric mean)"
        for each in summary.labels
        if each.mean is not None
    ]
    by_suite = [
        f"{table.head.suite.name}: {sentence(each)}"
        for table in summary.tables
        for each in conclusions(table)
        if each.outcome != "baseline"
    ]
    over_suites = Numbers(
        f"Speed-ups over {num_suites} suites", headers(summary), [cells(each) for each in summary.labels]
    )
    return fill(
        "plain.html",
        [],
        embed(sources),
        question="Does it pay?",
        title=heading(summary),
        verdicts=[*(means or ["No label has a speed-up in every suite."]), *by_suite],
        tables=[over_suites, *map(_numbers, summary.tables)],
        notes=[*notes(summary), *_notes(summary.tables)],
        environment=[
            ("suites", ", ".join(summary.suites)),
            ("model", model_words(head.model)),
        ],
    )


def _numbers(table: Table) -> Numbers:
    columns = columns_for(table)
    names = [column.name for column in columns]
    return Numbers(title(table), names, [[column.cell(row) for column in columns] for row in overall(table)])


def _notes(tables: Sequence[Table]) -> Iterator[str]:
    """What casts doubt on each suite; a line that several share once."""
    lines: dict[str, list[str]] = {}
    for table in tables:
        for line in notes_of(table):
            lines.setdefault(line, []).append(table.head.suite.name)
    return (f"{', '.join(suites)}: {line}" for line, suites in lines.items())


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
