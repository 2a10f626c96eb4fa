"""The live view: right numbers, whole lines, and not a character while a request is timed."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from spdbench.cli.main import run as run_command
from spdbench.cli.run import live_view
from spdbench.cli.run.live_view import MAX_GROUPS, LiveView, Tally
from spdbench.judge.metrics.metrics import Metrics
from spdbench.judge.results.schema import Run
from spdbench.judge.results.table import table_from
from spdbench.types import GenerationRequest, Step
from tests.builders import MS, chunk_steps, failed_run, make_backend, make_run, pipeline_steps, vanilla_steps
from tests.cli.run_helpers import spdbench, write_suite
from tests.mock_backend import MockSpans

REDRAWN = re.compile(r"\r(?:\x1b\[2K)?(?:\x1b\[1A\x1b\[2K)*")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
VANILLA = [make_run(vanilla_steps(5, step_ns=ms * MS), prompt=f"p{ms}") for ms in (10, 12, 20)]
EAGLE = [make_run(chunk_steps([1, 3, 2, 4], step_ns=ms * MS), prompt=f"p{ms}") for ms in (10, 12, 20)]
SPARE = {"useful": 0.5, "wasted": 0.125, "fill": 0.375}
SHARES = SPARE | dict.fromkeys(("verify", "draft", "imbalance", "host", "unattributed"), 0.0)
SPD = [make_run(pipeline_steps([True, True, False, True], 3), prompt=f"p{ms}", bubble=SHARES) for ms in (10, 12, 20)]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stderr is a terminal it can be redrawn, at once, and is 80 columns wide."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(live_view, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    monkeypatch.setattr(live_view, "MAX_SHARE", 1e9)


def three(total: int = 5) -> list[Tally]:
    return [Tally(make_backend(kind), total) for kind in ("autoregressive", "draft_verify", "pipeline")]


def watch(view: LiveView, *labels_and_runs: tuple[str, Sequence[Run]]) -> None:
    with view:
        for label, runs in labels_and_runs:
            for run in runs:
                view.finished(label, run)


def frames(text: str) -> list[list[str]]:
    """What a terminal shows after each drawing, without colours."""
    return [ESCAPES.sub("", frame).rstrip("\n").split("\n") for frame in REDRAWN.split(text)]


def last_frame(tallies: list[Tally], width: int = 80) -> list[str]:
    """The lines of the view after all runs above."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=40)
    view = LiveView(tallies, "live", console)
    watch(view, ("vanilla", VANILLA), ("eagle", EAGLE), ("spd", SPD))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in frames(console.file.getvalue())[-2]]


def test_a_bar_a_backend_with_its_numbers_and_a_line_of_stages() -> None:
    lines = last_frame(three())
    assert re.fullmatch(r"9/15 requests(, about \d+ s left)?", lines[0])
    assert lines[1].split() == ["requests", "left", "tok/s", "95", "%", "interval", "accepted"]
    vanilla, eagle, spd, stages = lines[2:]
    assert re.fullmatch(r"vanilla +[━╸╺]+ +3/5 +\d+ s +71\.4 +\[\d+\.\d, \d+\.\d\]", vanilla)
    assert re.fullmatch(r"eagle +[━╸╺]+ +3/5 +\d+ s +214\.3 +\[\d+\.\d, \d+\.\d\] +67%", eagle)
    assert re.fullmatch(r"spd +[━╸╺]+ +3/5 +\d+ s +50\.0 +\[50\.0, 50\.0\] +75%", spd)
    assert stages.startswith("spd: 10 + 10 + 10 layers; 0.50 tokens a cycle; 50% useful, 12% wasted")


@pytest.mark.parametrize(
    ("kind", "runs"), [("autoregressive", VANILLA), ("draft_verify", EAGLE), ("pipeline", SPD)], ids=str
)
def test_the_numbers_are_those_of_a_result(kind: str, runs: list[Run]) -> None:
    record = make_backend(kind)  # type: ignore[arg-type]
    tally = Tally(record, 3)
    for run in runs:
        tally.add(run, 1.0)
    metrics = Metrics(table_from(runs), record, None)
    for name in ("decode_tokens_per_s", "acceptance_rate", "tokens_per_cycle", "bubble_ratio", "useful"):
        assert tally.metric(name) == (None if metrics[name] is None else pytest.approx(metrics[name])), name
    assert tally.interval() == pytest.approx(metrics["decode_tokens_per_s_ci"], rel=0.05)


