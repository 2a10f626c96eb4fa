"""Tables that can be read: on a terminal of any width, in a pipe, in Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from spdbench.cli.reading import compare as commands
from spdbench.cli.reading import report
from spdbench.console import printable
from spdbench.judge.comparison.compare import Table, compare
from spdbench.judge.conclusion import Conclusion
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.metrics.dialects import DIALECTS
from spdbench.judge.metrics.stats import Interval
from spdbench.judge.projection.project import OwnDevices
from spdbench.judge.results.lanes import BubbleParts, CyclesByFill, FullCycles
from spdbench.judge.results.schema import Divergence, DrafterRecord, Run
from spdbench.render.notes import sentence
from spdbench.render.report.vega import CHARTS
from spdbench.render.table import FORMATS, Format, render
from spdbench.types import BackendKind
from tests.builders import (
    MS,
    ORACLE,
    RANDOM,
    TRAINED,
    chunk_steps,
    failed_run,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    vanilla_steps,
)

CATEGORIES = ("math", "summarization")


def entry(
    kind: BackendKind, drafter: DrafterRecord | None = None, *, runs: list[Run] | None = None, **more: Any
) -> LoadedResult:
    steps = {
        "autoregressive": vanilla_steps(9, step_ns=20 * MS),
        "draft_verify": chunk_steps([1, 4, 4], step_ns=25 * MS),
        "pipeline": pipeline_steps([True] * 8, 3, step_ns=20 * MS),
    }[kind]
    made = runs or [make_run(steps, prompt=f"p{i}", category=CATEGORIES[i % 2]) for i in range(10)]
    names = {name: more.pop(name) for name in ("label", "lossy", "num_devices", "chosen") if name in more}
    result = make_result(made, make_backend(kind, **names), drafter=drafter, **more)
    return load(result, f"{result.backend.label}.json")


def demo() -> list[LoadedResult]:
    """What `make demo` compares."""
    return [entry("autoregressive"), entry("pipeline", ORACLE)]


def everything() -> list[LoadedResult]:
    return [*demo(), entry("draft_verify", TRAINED), entry("draft_verify", RANDOM, label="medusa", lossy=True)]


def show(
    tables: list[Table], form: Format = "table", width: int = 80, *, colour: bool = False, details: bool = False
) -> str:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None
    )
    return render(tables, form, console, details=details)


def heading(text: str) -> str:
    """The title line, below what is concluded."""
    return next(line for line in text.splitlines() if line.startswith("quick v1"))


def headers(text: str) -> str:
    """The table's headers, on one line."""
    lines = text.splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("──"))
    return " ".join(lines[rule - 2 : rule])


def more(text: str) -> str:
    """What is left to `--details`."""
    return " ".join(text.split()).partition("--details` adds ")[2]


