"""Charts: each shows what the results hold, says so in words, and says why where there is nothing to show."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from spdbench.judge.comparison.compare import Table, compare
from spdbench.judge.loaded import load
from spdbench.judge.results.lanes import BubbleParts
from spdbench.render.report.chart import Panel, to_csv
from spdbench.render.report.speed import _marks
from spdbench.render.report.style import DARK, LIGHT, STYLES, Palette, page_palette
from spdbench.render.report.vega import CHARTS, to_file
from tests.builders import MS, chunk_steps, make_backend, make_result, make_run, pipeline_steps, vanilla_steps
from tests.unit.render.report.reports import HOSTILE, results, table

EVERYTHING = table(results())
POINTS_AN_INCH = 72


def panels(name: str, of: Table = EVERYTHING) -> list[Panel]:
    return CHARTS[name].make(of, LIGHT)


def rows(name: str, of: Table = EVERYTHING) -> list[dict[str, Any]]:
    return [row for panel in panels(name, of) for row in panel.rows]


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_shows_something_and_says_it(name: str) -> None:
    found = panels(name)
    assert found
    assert all(panel.rows == panel.spec["data"]["values"] for panel in found)
    assert len(CHARTS[name].describe(rows(name))) > 20
    assert len({panel.heading for panel in found}) == len(found)


@pytest.mark.parametrize("name", CHARTS)
def test_fields_that_a_chart_encodes_are_in_its_rows(name: str) -> None:
    for panel in panels(name):
        known = panel.rows[0].keys() | {"x", "y"}
        assert set(fields(panel.spec)) <= known


def fields(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("field"), str):
            yield node["field"]
        for key, value in node.items():
            if key != "data":
                yield from fields(value)
    elif isinstance(node, list):
        for value in node:
            yield from fields(value)


@pytest.mark.parametrize("name", CHARTS)
def test_csv_has_every_row(name: str) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(panels(name)))))
    assert len(lines) == len(rows(name))
    assert all(line["label"] for line in lines)


def test_speedups_are_drawn_with_their_intervals_and_flags() -> None:
    found = {row["label"]: row for row in rows("speedup")}
    eagle = next(row for row in EVERYTHING.rows if row.label == "eagle" and row.category is None)
    assert found["eagle"]["speedup"] == eagle.metrics["speedup"]
    assert [found["eagle"]["low"], found["eagle"]["high"]] == eagle.metrics["speedup_ci"]
    assert found["vanilla"]["outcome"] == "baseline"
    assert found["eagle"]["outcome"] == "faster"
    assert found["spd"]["outcome"] == "slower"
    assert "lossy" in found["medusa"]["flags"]
    assert "lossy" not in found["eagle"]["flags"]


def test_no_difference_is_drawn_as_such() -> None:
    base = [make_run(vanilla_steps(9, step_ns=10_000_000 + n * 100_000), prompt=f"p{n}") for n in range(8)]
    same = [make_run(vanilla_steps(9, step_ns=10_700_000 - n * 100_000), prompt=f"p{n}") for n in range(8)]
    both = [make_result(base), make_result(same, make_backend(label="again"))]
    [compared] = compare([load(result, f"{at}.json") for at, result in enumerate(both)], by_category=True)
    again = rows("speedup", compared)[1]
    assert again["outcome"] == "no difference shown"
    assert again["words"].startswith("1.0")
    assert "], no difference shown" in again["words"]
    assert hollow(panels("speedup", compared)[0]) == {"no difference shown", "no interval"}


def hollow(panel: Panel) -> set[str]:
    """The outcomes whose dots are empty; all others have filled ones."""
    dots = [layer for layer in panel.spec["layer"] if layer["mark"]["type"] == "point"]
    chosen = {layer["mark"]["filled"]: layer["transform"][0]["filter"] for layer in dots}
    assert chosen == {False: chosen[False], True: {"not": chosen[False]}}
    assert chosen[False]["field"] == "outcome"
    return set(chosen[False]["oneOf"])


def test_positions_of_drafts_have_whole_ticks() -> None:
    [panel] = panels("acceptance")
    ticks = panel.spec["layer"][0]["encoding"]["x"]["axis"]["values"]
    assert ticks == [*range(1, 1 + len(ticks))]
    assert {row["position"] for row in panel.rows if row["judged"] >= 20} <= set(ticks)


def scatter(speedups: list[float], *, apart: int = 2) -> Panel:
    """Of prompts whose baseline takes 10 ms a token, `apart` % more from prompt to prompt."""
    steps_ns = [round((10 + number * apart / 10) * MS) for number in range(len(speedups))]
    runs = [
        [make_run(vanilla_steps(9, step_ns=round(at / by)), prompt=f"p{n}") for n, (at, by) in enumerate(each)]
        for each in (zip(steps_ns, [1.0] * len(speedups), strict=True), zip(steps_ns, speedups, strict=True))
    ]
    both = [make_result(runs[0]), make_result(runs[1], make_backend(label="fast"))]
    [compared] = compare([load(result, f"{at}.json") for at, result in enumerate(both)], by_category=True)
    [panel] = panels("prompts", compared)
    return panel


def axes(panel: Panel) -> dict[str, dict[str, Any]]:
    return {name: panel.spec["layer"][1]["encoding"][name] for name in ("x", "y")}


def test_one_very_fast_prompt_is_at_the_edge_and_leaves_the_others_room() -> None:
    panel = scatter([1.2, 1.3, 1.4, 1.25, 1.35, 40.0, 1.3, 1.3])
    assert panel.heading == "1 dot beyond the axes: empty, at the edge"
    for name, axis in axes(panel).items():
        low, high = axis["scale"]["domain"]
        assert axis["scale"]["type"] == "log"
        assert axis["scale"]["clamp"] is True
        assert [row["prompt"] for row in panel.rows if not low <= row[axis["field"]] <= high] == ["p5"] * (name == "y")
        assert high < 5 * low
        assert len(axis["axis"]["values"]) >= 3


@pytest.mark.parametrize("speedups", [[1.1] * 6 + [9.0] * 3, [1.0] * 8, [3.0], [1.0, 50.0]], ids=len)
def test_groups_of_prompts_are_all_in_the_picture(speedups: list[float]) -> None:
    panel = scatter(speedups, apart=0)
    assert panel.heading is None
    for axis in axes(panel).values():
        low, high = axis["scale"]["domain"]
        assert all(low < row[axis["field"]] < high for row in panel.rows)
        ticks = axis["axis"]["values"]
        assert len(ticks) >= 2
        assert all(low <= tick <= high for tick in ticks)


def test_no_line_runs_through_the_words_of_speedups() -> None:
    """The only line without a row of its own was the one at 1.0."""
    [panel] = panels("speedup")
    assert all("y" in layer["encoding"] for layer in panel.spec["layer"])
    [line] = [layer for layer in panel.spec["layer"] if layer["encoding"]["x"] == {"datum": 1}]
    words = [layer["mark"] for layer in panel.spec["layer"] if layer["mark"]["type"] == "text"]
    nearest = min(abs(float(mark["dy"]["expr"].split()[0])) for mark in words)
    half = float(line["mark"]["size"]["expr"].split()[0]) / 2
    assert (nearest - half) * panel.spec["height"] >= 6  # half a line of text


def test_long_labels_that_begin_alike_stay_different() -> None:
    pytest.importorskip("vl_convert")
    names = [f"eagle-with-all-of-its-many-options-{number}" for number in range(3)]
    runs = [make_run(chunk_steps([1, 2, 2]), prompt=f"p{n}") for n in range(3)]
    base = make_result([make_run(vanilla_steps(5), prompt=f"p{n}") for n in range(3)])
    made = [base, *(make_result(runs, make_backend("draft_verify", label=name)) for name in names)]
    [compared] = compare([load(result, f"{at}.json") for at, result in enumerate(made)], by_category=True)
    for chart in ("speedup", "prompts"):
        drawn = to_file(CHARTS[chart], panels(chart, compared), "svg", "paper").decode()
        assert len(set(re.findall(r">(eag[^<]*[0-9])<", drawn))) == len(names), chart


def test_flags_that_have_no_room_are_counted() -> None:
    flags = ["few_prompts", "busy_machine", "noisy", "drift", "truncated"]
    assert _marks(flags[:2]) == "flags: few_prompts, busy_machine"
    assert _marks(flags) == "flags: few_prompts, busy_machine and 3 more"
    assert _marks([]) == ""


def test_a_category_of_one_prompt_is_an_empty_dot_without_interval() -> None:
    prompts = [("p0", "alone"), *((f"p{n}", "many") for n in range(1, 9))]
    base = [make_run(vanilla_steps(9, step_ns=10 * MS), prompt=prompt, category=name) for prompt, name in prompts]
    fast = [make_run(vanilla_steps(9, step_ns=5 * MS), prompt=prompt, category=name) for prompt, name in prompts]
    both = [make_result(base), make_result(fast, make_backend(label="fast"))]
    [compared] = compare([load(result, f"{at}.json") for at, result in enumerate(both)], by_category=True)
    found = {row["category"]: row for row in rows("categories", compared)}
    assert (found["alone"]["outcome"], found["alone"]["low"]) == ("no interval", None)
    assert found["many"]["outcome"] == "faster"
    assert hollow(panels("categories", compared)[0]) == {"no difference shown", "no interval"}
    assert "alone, fast: 2.00x (no interval)" in CHARTS["categories"].describe(rows("categories", compared))
    assert "no interval" in CHARTS["categories"].read


def test_waterfall_ends_at_what_was_measured() -> None:
    for panel in panels("waterfall"):
        *steps, measured, _ = panel.rows
        assert [step["start"] for step in steps[1:]] == [step["end"] for step in steps[:-1]]
        assert steps[-1]["end"] == pytest.approx(measured["end"])


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_waterfall_names_shared_cores_as_the_cause(num_devices: int) -> None:
    spans = dict.fromkeys(BubbleParts.model_fields, 0.0) | {"useful": 0.9, "host": 0.1}
    steps = pipeline_steps([True] * 8, 3, step_ns=20 * MS)
    spd = [make_run(steps, prompt=f"p{n}", bubble=spans) for n in range(8)]
    base = [make_run(vanilla_steps(9), prompt=f"p{n}") for n in range(8)]
    both = [make_result(base), make_result(spd, make_backend("pipeline", num_devices=num_devices))]
    [compared] = compare([load(result, f"{at}.json") for at, result in enumerate(both)], by_category=True)
    [panel] = panels("waterfall", compared)
    cause = "spd: its 3 stages share the cores of one device, so that each pass takes longer (verify inflation)"
    assert panel.heading == ("spd" if num_devices == 3 else cause)


def test_waterfalls_share_an_axis_that_holds_every_bar() -> None:
    spans = BubbleParts(useful=1, wasted=0, fill=0, verify=0, draft=0, imbalance=0, host=0, unattributed=0)
    steps = chunk_steps([1, 2, 2, 2], step_ns=8 * MS)  # a pass takes less than vanilla's 10 ms: the ideal is longer
    quick = [make_run(steps, prompt=f"p{n}", bubble=spans) for n in range(8)]
    base = [make_run(vanilla_steps(7), prompt=f"p{n}") for n in range(8)]
    both = [make_result(base), make_result(quick, make_backend("draft_verify"))]
    [compared] = compare([load(result, f"{at}.json") for at, result in enumerate(both)], by_category=True)
    assert any(row["kind"] == "gain" for row in rows("waterfall", compared))
    for of in (EVERYTHING, compared):
        drawn = panels("waterfall", of)
        [(low, high)] = {tuple(panel.spec["encoding"]["x"]["scale"]["domain"]) for panel in drawn}
        ends = [row[end] for panel in drawn for row in panel.rows for end in ("start", "end")]
        assert low == 0
        assert high == pytest.approx(max(ends))


def test_bubble_shows_all_of_the_time() -> None:
    for label in ("eagle", "medusa", "spd"):
        assert sum(row["share"] for row in rows("bubble") if row["label"] == label) == pytest.approx(1)


def test_shares_of_step_lengths_make_a_whole() -> None:
    for row in rows("step-lengths-by-category"):
        own = [
            each["share"]
            for each in rows("step-lengths-by-category")
            if each["name"] == row["name"] and each["label"] == row["label"]
        ]
        assert sum(own) == pytest.approx(1)


def test_where_there_is_nothing_to_show_the_reason_is_there() -> None:
    alone = make_result([make_run(prompt=f"p{n}") for n in range(8)])
    [compared] = compare([load(alone, "a.json")], by_category=True)
    for name, chart in CHARTS.items():
        assert panels(name, compared) == [], name
        assert chart.missing.endswith(".")


def test_timeline_shows_every_span_around_a_rejection() -> None:
    detailed = replace(table(results(detailed=True)), decode=lambda ids: "".join(f"<b>{each}\n" for each in ids))
    eagle, _, spd = panels("timeline", detailed)
    assert (eagle.heading, spd.heading) == ("eagle: prompt p0, turn 0, repeat 0", "spd: prompt p0, turn 0, repeat 0")
    cycles = [row for row in spd.rows if row["lane"] == "cycles"]
    verdicts = ["filling", "accepted", "accepted", "rejected", "filling", "filling", "accepted", "accepted"]
    assert [row["what"] for row in cycles] == verdicts
    for lane in ("stage 0", "stage 1", "stage 2"):
        own = [row for row in spd.rows if row["lane"] == lane]
        assert [(row["start"], row["end"]) for row in own] == [(row["start"], row["end"]) for row in cycles]
        assert [row["what"] == "work thrown away" for row in own] == [row["what"] == "rejected" for row in cycles]
    assert len(spd.rows) == 4 * len(cycles)
    assert spd.rows[0]["start"] == 0
    tokens = {row["token"] for row in spd.rows}
    assert any(token.startswith("<b>1") for token in tokens)
    assert not any("\n" in token for token in tokens)
    assert "rejected" in [row["what"] for row in eagle.rows if row["lane"] == "rounds"]


def test_draft_and_verify_alone_has_no_timeline() -> None:
    found = make_result([make_run(chunk_steps([1, 2, 2]))], make_backend("draft_verify"))
    [compared] = compare([load(found, "a.json")], by_category=True)
    assert panels("timeline", compared) == []
    assert len(panels("step-lengths", compared)) == 1


def test_names_from_outside_turn_no_text_around() -> None:
    odd = table(results(label=HOSTILE, prompt="p\u202e"))
    for name in CHARTS:
        text = json.dumps([panel.spec for panel in panels(name, odd)], ensure_ascii=False)
        assert "\u202e" not in text
        assert "\x1b" not in text


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough_to_read_and_to_tell_marks_apart(palette: Palette) -> None:
    for colour in (palette.ink, palette.muted, palette.good, palette.bad, palette.series[0]):
        assert contrast(colour, palette.surface) >= 4.5
    for colour in (*palette.series, palette.baseline, palette.neutral):
        assert contrast(colour, palette.surface) >= 3


def test_colours_of_the_page_are_those_that_its_style_sheet_names() -> None:
    page = page_palette()
    assert page.ink == "var(--ink)"
    assert page.series[1] == "var(--series-1)"
    assert len(page.parts) == len(LIGHT.parts) == len(DARK.parts)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_charts_become_files(form: Any, style: str) -> None:
    pytest.importorskip("vl_convert")
    for name in ("speedup", "waterfall"):
        content = to_file(CHARTS[name], panels(name), form, style)
        assert content.startswith({"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}[form])
        if form == "svg":
            assert content.count(b"<path") > 3
            assert b"eagle" in content


@pytest.mark.parametrize("style", STYLES)
def test_files_are_as_wide_as_their_style(style: str) -> None:
    pytest.importorskip("vl_convert")
    detailed = table(results(detailed=True))
    drawn = {name: to_file(chart, chart.make(detailed, LIGHT), "svg", style) for name, chart in CHARTS.items()}
    for name, content in drawn.items():
        [width] = re.findall(rb'^<svg [^>]*?width="([0-9.]+)"', content)
        assert float(width) == pytest.approx(STYLES[style].width, rel=0.06), name


@pytest.mark.parametrize(("style", "most"), [("paper", 6.0), ("paper-wide", 6.5), ("screen", 9.0)])
def test_files_are_not_much_higher_than_a_page_has_room_for(style: str, most: float) -> None:
    pytest.importorskip("vl_convert")
    detailed = table(results(detailed=True))
    for name in ("waterfall", "timeline", "step-lengths-by-context"):
        drawn = to_file(CHARTS[name], panels(name, detailed), "svg", style)
        [height] = re.findall(rb'^<svg [^>]*?height="([0-9.]+)"', drawn)
        assert float(height) / POINTS_AN_INCH < most, name


def test_numbers_of_an_axis_that_all_panels_share_stand_once() -> None:
    pytest.importorskip("vl_convert")
    drawn = to_file(CHARTS["waterfall"], panels("waterfall"), "svg", "paper").decode()
    assert drawn.count(">ms a token<") == 1


def test_colours_mean_the_same_in_every_panel_of_a_file() -> None:
    pytest.importorskip("vl_convert")
    drawn = to_file(CHARTS["step-lengths-by-category"], panels("step-lengths-by-category"), "svg", "screen").decode()
    bars = [mark for mark in re.findall("<path[^>]*>", drawn) if 'aria-roledescription="bar"' in mark]
    assert len(bars) == len(rows("step-lengths-by-category"))
    for bar in bars:
        [length] = re.findall("ids: ([0-9])", bar)
        assert f'fill="{LIGHT.lengths[int(length)]}"' in bar
