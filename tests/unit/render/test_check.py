"""A gate's judgements as a table, Markdown, JUnit XML, JSON, and for github-action-benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from spdbench.judge.gate.calibration import Calibration, Threshold
from spdbench.judge.gate.history import history
from spdbench.judge.gate.verdict import Judgement
from spdbench.render.check import NAMES, calibration_to_terminal, percent, to_markdown, to_terminal
from spdbench.render.check_files import UNITS, to_benchmark_json, to_json, to_junit
from spdbench.render.report import history_page
from tests.builders import MS, failed_run
from tests.unit.judge.gate.gates import drafted_runs, eagle, judged, plain
from tests.unit.judge.gate.test_served import server


def fine(**more: Any) -> list[Judgement]:
    run = [plain(), eagle()]
    return judged(run, run, **more)


def wrong() -> list[Judgement]:
    """A failed prompt, a prompt that is missing, slower, and a label that the baseline lacks."""
    broken = [*drafted_runs(8, step_ns=lambda _: 25 * MS), failed_run("p8\x00\u202e", "a|b")]
    return judged([plain(), eagle(broken), eagle(label="new|one")], [plain(), eagle()])


def show(judgements: Sequence[Judgement], width: int = 80) -> str:
    return to_terminal(judgements, Console(width=width, force_terminal=False))


def test_every_metric_has_a_name_and_what_is_better_when_bigger_a_unit() -> None:
    found = {each.metric for judgement in [*fine(), *wrong()] for each in judgement.findings}
    assert found <= set(NAMES)
    assert set(UNITS) <= set(NAMES)


def test_scores_and_loads_of_servers_have_names() -> None:
    results = [server(2, score=0.5, options={"concurrency": at_once}) for at_once in (1, 4)]
    judgements = judged(results, results)
    text = show(judgements, 120)
    assert "- eagle at 1: pass" in text
    assert "- eagle at 4: pass" in text
    assert text.count(" | 4 at once\n") == 1
    assert "score" in text
    assert "score" in to_junit(judgements)


def test_titles_name_the_chosen_chat_template() -> None:
    result = server(2)
    chosen = {"chat_template": "vicuna", "template_args": {"enable_thinking": False}}
    head = result.head.model_copy(update={"model": result.head.model.model_copy(update=chosen)})
    templated = replace(result, head=head)
    expected = "chat template vicuna enable_thinking=false | "
    assert expected in show(judged([templated], [templated]), 160)
    assert expected in history_page.to_html(history([templated], None), None, None, "results")


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_and_begins_with_the_verdict_and_a_line_a_label(width: int) -> None:
    for judgements in (fine(), wrong(), fine(by_category=True)):
        assert max(map(len, show(judgements, width).splitlines())) <= width
    assert show(fine()).splitlines()[:3] == [
        "pass (exit code 0)",
        "- vanilla: pass",
        "- eagle: pass; speed-up 1.000 [1.000, 1.000] times the former",
    ]
    assert show(wrong()).splitlines()[0] == "regression (exit code 1): eagle"


def test_what_is_wrong_is_told_below_the_table_and_what_is_fine_is_not() -> None:
    text = " ".join(show(wrong(), 200).split())
    assert "- eagle: regression; failed runs: 1 of 9 runs failed" in text
    assert text.count("1 of 9 runs failed") == 1
    assert "eagle, speed-up: regression. slower by 20.0%, and 5.0% is allowed." in text
    assert "- new|one: not comparable; paired runs: the baseline has no label" in text
    assert "paired runs: pass" not in text


def test_failures_and_divergences_are_shown_only_where_there_are_any() -> None:
    assert "failed runs" not in show(fine())
    assert "failed runs" in show(wrong())


def test_what_only_informs_stands_in_brackets() -> None:
    lines = [line.split() for line in show(fine()).splitlines()]
    [speed] = [line for line in lines if line[:1] == ["tok/s"] and line[1] != "50.0"]
    assert speed[-1] == "(pass)"


def test_categories_get_rows_of_their_own() -> None:
    text = show(fine(by_category=True))
    assert "category" in text
    assert "writing" in text
    assert "category" not in show(fine())


def test_results_that_share_a_label_are_told_apart_by_file() -> None:
    text = show(judged([eagle(file="1.json"), eagle(file="2.json")], eagle(), "exact"), 100)
    assert "eagle (1)" in text
    assert "eagle (2)" in text


def test_results_of_a_load_are_titled_by_it() -> None:
    text = show(judged([eagle(options={"concurrency": 4})], eagle(options={"concurrency": 4}), "exact"), 120)
    assert "new tokens | 4 at once\n" in text
    assert "at once" not in show(fine(), 120)


def test_files_of_one_label_are_named_by_the_end_in_which_they_differ() -> None:
    new = [eagle(file=f"/home/me/new/quick__eagle__smollm2__{name}.json") for name in ("10", "11")]
    text = show(judged(new, eagle(), "timing"), 80)
    assert "eagle (10)" in text
    assert "new/" not in text
    same = [eagle(file=f"{folder}/e.json") for folder in "ab"]
    assert "eagle (b/e.json)" in show(judged(same, eagle(), "exact"), 100)


def test_what_is_noted_of_several_files_is_said_once() -> None:
    new = [eagle(file=f"{name}.json", options={"depth": 5}) for name in ("a", "b", "c")]
    text = show(judged(new, eagle(options={"depth": 4}), "exact"), 200)
    assert text.count("option depth is 5 now and was 4") == 1
    assert "eagle (a), eagle (b), eagle (c): option depth" in text


def test_markdown_starts_with_the_verdict_and_escapes_cells() -> None:
    text = to_markdown(wrong())
    assert text.startswith("### spdbench check: regression (exit code 1): eagle\n\n- vanilla: pass")
    [header] = [line for line in text.splitlines() if line.startswith("| label")]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {header.count("|")}


def test_junit_counts_regressions_as_failures_and_what_cannot_be_told_as_errors() -> None:
    root = ElementTree.fromstring(to_junit(wrong()))
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["quick vanilla", "quick eagle", "quick new|one"]
    bad = suites["quick eagle"]
    assert bad.get("tests") == str(len(bad.findall("testcase")))
    assert {case.get("name") for case in bad if case.find("failure") is not None} == {
        "exact: failed runs",
        "timing: speed-up",
    }
    assert {case.get("name") for case in bad if case.find("error") is not None} == {"exact: paired runs"}
    assert suites["quick new|one"].get("errors") == "1"
    assert r"p8\x00\u202e: " in (bad.find("testcase/failure").get("message") or "")  # type: ignore[union-attr]


def test_junit_never_fails_for_what_only_informs() -> None:
    slow = [plain(), eagle(drafted_runs(step_ns=lambda i: (16 + 8 * (i % 2)) * MS))]
    root = ElementTree.fromstring(to_junit(judged(slow, [plain(), eagle()], "exact", by_category=True)))
    assert root.findall(".//failure") == root.findall(".//error") == []


def test_json_holds_every_finding() -> None:
    found = json.loads(to_json(wrong()))
    assert (found["schema"], found["verdict"], found["exit_code"]) == ("spdbench.check/1", "regression", 1)
    [bad] = [each for each in found["judgements"] if each["label"] == "eagle"]
    assert (bad["file"], bad["against"]) == ("eagle.json", "eagle.json")
    [speedup] = [each for each in bad["findings"] if each["metric"] == "speedup"]
    assert speedup["verdict"] == "regression"
    assert speedup["interval"] == pytest.approx([0.8, 0.8])


def test_benchmark_file_lists_the_new_values_with_names_of_their_own() -> None:
    found = json.loads(to_benchmark_json(fine(by_category=True)))
    names = [entry["name"] for entry in found]
    assert len(set(names)) == len(names)
    values = {name: entry["value"] for name, entry in zip(names, found, strict=True)}
    assert values["quick, smollm2, float32, eagle: speed-up over plain decoding"] == pytest.approx(3.0)
    assert values["quick, smollm2, float32, eagle: acceptance length"] == pytest.approx(3.0)
    for entry in found:
        assert {"name", "unit", "value", "extra"} <= set(entry)
        assert isinstance(entry["value"], float)


def test_calibration_ends_with_the_option_to_use() -> None:
    words = {"suite": "quick", "model": "smollm2", "dtype": "float32", "work": "w", "num_runs": 5, "spread": 0.012}
    thresholds = [
        Threshold(label="spd", metric="speedup", max_slowdown=0.0712, **words),
        Threshold(label="spd", metric="decode_tokens_per_s", max_slowdown=0.3, **words),
    ]
    found = Calibration(schema="spdbench.calibration/1", created="now", fingerprint="f", thresholds=thresholds)
    text = calibration_to_terminal(found, Console(width=80, force_terminal=False))
    assert text.rstrip().splitlines()[-1] == "For all labels: --max-slowdown 7.2%"
    assert "1.20%" in text
    assert "at once" not in text
    loaded = thresholds[0].model_copy(update={"requests_at_once": 8})
    found = found.model_copy(update={"thresholds": [*thresholds, loaded]})
    header, *rows = calibration_to_terminal(found, Console(width=80, force_terminal=False)).splitlines()
    assert "at once" in header
    assert [row.split()[-4] for row in rows if row.startswith("spd")] == ["1", "1", "8"]
    noisy = found.model_copy(update={"thresholds": [thresholds[0].model_copy(update={"max_slowdown": 0.863})]})
    text = calibration_to_terminal(noisy, Console(width=80, force_terminal=False))
    assert "--max-slowdown 86.3%\nSo much noise hides most slowdowns: measure again on an idle machine" in text


def test_shares_are_rounded_up() -> None:
    assert [percent(share) for share in (0.05, 0.0501, 0.01, 0.0712)] == ["5%", "5.1%", "1%", "7.2%"]
