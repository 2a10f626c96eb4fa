"""The answers that a page opens: texts, and where drafts are kept, their steps with what became of each draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from spdbench.console import printable
from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.results.schema import Run, RunKey
from spdbench.judge.timeline import step_tokens
from spdbench.render.answer import MAX_UNUSED, SIGNS, Words
from spdbench.render.columns import harmless
from spdbench.render.report.chart import overall

MS_IN_NS = 1e6
LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
"""A line break in a token; the page breaks the line behind it."""
CODES = {kind: kind[0] for kind in SIGNS}
"""The first letter of a token in `Step`, by what became of it."""
Step = list[int | str]
"""Number, ms since the request's start, then the tokens in the order of the answer, each behind its code."""


def answers(table: Table) -> Mapping[str, Any]:
    """By prompt its answers: turn, repeat, the place among `texts`, and the labels that gave it.

    Lossless methods give equal texts, which are there once. An answer with kept drafts is a list of steps instead.
    """
    places: dict[str, int] = {}
    texts: list[str | list[Step]] = []
    found: dict[str, dict[tuple[int, int, int], list[str]]] = {}
    for row in overall(table):
        stepwise = {run.key: _steps(run, table) for run in row.result.detailed_runs() if _has_drafts(run)}
        for key in row.result.runs.answered:
            prompt, turn, repeat = key
            content = stepwise.get(key) or printable(_text(row, key, table))
            place = places.setdefault(str(content), len(texts))
            texts += [content] * (place == len(texts))
            found.setdefault(harmless(prompt), {}).setdefault((turn, repeat, place), []).append(harmless(row.label))
    prompts = {prompt: [[*key, labels] for key, labels in sorted(each.items())] for prompt, each in found.items()}
    return {"texts": texts, "prompts": prompts}


def by_column(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """`answers` with columns in place of each list of steps: numbers, ms since the step before, codes of the tokens,
    their texts. Compressed they take three quarters of the size."""
    return {**found, "texts": [each if isinstance(each, str) else _columns(each) for each in found["texts"]]}


def _columns(steps: Sequence[Sequence[Any]]) -> list[list[Any]]:
    ends_ms = [0, *(step[1] for step in steps)]
    return [
        [step[0] for step in steps],
        [end - start for start, end in pairwise(ends_ms)],
        ["".join(token[0] for token in step[2:]) for step in steps],
        [[token[1:] for token in step[2:]] for step in steps],
    ]


def _has_drafts(run: Run) -> bool:
    return run.drafted_tokens is not None and any(run.drafted_tokens.ids) and bool(run.output_ids)


def _text(row: Row, key: RunKey, table: Table) -> str:
    """As the engine reported it, else decoded; ids where the model's tokenizer is in no cache."""
    runs = row.result.runs
    text = None if runs.texts is None else runs.texts[runs.row_of[key]]
    if text is not None:
        return text
    ids = [int(number) for number in runs.output_of(key) if number]
    return table.decode(ids) if table.decode else "ids: " + " ".join(map(str, ids))


def _steps(run: Run, table: Table) -> list[Step]:
    """The steps that commit or judge something: all but a pipeline's cycles without a verdict."""
    words = Words(run.output_ids, table.decode, LINE_END)
    found: list[Step] = []
    for number, (tokens, end_ns) in enumerate(zip(step_tokens(run), run.steps.t_ns, strict=True)):
        behind = tokens.position + len(tokens.accepted)
        shown = [
            (CODES["accepted"], words.at(tokens.position + at, [token])) for at, token in enumerate(tokens.accepted)
        ]
        for kind, ids in (("rejected", tokens.rejected), ("dropped", tokens.dropped)):
            shown += [(CODES[kind], words.at(behind, [token])) for token in ids[:MAX_UNUSED]]
            shown += [(CODES[kind], f" and {len(ids) - MAX_UNUSED} more")] * (len(ids) > MAX_UNUSED)
        shown += [(CODES["own"], words.at(behind + at, [token])) for at, token in enumerate(tokens.own)]
        if shown:
            found.append([number, round(end_ns / MS_IN_NS), *(code + text for code, text in shown)])
    return found
