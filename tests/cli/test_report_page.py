"""The report in a browser: it draws, sorts and opens answers without network, and everybody can read and reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spdbench.cli.reading.report import command
from spdbench.render.report import history
from spdbench.render.report import projection as projection_page
from spdbench.render.report import sweep as sweep_page
from spdbench.render.report.vega import CHARTS
from tests.builders import write_result
from tests.unit.judge.gate.histories import history_results
from tests.unit.judge.swept import swept
from tests.unit.render.report.reports import HOSTILE, WRONG, results
from tests.unit.render.report.test_charts import contrast
from tests.unit.render.report.test_sweep import projected

pytest.importorskip("vl_convert", reason="vl-convert-python draws the charts: pip install 'spdbench[report]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: it is in the dev extra")
WIDE, NARROW = 1280, 380
PAGES = ("plain", "hostile", "history", "hostile history", "detailed", "sweep", "projection")
TEXT_OF = """
const seen = [];
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || element.closest('script, style, noscript, dialog:not([open]), details:not([open])')) continue;
  const style = getComputedStyle(element);
  const colour = element instanceof SVGElement ? style.fill : style.color;
  seen.push([element.tagName, colour, element.textContent.slice(0, 40)]);
}
return seen;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of plain results, of results with spans and drafts, of a history, a sweep and a projection; and plain and
    history pages in which all that others write is hostile."""
    found: dict[str, Path] = {}
    more: dict[str, Any]
    for name, more in (
        ("plain", {"text": "Two plus two is four."}),
        ("detailed", {"detailed": True}),
        ("hostile", {"text": HOSTILE, "label": HOSTILE, "prompt": HOSTILE}),
    ):
        folder = tmp_path_factory.mktemp(name)
        for file, result in results(12, **more).items():
            write_result(result, folder / file)
        done = CliRunner().invoke(command, [str(folder), "-o", str(folder / "report.html")], catch_exceptions=False)
        assert done.exit_code == 0
        found[name] = folder / "report.html"
    for name, more in (
        ("history", {"commit": lambda number: f"{number:08x}abcd"}),
        ("hostile history", {"label": HOSTILE, "commit": lambda _: HOSTILE, "suite": HOSTILE}),
    ):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        for file, result in history_results(machine=lambda number: "0a1b" if number < 17 else HOSTILE, **more).items():
            write_result(result, folder / file)
        arguments = ["--history", str(folder), "-o", str(folder / "history.html")]
        assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
        found[name] = folder / "history.html"
    for name, text in (
        ("sweep", sweep_page.to_html(swept(), "tiny", "results/tiny", [], "spdbench sweep tiny.yaml")),
        ("projection", projection_page.to_html(projected(), "quick | projected", None, "spdbench project results")),
    ):
        found[name] = tmp_path_factory.mktemp(name) / f"{name}.html"
        found[name].write_text(text)
    return found


def opened(browser: Any, page: Path, width: int = WIDE, scheme: str = "light") -> Any:
    """`browser` with the page drawn in it, in a window that is `width` wide."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages said
    browser.get(page.as_uri())
    waiting = pytest.importorskip("selenium.webdriver.support.wait")
    waiting.WebDriverWait(browser, 60).until(
        lambda driver: driver.execute_script("return document.body.dataset.drawn === 'yes'")
    )
    return browser


