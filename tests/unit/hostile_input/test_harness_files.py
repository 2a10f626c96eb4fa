"""Suites, prompts, results, calibrations and journals that are broken or hostile: read, or refused in one message."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spdbench.cli.files import read_calibration
from spdbench.judge.results.reader import read_runs
from spdbench.measure.journal import resume_journal
from spdbench.prompts.suite import load_suite
from tests import hostile
from tests.builders import make_backend, make_result, make_run, write_result
from tests.hostile import broken_json, broken_json_lines, changed, damaged, settings

pytestmark = pytest.mark.usefixtures("own_cache")

SUITE = {
    "name": "s",
    "version": 1,
    "description": "x",
    "prompts": {
        "source": [
            {"path": "q.jsonl", "prompt": "turns", "id": "id"},
            {"package": "json", "file": "none.jsonl", "prompt": "prompt"},
            {"inline": [{"id": "a", "category": "c", "turns": ["hello"], "reference": ["1"]}]},
        ],
        "template": "{prompt}",
        "limit": 2,
    },
    "decoding": {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0},
    "score": "gsm8k",
}
ROWS = [{"id": 1, "turns": ["a", "b"], "category": "c", "reference": [None, "2"]}, {"id": "b", "turns": ["c"]}]
CALIBRATION = {
    "schema": "spdbench.calibration/1",
    "created": "2026-01-01",
    "fingerprint": "f",
    "thresholds": [
        {
            "suite": "s",
            "label": "a",
            "model": "m",
            "dtype": "float32",
            "work": "w",
            "metric": "speedup",
            "num_runs": 5,
            "spread": 0.01,
            "max_slowdown": 0.05,
            "num_answers": 8,
        }
    ],
}


@settings(500)
@given(content=st.one_of(changed(SUITE).map(lambda found: yaml.safe_dump(found).encode()), broken_json(SUITE)))
def test_suites(folder: Path, content: bytes) -> None:
    (folder / "q.jsonl").write_bytes(b'{"id": 1, "turns": ["a"]}\n')
    (folder / "s.yaml").write_bytes(content)
    hostile.read("suites", lambda: load_suite(str(folder / "s.yaml"), None), folder)


@settings(300)
@given(content=st.one_of(broken_json_lines(ROWS), broken_json(ROWS)), packed=st.booleans())
def test_prompts(folder: Path, content: bytes, packed: bool) -> None:
    suite = {"name": "s", "version": 1, "prompts": {"source": [{"path": "q.jsonl"}]}}
    (folder / "q.jsonl").write_bytes(gzip.compress(content, 1) if packed else content)
    (folder / "s.yaml").write_text(json.dumps(suite))
    hostile.read("prompts", lambda: load_suite(str(folder / "s.yaml"), None), folder)


@settings(100)
@given(content=damaged(gzip.compress(b'{"id": 1, "turns": ["a"]}\n')))
def test_packed_prompts(folder: Path, content: bytes) -> None:
    suite = {"name": "s", "version": 1, "prompts": {"source": [{"path": "q.jsonl.gz"}]}}
    (folder / "q.jsonl.gz").write_bytes(content)
    (folder / "s.yaml").write_text(json.dumps(suite))
    hostile.read("packed prompts", lambda: load_suite(str(folder / "s.yaml"), None), folder)


RESULT = json.loads(make_result([make_run(), make_run(prompt="p1")], make_backend()).model_dump_json(by_alias=True))


@settings(600)
@given(content=broken_json(RESULT))
def test_results(folder: Path, content: bytes) -> None:
    (folder / "r.json").write_bytes(content)
    hostile.read("results", lambda: read_runs(folder / "r.json", keep_ids=True), folder)


@settings(250)
@given(content=changed(RESULT), form=st.sampled_from(["table", "github", "latex", "csv", "json"]))
def test_comparisons(folder: Path, content: Any, form: str) -> None:
    (folder / "r.json").write_text(json.dumps(content))
    code = hostile.command(
        "comparisons", "compare", str(folder / "r.json"), "--format", form, "--details", folder=folder
    )
    assert code in (0, 2, 4)


@settings(150)
@given(content=changed(RESULT))
def test_gates(folder: Path, content: Any) -> None:
    (folder / "r.json").write_text(json.dumps(content))
    (folder / "base").mkdir(exist_ok=True)
    write_result(make_result([make_run(), make_run(prompt="p1")], make_backend()), folder / "base" / "r.json")
    hostile.command("gates", "check", str(folder / "r.json"), "--baseline", str(folder / "base"), folder=folder)


@settings(300)
@given(content=broken_json(CALIBRATION))
def test_calibrations(folder: Path, content: bytes) -> None:
    (folder / "calibration.json").write_bytes(content)
    hostile.read("calibrations", lambda: read_calibration(folder / "calibration.json"), folder)


IDENTITY = {"suite": "s", "max_new_tokens": 64, "options": {"a": 1}}
JOURNAL = [
    {"journal": "spdbench.journal/1", "created": "x", "identity": IDENTITY},
    {"run": make_run().model_dump(mode="json")},
    {"outcome": ["p0", 0, 0, "tie"]},
]


@settings(300)
@given(content=broken_json_lines(JOURNAL))
def test_journals(folder: Path, content: bytes) -> None:
    (folder / "j").write_bytes(content.replace(b'{"run": ', b'{"run":'))

    def resume() -> None:
        with resume_journal(folder / "j", IDENTITY) as journal:
            list(journal.runs())

    written = (folder / "j").read_bytes()
    hostile.read("journals", resume)
    assert (folder / "j").read_bytes() in (written, written[: written.rfind(b"\n") + 1])  # without a line that was cut


def test_so_many_inputs_were_tried_within_the_memory_limit() -> None:
    """The last test of this file: hypothesis may end a test early, and then has tried less than was asked for."""
    hostile.require_tried("harness files", within=8)
