"""Results of the same work under several loads as one HTML page: up to how many requests at once each label pays."""

from __future__ import annotations

from collections.abc import Sequence

from spdbench.judge.comparison.load import Load, conclude
from spdbench.judge.results.embedded import EmbeddedFile, embed
from spdbench.render.columns import title
from spdbench.render.load import columns_of, load_notes, sentences
from spdbench.render.report.page import Numbers, environment, fill


def to_html(load: Load, sources: Sequence[EmbeddedFile]) -> str:
    """The page of `load`; `sources` are the result files, which it holds. Charts and answers are on the page of each
    load alone."""
    columns = list(columns_of(load))
    rows = [[column.cell(row) for column in columns] for row in load.table.rows]
    numbers = Numbers("Speed-up and speed by requests at once", [column.name for column in columns], rows)
    found = []
    for each in conclude(load):
        first, *levels = sentences(each)
        found += [first, *(f"{each.label}, {level.strip()}" for level in levels)]
    return fill(
        "plain.html",
        [],
        embed(sources),
        question="Up to which load does it pay?",
        title=title(load.table),
        verdicts=found or ["Nothing was compared: each load has results of one label alone."],
        tables=[numbers],
        notes=[*load_notes(load), "Charts and answers are on a page of the results of one load alone."],
        environment=environment(*load.tables, leaving_out="concurrency"),
    )