@pytest.mark.parametrize("name", PAGES)
def test_no_errors_and_no_network(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    assert [line["message"] for line in browser.get_log("browser")] == []
    requests = [line["message"] for line in browser.get_log("performance") if "requestWillBeSent" in line["message"]]
    assert requests, "nothing was recorded"
    assert [
        request for request in requests if pages[name].as_uri() not in request and '"url":"data:' not in request
    ] == []


@pytest.mark.parametrize(
    ("name", "charts"),
    [("plain", CHARTS), ("detailed", CHARTS), ("history", history.CHARTS), ("sweep", sweep_page.CHARTS)],
)
def test_every_chart_has_marks(browser: Any, pages: dict[str, Path], name: str, charts: dict[str, Any]) -> None:
    opened(browser, pages[name])
    counts = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map((chart) => [chart.dataset.chart, "
        "chart.querySelectorAll('svg .mark-rect path, svg .mark-symbol path, svg .mark-rule line').length])"
    )
    assert {chart for chart, _ in counts} == set(charts)
    assert all(count > 2 for _, count in counts), counts


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_page_does_not_scroll_sideways(browser: Any, pages: dict[str, Path], width: int, name: str) -> None:
    opened(browser, pages[name], width)
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('.chart svg')].filter((svg) => "
        "svg.getBoundingClientRect().right > window.innerWidth).length"
    )
    assert beyond == 0


def test_no_word_of_the_speedups_is_cut_on_a_narrow_page(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"], NARROW)
    words = browser.execute_script(
        "return [...document.querySelectorAll('[data-chart=speedup] svg text')].map((each) => each.textContent)"
    )
    assert {"eagle", "3 stages on 1 device"} <= set(words)
    assert any(word.startswith("flags: ") for word in words)
    assert [word for word in words if "\N{HORIZONTAL ELLIPSIS}" in word] == []


def test_all_columns_are_seen_without_scrolling_on_a_narrow_page(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"], NARROW)
    box = browser.find_element("css selector", "[aria-label=Comparison]")
    assert browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", box)
    rows = {row.text.splitlines()[0]: row.text for row in box.find_elements("css selector", "tbody tr")}
    assert set(rows) == {"vanilla", "eagle", "medusa (lossy)", "spd"}
    named = "return getComputedStyle(document.querySelector('.numbers td:nth-child(2)'), '::before').content"
    assert browser.execute_script(named) == '"speed-up [95 %]"'
    assert "[" in rows["eagle"]
    assert "-" not in rows["eagle"].splitlines()  # what does not apply takes no room


@pytest.mark.parametrize("name", ["plain", "history"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(browser: Any, pages: dict[str, Path], scheme: str, name: str) -> None:
    opened(browser, pages[name], scheme=scheme)
    surface = hexadecimal(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (contrast(surface, "#000000") > 10) is (scheme == "light")
    found = browser.execute_script(TEXT_OF)
    assert {tag for tag, _, _ in found} >= {"H1", "LI", "P", "text", "CODE", "A"}
    for tag, colour, text in found:
        assert contrast(hexadecimal(colour), surface) >= 4.5, (tag, colour, text)


def hexadecimal(colour: str) -> str:
    """`rgb(1, 2, 3)` as `#010203`."""
    assert colour.startswith("rgb("), colour
    return "#" + "".join(f"{int(part):02x}" for part in colour[4:-1].split(","))


def test_dark_mode_reaches_the_marks_of_charts(browser: Any, pages: dict[str, Path]) -> None:
    fills = {}
    for scheme in ("light", "dark"):
        opened(browser, pages["plain"], scheme=scheme)
        fills[scheme] = browser.execute_script(
            "return getComputedStyle(document.querySelector('[data-chart=waterfall] .mark-rect path')).fill"
        )
    assert fills["light"] != fills["dark"]
    assert "none" not in fills.values()


def test_table_sorts_both_ways(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    header = browser.find_element("css selector", "table.sortable thead th:nth-child(3) button")
    cells = (
        "return [...document.querySelectorAll('table.sortable tbody')[0].rows].map((row) => row.cells[2].textContent)"
    )
    orders = []
    for state in ("ascending", "descending"):
        header.click()
        assert browser.execute_script("return document.querySelector('th:nth-child(3)').ariaSort") == state
        orders.append([float(cell) for cell in browser.execute_script(cells)])
    assert orders[0] == sorted(orders[0])
    assert orders[1] == orders[0][::-1]
    assert len(set(orders[0])) > 2


def test_a_history_sorts_by_date_and_changes_by_size(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["history"])
    table = "document.querySelectorAll('table.sortable')[0]"
    headers = browser.execute_script(
        f"return [...{table}.querySelectorAll('thead th')].map((th) => th.textContent.trim())"
    )
    found: dict[str, list[str]] = {}
    for number, name in enumerate(headers):
        browser.execute_script(f"{table}.querySelectorAll('thead th button')[{number}].click()")
        rows = f"return [...{table}.tBodies[0].rows].map((row) => row.cells[{number}].textContent.trim())"
        found[name] = browser.execute_script(rows)
    assert found["run"] == sorted(found["run"])
    assert len(set(found["run"])) > 2
    changes = [float(cell.replace("\N{MINUS SIGN}", "-").rstrip("%")) for cell in found["change"] if "%" in cell]
    assert changes == sorted(changes)
    assert min(changes) < 0 < max(changes)


def test_click_on_a_prompt_opens_its_answers_as_text(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["hostile"])
    browser.execute_script("document.querySelector('#prompts').scrollIntoView({block: 'center'});")
    point = browser.find_elements("css selector", "#prompts .mark-symbol path")[0]
    webdriver.ActionChains(browser).move_to_element(point).click().perform()
    assert browser.execute_script("return document.getElementById('answer').open")
    texts = [each.text for each in browser.find_elements("css selector", "#answer-texts pre")]
    assert len(texts) == 1
    assert "vanilla" in browser.find_element("css selector", "#answer-texts h3").text  # all labels gave the same
    assert all("<script>window.pwned=1</script>" in text and "\\u202e" in text and "\\x1b" in text for text in texts)
    assert browser.execute_script("return document.querySelectorAll('#answer-texts pre *').length") == 0


def test_an_answer_shows_what_became_of_its_drafts(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["detailed"])
    browser.execute_script("document.querySelector('button.answer').click()")
    shown = {
        title.text: block
        for title, block in zip(
            browser.find_elements("css selector", "#answer-texts h3"),
            browser.find_elements("css selector", "#answer-texts pre"),
            strict=True,
        )
    }
    assert list(shown) == [f"turn 0: {label}" for label in ("vanilla", "eagle", "medusa", "spd")]
    spd = shown["turn 0: spd"]
    titles = [each.get_attribute("title") for each in spd.find_elements("css selector", ".step")]
    assert f"rejected: <{WRONG}>\nthe target's own: <103>" in titles[3]
    assert f"<{WRONG}>" not in spd.text  # until it is asked for
    webdriver.ActionChains(browser).send_keys(" ").perform()  # the dialog's first control has the focus
    assert f"<102><{WRONG}><103>" in spd.text
    colours = {
        browser.execute_script("return getComputedStyle(arguments[0]).color", spd.find_element("class name", kind))
        for kind in ("accepted", "own", "rejected")
    }
    assert len(colours) == 3
    assert min(contrast(hexadecimal(colour), "#ffffff") for colour in colours) >= 4.5


def test_answers_without_drafts_have_no_legend_of_them(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    browser.execute_script("document.querySelector('button.answer').click()")
    assert not browser.find_element("id", "answer-legend").is_displayed()
    assert len(browser.find_elements("css selector", "#answer-texts pre")) == 1  # all labels gave the same


@pytest.mark.parametrize("name", ["hostile", "hostile history"])
def test_nothing_that_others_wrote_runs(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    for button in browser.find_elements("css selector", "button.answer")[:2]:
        browser.execute_script("arguments[0].click()", button)
        browser.execute_script("document.getElementById('answer').close()")
    assert browser.execute_script("return window.pwned === undefined")
    assert browser.execute_script("return document.images.length") == 0


@pytest.mark.parametrize("name", ["plain", "history"])
def test_keyboard_reaches_everything(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name], NARROW)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    wanted = set(
        browser.execute_script(
            "return [...document.querySelectorAll('main a, main button, main summary, main [tabindex]')]"
            ".filter((element) => element.offsetParent).map((element, at) => (element.dataset.at = `at${at}`))"
        )
    )
    reached = set()
    for _ in range(len(wanted) + 30):
        webdriver.ActionChains(browser).send_keys("\ue004").perform()  # Tab
        reached.add(browser.execute_script("return document.activeElement.dataset.at || ''"))
    assert wanted <= reached
    outline = browser.execute_script(
        "const button = [...document.querySelectorAll('th button')].find((each) => each.offsetParent);"
        "button.focus({focusVisible: true});"
        "return getComputedStyle(button).outlineStyle"
    )
    assert outline == "solid"


def test_answer_opens_and_closes_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    browser.execute_script(
        "const button = document.querySelector('button.answer'); button.closest('details').open = true; button.focus()"
    )
    webdriver.ActionChains(browser).send_keys("\ue007").perform()  # Enter
    assert "Two plus two is four." in browser.find_element("id", "answer-texts").text
    webdriver.ActionChains(browser).send_keys("\ue00c").perform()  # Escape
    assert not browser.execute_script("return document.getElementById('answer').open")


@pytest.mark.parametrize("name", ["plain", "history"])
def test_charts_have_words_for_those_who_cannot_see_them(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    labels = browser.execute_script("return [...document.querySelectorAll('.chart')].map((each) => each.ariaLabel)")
    assert labels
    assert all(len(label) > 40 for label in labels)


def test_csv_link_holds_the_numbers(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["plain"])
    link = browser.find_element("css selector", "#speedup a")
    assert link.get_attribute("download") == "speedup.csv"
    from urllib.parse import unquote

    assert unquote(link.get_attribute("href")).splitlines()[1].startswith("vanilla,1.0,")


@pytest.mark.parametrize("name", ["plain", "history"])
def test_page_prints(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name], scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    colour = browser.execute_script("return getComputedStyle(document.body).color")
    assert contrast(hexadecimal(colour), "#ffffff") > 10
    assert len(browser.print_page()) > 10_000
    cell = "return getComputedStyle(document.querySelector('td:nth-child(2)')).whiteSpace"
    is_comparison = browser.execute_script("return document.querySelector('table.numbers') !== null")
    assert browser.execute_script(cell) == ("nowrap" if is_comparison else "normal")


def test_history_marks_the_planted_regression_alone(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["history"])
    words = browser.execute_script(
        "return [...document.querySelectorAll('[data-chart=history-speedup] svg text')].map((each) => each.textContent)"
    )
    assert [word for word in words if "%" in word] == ["\N{MINUS SIGN}20.2%"]
    assert [word for word in words if word.startswith("machine")]
    marked = browser.find_elements("css selector", "td.bad")
    assert ["regression" in each.text for each in marked] == [True]
