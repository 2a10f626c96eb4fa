"""Counting and timing of one request, with a clock that the test turns."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from spdbench.measure.clock import IncompleteOutputError, measure
from spdbench.types import GenerationRequest, Step
from tests import tiny
from tests.mock_backend import MockBackend


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading is a second later than the one before."""
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(seconds) * 1_000_000_000)


def steps_of(*chunks: tuple[int, ...]) -> MockBackend:
    rows = [Step(ids, 0, 0, 0, 1.0) for ids in chunks]

    def script(request: GenerationRequest) -> Sequence[Step]:  # noqa: ARG001
        return rows

    return MockBackend(script)


@pytest.mark.usefixtures("ticking")
def test_time_to_first_token_and_decode_time_come_from_the_same_clock() -> None:
    found = measure(steps_of((1,), (2, 3), (), (4,)), tiny.greedy((9,), 4))
    assert (found.ttft_s, found.decode_s) == (1.0, 3.0)
    assert found.steps.t_ns == [1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000]
    assert found.steps.emitted == [1, 2, 0, 1]
    assert (found.output_ids, found.finish_reason) == ((1, 2, 3, 4), "length")


@pytest.mark.usefixtures("ticking")
def test_what_comes_after_the_end_of_sequence_neither_counts_nor_takes_time() -> None:
    backend = steps_of((1,), (2, 7, 3), (4,))
    found = measure(backend, tiny.greedy((9,), 10, frozenset({7})))
    assert (found.output_ids, found.finish_reason) == ((1, 2, 7), "eos")
    assert found.steps.emitted == [1, 2]
    assert found.decode_s == 1.0
    assert backend.log[-1] == "closed"


def test_the_limit_cuts_inside_a_chunk() -> None:
    found = measure(steps_of((1,), (2, 3, 4)), tiny.greedy((9,), 3))
    assert (found.output_ids, found.finish_reason) == ((1, 2, 3), "length")


def test_an_end_of_sequence_on_the_last_place_is_eos() -> None:
    assert measure(steps_of((1,), (7,)), tiny.greedy((9,), 2, frozenset({7}))).finish_reason == "eos"


def test_one_token_takes_no_decode_time() -> None:
    assert measure(steps_of((7,)), tiny.greedy((9,), 5, frozenset({7}))).decode_s == 0.0


def test_stopping_short_is_the_backends_bug() -> None:
    with pytest.raises(IncompleteOutputError, match="stopped after 2 of 5 tokens"):
        measure(steps_of((1,), (2,)), tiny.greedy((9,), 5))
