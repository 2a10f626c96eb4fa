"""Turns a journal into a result file: streamed, then renamed into place, so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from spdbench import __version__
from spdbench.judge.flags import flags_for
from spdbench.judge.metrics import summarise
from spdbench.judge.result import (
    SCHEMA,
    BackendRecord,
    DecodingInfo,
    Divergence,
    DrafterRecord,
    ModelInfo,
    SuiteInfo,
)
from spdbench.measure.journal import Journal, write_error


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


def write_result(path: Path, head: ResultHead, journal: Journal) -> None:
    """Writes the result of everything that `journal` holds to `path`, replacing an older file at the last moment.

    Raises:
        InputError: the folder cannot be written, or the disk is full; the older file and the journal stay as they are.
    """
    bandwidth = head.environment.get("read_bandwidth_bytes_per_s")
    summary = summarise(journal.runs(), head.backend, bandwidth)
    divergence = _divergence(journal)
    flags = flags_for(summary.overall, head.backend, head.drafter, divergence)
    before = {
        "schema": SCHEMA,
        "created": journal.created,
        "run_key": run_key(journal.identity),
        "spdbench": {"version": __version__, "git": head.git},
        "suite": head.suite,
        "decoding": head.decoding,
        "backend": head.backend,
        "model": head.model,
        "drafter": head.drafter,
        "environment": head.environment,
    }
    after = {"divergence": divergence, "summary": summary, "flags": flags}
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as out:
            out.write("{")
            _write_members(out, before)
            out.write('"runs":[')
            for number, line in enumerate(journal.lines()):
                out.write(",\n" if number else "\n")
                out.write(line.decode())
            out.write("\n],")
            _write_members(out, after, last=True)
            out.write("}\n")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise write_error(path, error) from None


def _write_members(out: IO[str], members: Mapping[str, Any], *, last: bool = False) -> None:
    texts = [f"{json.dumps(name)}:{json.dumps(value, default=_plain)}" for name, value in members.items()]
    out.write("\n" + ",\n".join(texts) + ("\n" if last else ",\n"))


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no place in a result file")


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
