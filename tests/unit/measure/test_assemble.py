"""From journal to result: one pass, and an entry that says what the file says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import LoadedResult, read_results
from spdbench.judge.results.schema import Run, read_result
from spdbench.measure.assemble import ResultHead, write_result
from spdbench.measure.journal import Journal, create_journal
from spdbench.render.export import to_json
from spdbench.types import BackendKind, FirstDivergence
from tests.builders import (
    chunk_steps,
    contents,
    failed_run,
    make_backend,
    make_result,
    make_run,
    summarise,
    vanilla_steps,
)

RUNS: dict[BackendKind, list[Run]] = {
    "autoregressive": [make_run(vanilla_steps(20), prompt=f"p{i}", category="ab"[i % 2]) for i in range(9)],
    "draft_verify": [*(make_run(chunk_steps([1, 4, 3]), prompt=f"p{i}") for i in range(8)), failed_run("p8")],
}


def head(kind: BackendKind) -> ResultHead:
    like = make_result([])
    return ResultHead(like.suite, like.decoding, make_backend(kind), like.model, None, like.environment, None)


def written(folder: Path, kind: BackendKind) -> LoadedResult:
    with create_journal(folder / f"{kind}.journal.jsonl", "now", {}) as journal:
        for run in RUNS[kind]:
            journal.append(run)
        journal.add_comparison(("p0", 0, 0), FirstDivergence("tie", 2, 7, 8, 1.5, 1.5, 0.0))
        return write_result(folder / f"{kind}.json", head(kind), journal)


def test_what_was_written_need_not_be_read_to_be_compared(tmp_path: Path) -> None:
    entries = [written(tmp_path, kind) for kind in RUNS]
    read = read_results([Path(entry.file) for entry in entries])
    assert to_json(compare(entries)) == to_json(compare(read))
    assert [contents(entry.runs) for entry in entries] == [contents(entry.runs) for entry in read]


def test_a_journal_is_gone_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Journal] = []
    original = Journal.lines

    def counted(self: Journal) -> Iterator[bytes]:
        passes.append(self)
        return original(self)

    monkeypatch.setattr(Journal, "lines", counted)
    written(tmp_path, "draft_verify")
    assert len(passes) == 1


@pytest.mark.parametrize("kind", RUNS)
def test_a_result_holds_the_journals_runs_and_every_metric(tmp_path: Path, kind: BackendKind) -> None:
    entry = written(tmp_path, kind)
    result = read_result(tmp_path / f"{kind}.json")
    assert result.runs == RUNS[kind]
    assert result.summary == summarise(RUNS[kind], result.backend, result.environment["read_bandwidth_bytes_per_s"])
    assert result.divergence is not None
    assert result.divergence.ties == 1
    assert result.flags == entry.flags


def test_a_result_has_a_line_for_each_run(tmp_path: Path) -> None:
    written(tmp_path, "draft_verify")
    lines = (tmp_path / "draft_verify.json").read_text().splitlines()
    first = lines.index('"runs":[') + 1
    runs = [json.loads(line.rstrip(",")) for line in lines[first : first + 9]]
    assert [run["prompt_id"] for run in runs] == [f"p{i}" for i in range(9)]
    assert (lines[0], lines[first + 9]) == ("{", "],")
