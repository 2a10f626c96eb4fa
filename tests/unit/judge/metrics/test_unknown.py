"""What a backend cannot know is null, and what an engine counted itself stands in for it."""

from __future__ import annotations

from typing import Any

import pytest

from spdbench.judge.comparison.compare import Row, compare
from spdbench.judge.conclusion import conclusions
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.metrics.steps import step_lengths
from spdbench.judge.results.schema import Drafts, Run
from tests.builders import MS, chunk_steps, make_backend, make_result, make_run, vanilla_steps

NUM = 9
ITL = ("itl_p50_s", "itl_p95_s", "itl_p99_s_macro")
DRAFTS = ("acceptance_rate", "acceptance_length", "acceptance_by_position", "ideal_speedup", "num_steps", "num_judged")


def served(runs: list[Run] | None = None, **fields: Any) -> LoadedResult:
    made = [make_run(vanilla_steps(30), prompt=f"p{i}") for i in range(NUM)] if runs is None else runs
    return load(make_result(made, make_backend("draft_verify", **fields)), "served.json")


def row_of(entry: LoadedResult) -> Row:
    base = load(
        make_result([make_run(vanilla_steps(30, step_ns=15 * MS), prompt=f"p{i}") for i in range(NUM)]), "vanilla.json"
    )
    [table] = compare([base, entry], base)
    return table.rows[1]


@pytest.mark.parametrize(
    ("unknown", "names"),
    [
        ("times", ITL),
        ("drafts", DRAFTS),
        ("forwards", ("token_efficiency",)),
        ("devices", ("device_s_per_token", "speedup_per_device")),
    ],
)
def test_metrics_of_what_is_not_known_are_null_and_the_others_are_not(unknown: str, names: tuple[str, ...]) -> None:
    all_names = (*ITL, *DRAFTS, "token_efficiency", "device_s_per_token", "speedup_per_device")
    known = row_of(served([make_run(chunk_steps([1, 4, 3, 4]), prompt=f"p{i}") for i in range(NUM)])).metrics
    found = row_of(
        served([make_run(chunk_steps([1, 4, 3, 4]), prompt=f"p{i}") for i in range(NUM)], unknown=[unknown])
    ).metrics
    assert {name for name in all_names if found[name] is None} == set(names)
    assert all(known[name] is not None for name in all_names)
    assert found["ttft_s"] is not None
    assert found["speedup"] is not None


def test_acceptance_is_what_the_engine_counted() -> None:
    drafts = [Drafts(rounds=4, judged=9, accepted=6), Drafts(rounds=6, judged=11, accepted=4)]
    runs = [make_run(vanilla_steps(30), prompt=f"p{i}", drafts=drafts[i % 2]) for i in range(8)]
    overall = served(runs, unknown=["drafts"]).metrics
    assert overall["acceptance_length"] == overall["ideal_speedup"] == pytest.approx(1 + 10 / 10)
    assert overall["acceptance_rate"] == pytest.approx(10 / 20)
    assert overall["acceptance_length_ci"] is not None


def test_a_rate_without_every_verdict_is_null_and_the_length_is_not() -> None:
    drafts = [Drafts(rounds=4, judged=9, accepted=6), Drafts(rounds=6, judged=None, accepted=4)]
    runs = [make_run(vanilla_steps(30), prompt=f"p{i}", drafts=drafts[i % 2]) for i in range(8)]
    overall = served(runs, unknown=["drafts"]).metrics
    assert overall["acceptance_rate"] is None
    assert overall["acceptance_length"] == pytest.approx(2)


def test_chunks_of_a_server_have_no_acceptance_length_in_any_dialect() -> None:
    overall = served(unknown=["drafts"]).metrics
    assert overall["acceptance_length_sglang"] is None
    assert overall["acceptance_length_vllm"] is None


def test_outputs_without_ids_are_not_compared() -> None:
    assert row_of(served(unknown=["ids"])).outputs is None
    assert row_of(served()).outputs is not None


def test_outputs_of_another_model_are_compared_and_diverge_from_nothing() -> None:
    runs = [make_run(vanilla_steps(30), prompt=f"p{i}", output_ids=range(500, 530)) for i in range(NUM)]
    own, other = row_of(served(runs)), row_of(served(runs, other_model="llama in its server"))
    assert other.outputs is not None
    assert other.outputs.num_identical == 0
    assert "diverged" in [flag.name for flag in own.flags]
    assert [flag.name for flag in other.flags] == ["other_model"]


def test_a_server_with_drafts_may_beat_the_same_server_without() -> None:
    plain = served(label="plain", other_model="llama in its server")
    drafts = [make_run(chunk_steps([1, 4, 4]), prompt=f"p{i}") for i in range(NUM)]
    for model, names in (("llama in its server", []), ("llama in another", ["other_model"])):
        [table] = compare([plain, served(drafts, label="eagle3", other_model=model)], "plain")
        assert [flag.name for flag in table.rows[1].flags if flag.name == "other_model"] == names
        assert table.rows[1].disqualified == bool(names)
        assert ("other_model" in conclusions(table)[1].disqualified_by) == bool(names)


def test_what_an_engine_counted_gives_positions_lengths_and_every_dialect() -> None:
    drafts = [
        Drafts(rounds=3, judged=7, accepted=4, rounds_accepting=[1, 0, 2, 0], judged_at=[3, 2, 2]),
        Drafts(rounds=5, judged=6, accepted=1, rounds_accepting=[4, 1], judged_at=[5, 1]),
        None,
    ]
    runs = [make_run(vanilla_steps(8), prompt=f"p{i}", drafts=drafts[i % 3]) for i in range(9)]
    row = served(runs, unknown=["drafts"])
    assert row.metrics["acceptance_by_position"] == pytest.approx([3 / 8, 2 / 3, 0 / 2])
    expected = {
        **dict.fromkeys(("spdbench", "vllm", "spec_bench"), 1 + 5 / 8),
        "sglang": 16 / 8,
        "specforge": (8 / 3 + 8 / 5) / 2,
        "aiperf": (1 + 4 / 3 + 1 + 1 / 5) / 2,
        "nvidia": (8 / 4 + 8 / 6) / 2,
        "eagle": 14 / 6,
    }
    assert {name: row.metrics[f"acceptance_length_{name}"] for name in expected} == pytest.approx(expected)
    table = row.runs
    assert step_lengths(table, ~table.failed, "reported").tolist() == [0, 15, 3, 6, 0]


@pytest.mark.parametrize(
    "wrong", [{"rounds_accepting": [1, 2]}, {"judged_at": [3, 3], "rounds_accepting": [1, 0, 2]}, {"judged_at": [1]}]
)
def test_counts_that_contradict_their_totals_are_refused(wrong: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="not as many"):
        Drafts(rounds=3, judged=7, accepted=4, **wrong)
