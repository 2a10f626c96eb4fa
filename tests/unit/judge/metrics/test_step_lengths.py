"""How many ids steps commit, by context too; and a pipeline's cycles around a rejection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.judge.metrics.steps import cycles_around_rejection, step_lengths, step_lengths_by_context
from spdbench.judge.results.table import RunTable, table_from
from tests.builders import MS, chunk_steps, failed_run, make_run, pipeline_steps


def table_of(*chunks: list[int]) -> RunTable:
    return table_from([make_run(chunk_steps(each, depth=8), prompt=f"p{at}") for at, each in enumerate(chunks)])


def everything(table: RunTable) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.ones(len(table.keys), dtype=np.bool_)


def test_prefill_is_no_step_and_chosen_runs_count_alone() -> None:
    table = table_of([1, 2, 3, 2], [1, 5])
    assert step_lengths(table, everything(table), "draft_verify").tolist() == [0, 0, 2, 1, 0, 1]
    assert step_lengths(table, np.array([False, True]), "draft_verify").tolist() == [0, 0, 0, 0, 0, 1]


def test_context_begins_with_the_prompt_and_grows_by_what_was_committed() -> None:
    table = table_of([1, 4, 5, 2], [1, 3])  # prompts of 7: steps begin with 8, 12, 17 and 8 tokens
    found = step_lengths_by_context(table, everything(table))
    assert {size: counts.tolist() for size, counts in found.items()} == {
        8: [0, 0, 0, 1, 1],
        16: [0, 0, 0, 0, 0, 1],
        32: [0, 0, 1],
    }


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_contexts_divide_the_steps_among_them(chunks: list[list[int]]) -> None:
    table = table_of(*chunks)
    overall = step_lengths(table, everything(table), "draft_verify")
    parts = step_lengths_by_context(table, everything(table)).values()
    together = sum((np.pad(counts, (0, len(overall) - len(counts))) for counts in parts), np.zeros_like(overall))
    assert together.tolist() == overall.tolist()
    assert overall.sum() == sum(len(each) - 1 for each in chunks)


def test_cycles_around_the_first_rejection_after_an_accepted_draft() -> None:
    early = make_run(pipeline_steps([False], 3), prompt="early")
    typical = make_run(pipeline_steps([True, True, False, True], 3, step_ns=4 * MS), prompt="typical")
    table = table_from([failed_run("failed"), early, typical])
    found = cycles_around_rejection(table, ~table.failed, before=2, after=3)
    assert found is not None
    key, cycles = found
    assert key == ("typical", 0, 0)
    assert [cycle.verdict for cycle in cycles] == ["accepted", "accepted", "rejected", "filling", "filling", "accepted"]
    assert all(cycle.end_s - cycle.start_s == pytest.approx(0.004) for cycle in cycles)
    assert cycles[0].start_s == pytest.approx(0.050 + 2 * 0.004)  # prefill, and two cycles that filled the pipe


def test_no_rejection_no_timeline() -> None:
    table = table_from([make_run(pipeline_steps([True, True], 3))])
    assert cycles_around_rejection(table, ~table.failed, 2, 3) is None


def test_window_stays_in_the_request() -> None:
    table = table_from([make_run(pipeline_steps([False], 2)), make_run(pipeline_steps([True], 2), prompt="p1")])
    found = cycles_around_rejection(table, ~table.failed, 9, 9)
    assert found is not None
    assert [cycle.verdict for cycle in found[1]] == ["filling", "rejected"]
