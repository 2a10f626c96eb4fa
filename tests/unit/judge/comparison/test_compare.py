"""What may stand in one table, against which baseline, and what is flagged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError, NotComparableError
from spdbench.judge.comparison.compare import Row, Table, compare, find_baseline
from spdbench.judge.comparison.context import by_context
from spdbench.judge.loaded import LoadedResult, load, read_results
from spdbench.judge.results.schema import Divergence, DrafterRecord, Run
from tests.builders import (
    MS,
    ORACLE,
    TRAINED,
    chunk_steps,
    failed_run,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    vanilla_steps,
    write_result,
)


def vanilla_runs(num_prompts: int = 10, **more: Any) -> list[Run]:
    return [make_run(vanilla_steps(9, step_ns=20 * MS), prompt=f"p{index}", **more) for index in range(num_prompts)]


def fast_runs(num_prompts: int = 10, *, step_ns: int = 20 * MS, **more: Any) -> list[Run]:
    return [make_run(chunk_steps([1, 4, 4], step_ns=step_ns), prompt=f"p{i}", **more) for i in range(num_prompts)]


def vanilla(
    file: str = "vanilla.json", *, label: str = "vanilla", runs: list[Run] | None = None, **more: Any
) -> LoadedResult:
    return load(make_result(runs or vanilla_runs(), make_backend(label=label), **more), file)


def eagle(file: str = "eagle.json", *, runs: list[Run] | None = None, lossy: bool = False, **more: Any) -> LoadedResult:
    devices = more.pop("num_devices", 1)
    backend = make_backend("draft_verify", lossy=lossy, num_devices=devices, label=more.pop("label", None))
    return load(make_result(fast_runs() if runs is None else runs, backend, drafter=TRAINED, **more), file)


def only(tables: list[Table]) -> Table:
    assert len(tables) == 1
    return tables[0]


def second(entries: list[LoadedResult], baseline: str | LoadedResult | None = None) -> Row:
    return only(compare(entries, baseline)).rows[1]


def flag_names(row: Row) -> set[str]:
    return {flag.name for flag in row.flags}


# Speed-ups


def test_speedup_is_the_ratio_of_decode_rates_on_paired_runs() -> None:
    row = second([vanilla(), eagle()])
    assert row.metrics["speedup"] == pytest.approx(4.0)
    assert row.metrics["speedup_ci"] == pytest.approx([4.0, 4.0])
    assert row.metrics["num_paired"] == 10
    assert row.best


def test_speedup_per_device_counts_the_drafters_device_too() -> None:
    row = second([vanilla(), eagle(num_devices=2)])
    assert row.metrics["speedup_per_device"] == pytest.approx(2.0)
    assert row.metrics["speedup_per_device_ci"] == pytest.approx([2.0, 2.0])


def test_interval_that_holds_one_shows_no_difference() -> None:
    runs = [make_run(vanilla_steps(9, step_ns=(18 + 4 * (i % 2)) * MS), prompt=f"p{i}") for i in range(10)]
    row = second([vanilla(), vanilla("b.json", label="again", runs=runs)])
    assert row.difference_shown is False
    assert not row.best


def test_one_prompt_gives_a_speedup_without_interval_and_no_best() -> None:
    row = second([vanilla(runs=vanilla_runs(1)), eagle(runs=fast_runs(1))])
    assert row.metrics["speedup"] == pytest.approx(4.0)
    assert row.metrics["speedup_ci"] is None
    assert not row.best


def test_runs_without_partner_are_dropped_and_counted() -> None:
    table = only(compare([vanilla(runs=vanilla_runs(12)), eagle()]))
    assert table.rows[1].metrics["num_paired"] == 10
    assert table.rows[1].metrics["num_dropped"] == 2
    assert any("2 without a partner" in note for note in table.notes)


def test_failed_runs_leave_the_pairs_and_are_told() -> None:
    table = only(compare([vanilla(), eagle(runs=[*fast_runs(9), failed_run("p9")])]))
    assert table.rows[1].metrics["num_paired"] == 9
    assert any("1 of 10 runs failed" in note for note in table.notes)


def test_interrupted_run_does_not_look_finished() -> None:
    table = only(compare([vanilla(num_prompts=40), eagle(num_prompts=10)]))
    told = [note for note in table.notes if "interrupted" in note]
    assert told == ["vanilla: 10 of 40 conversations; the run was interrupted, --resume finishes it."]


def test_failed_conversations_are_not_missing_ones() -> None:
    table = only(compare([vanilla(), eagle(runs=[*fast_runs(9), failed_run("p9")], num_prompts=10)]))
    assert not any("interrupted" in note for note in table.notes)


def test_result_with_nothing_but_failures_has_no_speedup() -> None:
    row = second([vanilla(), eagle(runs=[failed_run()])])
    assert row.metrics["speedup"] is None
    assert "prompt_mismatch" not in flag_names(row)


def test_one_token_answers_have_no_speedup() -> None:
    ones = [make_run(vanilla_steps(1), prompt=f"p{index}") for index in range(8)]
    assert second([vanilla(runs=ones), eagle(runs=ones)]).metrics["speedup"] is None


def test_later_turn_in_another_context_is_dropped_without_blame() -> None:
    other = [make_run(prompt=f"p{i}", turn=1, prompt_sha256="0" * 64) for i in range(10)]
    row = second([vanilla(runs=[*vanilla_runs(), *vanilla_runs(turn=1)]), eagle(runs=[*fast_runs(), *other])])
    assert row.metrics["num_paired"] == 10
    assert row.metrics["num_dropped"] == 10
    assert "prompt_mismatch" not in flag_names(row)


def test_wide_speedup_interval_is_noisy() -> None:
    runs = [make_run(chunk_steps([1, 4, 4], step_ns=(10 + 8 * (i % 3)) * MS), prompt=f"p{i}") for i in range(10)]
    assert "noisy" in flag_names(second([vanilla(), eagle(runs=runs)]))


# Tables


@pytest.mark.parametrize("other", [{"suite": "gsm8k"}, {"dtype": "bfloat16"}, {"temperature": 0.7}, {"machine": "b"}])
def test_what_may_not_stand_together_gets_tables_of_its_own(other: dict[str, Any]) -> None:
    tables = compare([vanilla(), eagle(), eagle("other.json", **other)])
    assert [[row.label for row in table.rows] for table in tables] == [["vanilla", "eagle"], ["eagle"]]
    assert tables[1].baseline is None
    assert tables[1].rows[0].metrics["speedup"] is None


def test_first_autoregressive_result_is_the_baseline() -> None:
    table = only(compare([eagle(), vanilla(), vanilla("b.json", label="slow")]))
    assert table.baseline == "vanilla"
    assert [(row.label, row.is_baseline) for row in table.rows] == [
        ("vanilla", True),
        ("eagle", False),
        ("slow", False),
    ]


def of_run(result: LoadedResult, baseline: str | None, labels: Sequence[str] = ()) -> LoadedResult:
    return replace(result, head=result.head.model_copy(update={"baseline": baseline, "labels": [*labels]}))


def test_the_runs_first_backend_is_the_baseline() -> None:
    files = [vanilla(), eagle()]
    assert only(compare([of_run(each, "eagle") for each in files])).baseline == "eagle"
    assert only(compare([of_run(each, "vanilla") for each in reversed(files)])).baseline == "vanilla"


def test_labels_have_the_order_of_the_run_whatever_the_order_of_files() -> None:
    order = ["vanilla", "slow", "eagle"]
    files = [eagle(), vanilla("b.json", label="slow"), vanilla()]
    for given in (files, files[::-1]):
        table = only(compare([of_run(each, "vanilla", order) for each in given]))
        assert [row.label for row in table.rows] == order
    mixed = [of_run(files[0], "vanilla", order), of_run(files[1], "vanilla", ["slow"]), of_run(files[2], "vanilla")]
    assert [row.label for row in only(compare(mixed)).rows] == ["vanilla", "eagle", "slow"]


@pytest.mark.parametrize("others", ["vanilla", None, "elsewhere"])
def test_of_runs_with_different_baselines_the_first_vanilla_is_it(others: str | None) -> None:
    assert only(compare([of_run(eagle(), "eagle"), of_run(vanilla(), others)])).baseline == "vanilla"
    assert only(compare([of_run(eagle(), "elsewhere"), of_run(vanilla(), "elsewhere")])).baseline == "vanilla"


def test_baseline_may_be_any_label() -> None:
    table = only(compare([vanilla(), eagle()], "eagle"))
    assert table.baseline == table.rows[0].label == "eagle"
    assert table.rows[1].metrics["speedup"] == pytest.approx(0.25)


def test_table_without_the_asked_for_baseline_stays_blank() -> None:
    tables = compare([vanilla(), eagle(), vanilla("g.json", suite="gsm8k")], "eagle")
    assert [table.baseline for table in tables] == ["eagle", None]


def test_results_with_one_label_are_both_shown_and_told_apart() -> None:
    table = only(compare([vanilla(), eagle("old/eagle.json"), eagle("new/eagle.json")]))
    assert [row.label for row in table.rows] == ["vanilla", "eagle #1", "eagle #2"]
    assert "eagle #2 is new/eagle.json." in table.notes


def test_by_category_gives_rows_for_each_category_and_for_all() -> None:
    runs = [run.model_copy(update={"category": "code"}) for run in vanilla_runs()[:4]] + vanilla_runs()[4:]
    fast = [run.model_copy(update={"category": "code"}) for run in fast_runs()[:4]] + fast_runs()[4:]
    table = only(compare([vanilla(runs=runs), eagle(runs=fast)], by_category=True))
    rows = [(row.category, row.label, row.metrics["num_paired"]) for row in table.rows]
    assert rows == [
        ("code", "vanilla", 4),
        ("code", "eagle", 4),
        ("math", "vanilla", 6),
        ("math", "eagle", 6),
        (None, "vanilla", 10),
        (None, "eagle", 10),
    ]


# Baseline by name or file


def test_unknown_baseline_suggests_a_label() -> None:
    with pytest.raises(InputError, match="did you mean 'vanilla'"):
        find_baseline("vanila", [vanilla(), eagle()])


def test_baseline_file_among_the_results_is_that_entry(tmp_path: Path) -> None:
    path = write_result(make_result(vanilla_runs()), tmp_path / "a.json")
    entries = read_results([path, path])
    assert len(entries) == 1
    assert find_baseline(str(path), entries) is entries[0]


def test_baseline_file_that_is_not_among_the_results_joins_the_table(tmp_path: Path) -> None:
    path = write_result(make_result(vanilla_runs()), tmp_path / "a.json")
    table = only(compare([eagle()], find_baseline(str(path), [eagle()])))
    assert [row.label for row in table.rows] == ["vanilla", "eagle"]
    assert table.rows[1].metrics["speedup"] == pytest.approx(4.0)


def test_baseline_file_from_another_machine_serves_but_disqualifies() -> None:
    base, mine = vanilla(machine="a"), eagle(machine="b")
    table = only(compare([base, mine], base))
    assert table.head.environment["fingerprint"] == "b"
    row = table.rows[1]
    assert row.metrics["speedup"] == pytest.approx(4.0)
    assert flag_names(row) >= {"hardware_mismatch"}
    assert row.outputs is None
    assert not row.best


@pytest.mark.parametrize(("devices", "other"), [(["cuda:0"], True), (["cpu", "cpu"], False)])
def test_plain_decoding_on_another_kind_of_device_serves_but_disqualifies(devices: list[str], *, other: bool) -> None:
    base, mine = vanilla(), eagle()
    backend = mine.head.backend.model_copy(update={"devices": devices})
    mine = replace(mine, head=mine.head.model_copy(update={"backend": backend}))
    row = only(compare([base, mine], base)).rows[1]
    assert ("hardware_mismatch" in flag_names(row)) == other
    assert row.best != other


def test_machines_that_are_not_known_are_not_the_same() -> None:
    base, mine = vanilla(machine=None), eagle(machine=None)
    assert "hardware_mismatch" in flag_names(only(compare([base, mine], base)).rows[1])


def test_baseline_file_that_serves_some_tables_leaves_the_others_blank() -> None:
    base = vanilla()
    tables = compare([base, eagle(), eagle("g.json", suite="gsm8k")], base)
    assert [table.baseline for table in tables] == ["vanilla", None]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"suite": "gsm8k"}, r"suite \(gsm8k v1, not quick v1\)"),
        ({"dtype": "bfloat16"}, r"dtype \(bfloat16, not float32\)"),
        ({"temperature": 0.7}, r"decoding \(temperature 0\.7, not 0\.0\)"),
        ({"dtype": "bfloat16", "temperature": 0.7}, r"dtype \(.*\); decoding \("),
    ],
)
@pytest.mark.parametrize("among_the_results", [False, True])
def test_baseline_file_that_serves_no_table_is_not_comparable(
    other: dict[str, Any], difference: str, among_the_results: bool
) -> None:
    base = vanilla("b.json", **other)
    with pytest.raises(NotComparableError, match=rf"--baseline b\.json: differs from eagle\.json in {difference}"):
        compare([eagle(), base] if among_the_results else [eagle()], base)


def test_baseline_of_another_model_shows_hashes_where_names_agree() -> None:
    base = vanilla("b.json")
    model = base.head.model.model_copy(update={"sha256": "f" * 64})
    base = replace(base, head=base.head.model_copy(update={"model": model}))
    with pytest.raises(NotComparableError, match=r"in model \(smollm2 ffffffff, not mmmmmmmm\)"):
        compare([eagle()], base)


def test_baseline_that_serves_no_table_is_held_against_the_result_most_like_it() -> None:
    others = [eagle("far.json", suite="gsm8k", temperature=0.7), eagle("near.json", temperature=0.7)]
    with pytest.raises(NotComparableError, match=r"differs from near\.json .*from the other 1\."):
        compare(others, vanilla("b.json"))


def test_baseline_file_alone_is_its_own_table() -> None:
    base = vanilla()
    assert only(compare([base], base)).baseline == "vanilla"


# Outputs


def test_identical_outputs_are_counted_against_the_baseline() -> None:
    changed = fast_runs()
    changed[3] = changed[3].model_copy(update={"output_ids": [9] * 9})
    row = second([vanilla(), eagle(runs=changed)])
    assert row.outputs is not None
    assert (row.outputs.num_identical, row.outputs.num_compared) == (9, 10)
    assert "diverged" in flag_names(row)
    assert not row.best


def test_differences_that_the_file_calls_ties_are_no_divergence() -> None:
    changed = fast_runs()
    changed[3] = changed[3].model_copy(update={"output_ids": [9] * 9})
    classes = Divergence(identical=9, ties=0, near_ties=1, real=0, unclassified=0)
    row = second([vanilla(), eagle(runs=changed, divergence=classes)])
    assert "diverged" not in flag_names(row)
    assert row.best


def test_sampled_outputs_are_not_compared() -> None:
    assert second([vanilla(temperature=0.7), eagle(temperature=0.7)]).outputs is None


def test_forced_verdicts_are_never_compared_for_losslessness() -> None:
    forced = DrafterRecord(id="forced:0.8", sha256=None, method="forced", trained_tokens=None, synthetic=True)
    runs = [make_run(chunk_steps([1, 4]), prompt=f"p{i}", output_ids=[1, 2, 3, 4, 5]) for i in range(10)]
    mine = load(make_result(runs, make_backend("draft_verify"), drafter=forced), "f.json")
    row = second([vanilla(), mine])
    assert row.outputs is None
    assert flag_names(row) == {"synthetic_drafter"}


# Flags that disqualify


def test_disqualified_row_is_never_best() -> None:
    steps = pipeline_steps([True] * 8, 3, step_ns=1 * MS)
    oracle = load(
        make_result([make_run(steps, prompt=f"p{i}") for i in range(10)], make_backend("pipeline"), drafter=ORACLE),
        "spd.json",
    )
    table = only(compare([vanilla(), oracle, eagle(), eagle("l.json", label="medusa", lossy=True)]))
    assert [(row.label, row.best) for row in table.rows if row.best] == [("eagle", True)]
    assert table.rows[1].metrics["speedup"] > table.rows[2].metrics["speedup"]


def test_slowdown_is_never_best() -> None:
    assert not second([vanilla(), eagle(runs=fast_runs(step_ns=200 * MS))]).best


def test_other_first_prompts_are_a_mismatch() -> None:
    row = second([vanilla(), eagle(runs=fast_runs(prompt_sha256="0" * 64))])
    assert "prompt_mismatch" in flag_names(row)
    assert row.metrics["speedup"] is None


def test_other_chat_template_is_a_mismatch() -> None:
    row = second([vanilla(), eagle(template="u" * 64, runs=fast_runs(prompt_sha256="0" * 64))])
    assert flag_names(row) >= {"template_mismatch"}
    assert "prompt_mismatch" not in flag_names(row)


def test_flags_are_judged_anew_but_those_of_other_makers_are_kept() -> None:
    result = make_result(fast_runs(), make_backend("draft_verify"), drafter=TRAINED)
    old = [{"name": name, "reason": "r", "remedy": "m"} for name in ("unattributed", "recalled", "few_prompts")]
    entry = load(type(result).model_validate(result.model_dump(by_alias=True) | {"flags": old}), "a.json")
    assert [flag.name for flag in entry.flags] == ["recalled"]


# Lengths of context


def contexts(*lengths: int) -> list[Run]:
    runs = fast_runs(len(lengths))
    return [run.model_copy(update={"num_prompt_tokens": length}) for run, length in zip(runs, lengths, strict=True)]


def test_contexts_are_rows_from_short_to_long() -> None:
    lengths = (40_000, 1024, 2047, 300, 255, 2048, 17)
    plain = [run.model_copy(update={"num_prompt_tokens": n}) for run, n in zip(vanilla_runs(7), lengths, strict=True)]
    results = by_context([vanilla(runs=plain), eagle(runs=contexts(*lengths))])
    rows = only(compare(results, by_category=True)).rows
    assert [(row.category, row.metrics["num_prompts"]) for row in rows[1::2]] == [
        ("context under 256", 2),
        ("context from 256", 1),
        ("context from 1k", 2),
        ("context from 2k", 1),
        ("context from 32k", 1),
        (None, 7),
    ]
    assert [row.metrics["speedup"] for row in rows[1::2]] == pytest.approx([4.0] * 6)


def test_the_context_of_a_failed_run_is_unknown() -> None:
    [result] = by_context([eagle(runs=[*contexts(300), failed_run("p9")])])
    assert result.runs.categories == ["context from 256", "context unknown"]


def test_contexts_pair_though_servers_count_tokens_differently_or_not_at_all() -> None:
    def counted(n: int) -> list[Run]:
        return [run.model_copy(update={"num_prompt_tokens": n}) for run in vanilla_runs()]

    for own in (256, 0):
        fast = [run.model_copy(update={"num_prompt_tokens": own}) for run in fast_runs()]
        rows = only(compare(by_context([vanilla(runs=counted(255)), eagle(runs=fast)]), by_category=True)).rows
        assert [row.category for row in rows[1::2]] == ["context under 256", None]
        assert rows[1].metrics["speedup"] == pytest.approx(4.0)
    unknown = by_context([vanilla(runs=counted(0))])
    assert {*unknown[0].runs.categories} == {"context unknown"}


def test_a_category_may_be_called_as_contexts_are() -> None:
    runs = vanilla_runs(category="context from wiki")
    rows = only(
        compare([vanilla(runs=runs), eagle(runs=fast_runs(category="context from wiki"))], by_category=True)
    ).rows
    assert [row.category for row in rows[::2]] == ["context from wiki", None]


def test_few_prompts_are_those_that_the_baseline_answered_too() -> None:
    row = second([vanilla(runs=vanilla_runs(3)), eagle(runs=fast_runs(40))])
    assert [flag.reason for flag in row.flags if flag.name == "few_prompts"] == [
        "only 3 prompts with a speed to compare with the baseline's"
    ]
    assert not row.best


def test_a_category_of_few_prompts_has_no_best() -> None:
    runs = [*vanilla_runs(10), *(make_run(vanilla_steps(9), prompt=f"r{i}", category="rare") for i in range(2))]
    fast = [*fast_runs(10), *(make_run(chunk_steps([1, 4, 4]), prompt=f"r{i}", category="rare") for i in range(2))]
    rows = only(compare([vanilla(runs=runs), eagle(runs=fast)], by_category=True)).rows
    assert {(row.category, row.best) for row in rows[1::2]} == {("math", True), ("rare", False), (None, True)}


def test_the_length_that_breaks_even_stands_to_tau_as_one_to_the_speedup() -> None:
    """Drafts that were accepted beyond an answer's end are in tau, and in no speed."""
    short = [make_run(chunk_steps([1, 5, 4], depth=4, step_ns=(40 + i) * MS), prompt=f"p{i}") for i in range(10)]
    row = second([vanilla(), eagle(runs=short)])
    assert row.metrics["break_even_length"] == pytest.approx(row.metrics["acceptance_length"] / row.metrics["speedup"])


def test_an_engine_that_knows_no_bytes_is_not_called_slow() -> None:
    backend = make_backend(label="vanilla").model_copy(update={"lane_bytes": [0]})
    found = load(make_result(vanilla_runs(), backend), "v.json")
    assert found.metrics["roofline_share"] is None
    assert "slow_baseline" not in {flag.name for flag in found.flags}


def test_prompts_of_one_token_show_no_speed_and_do_not_count() -> None:
    short = [make_run(vanilla_steps(1), prompt=f"s{i}") for i in range(11)]
    row = second([vanilla(runs=[*vanilla_runs(2), *short]), eagle(runs=[*fast_runs(2), *short])])
    assert "few_prompts" in {flag.name for flag in row.flags}
    assert not row.best
