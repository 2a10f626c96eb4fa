"""The schedule as arithmetic: cycle counts follow from verdicts alone, and a branch lives while it can be right."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.pipeline import schedule as module
from spdbench.pipeline.schedule import Batch, Change, Node, PipelineSchedule


def draft(schedule: PipelineSchedule, *token_ids: int) -> Batch:
    """Successors of the newest node."""
    newest = schedule.cycle().newest
    assert newest is not None
    return schedule.draft([(newest, token_id) for token_id in token_ids])


def run(num_stages: int, verdicts: list[bool]) -> int:
    """Cycles until the last of `verdicts` is given, drafting whenever there is something to draft behind."""
    schedule = PipelineSchedule(num_stages)
    schedule.start(0, 100)
    cycles = 0
    for right in verdicts:
        while True:
            cycles += 1
            draft(schedule, 1)
            if schedule.cycle().completing is None:
                schedule.fill()
                continue
            if right:
                schedule.accept(schedule.children()[0])
            else:
                schedule.restart(2)
            break
    return cycles


@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=40))
def test_cycles_are_verdicts_plus_fills(num_stages: int, verdicts: list[bool]) -> None:
    """docs/metrics.md: cycles = verdicts + (n - 1)(1 + rejections before the last verdict)."""
    rejections = verdicts[:-1].count(False)
    assert run(num_stages, verdicts) == len(verdicts) + (num_stages - 1) * (1 + rejections)


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("acceptance", [0.5, 0.8, 0.9])
def test_steady_state_tokens_per_cycle(num_stages: int, acceptance: float) -> None:
    """docs/metrics.md: 1 / (a + (1 - a) n)."""
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
        seen.append([batch[0].position if batch else None for batch in cycle.stages])
        draft(schedule, 60)
        if cycle.completing is None:
            schedule.fill()
        elif cycle_number == 4:
            schedule.restart(70)
        else:
            (child,) = schedule.children()
            assert child.position == cycle.completing.position + 1
            schedule.accept(child)
    assert seen == [[5, None, None], [6, 5, None], [7, 6, 5], [8, 7, 6], [7, None, None], [8, 7, None], [9, 8, 7]]


def test_a_child_is_found_by_parent_not_by_place() -> None:
    schedule = PipelineSchedule(3)
    root = schedule.start(1, 0)
    (first,) = draft(schedule, 2)
    assert first.parent == root.id
    schedule.fill()
    schedule.fill()
    cycle = schedule.cycle()
    assert cycle.completing == root
    assert schedule.children() == (first,)
    assert cycle.newest is None


def test_without_a_child_the_targets_own_token_goes_on() -> None:
    schedule = PipelineSchedule(2)
    root = schedule.start(1, 0)
    schedule.fill()
    assert schedule.children() == ()
    change = schedule.restart(9)
    assert (change.root.token_id, change.root.position, change.root.parent) == (9, 1, root.id)
    assert (change.dropped, change.entering) == ((), (change.root,))


def test_stages_run_last_first() -> None:
    schedule = PipelineSchedule(3)
    schedule.start(1, 0)
    draft(schedule, 2, 3)
    schedule.fill()
    work = [(stage, [node.token_id for node in batch]) for stage, batch in schedule.cycle().work()]
    assert work == [(1, [1]), (0, [2, 3])]


def tokens(batches: tuple[Batch, ...]) -> list[list[int]]:
    return [[node.token_id for node in batch] for batch in batches]


def test_the_branch_of_the_right_sibling_lives_and_the_others_are_dropped() -> None:
    schedule = PipelineSchedule(3)
    schedule.start(1, 0)
    left, right = draft(schedule, 10, 20)
    schedule.fill()
    schedule.draft([(left, 11), (right, 21), (right, 22)])
    schedule.fill()
    assert schedule.children() == (left, right)
    after = [node for node in schedule.cycle().stages[0] if node.token_id != 22]
    schedule.draft([(node, node.token_id + 1) for node in after])
    change = schedule.accept(right)
    assert tokens((change.dropped, change.entering)) == [[10, 11, 12], [22]]
    assert tokens(schedule.cycle().stages) == [[22], [21, 22], [20]]
    assert schedule.cycle().root == schedule.cycle().completing == right


def test_a_branch_that_begins_late_is_as_much_behind() -> None:
    """The alternative to a draft enters two cycles after it: two cycles less are without a verdict than after a
    restart."""
    schedule = PipelineSchedule(5)
    root = schedule.start(1, 0)
    (first,) = draft(schedule, 10)
    schedule.fill()
    schedule.draft([(first, 11)])
    schedule.fill()
    newest = schedule.cycle().newest
    assert newest is not None
    schedule.draft([(newest, 12), (root, 20)])
    schedule.fill()
    while schedule.cycle().completing is None:
        schedule.fill()
    first, late = schedule.children()
    assert tokens((schedule.accept(late).dropped,)) == [[10, 11, 12]]
    fills = 0
    while schedule.cycle().completing is None:
        schedule.fill()
        fills += 1
    assert fills == 2
    assert schedule.cycle().completing == late


@given(st.integers(1, 5), st.data())
def test_what_is_in_flight_descends_from_the_root(num_stages: int, data: st.DataObject) -> None:
    """Random trees and verdicts: nothing that disagrees with a verdict stays, and nothing that agrees is lost."""
    schedule = PipelineSchedule(num_stages)
    nodes: dict[int, Node] = {}
    root = schedule.start(0, 0)
    living = {root.id: root}
    for _ in range(12):
        cycle = schedule.cycle()
        nodes |= {node.id: node for batch in cycle.stages for node in batch}
        in_flight = [node for batch in cycle.stages for node in batch]
        assert {node.id for node in in_flight} == set(living)
        used = {(node.parent, node.token_id) for node in in_flight}
        chosen = data.draw(st.lists(st.sampled_from(in_flight), max_size=4)) if in_flight else []
        wanted = dict.fromkeys((node, data.draw(st.integers(0, 2))) for node in chosen)
        drafted = schedule.draft([(node, token) for node, token in wanted if (node.id, token) not in used])
        living |= {node.id: node for node in drafted}
        change = _verdict(schedule, data)
        if cycle.completing is not None:
            del living[cycle.completing.id]
        living |= {node.id: node for node in change.entering}
        assert {node.id for node in change.dropped} == {
            node.id for node in living.values() if not _descends(node, change.root, living | nodes)
        }
        for node in change.dropped:
            del living[node.id]


def _verdict(schedule: PipelineSchedule, data: st.DataObject) -> Change:
    if schedule.cycle().completing is None:
        return schedule.fill()
    children = schedule.children()
    right = data.draw(st.sampled_from([None, *children]))
    return schedule.restart(3) if right is None else schedule.accept(right)


def _descends(node: Node | None, root: Node, nodes: dict[int, Node]) -> bool:
    while node is not None and node.id > root.id:
        node = None if node.parent is None else nodes.get(node.parent)
    return node == root


def test_misuse_is_refused() -> None:
    schedule = PipelineSchedule(2)
    with pytest.raises(ValueError, match="no sequence"):
        schedule.cycle()
    root = schedule.start(1, 0)
    with pytest.raises(ValueError, match="nothing to accept"):
        schedule.accept(root)
    with pytest.raises(ValueError, match="nothing to correct"):
        schedule.restart(2)
    with pytest.raises(ValueError, match="drafted already"):
        schedule.draft([(root, 5), (root, 5)])
    schedule.fill()
    with pytest.raises(ValueError, match="accept a child or restart"):
        schedule.fill()
    with pytest.raises(ValueError, match="only a child"):
        schedule.accept(root)
    with pytest.raises(ValueError, match="needs a parent"):
        schedule.draft([(Node(77, None, 1, 1), 3)])
    with pytest.raises(ValueError, match="needs a stage"):
        PipelineSchedule(0)


def test_the_schedule_knows_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "dataclasses"}
