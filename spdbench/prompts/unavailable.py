"""The one word between sources and whoever tries them in turn: this one is not there, and how to get it."""

from __future__ import annotations


class SourceUnavailable(Exception):  # noqa: N818 - no error: the next source is tried
    """This source is not there: `reason` in words, and the `command` that would get it."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.command = command
