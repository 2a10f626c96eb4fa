"""What is kept out of a data file."""

from __future__ import annotations

from spdbench.training.distill.filters import Overlap, is_repetitive, words


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