def test_no_interval_before_the_second_conversation_and_no_more_groups_than_it_needs() -> None:
    tally = Tally(make_backend(), 1000)
    tally.add(VANILLA[0], 1.0)
    assert tally.interval() is None
    runs = [make_run(vanilla_steps(5, step_ns=(10 + n % 7) * MS), prompt=f"q{n}") for n in range(3 * MAX_GROUPS)]
    for run in runs:
        tally.add(run, 1.0)
    whole = Metrics(table_from([VANILLA[0], *runs]), make_backend(), None)["decode_tokens_per_s_ci"]
    assert tally.interval() == pytest.approx(whole, rel=0.02)
    assert len(tally._groups) == MAX_GROUPS


def test_time_left_is_that_of_each_backends_remaining_requests_at_its_own_pace() -> None:
    slow, quick = Tally(make_backend(label="slow"), 10, done=4), Tally(make_backend(label="quick"), 10)
    assert (slow.left_s, quick.left_s) == (None, None)
    for run in VANILLA:
        slow.add(run, 20.0)
        quick.add(run, 1.0)
    assert (slow.left_s, quick.left_s) == (60.0, 7.0)
    assert LiveView([slow, quick])._state == "10/20 requests, about 67 s left"
    assert LiveView([slow, Tally(make_backend(), 5)])._state == "7/15 requests", "unknown as long as one has not begun"


