"""What is kept out of a data file."""

from __future__ import annotations

import numpy as np
import pytest

from spdbench.judge.results.table import is_degenerate
from spdbench.training.distill.filters import Overlap, is_loop, is_repetitive, words


@pytest.mark.parametrize("cycle", [1, 3, 8])
def test_cycle_over_half_of_the_tail_is_a_loop(cycle: int) -> None:
    start = list(range(100, 130))
    assert is_loop(start + [i % cycle for i in range(40)])
    assert not is_loop(start + [i % cycle for i in range(12)])


def test_loop_is_what_the_flag_calls_degenerate() -> None:
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        ids = draw.integers(0, draw.integers(1, 4), draw.integers(0, 90)).tolist()
        ids += (draw.integers(0, 50, draw.integers(1, 10)).tolist() * 12)[: draw.integers(0, 60)]
        assert is_loop(ids) == is_degenerate(ids)
        seen.add(is_loop(ids))
    assert seen == {True, False}


def test_sentence_said_again_and_again_is_repetitive() -> None:
    assert is_repetitive(list(range(20)) * 4)
    assert not is_repetitive(list(range(80)))
    assert not is_repetitive([1, 2, 3])


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words("It's A  test: x_1!") == ("it", "s", "a", "test", "x_1")


def test_eight_words_in_a_row_overlap_and_seven_do_not() -> None:
    overlap = Overlap(["one two three four five six seven eight nine ten"])
    assert "So: TWO three, four five six seven eight nine!" in overlap
    assert "two three four five six seven eight and nine" not in overlap


def test_short_prompt_overlaps_where_all_of_it_occurs_and_a_tiny_one_only_as_a_whole() -> None:
    overlap = Overlap(["What is 17 times 6?", "Say hi."])
    assert "Tell me, what is 17 times 6, please" in overlap
    assert "What is 17 times 7?" not in overlap
    assert "say HI" in overlap
    assert "Say hi to Anna" not in overlap
