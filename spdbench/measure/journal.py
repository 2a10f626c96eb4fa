"""The journal of one label's run: a header with what is measured, then a line for every finished request.

{"journal": "spdbench.journal/1", "created": ..., "mark": "0a1b2c3d", "identity": {...}}
{"run": {...}, "of": "0a1b2c3d"}               one finished request
{"set_aside": {...}, "of": ...}                a disturbed measurement of a request that is not finished yet
{"outcome": ["prompt", turn, repeat, "tie"], "divergence": {...}, "of": ...}   how its output compared with vanilla's

Each journal draws its own random mark, so that lines of another journal, of another label for example, are refused. In
journals of older versions neither the header nor the lines have one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from spdbench.append_log import AppendLog, require_same_settings
from spdbench.errors import InputError
from spdbench.input_files import json_record, parse_json
from spdbench.judge.results.kept import RunDivergence
from spdbench.judge.results.schema import Run, RunKey, require_totals
from spdbench.output_files import try_lock
from spdbench.types import DivergenceClass, FirstDivergence

MAGIC = "spdbench.journal/1"
MAX_TRANSIENT = 3
"""How often a request may fail for a reason that may pass. It may be the reason itself, by crashing a server each time,
and a run that asked it again each time would have no end."""
RUN_START, ASIDE_START = b'{"run":', b'{"set_aside":'


class Journal(AppendLog):
    """An open journal, closed by `with`. Keeps the offset of each run's line, never the lines."""

    name = "journal"
    elsewhere = "choose another --name or another folder with --results DIR"
    resume_with = "again with --resume"
    restart = "run without --resume"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.created = ""
        self.identity: Mapping[str, Any] = {}
        self.outcomes: dict[RunKey, DivergenceClass] = {}
        self.divergences: dict[RunKey, RunDivergence] = {}
        self.offsets: dict[RunKey, int] = {}
        self.resumed_prompts: dict[RunKey, str] = {}
        """The hash of the prompt of each run that an earlier process wrote."""
        self.asked_again: set[RunKey] = set()
        """Requests that failed in an earlier process for a reason that may pass, and count as not asked."""
        self._num_transient: Counter[RunKey] = Counter()
        self._end = b"}\n"
        self._aside: dict[RunKey, list[Run]] = {}
        self._reader = path.open("rb")

    def __contains__(self, key: RunKey) -> bool:
        return key in self.offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def append(self, run: Run) -> None:
        """Adds a finished request; it is with the operating system when this returns."""
        self.append_json(run.key, _json(run.model_dump(mode="json")))

    def append_json(self, key: RunKey, run: bytes) -> None:
        """`append` for a run that is JSON already, with this `key` in it."""
        self.offsets[key] = self.append_line(RUN_START + run + self._end)

    def set_aside(self, run: Run) -> None:
        """Adds a measurement of a request that is going to be measured again."""
        self.append_line(ASIDE_START + _json(run.model_dump(mode="json")) + self._end)

    def taken_aside(self, key: RunKey) -> list[Run]:
        """The measurements of a request that an earlier process set aside; they are returned once."""
        return self._aside.pop(key, [])

    def add_comparison(self, key: RunKey, found: FirstDivergence | None) -> None:
        """Adds where a finished request's output differs first from vanilla's; None: nowhere."""
        outcome: DivergenceClass = "identical" if found is None else found.outcome
        line = _json({"outcome": [*key, outcome]})[:-1]
        if found is not None:
            prompt, turn, repeat = key
            first = RunDivergence(prompt_id=prompt, turn=turn, repeat=repeat, divergence=found)
            text = first.model_dump_json()  # without NaN and infinity, so it is what is read back
            self.divergences[key] = RunDivergence.model_validate_json(text)
            line += b',"divergence":' + text.encode()
        self.append_line(line + self._end)
        self.outcomes[key] = outcome

    def require_prompt(self, key: RunKey, sha256: str) -> None:
        """Raises `InputError` where an earlier process measured a request with a prompt of another hash."""
        if self.resumed_prompts.get(key, sha256) != sha256:
            prompt, turn, repeat = key
            raise InputError(
                f"{self.path}: prompt {prompt}, turn {turn}, repeat {repeat} was measured with other tokens than this "
                f"run gives it, so it cannot be resumed; {self.restart}"
            )

    def run(self, key: RunKey) -> Run:
        """One run, read back from disk."""
        return Run.model_validate_json(self._run_at(self.offsets[key]))

    def lines(self) -> Iterator[bytes]:
        """Every run as the JSON it was written in, in order of writing; constant memory."""
        return map(self._run_at, self.offsets.values())

    def runs(self) -> Iterator[Run]:
        return map(Run.model_validate_json, self.lines())

    def close(self) -> None:
        self._reader.close()
        super().close()

    def remove(self) -> None:
        """Deletes the file, when all of it is in a result."""
        self.path.unlink(missing_ok=True)
        self.close()

    def parse(self, number: int, offset: int, line: bytes) -> None:
        """Takes over one line that an earlier process wrote; raises as `AppendLog.read` says."""
        if number == 1:
            header = parse_json(line)
            if header["journal"] != MAGIC:
                raise ValueError
            self.created, self.identity = str(header["created"]), dict(header["identity"])
            self._end = _end(header.get("mark"))
        elif not line.endswith(self._end):
            raise ValueError
        elif line.startswith(RUN_START):
            run = self._checked(self._content(line, RUN_START))
            self._num_transient[run.key] += run.transient
            self._aside.pop(run.key, None)
            if run.transient and self._num_transient[run.key] < MAX_TRANSIENT:
                self.asked_again.add(run.key)
                return
            self.asked_again.discard(run.key)
            self.offsets[run.key] = offset
            self.resumed_prompts[run.key] = run.prompt_sha256
        elif line.startswith(ASIDE_START):
            run = self._checked(self._content(line, ASIDE_START))
            self._aside.setdefault(run.key, []).append(run)
        else:
            record = parse_json(line)
            prompt, turn, repeat, outcome = record["outcome"]
            key: RunKey = (prompt, turn, repeat)
            if outcome not in get_args(DivergenceClass) or key not in self.offsets:
                raise ValueError
            if "divergence" in record:
                self.divergences[key] = RunDivergence.model_validate(record["divergence"])
            self.outcomes[key] = outcome

    def _checked(self, text: bytes) -> Run:
        """The run in `text`; raises `ValueError` for one that this journal's run cannot have made."""
        run = json_record(Run, text)
        require_totals(run)
        if run.num_new_tokens > self.identity.get("max_new_tokens", run.num_new_tokens):
            raise ValueError
        return run

    def _run_at(self, offset: int) -> bytes:
        self._reader.seek(offset)
        return self._content(self._reader.readline(), RUN_START)

    def _content(self, line: bytes, start: bytes) -> bytes:
        """The run inside a line as `append` writes it; anything else is not JSON afterwards."""
        return line.removeprefix(start).removesuffix(self._end)