@pytest.mark.parametrize("width", [12, 20, 33, 40, 56, 64, 72, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    tallies = three()
    tallies.append(Tally(make_backend(label="a-label-of-some-forty-characters-in-one-row"), 12_000, done=11_999))
    lines = last_frame(tallies, width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 7, "no line wraps"
    whole = {
        word for line in last_frame(tallies_of(tallies), 200) for word in re.findall(r"[\d.,/%]*\d[\d.,/%]*", line)
    }
    shown = {word for line in lines[2:6] for word in re.findall(r"[\d.,/%]*\d[\d.,/%]*", line)}
    assert shown <= whole


def tallies_of(tallies: list[Tally]) -> list[Tally]:
    """The same backends before their first request."""
    return [Tally(each.record, each.total, 11_999 if each.total == 12_000 else 0) for each in tallies]


def test_narrow_terminals_lose_the_least_important_columns_first() -> None:
    headings = [" ".join(last_frame(three(), width)[1].split()) for width in (80, 60, 46, 36, 22)]
    assert headings == [
        "requests left tok/s 95 % interval accepted",
        "requests tok/s 95 % interval accepted",
        "requests tok/s accepted",
        "requests tok/s",
        "requests",
    ]


def test_failed_requests_are_counted_apart() -> None:
    tallies = three()
    with redirect_stderr(Screen()) as screen:
        watch(LiveView(tallies), ("vanilla", [VANILLA[0], failed_run()]))
    assert "2/5, 1 failed" in frames(screen.getvalue())[-2][2]
    assert tallies[0].metric("decode_tokens_per_s") == pytest.approx(100.0)


def test_the_view_is_gone_at_the_end_and_the_cursor_is_never_left_hidden() -> None:
    with redirect_stderr(Screen()) as screen:
        view = LiveView(three())
        with view:
            started = screen.getvalue()
            assert started.rindex(SHOW_CURSOR) > started.rindex(HIDE_CURSOR), "a SIGKILL would leave it so"
            view.finished("vanilla", VANILLA[0])
        with pytest.raises(KeyboardInterrupt), LiveView(three()):
            raise KeyboardInterrupt
        assert sys.stderr is screen
    text = screen.getvalue()
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert [line for line in frames(text)[-1] if line.strip()] == []


def test_there_is_no_thread_that_could_draw_while_a_request_is_timed() -> None:
    before = threading.active_count()
    with redirect_stderr(Screen()), LiveView(three()):
        assert threading.active_count() == before


def test_a_view_is_not_drawn_for_each_of_many_quick_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "SECONDS_BETWEEN_DRAWINGS", 3600.0)
    with redirect_stderr(Screen()) as screen, LiveView(three()) as view:
        before = screen.getvalue()
        for run in VANILLA:
            view.finished("vanilla", run)
        assert screen.getvalue() == before


def test_after_a_slow_drawing_200_times_as_long_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "MAX_SHARE", 0.005)
    view = LiveView(three(), "live")
    view._drawing_s = 0.05
    assert view.pause_s(view._tallies["vanilla"]) == pytest.approx(10.0)
    assert view.pause_s(Tally(make_backend(), 1, width=8)) == 10.0


def test_a_crash_is_shown_above_the_bars() -> None:
    with redirect_stderr(Screen()) as screen, LiveView(three()) as view:
        view.crashed("spd", make_run(prompt="p\x1b[2J"), "Traceback ...")
        text = ESCAPES.sub("", screen.getvalue())
    assert text.index("spd failed on prompt p\\x1b[2J:") < text.index("Traceback ...") < text.rindex("vanilla")


def test_no_color_leaves_the_bars_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for no_color, expected in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        with redirect_stderr(Screen()) as screen:
            watch(LiveView(three()), ("vanilla", VANILLA))
        colours = re.findall(r"\x1b\[(?:3[0-9]|9[0-7]|38;[0-9;]+)m", screen.getvalue())
        assert bool(colours) is expected
        assert "3/5" in frames(screen.getvalue())[-2][2]


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true")])
def test_a_dumb_terminal_and_a_ci_job_get_plain_lines(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with redirect_stderr(Screen()) as screen:
        watch(LiveView([Tally(make_backend(), 3, done=2)]), ("vanilla", VANILLA[:1]))
    assert screen.getvalue() == "3/3 requests: vanilla 100.0 tok/s\n"


def test_a_pipe_gets_a_line_now_and_then_and_one_for_the_last_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveView([Tally(make_backend("draft_verify"), 3)]) as view:
        view.finished("eagle", EAGLE[0])
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(live_view, "SECONDS_BETWEEN_LINES", 0.0)
        view.finished("eagle", failed_run())
        line = r"2/3 requests(, about \d+ s left)?: eagle 300\.0 tok/s, \d+% accepted, 1 failed\n"
        assert re.fullmatch(line, capsys.readouterr().err)
        monkeypatch.setattr(live_view, "SECONDS_BETWEEN_LINES", 3600.0)
        view.finished("eagle", EAGLE[1])
    assert re.fullmatch(r"3/3 requests: eagle \d+\.\d tok/s \[\d+\.\d, \d+\.\d\], .*\n", capsys.readouterr().err)


# With the command


class Watched(MockSpans):
    """Notes how much is on the screen when a request begins and ends."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        before = len(SCREEN.getvalue())
        try:
            yield from super().generate(request)
        finally:
            self.seen.append((before, len(SCREEN.getvalue())))


SCREEN = Screen()


@pytest.fixture
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        name: EntryPoint(name, f"{cls.__module__}:{cls.__name__}", "spdbench.backends")
        for name, cls in (("watched", Watched), ("other", MockSpans))
    }
    monkeypatch.setattr("spdbench.backend.installed_backends", lambda: points)
    monkeypatch.setattr("spdbench.measure.clock.time", MockSpans.time)


def words(tiny_model: Path, tmp_path: Path, *more: str) -> list[str]:
    suite, results = write_suite(tmp_path), str(tmp_path / "results")
    common = ["-m", str(tiny_model), "--dtype", "float32", "--results", results, "--drafter", "random"]
    return ["run", str(suite), *common, "-b", "watched", "-b", "other", *more]


@pytest.mark.usefixtures("own_cache", "_watched")
def test_nothing_is_written_between_a_requests_start_and_its_end(tiny_model: Path, tmp_path: Path) -> None:
    Watched.seen.clear()
    SCREEN.seek(0)
    SCREEN.truncate()
    with redirect_stderr(SCREEN), redirect_stdout(io.StringIO()):
        assert run_command(words(tiny_model, tmp_path)) == 0
    assert len(Watched.seen) == 5, "four prompts and a warm-up"
    assert all(before == after for before, after in Watched.seen)
    assert len({before for before, _ in Watched.seen}) >= 4, "it is drawn between requests"
    assert any("4/4" in line for frame in frames(SCREEN.getvalue()) for line in frame)


@pytest.mark.usefixtures("own_cache", "_watched")
def test_quiet_prints_the_comparison_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    said = spdbench(*words(tiny_model, tmp_path, "--quiet"))
    assert said.code == 0
    assert said.err == ""
    assert "speed-up" in said.out
    assert len(list((tmp_path / "results").glob("*.json"))) == 2
    assert "Wrote" in spdbench(*words(tiny_model, tmp_path)).err, "only that run is quiet"
