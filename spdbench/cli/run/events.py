"""`run --events FILE`: what happens in a run as lines of JSON, for other programs to draw.

Schema `spdbench.events/1`. Each line is one object with `event` and `time` (ISO 8601, UTC); names and messages are
escaped as JSON does it, and hold no secrets of the environment. Lines are appended whole, between requests; a reader
ignores events and fields that it does not know. A run that is killed leaves no last event.

`run_started`
    `schema`, `suite`, `model`, and `backends`: a list of `label`, `backend`, `kind`, `requests`, `done`.
`request_finished`
    `backend` (its label), `prompt_id`, `turn`, `repeat`, `tokens` (new ones), `ttft_s`, `decode_s`, `drafted`,
    `judged`, `accepted` (null where unknown), `error` (null unless the request failed).
`run_interrupted`
    `reason`: `SIGINT`, `SIGTERM`, or the first line of the error that ended the run.
`run_ended`
    `exit_code`, and `results`: the names of the result files.

`drafted`, `judged` and `accepted` are sums over the steps of one request; `done` counts the requests that `--resume`
found finished, of which no event follows. A file that holds events of earlier runs is continued. With several numbers
of `--concurrency`, each is a run of its own here: its events follow those of the one before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from spdbench.append_log import AppendLog
from spdbench.cli.terminal import Terminated
from spdbench.errors import InputError
from spdbench.input_files import parse_json
from spdbench.judge.results.schema import Run
from spdbench.measure.privacy import without_secrets
from spdbench.measure.runner import Observer

if TYPE_CHECKING:
    from spdbench.cli.run.live_view import Tally

SCHEMA = "spdbench.events/1"
STDOUT = Path("-")
Write = Callable[[bytes], object]


class EventFile(AppendLog):
    """An open file of events."""

    name = "file of events"
    elsewhere = "give --events another file"
    resume_with = "the same command with --resume"
    restart = "give --events another file"


class Events:
    """Writes the events of one run with `write`, if there is one. Observes a `Runner`.

    A context: an error that leaves it ends the run, and is its last event.
    """

    def __init__(self, write: Write | None, tallies: Sequence[Tally]) -> None:
        self._write = write
        self._tallies = {tally.record.label: tally for tally in tallies}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            with suppress(InputError, OSError):  # the error itself may be that nothing can be written
                self._append("run_interrupted", reason=_reason(error))

    def started(self, suite: str, model: str) -> None:
        backends = [
            {"label": label, "backend": tally.record.name, "kind": tally.record.kind}
            | {"requests": tally.total, "done": tally.done}
            for label, tally in self._tallies.items()
        ]
        self._append("run_started", schema=SCHEMA, suite=suite, model=model, backends=backends)

    def finished(self, label: str, run: Run) -> None:
        self._append(
            "request_finished",
            backend=label,
            prompt_id=run.prompt_id,
            turn=run.turn,
            repeat=run.repeat,
            tokens=run.num_new_tokens,
            ttft_s=run.ttft_s,
            decode_s=run.decode_s,
            **self._drafts(label, run),
            error=run.error,
        )

    def crashed(self, label: str, run: Run, trace: str) -> None:
        """Nothing: the event of the request has its error."""

    def ended(self, exit_code: int, results: Sequence[Path]) -> None:
        self._append("run_ended", exit_code=exit_code, results=[path.name for path in results])

    def _drafts(self, label: str, run: Run) -> dict[str, int | None]:
        """An engine's own counts where its steps cannot tell."""
        if "drafts" in self._tallies[label].record.unknown:
            drafts = run.drafts
            judged, accepted = (drafts.judged, drafts.accepted) if drafts else (None, None)
            return {"drafted": None, "judged": judged, "accepted": accepted}
        return {name: sum(getattr(run.steps, name)) for name in ("drafted", "judged", "accepted")}

    def _append(self, event: str, **fields: Any) -> None:
        if self._write is None:
            return
        fields = {name: without_secrets(value) if isinstance(value, str) else value for name, value in fields.items()}
        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        self._write(json.dumps(line).encode() + b"\n")


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "SIGTERM" if isinstance(error, Terminated) else "SIGINT"
    return str(error).partition("\n")[0] or type(error).__name__


class Observers:
    """Several observers of one `Runner`."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def finished(self, label: str, run: Run) -> None:
        for observer in self._observers:
            observer.finished(label, run)

    def crashed(self, label: str, run: Run, trace: str) -> None:
        for observer in self._observers:
            observer.crashed(label, run, trace)


@contextmanager
def open_events(path: Path | None) -> Iterator[Write | None]:
    """What appends a line to the file that `--events` names, or to stdout for `-`; None where it names none.

    Raises:
        InputError: the file cannot be written, another run is writing it, or it holds something else than events.
    """
    if path is None:
        yield None
    elif path == STDOUT:
        yield _write_stdout
    else:
        if path.exists() and not path.is_file():
            raise InputError(f"--events {path}: is not a regular file; `-` writes to stdout")
        with EventFile(path) as file:
            if file.size:
                file.read(_require_event)  # which drops a last line that a kill cut
            yield file.append_line


def _require_event(_number: int, _offset: int, line: bytes) -> None:
    if not isinstance(parse_json(line)["event"], str):
        raise TypeError


def _write_stdout(line: bytes) -> None:
    sys.stdout.write(line.decode())
    sys.stdout.flush()
