"""What became of drafted tokens, which stage held them, and the tokens of spans, on hand-made runs."""

from __future__ import annotations

import pytest

from spdbench.judge.results.kept import DraftColumns, SpanColumns
from spdbench.judge.results.schema import Run
from spdbench.judge.timeline import StageToken, acceptance, lane_spans, pipe_fill, stage_tokens, step_tokens
from spdbench.types import Drafted, Span
from tests.builders import make_backend, make_run, make_steps, pipeline_steps

PIPELINE = make_backend("pipeline")


def tree_run() -> Run:
    """One round: drafts 11, 12 and 13 after the root; 21 and 22 after 12; 31 after 21."""
    steps = make_steps([1, 3], drafted=[0, 3], judged=[0, 3], accepted=[0, 2], forwards=[1, 7])
    drafts = DraftColumns.of([None, Drafted((11, 12, 13, 21, 22, 31), (-1, -1, -1, 1, 1, 3))])
    return make_run(steps, output_ids=[5, 12, 21, 99], drafted_tokens=drafts)


def flushed_run() -> Run:
    """Three stages: 10 from prefill, 11 accepted, 90 rejected for 12 with 91 and 92 behind it, 13 accepted."""
    steps = pipeline_steps([True, False, True], 3)
    by_step = [None, None, None, Drafted((11,), (-1,)), Drafted((90, 91, 92), (-1, 0, 1)), None, None]
    by_step.append(Drafted((13, 93, 94), (-1, 0, 1)))
    return make_run(steps, output_ids=[10, 11, 12, 13], drafted_tokens=DraftColumns.of(by_step))


def test_a_tree_has_accepted_rejected_and_dropped_drafts() -> None:
    prefill, round_ = step_tokens(tree_run())
    assert prefill.own == (5,)
    assert round_.accepted == (12, 21)
    assert round_.rejected == (31,)
    assert round_.dropped == (11, 13, 22)
    assert round_.own == (99,)


def test_an_answer_that_ends_within_a_round_shows_only_what_it_holds() -> None:
    run = tree_run()
    cut = run.steps.model_copy(update={"emitted": [1, 1]})
    [_, round_] = step_tokens(run.model_copy(update={"steps": cut, "output_ids": [5, 12], "num_new_tokens": 2}))
    assert round_.accepted == (12,)
    assert round_.own == ()


def test_drafts_of_another_run_are_refused() -> None:
    run = tree_run()
    with pytest.raises(ValueError, match="no draft of the accepted token 77"):
        step_tokens(run.model_copy(update={"output_ids": [5, 77, 21, 99]}))
    with pytest.raises(ValueError, match="1 steps, and the run has 2"):
        step_tokens(run.model_copy(update={"drafted_tokens": DraftColumns.of([None])}))


def test_stages_are_flushed_and_filled_again() -> None:
    assert stage_tokens(flushed_run(), PIPELINE) == [
        (StageToken(10, "own"), None, None),
        (StageToken(11, "accepted"), StageToken(10, "own"), None),
        (StageToken(90, "rejected"), StageToken(11, "accepted"), StageToken(10, "own")),
        (StageToken(91, "dropped"), StageToken(90, "rejected"), StageToken(11, "accepted")),
        (StageToken(12, "own"), None, None),
        (StageToken(13, "accepted"), StageToken(12, "own"), None),
        (StageToken(93, "dropped"), StageToken(13, "accepted"), StageToken(12, "own")),
    ]


def test_pipe_fill_without_spans_counts_tokens() -> None:
    assert pipe_fill(flushed_run(), PIPELINE) == [1, 2, 3, 3, 1, 2, 3]
    assert pipe_fill(flushed_run().model_copy(update={"drafted_tokens": None}), PIPELINE) == []


