"""Turns a journal into a result file: streamed, then renamed into place, so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spdbench import __version__
from spdbench.judge.comparison.pairing import Collector, Entry
from spdbench.judge.results.reader import in_batches, read_lines
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
from spdbench.measure.journal import Journal
from spdbench.measure.privacy import names_only

Told = TypeVar("Told", SuiteInfo, BackendRecord, ModelInfo, DrafterRecord)


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


def run_key(identity: Mapping[str, Any]) -> str:
    """Equal for runs that measure the same thing the same way."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_result(path: Path, head: ResultHead, journal: Journal) -> Entry:
    """Writes the result of everything that `journal` holds to `path`, replacing an older file at the last moment.

    The journal is gone through once, a few runs at a time. Returns what `read_entries` would make of the file.

    Raises:
        InputError: the folder cannot be written, or the disk is full; the older file and the journal stay as they are.
    """
    collector = Collector(head.backend)
    told = _without_runs(head, journal)
    members = told.model_dump(mode="json", by_alias=True)
    before = {name: members[name] for name in [*members][: [*members].index("runs")]}
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as out:
            out.write(b"{\n" + _lines(before) + b',\n"runs":[')
            separator = b"\n"
            for lines in in_batches(journal.lines()):
                collector.add(read_lines(lines))
                out.write(separator + b",\n".join(lines))
                separator = b",\n"
            entry = collector.entry(told, str(path))
            out.write(b"\n],\n" + _lines(_judged(entry.head)) + b"\n}\n")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise Journal.write_error(path, error) from None
    return entry


def _without_runs(head: ResultHead, journal: Journal) -> Result:
    """The result before its runs are judged."""
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
        runs=[],
        divergence=_divergence(journal),
        summary=Summary(overall={}, by_category={}),
        flags=[],
    )


def _public(record: Told) -> Told:
    """`record` with the names of files in it, but not their folders."""
    return type(record).model_validate(names_only(record.model_dump()))


def _judged(head: Result) -> dict[str, Any]:
    """What stands behind the runs, with every metric."""
    by_category = {name: dict(metrics) for name, metrics in head.summary.by_category.items()}
    return {
        "divergence": None if head.divergence is None else head.divergence.model_dump(),
        "summary": {"overall": dict(head.summary.overall), "by_category": by_category},
        "flags": [flag.model_dump() for flag in head.flags],
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
    )
