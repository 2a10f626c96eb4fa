"""The progress bar: it shows what finished, and leaves alone what is being timed."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from spdbench.cli import progress
from spdbench.cli.progress import LiveBar
from tests.builders import make_run


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def bar(screen: io.StringIO) -> LiveBar:
    return LiveBar(Console(file=screen, force_terminal=True, width=100), 10, 0)


def test_a_bar_has_no_thread_that_could_draw_while_a_request_is_timed(bar: LiveBar) -> None:
    before = threading.active_count()
    with bar:
        assert threading.active_count() == before


def test_a_bar_is_drawn_when_a_request_has_finished(
    bar: LiveBar, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    with bar:
        bar.finished("vanilla", make_run())
        assert "1/10" in screen.getvalue()
        assert "vanilla 100.0 tok/s" in screen.getvalue()


def test_a_bar_is_not_drawn_for_each_of_many_quick_requests(
    bar: LiveBar, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 3600.0)
    with bar:
        drawn = len(screen.getvalue())
        for _ in range(9):
            bar.finished("vanilla", make_run())
        assert len(screen.getvalue()) == drawn
