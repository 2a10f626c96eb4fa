"""Columns of numbers out of JSON text: what is plain, and what somebody slower has to look at."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.judge.results.reader import NotPlain, floats, integers

COUNTS = st.lists(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 10**6)), max_size=6), max_size=6)


def texts(columns: list[list[float]]) -> list[bytes]:
    return [json.dumps(column, separators=(",", ":"))[1:-1].encode() for column in columns]


@given(COUNTS)
def test_whole_numbers_come_back_with_the_length_of_each_column(columns: list[list[int]]) -> None:
    values, counts = integers(texts([[*column] for column in columns]), 10**6)
    assert values.tolist() == [number for column in columns for number in column]
    assert counts.tolist() == [len(column) for column in columns]


@given(st.lists(st.lists(st.one_of(st.integers(0, 12).map(float), st.floats(0, 1e10)), max_size=6), max_size=6))
def test_floats_come_back_exactly(columns: list[list[float]]) -> None:
    values, counts = floats(texts(columns), 1e10)
    assert values.tolist() == [number for column in columns for number in column]
    assert counts.tolist() == [len(column) for column in columns]


NO_COUNTS = [
    *(b"1,,2", b"01,2", b"00", b"1 2", b"1,", b",1", b",", b" ", b"-1", b"+1", b"1.0", b"1e3", b"true", b'"1"', b"[1"),
    *(b"101", b"1234567890123456789"),  # more than was allowed
]
NO_QUANTITIES = [
    *(b"1.0.0", b".0", b"1.,2", b"01.0", b"NaN", b"-1.0", b"null", b"1.0,.0", b"1.0,", b"1 2", b"[1"),
    *(b"1e300", b"1e400"),  # more than was allowed
]


@pytest.mark.parametrize("column", NO_COUNTS)
def test_what_json_does_not_write_for_a_count_is_not_plain(column: bytes) -> None:
    for columns in ([column], [b"1,2", column], [column, b"", b"37"]):
        with pytest.raises(NotPlain):
            integers(columns, 100)


@pytest.mark.parametrize("column", NO_QUANTITIES)
def test_what_json_does_not_write_for_a_quantity_is_not_plain(column: bytes) -> None:
    for columns in ([column], [b"1.0,2.0", column], [column, b"", b"3.0"]):
        with pytest.raises(NotPlain):
            floats(columns, 1e10)
