"""The schedule as arithmetic: every cycle count follows from verdicts alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.pipeline import schedule as module
from spdbench.pipeline.schedule import PipelineSchedule


def run(num_stages: int, verdicts: list[bool]) -> int:
    """Cycles until the last of `verdicts` is given, drafting whenever there is something to draft behind."""
    schedule = PipelineSchedule(num_stages)
    schedule.start(0, 100)
    cycles = 0
    for right in verdicts:
        while True:
            cycles += 1
            cycle = schedule.cycle()
            if cycle.completing is None:
                schedule.fill(1)
                continue
            if right:
                schedule.accept(1)
            else:
                schedule.restart(2)
            break
    return cycles


@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=40))
def test_cycles_are_verdicts_plus_fills(num_stages: int, verdicts: list[bool]) -> None:
    """METRICS.md: cycles = verdicts + (n - 1)(1 + rejections before the last verdict)."""
    rejections = verdicts[:-1].count(False)
    assert run(num_stages, verdicts) == len(verdicts) + (num_stages - 1) * (1 + rejections)


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.9])
def test_steady_state_tokens_per_cycle(num_stages: int, acceptance: float) -> None:
    """METRICS.md: 1 / (a + (1 - a) n)."""
    period = 10
    verdicts = [i % period < acceptance * period for i in range(4000)]
    found = len(verdicts) / run(num_stages, verdicts)
    assert found == pytest.approx(1 / (acceptance + (1 - acceptance) * num_stages), rel=1e-3)


def test_the_worked_example_of_three_stages() -> None:
    """A prompt of five, the draft at 7 wrong: positions in the stages, newest first, cycle by cycle."""
    schedule = PipelineSchedule(3)
    schedule.start(50, 5)
    seen = []
    for cycle_number in range(1, 8):
        cycle = schedule.cycle()
        seen.append([node.position if node else None for node in cycle.stages])
        if cycle.completing is None:
            schedule.fill(60)
        elif cycle_number == 4:
            schedule.restart(70)
        else:
            assert cycle.child is not None
            assert cycle.child.position == cycle.completing.position + 1
            schedule.accept(60)
    assert seen == [[5, None, None], [6, 5, None], [7, 6, 5], [8, 7, 6], [7, None, None], [8, 7, None], [9, 8, 7]]


def test_a_child_is_found_by_parent_not_by_place() -> None:
    schedule = PipelineSchedule(3)
    root = schedule.start(1, 0)
    first = schedule.fill(2)
    assert first is not None
    assert first.parent == root.id
    schedule.fill(None)
    cycle = schedule.cycle()
    assert cycle.completing == root
    assert cycle.child == first
    assert cycle.stages[0] is None


def test_without_a_child_the_targets_own_token_goes_on() -> None:
    schedule = PipelineSchedule(2)
    schedule.start(1, 0)
    schedule.fill(None)
    assert schedule.cycle().child is None
    node = schedule.restart(9)
    assert (node.token_id, node.position, node.parent) == (9, 1, None)


def test_stages_run_last_first() -> None:
    schedule = PipelineSchedule(3)
    schedule.start(1, 0)
    schedule.fill(2)
    assert [(stage, node.token_id) for stage, node in schedule.cycle().work()] == [(1, 1), (0, 2)]


def test_misuse_is_refused() -> None:
    schedule = PipelineSchedule(2)
    schedule.start(1, 0)
    with pytest.raises(ValueError, match="nothing to accept"):
        schedule.accept(2)
    with pytest.raises(ValueError, match="nothing to correct"):
        schedule.restart(2)
    schedule.fill(None)
    with pytest.raises(ValueError, match="accept its child or restart"):
        schedule.fill(2)
    with pytest.raises(ValueError, match="needs a parent"):
        schedule.accept(3)
    with pytest.raises(ValueError, match="needs a stage"):
        PipelineSchedule(0)


def test_the_schedule_knows_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "dataclasses"}