def _end(mark: object) -> bytes:
    """How every line of a journal with this mark ends; None for a journal of an older version."""
    return b"}\n" if mark is None else b',"of":' + json.dumps(mark).encode() + b"}\n"


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def create_journal(path: Path, created: str, identity: Mapping[str, Any]) -> Journal:
    """A new journal. One left by an unfinished run is renamed to `NAME.old`.

    Raises:
        InputError: the folder cannot be written, or another run is writing this journal now.
    """
    mark = secrets.token_hex(4)
    header = {"journal": MAGIC, "created": created, "mark": mark, "identity": identity}
    try:
        with _locked_folder(path.parent):
            if path.exists():
                with Journal(path):  # its lock shows that no other run is writing it
                    path.replace(path.with_name(path.name + ".old"))
            Journal.replace_file(path, json.dumps(header).encode() + b"\n")
            journal = Journal(path)
    except OSError as error:
        raise Journal.write_error(path, error) from None
    journal.created, journal.identity, journal._end = created, identity, _end(mark)
    return journal


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks: of two runs that begin at once with one name, the second
    finds the first one's journal, instead of replacing it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try_lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def resume_journal(path: Path, identity: Mapping[str, Any]) -> Journal:
    """The journal in `path`, ready for more; a last line that a kill cut short is dropped.

    Raises:
        InputError: it is damaged, measures something other than `identity`, or another run is writing it.
    """
    journal = Journal(path)

    def parse(number: int, offset: int, line: bytes) -> None:
        journal.parse(number, offset, line)
        if number == 1:
            remedy = "Resume with the same suite, model, decoding and options, or run without --resume."
            require_same_settings(f"--resume: {path}", journal.identity, identity, remedy)

    try:
        journal.read(parse)
    except BaseException:
        journal.close()
        raise
    return journal
