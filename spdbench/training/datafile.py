"""The data file that `distill` writes: a header that says how it is made, then a line for each conversation kept.

Next to it, `FILE.summary.json` counts what was dropped or cut short, and why.

    {"schema": "spdbench.data/1", "created": ..., "model": {...}, "seed": 0, "tokens": 500000, ...}
    {"messages": [...], "sampling": {"index": 0, ...}, "num_tokens": 214}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdbench.append_log import AppendLog, require_same_settings
from spdbench.chat_rows import messages_of
from spdbench.errors import InputError
from spdbench.input_files import parse_json, read_json
from spdbench.training.conversations import OUR_START, SCHEMA
from spdbench.training.distill.talk import Dropped, Kept

SUMMARY_SCHEMA = "spdbench.data-summary/1"
MAX_COUNT = 1e15
"""No count and no time in seconds of a summary is larger."""
FREE_TO_CHANGE = ("created", "tokens", "spdbench", "batch")
"""Settings that may differ when a file is resumed: the file may grow, by another version of spdbench."""


class DataFile(AppendLog):
    """An open data file, closed by `with`."""

    name = "data file"
    elsewhere = restart = "choose another --out"
    resume_with = "the same command again"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header: dict[str, Any] = {}
        self.found: list[Kept] = []
        """The conversations that were there when the file was opened."""
        self.num_conversations = self.num_tokens = 0
        self.cut_short: Counter[str] = Counter()
        """Conversations that were kept up to a turn that was not, by the reason."""
        self.dropped: Counter[str] = Counter()
        self.num_written, self.seconds = 0, 0.0

    def add(self, outcome: Kept | Dropped) -> None:
        """Counts the outcome; a kept one is with the operating system when this returns."""
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason] += 1
            return
        line = {"messages": outcome.messages, "sampling": outcome.sampling, "num_tokens": outcome.num_tokens}
        self.append_line(_json(line))
        self._count(outcome)

    def _count(self, kept: Kept) -> None:
        self.num_conversations += 1
        self.num_tokens += kept.num_tokens
        if kept.cut_short is not None:
            self.cut_short[kept.cut_short] += 1

    def write_summary(self, *, complete: bool) -> None:
        """Replaces `FILE.summary.json` by the counts so far."""
        summary = {
            "schema": SUMMARY_SCHEMA,
            "complete": complete,
            "conversations": self.num_conversations,
            "tokens": self.num_tokens,
            "dropped": dict(self.dropped.most_common()),
            "num_dropped": self.dropped.total(),
            "cut_short": dict(self.cut_short.most_common()),
            "generated_tokens": self.num_written,
            "seconds": round(self.seconds, 1),
        }
        DataFile.replace_file(summary_path(self.path), json.dumps(summary, indent=2).encode() + b"\n")

    def resume(self, settings: Mapping[str, Any]) -> None:
        """Reads what an earlier process wrote.

        Raises:
            InputError: the file is not ours, was made with other `settings`, or is damaged.
        """

        def parse(number: int, _: int, line: bytes) -> None:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError
            if number > 1:
                messages = messages_of(row, f"{self.path} line {number}")
                sampling = dict(row["sampling"])
                if not isinstance(sampling.get("cut_short", ""), str):
                    raise ValueError
                kept = Kept(int(sampling["index"]), messages, sampling, int(row["num_tokens"]))
                self.found.append(kept)
                self._count(kept)
                return
            if row["schema"] != SCHEMA or "tokens" not in row:
                raise ValueError
            self.header = row
            remedy = "Continue with the same settings, or choose another --out."
            require_same_settings(self.path, row, settings, remedy, FREE_TO_CHANGE)

        self.read(parse)
        if self.found:
            self._read_summary()

    def _read_summary(self) -> None:
        """Continues the counts of what was dropped, written and spent; from 0 where the summary is lost."""
        try:
            row = read_json(summary_path(self.path))
            dropped = Counter({str(reason): int(count) for reason, count in row["dropped"].items()})
            written, seconds = int(row["generated_tokens"]), float(row["seconds"])
            if all(0 <= number < MAX_COUNT for number in (*dropped.values(), written, seconds)):  # false for NaN
                self.dropped, self.num_written, self.seconds = dropped, written, seconds
        except (InputError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            pass


def summary_path(path: Path) -> Path:
    return path.with_name(path.name + ".summary.json")


def open_data(path: Path, settings: Mapping[str, Any]) -> DataFile:
    """A new file at `path`, or the one that is there, to be continued; a last line that a kill cut short is dropped.

    Raises:
        InputError: the file is not ours, was made with other settings, is damaged, cannot be written, or is being
            written by another process.
    """
    settings = {"schema": SCHEMA, **settings}
    try:
        is_new = not path.exists() or _is_cut_header(path.read_bytes())
    except OSError as error:
        raise DataFile.write_error(path, error) from None
    if is_new:
        DataFile.replace_file(path, _json(settings))
    file = DataFile(path)
    try:
        file.resume(settings)
        if file.header["tokens"] == settings["tokens"]:
            return file
        grown = {**file.header, "tokens": settings["tokens"]}
        DataFile.replace_file(path, _json(grown) + path.read_bytes().partition(b"\n")[2])
    except BaseException:
        file.close()
        raise
    file.close()
    return open_data(path, grown)


def _is_cut_header(content: bytes) -> bool:
    """True for an empty file, and for the beginning of a data file's header."""
    is_ours = content.startswith(OUR_START) or OUR_START.startswith(content)
    # A file of several lines that end in a carriage return is none of ours, but may hold someone's data.
    return is_ours and not any(mark in content for mark in (b"\n", b"\r", b'"messages"'))


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
