"""Progress: it shows what finished, and leaves alone what is being timed."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from spdbench.cli import progress
from spdbench.cli.progress import DataProgress, RunProgress, TrainingProgress
from tests.builders import make_run


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Screen]:
    """A terminal on stderr. Not a fixture: pytest replaces stderr between a test's setup and its call."""
    with redirect_stderr(Screen()) as screen:
        yield screen


def test_a_bar_has_no_thread_that_could_draw_while_a_request_is_timed() -> None:
    before = threading.active_count()
    with terminal(), RunProgress(10, 0):
        assert threading.active_count() == before


def test_a_bar_is_drawn_when_a_request_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    with terminal() as screen, RunProgress(10, 0) as bar:
        bar.finished("vanilla", make_run())
        assert "1/10" in screen.getvalue()
        assert "vanilla 100.0 tok/s" in screen.getvalue()
    assert screen.getvalue().endswith("\r\033[K"), "the bar is gone at the end"


def test_a_bar_is_not_drawn_for_each_of_many_quick_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 3600.0)
    with terminal() as screen, RunProgress(10, 0) as bar:
        drawn = len(screen.getvalue())
        for _ in range(9):
            bar.finished("vanilla", make_run())
        assert len(screen.getvalue()) == drawn


def test_a_bar_is_no_longer_than_the_terminal_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    with terminal() as screen, RunProgress(10, 0) as bar:
        for label in "abcdefgh":
            bar.finished(label * 20, make_run())
    assert max(len(line) for line in screen.getvalue().split("\r\033[K")) == 99


def test_a_crash_is_shown_in_place_of_the_bar() -> None:
    with terminal() as screen, RunProgress(10, 0) as bar:
        bar.crashed("spd", make_run(prompt="p1"), "Traceback ...")
    assert "\r\033[Kspd failed on prompt p1:\nTraceback ...\n" in screen.getvalue()


def test_a_pipe_gets_a_line_for_the_last_request_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(3, 1) as lines:
        lines.finished("vanilla", make_run())
        assert capsys.readouterr().err == ""
        lines.finished("vanilla", make_run())
    assert capsys.readouterr().err == "3/3 requests: vanilla 100.0 tok/s\n"


def test_time_left_follows_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", iter([100.0, *[110.0] * 9]).__next__)
    data = DataProgress(1000, 200)
    data._done = 400
    assert data.left == "about 30 s left"
    assert data.words(400, 500, 3, 1) == (
        "400/1,000 tokens kept in 3 conversations, 1 dropped; 20 tok/s kept, 50 generated; about 30 s left"
    )
    data._done = 1000
    assert data.left == ""


def test_training_shows_steps_now_and_then_and_every_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = TrainingProgress()
    shown.step(1, 2.0, 0.5, 0.1, 300.0)
    shown.evaluated(1, [0.5, 0.25], best=True)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    shown.step(2, 2.0, 0.5, 0.2, 600.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 1: held-out acceptance 50.0%, 25.0% (best so far)",
        "step 2 (20%): loss 2.000, held-out acceptance 50.0%, about 10 min left",
    ]
