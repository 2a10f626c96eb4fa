"""Progress of training and of data: a line that is redrawn on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from spdbench.cli import progress
from spdbench.cli.progress import DataProgress, Progress, TrainingProgress, duration


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_no_longer_than_the_terminal_is_wide_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMNS", "100"), ("TERM", "xterm"), ("CI", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    with redirect_stderr(Screen()) as screen, Progress(10) as bar:
        bar.show(5, "x" * 200)
    lines = screen.getvalue().split("\r\033[K")
    assert max(map(len, lines)) == 99
    assert lines[1].startswith("━" * 10 + "─" * 10 + " x")
    assert lines[-1] == ""


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true")])
def test_what_cannot_or_should_not_be_redrawn_gets_lines(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, normal in (("TERM", "xterm"), ("CI", "")):
        monkeypatch.setenv(variable, normal)
    monkeypatch.setenv(name, value)
    with redirect_stderr(Screen()) as screen, Progress(10) as bar:
        bar.show(10, "all of it", last=True)
    assert screen.getvalue() == "all of it\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (7200, "2 h")]
)
def test_durations_have_one_unit(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_time_left_follows_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", iter([100.0, *[110.0] * 9]).__next__)
    data = DataProgress(1000, 200)
    data._done = 400
    assert data.left == "about 30 s left"
    assert data.words(400, 500, 3, 1) == (
        "400/1,000 tokens kept in 3 conversations, 1 dropped; 20 tok/s kept, 50 tok/s generated; about 30 s left"
    )
    assert "; 0.2 tok/s kept, 0.4 tok/s generated;" in data.words(202, 4, 1, 0)
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
