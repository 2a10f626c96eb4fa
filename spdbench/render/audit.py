"""An audit for people, the verdict on each backend first and then each first divergence; and for programs as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from spdbench.judge.audit import POWER, BackendAudit, PromptDivergence
from spdbench.render.columns import EMPTY, bullet, capture, harmless, plain_grid

SCHEMA = "spdbench.audit/1"
STYLES = {"NOT lossless": "bold red", "faulty": "bold red", "unknown": "yellow", "not audited": "yellow"}
CLASSES = {"tie": "tie", "near_tie": "near tie", "real": "REAL", "unclassified": "unknown"}
LEGEND = (
    "at: new token, from 0. logits, gap: of plain decoding's token and of this one, by plain decoding after its own "
    "tokens. floor: the largest change by rounding alone. tie: no gap; near tie: a gap within the floor."
)


def to_terminal(title: str, audits: Sequence[BackendAudit], console: Console) -> str:
    """A sentence for each backend, then a table of first divergences."""
    parts: list[RenderableType] = [Text(harmless(title), style="bold")]
    parts += [Text(f"{audit.label}: {harmless(audit.sentence)}", STYLES.get(audit.verdict, "")) for audit in audits]
    if any(audit.divergences for audit in audits):
        parts += ["", _table(audits), bullet(LEGEND)]
        sources = {
            f"{audit.label}: floor of {each.divergence.floor_source}"
            for audit in audits
            for each in audit.divergences
            if each.divergence.floor_source
        }
        parts += [bullet(f"{source}.") for source in sorted(sources)]
        reasons = [
            f"{audit.label}, {each.prompt_id}: {each.divergence.reason}"
            for audit in audits
            for each in audit.divergences
            if each.divergence.reason
        ]
        parts += [bullet(f"{harmless(reason)}.") for reason in dict.fromkeys(reasons)]
    return capture(console, *parts)


def to_json(title: Mapping[str, Any], audits: Sequence[BackendAudit]) -> str:
    """Everything, with the verdicts computed."""
    content = {"schema": SCHEMA, **title, "backends": [_record(audit) for audit in audits]}
    return json.dumps(content, indent=1) + "\n"


def _record(audit: BackendAudit) -> dict[str, Any]:
    record = asdict(replace(audit, outcomes=Counter())) | {"outcomes": dict(audit.outcomes)}
    sampled = audit.sampled
    if sampled is not None:
        record["sampled"] |= {
            "p_value": sampled.p_value,
            "power": POWER,
            "detectable_total_variation": sampled.detectable(audit.significance, POWER),
        }
    return {"label": audit.label, "verdict": audit.verdict, "sentence": audit.sentence, **record}


def _table(audits: Sequence[BackendAudit]) -> RichTable:
    headers = ("label", "prompt", "at", "plain", "this", "logits", "gap", "floor", "class")
    grid = plain_grid([(header, header in ("at", "logits", "gap", "floor")) for header in headers], (0, 1, 0, 0))
    for column, header in zip(grid.columns, headers, strict=True):
        column.overflow, column.no_wrap = "fold", header not in ("label", "prompt", "plain", "this")
    for audit in audits:
        for each in audit.divergences:
            style = STYLES["NOT lossless"] if each.divergence.outcome == "real" else ""
            grid.add_row(*(Text(cell, style=style) for cell in _cells(audit.label, each)))
        grid.add_section()
    return grid


def _cells(label: str, each: PromptDivergence) -> list[str]:
    found = each.divergence
    turn = f" turn {each.turn}" if each.turn else ""
    logits = EMPTY
    if found.expected_logit is not None and found.found_logit is not None:
        logits = f"{found.expected_logit:.6g} {found.found_logit:.6g}"
    return [
        label,
        f"{harmless(each.prompt_id)}{turn}",
        str(found.position),
        harmless(each.expected),
        harmless(each.found),
        logits,
        _number(found.gap),
        _number(found.floor),
        CLASSES[found.outcome],
    ]


def _number(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.3g}"
