"""Turns a journal into a result file: streamed, then renamed into place, so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from spdbench import __version__
from spdbench.append_log import first_difference
from spdbench.errors import InputError
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.reader import in_batches, read_lines, reread
from spdbench.judge.results.schema import (
    SCHEMA,
    BackendRecord,
    DecodingInfo,
    Divergence,
    DrafterRecord,
    ModelInfo,
    Result,
    SuiteInfo,
    Summary,
)
from spdbench.judge.results.table import RunTable, join_tables
from spdbench.measure.journal import Journal, create_journal
from spdbench.measure.privacy import names_only
from spdbench.output_files import replaced_file

IS_TRANSIENT = re.compile(rb'"transient": *true')
"""In the JSON of a run that failed for a reason that may pass; no string can hold it, as in `reader.MARKS`."""
Recorded = TypeVar("Recorded", SuiteInfo, BackendRecord, ModelInfo, DrafterRecord)


@dataclass(frozen=True)
class ResultHead:
    """All of a result but its runs and what is computed from them."""

    suite: SuiteInfo
    decoding: DecodingInfo
    backend: BackendRecord
    model: ModelInfo
    drafter: DrafterRecord | None
    environment: Mapping[str, Any]
    git: str | None
    baseline: str | None = None
    labels: Sequence[str] = ()


def run_key(identity: Mapping[str, Any]) -> str:
    """Equal for runs that measure the same thing the same way."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_result(path: Path, head: ResultHead, journal: Journal) -> LoadedResult:
    """Writes the result of everything that `journal` holds to `path`, replacing an older file at the last moment.

    The journal's lines are read once: they are copied as they are, and their runs go into the table that is returned,
    as if the file had been loaded. Keeping that table while the run goes on would save no time, since reading a line
    costs no more than converting a run that is in memory, and would let memory grow with the run.

    Raises:
        InputError: the folder cannot be written, or the disk is full; the older file and the journal stay as they are.
    """
    without_runs = _without_runs(head, journal)
    members = without_runs.model_dump(mode="json", by_alias=True)
    before = {name: members[name] for name in [*members][: [*members].index("runs")]}
    try:
        with replaced_file(path) as out:
            out.write(b"{\n" + _lines(before) + b',\n"runs":[')
            result = LoadedResult(str(path), without_runs, join_tables(_copied_runs(journal, out)))
            out.write(b"\n],\n" + _lines(_computed(result)) + b"\n}\n")
    except OSError as error:
        raise Journal.write_error(path, error) from None
    return result


def _copied_runs(journal: Journal, out: IO[bytes]) -> Iterator[RunTable]:
    """The journal's runs, each batch written to `out` first."""
    separator = b"\n"
    for lines in in_batches(journal.lines()):
        out.write(separator + b",\n".join(lines))
        separator = b",\n"
        yield read_lines(lines)


def _without_runs(head: ResultHead, journal: Journal) -> Result:
    """The result before anything is computed from its runs."""
    return Result(
        schema=SCHEMA,
        created=journal.created,
        run_key=run_key(journal.identity),
        spdbench={"version": __version__, "git": head.git},
        suite=_public(head.suite),
        decoding=head.decoding,
        backend=_public(head.backend),
        model=_public(head.model),
        drafter=None if head.drafter is None else _public(head.drafter),
        environment=dict(head.environment),
        baseline=head.baseline,
        labels=list(head.labels),
        runs=[],
        divergence=_divergence(journal),
        summary=Summary(overall={}, by_category={}),
        flags=[],
    )


def _public(record: Recorded) -> Recorded:
    """`record` with the names of files in it, but not their folders."""
    return type(record).model_validate(names_only(record.model_dump()))


def _computed(result: LoadedResult) -> dict[str, Any]:
    """The members that follow the runs, with every metric."""
    divergence = result.head.divergence
    by_category = {name: dict(part.metrics) for name, part in result.by_category.items()}
    return {
        "divergence": None if divergence is None else divergence.model_dump(),
        "summary": {"overall": dict(result.metrics), "by_category": by_category},
        "flags": [flag.model_dump() for flag in result.flags],
    }


def _lines(members: Mapping[str, Any]) -> bytes:
    return ",\n".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in members.items()).encode()


def _divergence(journal: Journal) -> Divergence | None:
    """How the outputs compared with vanilla's; None where none were compared."""
    if not journal.outcomes:
        return None
    count = Counter(journal.outcomes.values())
    return Divergence(
        identical=count["identical"],
        ties=count["tie"],
        near_ties=count["near_tie"],
        real=count["real"],
        unclassified=count["unclassified"],
        first=list(journal.divergences.values()),
    )


def reopened_journal(result: Path, path: Path, identity: Mapping[str, Any]) -> Journal:
    """A journal at `path` made from a `result` that is there already, so that a finished run resumes to itself; without
    what failed for a reason that may pass.

    Raises:
        InputError: the result was measured with other settings.
    """
    done, runs = reread(result)
    if done.run_key != run_key(identity):
        facts = {
            **done.decoding.model_dump(exclude={"eos_ids"}),
            "suite_sha256": done.suite.sha256,
            "num_prompts": done.suite.num_prompts,
            "model_sha256": done.model.sha256,
            "dtype": done.model.dtype,
            "options": done.backend.options,
        }
        difference = first_difference(facts, {key: identity[key] for key in facts})
        raise InputError(
            f"--resume: {result} is a finished run with other settings{difference and ': ' + difference}. "
            "Run without --resume to replace it, or with a --name of its own."
        )
    journal = create_journal(path, done.created, identity)
    for key, run in runs:
        if IS_TRANSIENT.search(run):
            journal.asked_again.add(key)
        else:
            journal.append_json(key, run)
    return journal
