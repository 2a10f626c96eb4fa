"""A history as one HTML page: what changed and when, label by label, the charts, and a table of all runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spdbench.judge.gate.calibration import Calibration
from spdbench.judge.gate.check import MAX_SLOWDOWN
from spdbench.judge.gate.history import MAX_BASELINES, History, HistoryRun, Point
from spdbench.judge.results.embedded import EmbeddedFile, embed
from spdbench.render.check import because
from spdbench.render.columns import EMPTY, harmless, loads, work
from spdbench.render.report.history import CHARTS, SIGNS, change_of, machine_name, run_names
from spdbench.render.report.page import command, fact, figure, fill, model_words

COLUMNS = ("run", "label", "speed-up [95 %]", "change", "tok/s", "accept", "verdict", "machine", "file")
LOOKS = {"regression": "bad", "improved": "good"}
RULES = (
    f"Each run is judged as spdbench check judges, against up to {MAX_BASELINES} runs before it of the same label on "
    "the same machine. A regression or an improvement begins a new baseline, so that a lasting change is found once. "
    "Inconclusive, incomplete and failed runs are part of no baseline. Change is that of the speed-up, relative to the "
    "baseline."
)


class Answer(NamedTuple):
    """A sentence on one label, and the class that it is drawn with."""

    words: str
    look: str


class Line(NamedTuple):
    """A row of the table: one label of one run. `cells` are those before the verdict."""

    cells: list[str]
    verdict: str
    look: str
    machine: str
    file: str


def to_html(
    history: History, sources: Sequence[EmbeddedFile] | None, calibration: Calibration | None, name: str
) -> str:
    """The page of `history`. `sources` are the result files; None leaves them out. `name` is what `spdbench report`
    reads to draw the same charts: the page, or the results' folder."""
    head = history.head
    parts = [work(head), *loads([head])]
    count = f"{len(history.runs)} runs" if len(history.runs) > 1 else "one run"
    return fill(
        "history.html",
        [figure(chart, history, command(name, chart.name)) for chart in CHARTS.values()],
        embed(sources) if sources is not None else "",
        question="Has it changed?",
        title=" | ".join([*parts, count]),
        verdicts=[answer(history, label) for label in history.labels],
        rules=RULES,
        columns=COLUMNS,
        rows=_lines(history),
        environment=_environment(history, calibration),
    )


def answer(history: History, label: str) -> Answer:
    """What happened to `label`, and where it is now."""
    points = history.of(label)
    names = run_names(history)
    now = _now(points[-1][1])
    if len(points) == 1:
        only = points[0][1]
        if only.verdict == "first":
            return Answer(f"{label}: one run, and nothing before it to judge it by; {now}", "")
        return Answer(
            f"{label}: one run, {only.verdict}: {because(only.judgement)}; {now}", LOOKS.get(only.verdict, "")
        )
    regressions = [(run, point) for run, point in points if point.verdict == "regression"]
    rest = ", ".join(
        f"{number} {verdict}"
        for verdict in ("improved", "inconclusive", "not comparable")
        if (number := sum(point.verdict == verdict for _, point in points))
    )
    others = f" ({rest})" if rest else ""
    if not regressions:
        return Answer(f"{label}: no regression in {len(points)} runs{others}; {now}", "good")
    run, point = regressions[-1]
    count = "one regression" if len(regressions) == 1 else f"{len(regressions)} regressions, the last one"
    where = f"on {names[run]} ({because(point.judgement)})"
    return Answer(f"{label}: {count} {where}, in {len(points)} runs{others}; {now}", "bad")


def _now(point: Point) -> str:
    if point.speedup is not None:
        return f"now {_speedup(point)}"
    rate = point.result.metrics["decode_tokens_per_s"]
    return "no tokens decoded now" if rate is None else f"now {rate:.1f} tok/s"


def _speedup(point: Point) -> str:
    if point.speedup is None:
        return EMPTY
    interval = "" if point.interval is None else f" [{point.interval[0]:.2f}, {point.interval[1]:.2f}]"
    return f"{point.speedup:.2f}x{interval}"


def _lines(history: History) -> list[Line]:
    """The newest run first."""
    names = run_names(history)
    return [_line(names[run], run, point) for run in reversed(history.runs) for point in run.points]


def _line(name: str, run: HistoryRun, point: Point) -> Line:
    rate, accepted = (point.result.metrics[metric] for metric in ("decode_tokens_per_s", "acceptance_rate"))
    numbers = [EMPTY if rate is None else f"{rate:.1f}", EMPTY if accepted is None else f"{accepted:.1%}"]
    verdict = f"{SIGNS[point.verdict].text} {point.verdict}"
    reason = because(point.judgement)
    return Line(
        [name, point.label, _speedup(point), change_of(point) or EMPTY, *numbers],
        f"{verdict}; {reason}" if reason and point.verdict not in ("pass", "improved") else verdict,
        LOOKS.get(point.verdict, ""),
        machine_name(run.head),
        Path(point.result.file).name,
    )


def _environment(history: History, calibration: Calibration | None) -> list[tuple[str, str]]:
    head = history.head
    first, last = history.runs[0].started, history.runs[-1].started
    found = {
        "suite": f"{head.suite.name} v{head.suite.version} ({head.suite.source})",
        "model": model_words(head.model),
        "measured": f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC",
        "noise": _noise(calibration),
    }
    for run in history.runs:
        own = {name: value for name, value in run.head.environment.items() if value and name != "fingerprint"}
        own.pop("read_bandwidth_bytes_per_s", None)  # another in each run
        about = ", ".join(" ".join(fact(name, value)) for name, value in own.items())
        found[f"machine {machine_name(run.head)}"] = about
    return [(name, harmless(value)) for name, value in found.items()]


def _noise(calibration: Calibration | None) -> str:
    if calibration is None:
        return f"not calibrated: {MAX_SLOWDOWN:.0%} is allowed; spdbench check --calibrate finds what is noise"
    labels = ", ".join(dict.fromkeys(each.label for each in calibration.thresholds))
    machine = calibration.fingerprint[:8]
    return f"calibrated on machine {machine} for {labels} (calibration.json); elsewhere {MAX_SLOWDOWN:.0%} is allowed"
