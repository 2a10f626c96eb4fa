"""`spdbench report --history` from the outside: a page, and one message for everything that is in the way."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spdbench.cli.main import run
from spdbench.cli.reading import report
from spdbench.judge.gate.calibration import calibrate
from spdbench.judge.loaded import load, read_results
from spdbench.render.report import history, vega
from tests.builders import write_result
from tests.unit.judge.gate.histories import history_results, same_code
from tests.unit.render.report.reports import HOSTILE


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the megabyte of script that draws the charts; what it draws is tested in a browser."""
    monkeypatch.setattr(vega, "vl_convert", lambda: None)
    monkeypatch.setattr(vega, "script", lambda: "/* library */")


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("written") / "history", history_results())


@pytest.fixture
def folder(written_once: Path, tmp_path: Path) -> Path:
    """A copy for one test, which may change it."""
    return Path(shutil.copytree(written_once, tmp_path / "history"))


def written(folder: Path, results: Any) -> Path:
    folder.mkdir()
    for name, result in results.items():
        write_result(result, folder / name)
    return folder


def calibrated(folder: Path) -> Path:
    found = calibrate([load(result, name) for name, result in same_code().items()])
    (folder / "calibration.json").write_text(found.model_dump_json(by_alias=True))
    return folder


def page_of(*words: object, out: Path) -> str:
    arguments = ["--history", *map(str, words), "-o", str(out), "--force"]
    done = CliRunner().invoke(report.command, arguments, catch_exceptions=False)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", f"Wrote {out}\n")
    return out.read_text()


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an error."""
    assert run(["report", "--history", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_page_marks_the_planted_regression_alone(folder: Path, tmp_path: Path) -> None:
    text = page_of(calibrated(folder), out=tmp_path / "history.html")
    [marked] = re.findall(r'<td class="words bad">(.*?)</td>', text)
    assert marked == "\N{BLACK DOWN-POINTING TRIANGLE} regression; speed-up: slower by 20.2%, and 3.1% is allowed"
    assert text.count('<tr><th scope="row">2026-06-') == 40
    assert "calibrated on machine 0a1b2c3d for vanilla, eagle" in text


def test_without_a_calibration_the_page_says_what_is_allowed(folder: Path, tmp_path: Path) -> None:
    text = page_of(folder, out=tmp_path / "history.html")
    assert "not calibrated: 5% is allowed" in text
    assert "and 5.0% is allowed" in text


def test_page_holds_its_results(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "history.html"
    text = page_of(folder, out=out)
    held = read_results([out])
    assert [Path(each.file).name for each in held] == sorted(history_results())
    again = page_of(out, out=tmp_path / "again.html")
    assert again == text.replace("report history.html", "report again.html")


def test_large_results_stay_outside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_EMBEDDED_BYTES", 1000)
    text = page_of(folder, out=tmp_path / "history.html")
    assert "does not hold the results" in text
    assert "spdbench-results" not in text


def test_page_of_one_run_says_so(tmp_path: Path) -> None:
    text = page_of(written(tmp_path / "one", history_results(1)), out=tmp_path / "history.html")
    assert "eagle: one run, and nothing before it to judge it by" in text


def test_what_others_write_is_text(tmp_path: Path) -> None:
    odd = history_results(3, label=HOSTILE, suite=HOSTILE, commit=lambda _: HOSTILE, machine=lambda _: HOSTILE)
    text = page_of(written(tmp_path / "odd", odd), out=tmp_path / "history.html")
    body = re.sub(r'<script type="application/json" id="spdbench-results">.*?</script>', "", text, flags=re.DOTALL)
    assert "window.pwned" in body
    assert "<script>window.pwned" not in body
    assert "<img" not in body
    assert "\u202e" not in body
    assert "\x1b" not in body
    assert len(re.findall("<script", body)) == 4


def test_different_work_in_a_folder(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = next(iter(history_results(1, dtype="bfloat16").values()))
    write_result(other, folder / "z.json")
    message = refusal(capsys, folder, "-o", tmp_path / "history.html")
    assert "did different work" in message
    assert "dtype (float32, not bfloat16)" in message
    assert not (tmp_path / "history.html").exists()


def test_no_results_and_unreadable_ones(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no result files" in refusal(capsys, empty)
    calibrated(empty)
    assert "no result files" in refusal(capsys, empty)
    assert "missing.json" in refusal(capsys, folder / "missing.json")
    (folder / "z.json").write_text("{")
    assert "z.json: is not JSON" in refusal(capsys, folder)


def test_calibration_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "calibration.json").write_text("{}")
    assert "is no calibration" in refusal(capsys, folder)


def test_two_calibrations(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    second = calibrated(written(tmp_path / "second", history_results(2)))
    assert "both next to results" in refusal(capsys, calibrated(folder), second)


def test_output_is_never_overwritten_unasked(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "history.html"
    out.write_text("mine")
    assert "--force" in refusal(capsys, folder, "-o", out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (("--chart", "speedup"), "--chart speedup shows a comparison; with --history: history-speedup, history-speed"),
        (("--baseline", "vanilla"), "--baseline has no effect on a history"),
    ],
)
def test_options_of_other_pages(folder: Path, option: tuple[str, str], why: str) -> None:
    done = CliRunner().invoke(report.command, ["--history", str(folder), *option])
    assert done.exit_code == 2
    assert why in done.stderr


def test_one_chart_of_a_history_as_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def to_file(chart: Any, panels: Any, *how: str) -> bytes:
        asked.append((chart.name, [len(panel.rows) for panel in panels], *how))
        return b"drawn"

    monkeypatch.setattr(vega, "to_file", to_file)
    out = tmp_path / "a.file"
    for words in (["--history"], []):  # the name of the chart says enough
        arguments = ["report", str(folder), *words, "--chart", "history-speedup", "--style", "paper", "-o", str(out)]
        assert run([*arguments, "--force"]) == 0
    assert asked == [("history-speedup", [20], "svg", "paper")] * 2
    assert out.read_bytes() == b"drawn"


def test_chart_of_a_history_without_anything_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {name: each for name, each in history_results(2).items() if each.backend.label == "vanilla"}
    where = written(tmp_path / "alone", alone)
    message = refusal(capsys, where, "--chart", "history-acceptance", "-o", tmp_path / "a.svg")
    assert "--chart history-acceptance: None of these runs drafts." in message


def test_charts_of_the_command_are_those_of_the_page() -> None:
    assert tuple(history.CHARTS) == report.HISTORY_CHARTS


def test_page_says_how_to_draw_its_charts_anew(folder: Path, tmp_path: Path) -> None:
    again = "--chart history-speed --format svg -o history-speed.svg"
    text = page_of(folder, out=tmp_path / "history.html")
    assert f"spdbench report history.html {again}" in text
    text = page_of(calibrated(folder), out=tmp_path / "history.html")  # the calibration is in the folder only
    assert f"spdbench report history/ {again}" in text


def test_page_is_called_history(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["report", "--history", str(folder)]) == 0
    assert (tmp_path / "history.html").exists()
