"""Goodput: which requests count, and what is said about limits that are none."""

from __future__ import annotations

import pytest

from spdbench.errors import InputError
from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import load
from spdbench.judge.metrics.goodput import note, parse_limits
from tests.builders import MS, failed_run, make_result, make_run, vanilla_steps

# Four further tokens after the first, 10 to 40 ms each; the first takes as long as each of them.
RUNS = [make_run(vanilla_steps(5, step_ns=pace * MS), prompt=f"p{pace}") for pace in (10, 20, 30, 40)]


def share(limits: str, *more: object) -> float:
    result = load(make_result([*RUNS, *more]), "a.json")  # type: ignore[list-item]
    [table] = compare([result], limits=parse_limits(limits))
    assert table.notes[0] == note(parse_limits(limits))
    found = table.rows[0].metrics["goodput"]
    assert isinstance(found, float)
    return found


def test_share_of_requests_within_all_limits() -> None:
    first_ms = [1000 * run.ttft_s for run in RUNS if run.ttft_s is not None]
    assert share("tpot:25") == 0.5
    assert share("tpot:30") == 0.75  # the limit itself is within
    assert share("tpot:1000,ttft:0.001") == 0
    assert share(f"ttft:{max(first_ms) + 1},tpot:45") == 1
    assert share(f"e2el:{first_ms[0] + 4 * 10 + 1}") == 0.25


def test_a_failed_request_kept_no_limit() -> None:
    assert share("tpot:1000", failed_run("lost")) == pytest.approx(0.8)


def test_a_request_of_one_token_has_no_time_between_tokens() -> None:
    assert share("tpot:0.001", make_run(vanilla_steps(1, step_ns=10 * MS), prompt="short")) == pytest.approx(0.2)


def test_nothing_is_added_unless_asked() -> None:
    [table] = compare([load(make_result(RUNS), "a.json")])
    assert "goodput" not in table.rows[0].metrics


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("tttf:5", "unknown time 'tttf'; did you mean 'ttft'? Known: e2el, tpot, ttft."),
        ("", "unknown time ''"),
        ("ttft", "in milliseconds above 0"),
        ("ttft:0", "in milliseconds above 0"),
        ("ttft:nan", "in milliseconds above 0"),
        ("ttft:inf", "in milliseconds above 0"),
        ("ttft:5,ttft:6", "takes each time once"),
    ],
)
def test_limits_that_are_none(word: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_limits(word)
    assert why in str(caught.value)
    assert str(caught.value).startswith(f"--goodput {word}: ")
