"""Up to how many requests at once a label pays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from spdbench.judge.comparison.compare import compare
from spdbench.judge.comparison.load import break_even, conclude, loads
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.results.schema import Drafts
from spdbench.render.load import sentences
from tests.builders import MS, make_backend, make_result, make_run, make_steps


def test_the_break_even_lies_between_two_levels() -> None:
    assert break_even([1, 4, 16], [2.0, 1.5, 1.2]) is None
    assert break_even([1, 4], [0.9, 1.2]) is None
    assert break_even([4, 16], [1.25, 0.8]) == pytest.approx(8.0)
    assert break_even([1, 2, 4], [1.5, 1.0, 1.2]) == pytest.approx(2.0)
    assert break_even([1, 2, 4, 8], [1.5, 1.1, 0.9, 1.3]) == pytest.approx(
        2 * 2 ** (math.log(1.1) / math.log(1.1 / 0.9))
    )


def _result(label: str, at_once: int, step_ms: float, tau: float = 1.0) -> LoadedResult:
    rounds = 10
    accepted = round(rounds * (tau - 1))
    tokens = 1 + rounds + accepted
    runs = [
        make_run(
            make_steps([1] * tokens, step_ns=round((step_ms + index / 100) * MS)),
            prompt=f"p{index}",
            drafts=Drafts(rounds=rounds, judged=None, accepted=accepted, source="each response"),
        )
        for index in range(8)
    ]
    backend = make_backend(
        "draft_verify",
        label=label,
        name="openai",
        options={"concurrency": at_once},
        unknown=["drafts", "forwards", "devices", "ids"],
        other_model="m in its server",
    )
    return load(make_result(runs, backend=backend), f"{label}-{at_once}.json")


def test_the_level_at_which_drafts_stop_paying_is_named_with_what_acceptance_would_pay() -> None:
    results = []
    for at_once, plain_ms, drafted_ms in ((8, 20.0, 25.0), (1, 10.0, 5.0), (4, 12.0, 10.0)):
        results += [_result("plain", at_once, plain_ms), _result("drafted", at_once, drafted_ms, tau=2.0)]
    (found,) = loads(compare(results, "plain"))
    assert found.levels == (1, 4, 8)
    (conclusion,) = conclude(found)
    assert (conclusion.label, conclusion.pays_up_to) == ("drafted", 4)
    assert [level.outcome for level in conclusion.levels] == ["pays", "pays", "slower"]
    assert conclusion.levels[0].speedup == pytest.approx(2.0, rel=0.01)
    # A round gives two tokens, each after 5 ms, and plain decoding one in 10 ms: 1.0 would break even.
    assert conclusion.levels[0].needed == pytest.approx(1.0, rel=0.01)
    assert conclusion.levels[2].needed == pytest.approx(2 * 25 / 20, rel=0.01)
    assert conclusion.break_even is not None
    low, high = conclusion.break_even_interval
    assert low is not None
    assert high is not None
    assert 4 < low <= conclusion.break_even <= high < 8
    first, *others = sentences(conclusion)
    assert first.startswith("drafted: pays up to 4 requests at once; break-even at about ")
    assert others[0].strip().startswith("at 1: 1.99x [1.99, 2.00], pays; ")
    assert "tau 2.00 [2.00, 2.00], break-even 1.00 [" in others[0]


@pytest.mark.parametrize(
    ("drafted_ms", "words"),
    [
        ((20.0, 25.0), "drafted: does not pay at any level measured"),
        ((20.0, 5.0), "drafted: does not pay at 1 request at once"),
        ((10.0, 25.0), "drafted: no difference shown at 1 request at once"),
    ],
)
def test_the_first_line_says_the_same_as_the_levels_below_it(drafted_ms: tuple[float, ...], words: str) -> None:
    results = [_result("plain", 1, 10.0), _result("plain", 4, 12.0)]
    results += [_result("drafted", at_once, ms, tau=1.0) for at_once, ms in zip((1, 4), drafted_ms, strict=True)]
    (found,) = loads(compare(results, "plain"))
    (conclusion,) = conclude(found)
    assert sentences(conclusion)[0].startswith(words)


def test_one_level_is_no_load() -> None:
    tables = compare([_result("plain", 1, 10.0), _result("drafted", 1, 5.0, tau=2.0)], "plain")
    assert [len(each.tables) for each in loads(tables)] == [1]


def test_servers_that_did_not_take_turns_are_marked() -> None:
    plain, drafted = _result("plain", 1, 10.0), _result("drafted", 1, 5.0, tau=2.0)
    [together] = compare([plain, drafted])
    assert together.baseline == "plain"
    assert "apart" not in {flag.name for flag in together.rows[1].flags}
    moved = replace(drafted, head=drafted.head.model_copy(update={"environment": {**drafted.head.environment, "x": 1}}))
    [apart] = compare([plain, moved])
    assert "apart" in {flag.name for flag in apart.rows[1].flags}
    assert not apart.rows[1].disqualified


def test_texts_of_servers_are_compared_where_ids_are_unknown() -> None:
    def server(label: str, *texts: str | None) -> LoadedResult:
        found = _result(label, 1, 10.0)
        runs = [make_run(prompt=f"p{i}", output_ids=[], text=text) for i, text in enumerate(texts)]
        return load(make_result(runs, backend=found.head.backend), f"{label}.json")

    [table] = compare([server("plain", "a", "b"), server("drafted", "a", "c")], "plain")
    assert table.rows[1].outputs == (2, 1)
    [table] = compare([server("plain", None, None), server("drafted", None, None)], "plain")
    assert table.rows[1].outputs is None


def test_a_label_that_is_disqualified_pays_at_no_load() -> None:
    def other(result: LoadedResult) -> LoadedResult:
        backend = result.head.backend.model_copy(update={"other_model": "another model in its server"})
        return replace(result, head=result.head.model_copy(update={"backend": backend}))

    results = [_result("plain", 1, 10.0), _result("plain", 4, 12.0)]
    results += [other(_result("drafted", at_once, 5.0, tau=2.0)) for at_once in (1, 4)]
    (found,) = loads(compare(results, "plain"))
    (conclusion,) = conclude(found)
    assert conclusion.pays_up_to is None
    first, *levels = sentences(conclusion)
    assert first == "drafted: disqualified by other_model"
    assert not any("pays" in line for line in levels)


def test_doubts_make_a_verdict_over_loads_provisional() -> None:
    results = [_result("plain", at_once, 10.0) for at_once in (1, 4)]
    apart = [_result("drafted", at_once, 5.0, tau=2.0) for at_once in (1, 4)]
    results += [
        replace(one, head=one.head.model_copy(update={"environment": {**one.head.environment, "x": 1}}))
        for one in apart
    ]
    (found,) = loads(compare(results, "plain"))
    (conclusion,) = conclude(found)
    assert sentences(conclusion)[0].endswith("up to 4 requests at once (provisional: measured apart)")


def test_doubts_of_levels_at_which_it_does_not_pay_are_no_doubts_of_the_others() -> None:
    def apart(one: LoadedResult) -> LoadedResult:
        return replace(one, head=one.head.model_copy(update={"environment": {**one.head.environment, "x": 1}}))

    results = [_result("plain", at_once, 10.0) for at_once in (1, 4)]
    results += [_result("drafted", 1, 5.0, tau=2.0), apart(_result("drafted", 4, 25.0, tau=2.0))]
    (found,) = loads(compare(results, "plain"))
    (conclusion,) = conclude(found)
    assert "provisional" not in sentences(conclusion)[0]
    assert conclusion.pays_up_to == 1
