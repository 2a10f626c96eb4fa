"""A gate's judgements for programs: JSON with everything, JUnit XML, and what github-action-benchmark reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from spdbench.console import printable
from spdbench.judge.gate.verdict import EXIT_CODES, Finding, Judgement, verdict_of
from spdbench.render.check import NAMES, names

UNITS = {
    "speedup": ("speed-up over plain decoding", "x", 1),
    "decode_tokens_per_s": ("decode tokens/s", "tokens/s", 1),
    "acceptance_rate": ("acceptance rate", "%", 100),
    "acceptance_length": ("acceptance length", "tokens", 1),
    "tokens_per_cycle": ("tokens per cycle", "tokens", 1),
}
"""Metrics of which more is better: name, unit, and the factor from ours to that unit."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 has no way to write."""


def to_json(judgements: Sequence[Judgement]) -> str:
    """One object: the verdict, its exit code, and every finding of every label."""
    verdict = verdict_of(judgements)
    found = {
        "schema": "spdbench.check/1",
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "judgements": [_judgement(each) for each in judgements],
    }
    return json.dumps(found, indent=2) + "\n"


def _judgement(judgement: Judgement) -> dict[str, Any]:
    head = judgement.head
    return {
        "label": judgement.label,
        "verdict": judgement.verdict,
        "file": judgement.file,
        "against": judgement.against,
        "suite": head.suite.name,
        "model": head.model.id,
        "dtype": head.model.dtype,
        "decoding": head.decoding.model_dump(),
        "notes": list(judgement.notes),
        "findings": [asdict(finding) for finding in judgement.findings],
    }


def to_junit(judgements: Sequence[Judgement]) -> str:
    """A test suite for each label, a test case for each finding.

    A regression is a failure; an inconclusive or incomparable one is an error, since it must not pass; a finding that
    only informs is skipped.
    """
    root = ElementTree.Element("testsuites", name="spdbench check")
    for judgement, name in zip(judgements, names(judgements), strict=True):
        head = judgement.head
        suite = ElementTree.SubElement(root, "testsuite", name=_text(f"{head.suite.name} {name}"))
        for finding in judgement.findings:
            _add_case(suite, f"{head.suite.name}.{name}", finding)
        suite.set("tests", str(len(suite)))
        for kind, plural in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            suite.set(plural, str(len(suite.findall(f"testcase/{kind}"))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _add_case(suite: ElementTree.Element, class_name: str, finding: Finding) -> None:
    of = f" [{finding.category}]" if finding.category is not None else ""
    name = f"{finding.gate}: {NAMES[finding.metric]}{of}"
    case = ElementTree.SubElement(suite, "testcase", classname=_text(class_name), name=_text(name))
    if finding.verdict in ("pass", "improved"):
        return
    if not finding.decides:
        ElementTree.SubElement(case, "skipped", message=_text(f"{finding.verdict}: {finding.reason}"))
        return
    kind = "failure" if finding.verdict == "regression" else "error"
    ElementTree.SubElement(case, kind, type=finding.verdict, message=_text(finding.reason))


def _text(text: str) -> str:
    return NOT_XML.sub("?", printable(text))


def to_benchmark_json(judgements: Sequence[Judgement]) -> str:
    """The list that github-action-benchmark reads as `customBiggerIsBetter`: the new values of what was judged."""
    found = [
        _benchmark(judgement, name, finding)
        for judgement, name in zip(judgements, names(judgements), strict=True)
        for finding in judgement.findings
        if finding.category is None and finding.metric in UNITS and finding.now is not None
    ]
    return json.dumps(found, indent=2) + "\n"


def _benchmark(judgement: Judgement, name: str, finding: Finding) -> dict[str, Any]:
    head = judgement.head
    what, unit, factor = UNITS[finding.metric]
    entry = {
        "name": f"{head.suite.name}, {head.model.id}, {head.model.dtype}, {name}: {what}",
        "unit": unit,
        "value": (finding.now or 0.0) * factor,
        "extra": f"{finding.verdict}: {finding.reason}",
    }
    if finding.interval is not None and finding.change:
        half = (finding.interval[1] - finding.interval[0]) / 2 / finding.change
        entry["range"] = f"± {half:.1%}"
    return entry