def test_pipe_fill_with_spans_counts_lanes_at_work_on_tokens_in_the_pipe() -> None:
    spans = [
        Span(0, "target", 60, 61, 7, True, 0),
        Span(0, "host", 61, 62, 7, True, 1),
        Span(1, "target", 62, 63, 7, True, 1),
        Span(1, "head", 63, 64, 7, True, 1),
        Span(0, "target", 62, 63, 8, True, 1),
        Span(0, "target", 64, 65, 9, True, 2),
        Span(2, "target", 64, 65, 8, False, 2),
    ]
    run = flushed_run().model_copy(update={"spans": SpanColumns.of(spans, 0)})
    assert pipe_fill(run, PIPELINE) == [1, 2, 1, 0, 0, 0, 0]
    assert pipe_fill(run.model_copy(update={"spans": SpanColumns.of(spans[1:2], 0)}), PIPELINE) == [0] * 7


def test_spans_have_the_tokens_of_kept_and_of_discarded_work() -> None:
    """Positions count the prompt's 7 ids. Stage 0 had begun 92 for the cycle after the flush, and passed it on."""
    spans = [
        Span(2, "target", 0, 1, 7, True, 2),
        Span(1, "target", 0, 1, 9, False, 3),
        Span(0, "target", 0, 1, 10, False, 3),
        Span(0, "target", 0, 1, 11, False, 4),
        Span(1, "target", 1, 2, 11, False, 5),
        Span(0, "target", 1, 2, 9, True, 4),
        Span(0, "target", 1, 2, 11, False, 6),
        Span(0, "target", 1, 2, 3, True, 0),
    ]
    run = flushed_run().model_copy(update={"spans": SpanColumns.of(spans, 0)})
    assert [each.token_id for each in lane_spans(run)] == [10, 90, 91, 92, 92, 12, 93, None]


def test_a_span_without_a_cycle_lies_in_that_of_its_begin() -> None:
    run = tree_run()
    begins = [run.steps.t_ns[0] - 1, run.steps.t_ns[0], run.steps.t_ns[0] + 5]
    spans = [Span(0, "target", at, at + 1, 8, True) for at in begins]
    found = lane_spans(run.model_copy(update={"spans": SpanColumns.of(spans, 0)}))
    assert [each.cycle for each in found] == [-1, 0, 0]


def test_acceptance_is_the_share_so_far() -> None:
    assert acceptance(flushed_run().steps) == [None, None, None, 1.0, 0.5, 0.5, 0.5, 2 / 3]


def test_spans_go_there_and_back() -> None:
    spans = [Span(1, "head", 105, 110, 3, False, 2), Span(0, "draft", 101, 102, 2, True)]
    kept = SpanColumns.model_validate_json(SpanColumns.of(spans, 100).model_dump_json())
    assert [span._replace(start_ns=span.start_ns + 100, end_ns=span.end_ns + 100) for span in kept.spans()] == spans


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lane": [0]}, "columns of different length"),
        ({"end_ns": [1, 2]}, "comes before the start"),
        ({"kind": ["target", "sleep"]}, "kind.1"),
        ({"cycle": [-2, 0]}, "cycle.0"),
    ],
)
def test_damaged_spans_are_refused(change: dict[str, object], why: str) -> None:
    spans = SpanColumns.of([Span(1, "head", 5, 10, 3, False, 2), Span(0, "draft", 1, 2, 2, True)], 0)
    with pytest.raises(ValueError, match=why):
        SpanColumns.model_validate({**spans.model_dump(), **change})


@pytest.mark.parametrize(
    ("ids", "parents", "why"),
    [
        ([[], [1]], [[]], "ids of 2 steps, and parents of 1"),
        ([[1, 2]], [[-1]], "2 ids, and 1 parents"),
        ([[1, 2]], [[-1, 1]], "comes before its parent"),
    ],
)
def test_damaged_drafts_are_refused(ids: list[list[int]], parents: list[list[int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DraftColumns.model_validate({"ids": ids, "parents": parents})
