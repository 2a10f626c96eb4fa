"""Charts of a sweep and its page, and the page of a projection: what they hold, and what they say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from spdbench.judge.loaded import load
from spdbench.judge.projection.costs import ProfileCosts
from spdbench.judge.projection.project import Projection, Setting, project
from spdbench.judge.projection.recorded import sort_results
from spdbench.judge.sweeps import SweepRow
from spdbench.render.report import projection as projection_page
from spdbench.render.report.chart import Panel, to_csv
from spdbench.render.report.style import LIGHT, STYLES
from spdbench.render.report.sweep import CHARTS, to_html
from spdbench.render.report.vega import to_file
from tests.unit.judge.projection.projected import eagle_result, make_profile, pipeline_result, vanilla_result
from tests.unit.judge.swept import DRAFTERS, STAGES, swept, with_speedups
from tests.unit.render.report.reports import HOSTILE
from tests.unit.render.report.test_charts import fields

ROWS = swept()


def panels(name: str, rows: list[SweepRow] = ROWS) -> list[Panel]:
    return CHARTS[name].make(rows, LIGHT)


def projected() -> Projection:
    results = (vanilla_result(), pipeline_result(), eagle_result())
    recorded = sort_results([load(result, f"{at}.json") for at, result in enumerate(results)])
    setting = Setting(((15, 15), (10, 10, 10)), own_drafter=True, concurrency=4)
    return project(recorded, ProfileCosts(make_profile(), recorded), setting)


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_shows_its_rows_and_says_what_they_are(name: str) -> None:
    [panel] = panels(name)
    shown = panel.spec["data"]["values"]
    assert panel.rows[: len(shown)] == shown
    assert set(fields(panel.spec)) <= {field for row in panel.rows for field in row}
    assert "spd" in CHARTS[name].describe(panel.rows)
    assert to_csv([panel]).count("\n") == len(panel.rows) + 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CHARTS)
def test_charts_become_files(name: str, style: str) -> None:
    pytest.importorskip("vl_convert")
    drawn = to_file(CHARTS[name], panels(name), "svg", style)
    [width] = re.findall(rb'^<svg [^>]*?width="([0-9.]+)"', drawn)
    assert float(width) == pytest.approx(STYLES[style].width, rel=0.06)


def test_the_map_has_a_cell_for_each_pair_of_values() -> None:
    [panel] = panels("heat-map")
    cells = {(row["x"], row["y"]): row["speedup"] for row in panel.rows}
    assert cells == {(row.text(DRAFTERS), row.text(STAGES)): row.speedup for row in ROWS}


def test_with_one_axis_the_map_has_a_row_a_label() -> None:
    [panel] = panels("heat-map", swept([2]))
    assert {(row["x"], row["y"]) for row in panel.rows} == {(f"oracle:{each}", "spd") for each in (0.2, 0.5, 0.9)}


def test_rings_are_where_a_line_crosses_one() -> None:
    [panel] = panels("break-even")
    rings = [row for row in panel.rows if "words" in row]
    assert rings
    assert all(row["speedup"] == 1 for row in rings)


def test_a_line_has_a_ring_where_it_crosses_and_words_where_it_never_does() -> None:
    [panel] = panels("break-even", with_speedups((0.5, 1.5, 0.5)))
    assert [row["at"] for row in panel.rows if "words" in row] == pytest.approx([1.5, 2.5])
    words = CHARTS["break-even"].describe(panel.rows)
    assert words == "spd: pays from n 1.5 to 2.5 (measured: 1 to 3)"
    for speedups, word in (((0.5, 0.7), "never"), ((1.5, 1.7), "always")):
        [panel] = panels("break-even", with_speedups(speedups))
        assert CHARTS["break-even"].describe(panel.rows) == f"spd: {word} pays at n 1 to 2"


@pytest.mark.parametrize("name", CHARTS)
def test_without_points_a_chart_says_why_it_is_missing(name: str) -> None:
    assert panels(name, []) == []
    assert CHARTS[name].missing.endswith(".")


def test_a_sweeps_page_has_every_point_and_the_commands_that_draw_its_charts() -> None:
    pytest.importorskip("vl_convert")
    page = to_html(ROWS, "tiny", "results/tiny", [], "spdbench sweep tiny.yaml")
    for name in CHARTS:
        assert f"spdbench sweep tiny.yaml --chart {name} {name}.svg" in page
        assert f'data-chart="{name}"' in page
    assert page.count('<th scope="row">spd</th>') == len(ROWS)
    assert "pays from drafters" in page
    assert "few_prompts (warning): " in page


def test_a_projections_page_has_its_chart_its_tables_and_its_command() -> None:
    pytest.importorskip("vl_convert")
    found = projected()
    page = projection_page.to_html(found, "quick | projected", None, "spdbench project results --stages 2,3")
    assert "spdbench project results --stages 2,3 --chart projection.svg" in page
    assert "Several requests at once" in page
    for label in [*(row.label for row in found.pipelines), *(row.label for row in found.opponents)]:
        assert f'<th scope="row">{label}</th>' in page
    assert 'aria-label="Projected speed-up by devices. ' in page


def test_names_from_files_are_text_in_both_pages() -> None:
    pytest.importorskip("vl_convert")
    hostile: dict[str, Any] = {STAGES: HOSTILE, DRAFTERS: HOSTILE}
    rows = [SweepRow(hostile, ROWS[0].row), *ROWS[1:]]
    for page in (
        to_html(rows, HOSTILE, HOSTILE, None, HOSTILE),
        projection_page.to_html(projected(), HOSTILE, None, HOSTILE),
    ):
        assert HOSTILE not in page