def grid(text: str) -> list[str]:
    """The lines from the table's rule to its last row."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("──"))
    end = next(index for index, line in enumerate(lines) if line.startswith("- "))
    return lines[start:end]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("entries", [demo, everything], ids=["demo", "everything"])
def test_nothing_is_wider_than_the_terminal(entries: Any, width: int) -> None:
    for by_category in (False, True):
        text = show(compare(entries(), by_category=by_category), width=width)
        assert max(map(len, text.splitlines())) <= width


def test_what_is_concluded_comes_first_a_sentence_a_label() -> None:
    lines = show(compare(everything()), width=240).splitlines()
    assert lines[:4] == [
        "vanilla: 50.0 tok/s, the baseline; every method ran on one device",
        "spd: 0.80x [0.80, 0.80], does not pay here: 3 stages share one device; "
        "with a device for each stage and the drafter: at most 2.11x [2.11, 2.11] (estimate), could pay; "
        "disqualified by synthetic_drafter",
        "eagle: 3.20x [3.20, 3.20], pays",
        "medusa: 3.20x [3.20, 3.20]; disqualified by lossy, untrained_drafter",
    ]
    assert lines[4] == ""


def test_several_tables_have_their_conclusions_first_each_below_its_title() -> None:
    lines = show(compare([*demo(), entry("autoregressive", suite="gsm8k")]), width=240).splitlines()
    first = lines.index("")
    assert [line.split()[0] for line in lines[:first]] == ["quick", "vanilla:", "spd:", "gsm8k", "vanilla:"]


def test_the_demo_fits_80_columns_with_only_the_drafters_left_out() -> None:
    text = show(compare(demo()))
    assert more(text).startswith("drafter, explanations")
    for header in ("label", "tok/s", "speed-up", "accept", "cycle", "ideal", "TTFT", "outputs"):
        assert header in headers(text)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
@pytest.mark.parametrize("label", ["eagle", "a-label-of-a-long-name-with-its-temperature-0.7", "x" * 100])
def test_each_row_is_one_line_from_80_columns_on_however_long_its_label(label: str, width: int) -> None:
    for by_category in (False, True):
        tables = compare([*everything(), entry("draft_verify", TRAINED, label=label)], by_category=by_category)
        for details in (False, True):
            text = show(tables, width=width, details=details)
            assert max(map(len, text.splitlines())) <= width
            rows = 5 if not by_category else 5 * 3 + 3
            assert len([line for line in grid(text) if line.strip() and not line.startswith("──")]) == rows


def test_a_wide_terminal_has_room_for_the_drafters() -> None:
    text = show(compare(demo()), width=120)
    assert "oracle:0.8 (synthetic)" in text
    assert "10/10" in text
    assert more(text).startswith("explanations")


def test_the_tree_that_was_chosen_stands_with_its_drafter() -> None:
    tree = {"tree": "dynamic, depth 3, top_k 2, total_tokens 6", "graphs": "on"}
    eagle = entry("draft_verify", TRAINED, chosen=tree)
    assert "smollm2-spd (dynamic, depth 3, top_k 2, total_tokens 6)" in show(compare([*demo(), eagle]), width=180)
    synthetic = entry("draft_verify", ORACLE, chosen={"tree": "chain, depth 2"})
    assert "oracle:0.8 (synthetic; chain, depth 2)" in show(compare([*demo(), synthetic]), width=180)


def test_columns_go_by_rank_when_room_is_short_and_the_hint_names_them() -> None:
    text = show(compare(everything()), width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "TTFT s, " in more(text)
    assert "[95 %]" in headers(text)
    assert "drafter" not in headers(text)


def test_details_have_a_table_for_every_column_that_had_no_room() -> None:
    plain, text = (show(compare(everything()), width=60, details=details) for details in (False, True))
    assert "--details" not in text
    for name in ("TTFT", "drafter", "cycle"):
        assert name not in headers(plain)
        assert name in text.partition(grid(plain)[-1])[2]
    assert text.count("oracle:0.8 (synthetic)") == 1


def test_a_label_too_long_for_the_terminal_keeps_both_of_its_ends() -> None:
    label = "supercalifragilisticexpialidocious"
    text = show(compare([entry("autoregressive", label=label)]), width=40)
    assert max(map(len, text.splitlines())) <= 40
    [row] = grid(text)[1:]
    start, _, end = row.split()[0].partition("..")
    assert label.startswith(start)
    assert label.endswith(end)
    assert len(start + end) > 20


def test_synthetic_untrained_and_lossy_are_said_in_the_table_itself() -> None:
    body = "\n".join(grid(show(compare(everything()), width=160)))
    assert "oracle:0.8 (synthetic)" in body
    assert "random (untrained)" in body
    assert "medusa (lossy)" in body


def test_interval_that_holds_one_is_called_no_difference_and_still_shown() -> None:
    runs = [make_run(vanilla_steps(9, step_ns=(18 + 4 * (i % 2)) * MS), prompt=f"p{i}") for i in range(10)]
    text = show(compare([entry("autoregressive"), entry("autoregressive", label="again", runs=runs)]), width=120)
    assert "], no difference shown; about " in text
    assert "prompts needed to detect a 5 % speed-up" in text
    assert "1.00 [0.9" in "\n".join(grid(text)) or "1.01 [0.9" in "\n".join(grid(text))


def test_without_a_baseline_speedups_stay_blank_and_the_note_says_why() -> None:
    text = show(compare([entry("pipeline", ORACLE)]))
    assert "No baseline in this table" in text
    assert "interval" not in text


def test_title_says_suite_model_dtype_decoding_prompts_and_machine() -> None:
    text = show(compare(demo()), width=200)
    assert heading(text) == (
        "quick v1 | smollm2 | float32 | greedy, up to 64 new tokens | 10 prompts | Testium 9000 (machine id machine-)"
    )


def heading_of(*entries: LoadedResult, by_category: bool = False) -> str:
    return heading(show(compare(list(entries), by_category=by_category), width=200))


def test_title_of_an_interrupted_run_says_of_how_many_prompts() -> None:
    assert "| 10 of 40 prompts |" in heading_of(entry("autoregressive", num_prompts=40))
    assert "| 10 of 40 prompts |" in heading_of(entry("autoregressive", num_prompts=40), by_category=True)


def test_title_does_not_lend_the_fullest_rows_prompts_to_the_others() -> None:
    runs = [make_run(chunk_steps([1, 4, 4]), prompt=f"p{i}") for i in range(4)]
    partial = entry("draft_verify", TRAINED, runs=runs, num_prompts=10)
    assert "| 4 to 10 of 10 prompts |" in heading_of(entry("autoregressive"), partial)
    assert "| 4 to 10 prompts |" in heading_of(entry("autoregressive"), entry("draft_verify", TRAINED, runs=runs))


def test_csv_and_json_tell_how_many_prompts_were_asked_for() -> None:
    tables = compare([entry("autoregressive", num_prompts=40)])
    row = next(csv.DictReader(io.StringIO(show(tables, "csv"))))
    assert (row["num_prompts"], row["suite_num_prompts"]) == ("10", "40")
    assert "vanilla: 10 of 40 conversations" in json.loads(show(tables, "json"))["tables"][0]["notes"][0]


@pytest.mark.parametrize("form", FORMATS)
def test_rendering_writes_nothing_by_itself(form: Format) -> None:
    console = Console(file=io.StringIO())
    assert render(compare(demo()), form, console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_sampling_is_named_in_the_title() -> None:
    text = show(compare([entry("autoregressive", temperature=0.7)]), width=200)
    assert "temperature 0.7, seed 0, up to 64 new tokens" in text


def test_each_flag_is_one_line_with_its_remedy_and_its_reason_is_a_detail() -> None:
    slow = [entry("pipeline", ORACLE, label=name) for name in ("two", "three")]
    tables = compare([entry("autoregressive"), *slow])
    line = "- synthetic_drafter (two, three): measure a trained one; this is a what-if."
    assert line in show(tables).splitlines()
    assert "the drafts come from" not in show(tables)
    text = " ".join(show(tables, details=True).split())
    assert "synthetic_drafter (disqualifies): two, three: the drafts come from oracle:0.8" in text


def test_a_flag_names_the_labels_that_it_concerns() -> None:
    runs = [make_run(vanilla_steps(9), prompt=f"p{i}", finish="length") for i in range(10)]
    all_of_them = [entry("autoregressive", label=f"number-{i}", runs=runs) for i in range(9)]
    assert "- truncated (all): raise" in show(compare(all_of_them))
    named = ", ".join(f"number-{i}" for i in range(6))
    text = " ".join(show(compare([entry("autoregressive"), *all_of_them])).split())
    assert f"- truncated ({named} and 3 more): raise" in text
    cut = [entry("autoregressive", label=f"cut-{i}", runs=runs[: 2 + i]) for i in range(5)]
    text = show(compare([entry("autoregressive"), *cut]))
    assert "- few_prompts (cut-0, cut-1, cut-2, cut-3, cut-4): measure" in text


def test_failed_runs_and_divergence_classes_are_told() -> None:
    runs = [make_run(chunk_steps([1, 4, 4]), prompt=f"p{i}") for i in range(9)]
    classes = Divergence(identical=8, ties=0, near_ties=1, real=0, unclassified=0)
    broken = entry("draft_verify", TRAINED, runs=[*runs, failed_run("p9")], divergence=classes)
    text = show(compare([entry("autoregressive"), broken]), width=120)
    assert "eagle: 1 of 10 runs failed." in text
    assert "eagle, outputs against vanilla's: 8 identical, 1 near tie." in text


def test_methods_and_counts_are_explained() -> None:
    turns = [make_run(vanilla_steps(9), prompt=f"p{i}", turn=turn) for i in range(8) for turn in (0, 1)]
    tables = compare([entry("autoregressive", runs=turns), entry("pipeline", ORACLE)])
    text = " ".join(show(tables).split())
    assert ", 16 answers |" in text
    assert "speculative pipeline decoding" not in text
    text = " ".join(show(tables, details=True).split())
    assert "- spd: speculative pipeline decoding: " in text
    assert "- prompts are conversations; answers are their turns" in text


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    text = show(compare([entry("autoregressive", label="[red]a|b")]))
    assert "[red]a|b" in text
    assert "[red]a\\|b" in show(compare([entry("autoregressive", label="[red]a|b")]), "github")


def test_no_colour_without_a_terminal() -> None:
    assert "\x1b[" not in show(compare(everything()))
    assert "\x1b[" in show(compare(everything()), colour=True)


def test_tables_that_look_alike_show_their_hashes() -> None:
    first, other = entry("autoregressive"), entry("autoregressive")
    head = other.head.model_copy(update={"model": other.head.model.model_copy(update={"sha256": "f" * 64})})
    text = show(compare([first, replace(other, file="b.json", head=head)]), width=200)
    assert "smollm2 (sha256 mmmmmmmm)" in text
    assert "smollm2 (sha256 ffffffff)" in text


def test_github_has_conclusions_one_row_a_label_and_notes_as_a_list() -> None:
    lines = show(compare(everything()), "github").splitlines()
    assert lines[0] == "- vanilla: 50.0 tok/s, the baseline; every method ran on one device"
    assert lines[5].startswith("**quick v1 | smollm2")
    assert sum(line.startswith("| ") for line in lines) == 5
    assert any(line.startswith("- synthetic_drafter") for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_latex_is_escaped_and_its_sentences_are_comments() -> None:
    text = show(compare(everything()), "latex")
    assert text.startswith("% vanilla: 50.0 tok/s, the baseline; every method ran on one device\n")
    assert "\\begin{tabular}" in text
    assert "95 \\%" in text
    for outside in (text.split("\\begin{tabular}")[0], text.split("\\end{tabular}")[1]):
        assert all(line.startswith("% ") for line in outside.strip().splitlines())


def dialects(width: int, *names: str) -> str:
    entries = [*demo(), entry("draft_verify", TRAINED)]
    return show(compare(entries, dialects=names or list(DIALECTS)), width=width)


@pytest.mark.parametrize(("width", "num_dialects"), [(60, 7), (60, 9), (80, 9), (120, 9)])
def test_all_dialects_fit_the_terminal_and_other_columns_make_room(width: int, num_dialects: int) -> None:
    names = [*(set(DIALECTS) - {"specforge", "aiperf"}), "specforge", "aiperf"][:num_dialects]
    text = dialects(width, *sorted(names, key=list(DIALECTS).index))
    assert max(map(len, text.splitlines())) <= width
    # Nine names are longer than 60 columns, and are broken there.
    assert (width, num_dialects) == (60, 9) or all(name in headers(text) for name in names)


def test_there_are_as_many_dialects_as_the_widths_were_tried_with() -> None:
    assert len(DIALECTS) == 9


def test_a_dialect_stays_on_a_narrow_terminal_since_it_was_asked_for() -> None:
    text = dialects(62, "sglang")
    assert max(map(len, text.splitlines())) <= 62
    assert "sglang" in headers(text)
    assert "TTFT" in more(text)


def test_rows_that_a_dialect_says_nothing_of_are_blank() -> None:
    vanilla, spd, eagle = grid(dialects(160, "eagle"))[1:]
    assert "8.00" in eagle
    assert "8.00" not in vanilla + spd


# Resources


def test_resource_columns_are_there_only_where_they_say_something() -> None:
    text = show(compare(everything()), width=200)
    assert "J/tok" not in text
    assert "ms/tok" not in text
    assert "GiB" not in text


def metered() -> list[LoadedResult]:
    steps = chunk_steps([1, 4, 4], step_ns=25 * MS)
    runs = [make_run(steps, prompt=f"p{i}", peak_memory_bytes=3 * 2**29, energy_j=4.5) for i in range(10)]
    return [entry("autoregressive"), entry("draft_verify", TRAINED, runs=runs, num_devices=2)]


def test_energy_memory_and_device_time_are_columns() -> None:
    text = show(compare(metered()), width=200)
    assert "J/tok  device ms/tok  memory GiB  drafter" in text
    vanilla, eagle = grid(text)[1:]
    assert eagle.split()[-4:-1] == ["0.50", "12.5", "1.50"]
    assert vanilla.split()[-4:-1] == ["-", "-", "-"]
    detailed = show(compare(metered()), width=200, details=True)
    assert "J/tok: what the machine counted from before each request" in detailed


def test_the_note_on_energy_names_the_counters() -> None:
    rows = metered()
    environment = rows[0].head.environment | {"energy": ["RAPL package-0", "NVML cuda:0"]}
    rows = [replace(row, head=row.head.model_copy(update={"environment": environment})) for row in rows]
    assert "what RAPL package-0, NVML cuda:0 counted" in show(compare(rows), width=300, details=True)


def test_resource_columns_are_the_first_to_be_left_out() -> None:
    assert more(show(compare(metered()), width=70)).startswith("device ms/tok, memory GiB, drafter, explanations")


def test_energy_is_in_the_exports_and_empty_where_it_was_not_measured() -> None:
    vanilla, eagle = csv.DictReader(io.StringIO(show(compare(metered()), "csv")))
    assert (vanilla["energy_j_per_token"], float(eagle["energy_j_per_token"])) == ("", 0.5)
    assert (vanilla["peak_memory_bytes"], eagle["peak_memory_bytes"]) == ("", str(3 * 2**29))


def bubbly(label: str, **shares: float) -> LoadedResult:
    bubble = BubbleParts(**(dict.fromkeys(BubbleParts.model_fields, 0.0) | shares))
    steps = chunk_steps([1, 4, 4], step_ns=25 * MS)
    return entry("draft_verify", label=label, runs=[make_run(steps, prompt=f"p{i}", bubble=bubble) for i in range(10)])


def test_bubble_ratio_is_a_column_and_its_parts_a_note() -> None:
    rows = [
        bubbly("eagle", useful=0.6, draft=0.25, host=0.15),
        bubbly("ppsd", useful=0.8, wasted=0.1, verify=0.1),
        bubbly("ideal", useful=1.0),
    ]
    text = show(compare([entry("autoregressive"), *rows]), width=160)
    assert "bubble" in headers(text)
    assert [cell for line in grid(text) for cell in line.split() if cell in {"40.0%", "10.0%", "0.0%"}] == [
        "40.0%", "10.0%", "0.0%",
    ]  # fmt: skip
    note = show(compare(rows), "github", details=True).splitlines()
    assert any(
        line.endswith("eagle: draft 25.0%, host 15.0%; ppsd: verify 10.0%, and wasted 10.0%; ideal: none.")
        for line in note
    )


def test_bubbles_are_in_the_exports_and_empty_where_they_were_not_measured() -> None:
    tables = compare([entry("autoregressive"), bubbly("eagle", useful=0.6, draft=0.25, host=0.15)])
    vanilla, eagle = csv.DictReader(io.StringIO(show(tables, "csv")))
    assert float(eagle["bubble_ratio"]) == pytest.approx(0.4)
    assert float(eagle["draft"]) == pytest.approx(0.25)
    assert vanilla["bubble_ratio"] == vanilla["draft"] == eagle["cycle_efficiency"] == ""
    metrics = [row["metrics"] for row in json.loads(show(tables, "json"))["tables"][0]["rows"]]
    assert metrics[0]["bubble_ratio"] is None
    assert metrics[1]["host"] == pytest.approx(0.15)


def test_a_table_without_spans_has_no_bubble_column() -> None:
    assert "bubble" not in show(compare(everything()), width=160)


def test_csv_has_one_header_over_all_tables_and_every_metric() -> None:
    text = show(compare([*demo(), entry("autoregressive", suite="gsm8k")], by_category=True), "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["suite"], row["label"], row["category"]) for row in rows[-3:]] == [
        ("gsm8k", "vanilla", "math"),
        ("gsm8k", "vanilla", "summarization"),
        ("gsm8k", "vanilla", ""),
    ]
    spd = next(row for row in rows if row["label"] == "spd" and not row["category"])
    assert float(spd["speedup"]) == pytest.approx(0.8)
    assert float(spd["speedup_ci_low"]) == pytest.approx(0.8)
    assert spd["synthetic"] == "True"
    assert spd["acceptance_length"] == ""
    assert text.count("acceptance_rate_macro") == 1


def test_json_is_one_object_with_every_metric_and_flag() -> None:
    tables = json.loads(show(compare(demo()), "json"))["tables"]
    spd = tables[0]["rows"][1]
    assert spd["metrics"]["speedup"] == pytest.approx(0.8)
    assert spd["outputs"] == {"num_compared": 10, "num_identical": 10}
    assert spd["disqualified"]
    assert [flag["name"] for flag in spd["flags"]] == ["synthetic_drafter"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shows_a_result_of_failures_only(form: Format) -> None:
    assert show(compare([entry("autoregressive", runs=[failed_run()])], by_category=True), form)


def scored(label: str, *, missing: int = 0) -> LoadedResult:
    """Ten answers, of which every second is right, and the last `missing` have no score."""
    runs = [
        make_run(
            vanilla_steps(9), prompt=f"p{i}", category=CATEGORIES[i % 2], score=None if i >= 10 - missing else i % 2
        )
        for i in range(10)
    ]
    return entry("autoregressive", runs=runs, label=label)


def test_scores_stand_beside_speed_with_their_interval_and_how_many_there_are() -> None:
    text = show(compare([scored("vanilla"), scored("other", missing=2)]), width=200)
    assert "0.50 [0." in grid(text)[-1]
    detailed = show(compare([scored("vanilla"), scored("other", missing=2)]), width=200, details=True)
    assert "score: the mean over the answers that have one (vanilla: 10 of 10; other: 8 of 10)" in detailed
    assert "score" not in show(compare(demo()), width=200)


def test_a_score_of_fewer_than_eight_answers_is_a_detail() -> None:
    few = compare([scored("vanilla", missing=3), scored("other", missing=2)])
    first, last = grid(show(few, width=200))[1:]
    assert "[0." not in first
    assert "0.50 [0." in last
    assert "0.43 [0." in show(few, width=200, details=True)
    by_category = compare([scored("vanilla")], by_category=True)
    assert "0.00 [0.00, 0.00]" not in show(by_category, width=200)
    assert "0.00 [0.00, 0.00]" in show(by_category, width=200, details=True)
    assert "1.00 [1.00, 1.00]" in show(by_category, width=200, details=True)


def test_names_of_drafters_make_room_for_scores_on_a_narrow_terminal() -> None:
    lookup = DrafterRecord(id="prompt lookup", sha256=None, method="ngram", trained_tokens=None, synthetic=False)
    text = show(compare([scored("vanilla"), entry("draft_verify", lookup)]), width=80)
    assert "score" in headers(text)
    assert "prompt lookup" not in text


# Conclusions in words, and for programs


def sentence_of(**more: Any) -> str:
    facts: dict[str, Any] = {
        "label": "eagle", "outcome": "pays", "tokens_per_s": 60.0, "speedup": 1.24, "interval": (1.13, 1.37),
        "num_prompts": 8, "num_prompts_to_show": None, "num_devices": 1, "speedup_per_device": None,
        "devices_of_all": None, "own_devices": None, "disqualified_by": (), "doubts": (),
    }  # fmt: skip
    return sentence(Conclusion(**(facts | more)))


def test_sentences() -> None:
    assert sentence_of() == "eagle: 1.24x [1.13, 1.37], pays"
    assert sentence_of(outcome="slower", speedup=0.58, interval=(0.5, 0.6)) == "eagle: 0.58x [0.50, 0.60], does not pay"
    assert sentence_of(doubts=("few_prompts",)) == "eagle: 1.24x [1.13, 1.37], pays (provisional: few prompts)"
    assert sentence_of(num_devices=4, speedup_per_device=0.31).endswith("pays; 0.31x for each of 4 devices")
    assert sentence_of(disqualified_by=("lossy",)) == "eagle: 1.24x [1.13, 1.37]; disqualified by lossy"
    assert sentence_of(outcome="no interval", interval=None) == "eagle: 1.24x over one prompt, which shows no interval"
    baseline = {"outcome": "baseline", "speedup": None, "interval": None}
    assert sentence_of(**baseline) == "eagle: 60.0 tok/s, the baseline"
    assert sentence_of(**baseline, devices_of_all=2) == "eagle: 60.0 tok/s, the baseline; every method ran on 2 devices"


@pytest.mark.parametrize(
    ("speedup", "interval", "is_bound", "words"),
    [
        (1.05, (1.02, 1.09), False, "about 1.05x [1.02, 1.09] (estimate), would pay"),
        (1.05, (1.02, 1.09), True, "at most 1.05x [1.02, 1.09] (estimate), could pay"),
        (1.02, (0.99, 1.05), False, "about 1.02x [0.99, 1.05] (estimate), no difference shown"),
        (0.9, (0.85, 0.96), True, "at most 0.90x [0.85, 0.96] (estimate), still no gain"),
        (1.3, None, False, "about 1.30x (estimate over one prompt)"),
    ],
)
def test_a_pipeline_on_shared_devices_says_why_and_what_more_devices_would_give(
    speedup: float, interval: Interval | None, is_bound: bool, words: str
) -> None:
    own = OwnDevices(speedup, interval, 2, is_bound=is_bound)
    assert sentence_of(outcome="slower", speedup=0.58, interval=(0.5, 0.6), own_devices=own) == (
        "eagle: 0.58x [0.50, 0.60], does not pay here: 2 stages share one device; "
        f"with a device for each stage and the drafter: {words}"
    )


def test_a_doubtful_verdict_is_provisional_and_says_why() -> None:
    assert sentence_of(doubts=("busy_machine", "noisy")).endswith(", pays (provisional: busy machine, noisy)")
    slower = {"outcome": "slower", "speedup": 0.58, "interval": (0.5, 0.6)}
    assert sentence_of(doubts=("busy_machine", "noisy"), **slower).endswith("does not pay (provisional: busy machine)")
    assert sentence_of(doubts=("few_prompts",), **slower).endswith("does not pay")
    own = sentence_of(doubts=("busy_machine",), own_devices=OwnDevices(1.05, (1.02, 1.09), 2, is_bound=False), **slower)
    assert "does not pay here (provisional: busy machine): 2 stages share one device; with" in own
    assert "provisional" not in sentence_of(doubts=("noisy",), disqualified_by=("lossy",))


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (27, "1.02x [0.90, 1.13], no difference shown; about 30 prompts needed to detect a 5 % speed-up"),
        (9, "1.02x [0.90, 1.13], no difference shown; about 9 prompts needed to detect a 5 % speed-up"),
        (143, "1.02x [0.90, 1.13], no difference shown; about 150 prompts needed to detect a 5 % speed-up"),
        (8, "1.02x [0.90, 1.13], no difference shown; 8 prompts are enough to detect a 5 % speed-up"),
        (None, "1.02x [0.90, 1.13], no difference shown at 8 prompts"),
    ],
)
def test_the_number_of_prompts_that_would_show_a_difference(needed: int | None, words: str) -> None:
    facts = {"speedup": 1.02, "interval": (0.9, 1.13), "num_prompts_to_show": needed}
    assert sentence_of(outcome="no difference shown", **facts) == f"eagle: {words}"


def test_conclusions_are_in_the_exports() -> None:
    tables = compare(demo())
    vanilla, spd = json.loads(show(tables, "json"))["tables"][0]["conclusions"]
    assert (vanilla["outcome"], spd["outcome"], spd["num_prompts"]) == ("baseline", "slower", 10)
    faster = 8 / (2 * 0.3 + 8 * 0.4)  # 8 tokens in ten cycles, of which two wait for no stage with the head
    ends = [pytest.approx(faster)] * 2  # all prompts are alike
    assert spd["own_devices"] == {"speedup": ends[0], "interval": ends, "num_stages": 3, "is_bound": True}
    assert spd["sentence"].startswith("spd: 0.80x")
    rows = list(csv.DictReader(io.StringIO(show(tables, "csv"))))
    assert [row["outcome"] for row in rows] == ["baseline", "slower"]
    columns = ("own_devices_speedup", "own_devices_speedup_ci_low", "own_devices_speedup_ci_high")
    assert [float(rows[1][column]) for column in columns] == pytest.approx([faster] * 3)


def test_cycles_are_never_told_as_negative_times_or_shares_over_one() -> None:
    bubble = BubbleParts(**(dict.fromkeys(BubbleParts.model_fields, 0.0) | {"useful": 1.0}))
    for wall_s, words in ((0.9, "stages ran ahead of the verdict"), (1.25, "80.0% of the time, and 50.00 ms a cycle")):
        full = FullCycles(num=5, stage_s=1.0, wall_s=wall_s)
        steps = pipeline_steps([True] * 8, 3)
        runs = [make_run(steps, prompt=f"p{i}", bubble=bubble, full_cycles=full) for i in range(10)]
        text = " ".join(show(compare([entry("autoregressive"), entry("pipeline", runs=runs)]), details=True).split())
        assert words in text
        assert "-0." not in text
        assert "111." not in text


@pytest.mark.parametrize(("slack_s", "words"), [([0, 0, 0.2], "20.00 ms less"), ([0, 0, -0.05], "5.00 ms more")])
def test_details_say_how_full_the_pipeline_was_and_what_the_drafter_left(slack_s: list[float], words: str) -> None:
    bubble = BubbleParts(**(dict.fromkeys(BubbleParts.model_fields, 0.0) | {"useful": 1.0}))
    fill = CyclesByFill(num=[0, 5, 15], wall_s=[0, 0.2, 0.9], stage_s=[0, 0.1, 0.8], drafts=[0, 5, 10], slack_s=slack_s)
    steps = pipeline_steps([True] * 8, 3)
    runs = [make_run(steps, prompt=f"p{i}", bubble=bubble, cycles_by_fill=fill) for i in range(10)]
    tables = compare([entry("autoregressive"), entry("pipeline", runs=runs)])
    text = " ".join(show(tables, details=True).split())
    line = "spd, cycles by stages at work: 1 stage 25.0% (40.00 ms each), 2 stages 75.0% (60.00 ms each)"
    assert f"{line}; with all of them, drafting took {words} than the slowest stage." in text
    metrics = json.loads(show(tables, "json"))["tables"][0]["rows"][1]["metrics"]
    assert metrics["cycles_by_fill"] == [0, 50, 150]
    assert metrics["cycle_s_by_fill"] == pytest.approx([0, 2, 9])
    assert "by stages at work" not in show(tables)


HOSTILE = "\x1b]0;x\x07\n| \\hline % <b>\u202e[/]"
"""Obeyed by a terminal, ends a line, and is markup of LaTeX, HTML and rich."""


@pytest.mark.parametrize("form", FORMATS)
def test_names_from_files_are_shown_and_not_obeyed(form: Format) -> None:
    runs = [make_run(vanilla_steps(9, step_ns=20 * MS), prompt=f"p{i}", category=HOSTILE) for i in range(2)]
    drafter = TRAINED.model_copy(update={"id": HOSTILE})
    plain = [entry("autoregressive", label=HOSTILE, runs=runs), entry("draft_verify", drafter, label="x" + HOSTILE)]
    found = [
        replace(each, head=each.head.model_copy(update={"model": each.head.model.model_copy(update={"id": HOSTILE})}))
        for each in plain
    ]
    lines = show(compare(found, by_category=True), form).split("\n")
    assert [printable(line) for line in lines] == lines
    if form == "latex":
        assert all(line.startswith(("%", "\\")) or line.rstrip().endswith("\\\\") for line in lines if line)
    if form == "github":
        rows = [line for line in lines if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows}) == 1
        assert not any("<b>" in line for line in lines)


def test_csv_holds_no_formulas() -> None:
    formula = entry("autoregressive", label='=HYPERLINK("http://x")')
    [row] = csv.DictReader(io.StringIO(show(compare([formula]), "csv")))
    assert row["label"] == '\'=HYPERLINK("http://x")'


def test_commands_offer_every_form_dialect_and_chart() -> None:
    """Commands list them again, as their help would otherwise have to import numpy and Vega."""
    assert (*FORMATS, "parquet") == commands.FORMATS
    assert tuple(DIALECTS) == commands.DIALECTS
    assert tuple(CHARTS) == report.CHARTS
