"""The page of a history: what its charts hold, what it says of each label, and what it is called by."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import pytest

from spdbench.judge.gate.calibration import calibrate
from spdbench.judge.gate.history import History, history
from spdbench.judge.loaded import load
from spdbench.render.report.chart import Panel
from spdbench.render.report.history import CHARTS, SIGNS, _decimals, run_names
from spdbench.render.report.history_page import answer
from spdbench.render.report.style import LIGHT, STYLES
from spdbench.render.report.vega import to_file
from tests.unit.judge.gate.histories import BEGIN, NUM_RUNS, PLANTED, history_results, same_code
from tests.unit.render.report.reports import HOSTILE
from tests.unit.render.report.test_charts import fields


def made(num_runs: int = NUM_RUNS, **more: Any) -> History:
    calibration = calibrate([load(result, file) for file, result in same_code().items()])
    return history([load(result, file) for file, result in history_results(num_runs, **more).items()], calibration)


EVERYTHING = made()


def panels(name: str, of: History = EVERYTHING) -> list[Panel]:
    return CHARTS[name].make(of, LIGHT)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CHARTS)
def test_charts_become_files_as_wide_as_their_style(name: str, style: str) -> None:
    pytest.importorskip("vl_convert")
    drawn = to_file(CHARTS[name], panels(name), "svg", style)
    [width] = re.findall(rb'^<svg [^>]*?width="([0-9.]+)"', drawn)
    assert float(width) == pytest.approx(STYLES[style].width, rel=0.06)
    assert drawn.count(b"<path") > NUM_RUNS


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_holds_every_run_and_says_what_happened(name: str) -> None:
    for panel in panels(name):
        assert panel.rows == panel.spec["data"]["values"]
        labels = {row["label"] for row in panel.rows}
        assert len(panel.rows) == NUM_RUNS * len(labels)
        assert set(fields(panel.spec)) <= panel.rows[0].keys() | {"machine"}
    words = CHARTS[name].describe([row for panel in panels(name) for row in panel.rows])
    assert "eagle: " in words
    assert "regression at 2026-06-14" in words
    assert words.count("regression") == 1 + ("vanilla" in words)  # of vanilla it says that there is none


def test_speedups_have_a_panel_a_label_and_the_others_one_for_all() -> None:
    assert [panel.heading for panel in panels("history-speedup")] == ["eagle"]
    assert [len({row["label"] for row in panel.rows}) for panel in panels("history-speed")] == [2]
    assert [len({row["label"] for row in panel.rows}) for panel in panels("history-acceptance")] == [1]


def test_only_the_planted_run_has_a_number_of_its_own() -> None:
    [panel] = panels("history-speedup")
    assert [at for at, row in enumerate(panel.rows) if row["words"]] == [PLANTED]
    assert panel.rows[PLANTED]["words"] == "\N{MINUS SIGN}20.2%"
    assert panel.rows[PLANTED]["because"] == "speed-up: slower by 20.2%, and 3.1% is allowed"


def layers(panel: Panel, kind: str) -> list[dict[str, Any]]:
    return [layer for layer in panel.spec["layer"] if layer["mark"]["type"] == kind]


def test_each_verdict_that_occurs_has_a_shape_of_its_own() -> None:
    [panel] = panels("history-speedup")
    marks = {layer["transform"][0]["filter"]: layer["mark"] for layer in layers(panel, "point")}
    verdicts = {row["verdict"] for row in panel.rows}
    assert set(marks) == {f"datum.verdict === '{verdict}'" for verdict in verdicts}
    assert marks["datum.verdict === 'regression'"]["color"] == LIGHT.bad
    assert len({(sign.shape, sign.filled) for sign in SIGNS.values()}) == len(SIGNS)
    assert len({sign.text for sign in SIGNS.values()}) == len(SIGNS)


def test_bands_are_those_that_were_judged_by() -> None:
    [panel] = panels("history-speedup")
    for row, (_, point) in zip(panel.rows, EVERYTHING.of("eagle"), strict=True):
        band = point.speedup_band
        expected = (None, None, None) if band is None else band[:3]
        assert tuple(row[f"speedup_{end}"] for end in ("baseline", "floor", "ceiling")) == expected
        low, high = panel.spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
        assert all(low <= value <= high for value in expected if value is not None)


def test_tokens_per_s_have_a_band_only_where_it_is_calibrated() -> None:
    elsewhere = made(4, machine=lambda _: "another")
    assert any(row["tokens_per_s_floor"] for row in panels("history-speed")[0].rows)
    assert not any(row["tokens_per_s_floor"] for row in panels("history-speed", elsewhere)[0].rows)
    assert any(row["speedup_floor"] for row in panels("history-speedup", elsewhere)[0].rows)


@pytest.mark.parametrize(
    ("domain", "decimals"), [((0, 1), 0), ((0.7, 0.75), 0), ((0.7, 0.73), 1), ((0.7, 0.742), 1), ((0.7, 0.7005), 2)]
)
def test_labels_of_shares_differ_from_tick_to_tick(domain: tuple[float, float], decimals: int) -> None:
    assert _decimals(domain) == decimals


def test_acceptance_has_no_label_twice() -> None:
    pytest.importorskip("vl_convert")
    drawn = to_file(CHARTS["history-acceptance"], panels("history-acceptance"), "svg", "screen").decode()
    labels = re.findall(r">([0-9.]+%)<", drawn)
    assert len(labels) == len(set(labels)) > 2


def test_a_change_of_machine_breaks_the_line_and_is_named() -> None:
    found = made(6, machine=lambda number: "0a1b2c3d4e5f6071" if number < 4 else "77ff2c3d4e5f6071")
    for name in CHARTS:
        [panel] = panels(name, found)
        assert [row["stretch"] for row in panel.rows if row["label"] == "eagle"] == [0, 0, 0, 0, 1, 1]
        breaks = [layer["data"]["values"] for layer in panel.spec["layer"] if "data" in layer]
        assert breaks == [[{"run": "2026-06-05", "machine": "machine 77ff2c3d"}]] * 2  # a line, and its name
    assert not any("data" in layer for layer in panels("history-speedup")[0].spec["layer"])


def test_runs_are_named_by_day_or_time_and_by_commit_where_all_have_one() -> None:
    assert list(run_names(EVERYTHING).values())[:2] == ["2026-06-01", "2026-06-02"]
    commits = made(2, commit=lambda number: f"{number:012x}" + "+dirty" * number)
    assert list(run_names(commits).values()) == ["2026-06-01 00000000", "2026-06-02 00000000+"]
    some = made(2, commit=lambda number: "abc" if number else None)
    assert list(run_names(some).values()) == ["2026-06-01", "2026-06-02"]


@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        (timedelta(hours=1), ["2026-06-01 09:30", "2026-06-01 10:30"]),
        (timedelta(seconds=1), ["2026-06-01 09:30:00", "2026-06-01 09:30:01"]),
        (timedelta(0), ["2026-06-01", "2026-06-01 #2"]),
    ],
)
def test_names_of_runs_are_unique(apart: timedelta, expected: list[str]) -> None:
    results = [result for file, result in history_results(2).items() if "draft" in file]
    files = [
        load(result.model_copy(update={"created": (BEGIN + at * apart).isoformat()}), f"{at}.json")
        for at, result in enumerate(results)
    ]
    assert list(run_names(history(files, None)).values()) == expected


def test_answers_say_what_happened_and_where_it_is_now() -> None:
    eagle, vanilla = answer(EVERYTHING, "eagle"), answer(EVERYTHING, "vanilla")
    assert eagle.look == "bad"
    assert eagle.words.startswith(
        "eagle: one regression on 2026-06-14 (speed-up: slower by 20.2%, and 3.1% is allowed), in 20 runs; now 2.18x ["
    )
    assert vanilla.look == "good"
    assert vanilla.words.startswith("vanilla: no regression in 20 runs; now ")
    twice = answer(made(12, speed=lambda number: 1.0 if number < 5 else 0.8 if number < 9 else 0.6), "eagle")
    assert twice.words.startswith("eagle: 2 regressions, the last one on 2026-06-10 (")
    back = answer(made(12, speed=lambda number: 0.8 if number == 5 else 1.0), "eagle")
    assert "in 12 runs (1 improved); now" in back.words


def test_one_run_says_that_there_is_nothing_before_it() -> None:
    words = answer(made(1), "eagle").words
    assert words.startswith("eagle: one run, and nothing before it to judge it by; now 2.")
    assert panels("history-speedup", made(1))[0].rows[0]["verdict"] == "first"


def test_without_plain_decoding_there_are_tokens_and_no_speedups() -> None:
    files = [load(result, file) for file, result in history_results(3).items() if "draft" in file]
    found = history(files, None)
    assert panels("history-speedup", found) == []
    assert len(panels("history-speed", found)[0].rows) == 3
    assert "tok/s" in answer(found, "eagle").words


def test_names_from_outside_turn_no_text_around() -> None:
    odd = made(3, label=HOSTILE, commit=lambda _: HOSTILE, machine=lambda number: HOSTILE * number)
    text = json.dumps([panel.spec for name in CHARTS for panel in panels(name, odd)], ensure_ascii=False)
    assert "\u202e" not in text
    assert "\x1b" not in text
