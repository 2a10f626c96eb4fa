"""Journals that tests open are closed when they end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spdbench.measure.journal import Journal


@pytest.fixture(autouse=True)
def _close_journals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests open journals freely; this closes them."""
    opened: list[Journal] = []
    original = Journal.__init__

    def remember(self: Journal, *words: Any) -> None:
        original(self, *words)
        opened.append(self)

    monkeypatch.setattr(Journal, "__init__", remember)
    yield
    for journal in opened:
        journal.close()
