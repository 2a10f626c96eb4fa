"""The exact gate: ids, steps, counts, acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdbench.judge.gate.verdict import GateVerdict
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.schema import Divergence, Drafts, Steps
from tests.builders import chunk_steps, make_run, vanilla_steps
from tests.unit.judge.gate.gates import (
    CATEGORIES,
    CHUNKS,
    drafted_runs,
    eagle,
    finding,
    judged,
    only,
    plain,
    plain_runs,
)


def verdicts(chunks: Sequence[int]) -> tuple[GateVerdict, str]:
    found = only(judged(eagle(drafted_runs(chunks=lambda i: chunks if i == 4 else CHUNKS)), eagle(), "exact"))
    return found.verdict, finding(found, "num_steps").reason


def test_another_id_in_greedy_float32_is_a_regression_and_is_located() -> None:
    wrong = drafted_runs(ids=lambda i: [*range(100, 106), 9, *range(107, 110)] if i == 3 else None)
    found = only(judged(eagle(wrong), eagle(), "exact"))
    assert found.verdict == "regression"
    assert finding(found, "identical_outputs").reason == "1 of 10 outputs differ, the first at token 6 of p3"


def test_another_id_is_caught_though_acceptance_rose() -> None:
    better = drafted_runs(chunks=lambda _: (1, 4, 4, 1), ids=lambda i: [7] * 10 if i == 3 else None)
    assert only(judged(eagle(better), eagle(), "exact")).verdict == "regression"


def test_shorter_answer_is_another_output() -> None:
    found = only(judged(plain([*plain_runs(9), make_run(prompt="p9")]), plain(), "exact"))
    assert found.verdict == "regression"
    assert "at token 5 of p9" in finding(found, "identical_outputs").reason


def test_one_rejection_more_is_a_regression_and_is_located() -> None:
    verdict, reason = verdicts((1, 3, 1, 2, 3))
    assert verdict == "regression"
    assert reason == "1 of 10 runs take other steps; p4, step 1: accepted 2, was 3"


def test_one_rejection_less_is_improved() -> None:
    assert verdicts((1, 5, 4))[0] == "improved"


def test_fewer_accepted_drafts_are_no_improvement_however_few_were_judged() -> None:
    """The same ids in as many steps, of which one accepted nothing and four were not judged."""

    def poorer(steps: Steps) -> Steps:
        accepted, judged = list(steps.accepted), list(steps.judged)
        accepted[1], judged[1], judged[2] = accepted[1] - 1, accepted[1] - 1, accepted[2]
        return steps.model_copy(update={"accepted": accepted, "judged": judged})

    runs = [run.model_copy(update={"steps": poorer(run.steps)}) for run in drafted_runs()]
    found = only(judged(eagle(runs), eagle(), "exact"))
    assert finding(found, "acceptance_rate").verdict == "improved"
    assert finding(found, "num_steps").verdict == found.verdict == "regression"


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=8), min_size=2, max_size=6), st.data())
def test_any_accepted_draft_turned_into_a_rejection_is_caught(rounds: list[list[int]], data: st.DataObject) -> None:
    """The same ids, but one round commits one less and another round makes up for it."""
    places = [(run, at) for run, chunks in enumerate(rounds) for at, chunk in enumerate(chunks) if chunk > 1]
    if not places:
        return
    run, at = data.draw(st.sampled_from(places))
    worse = [list(chunks) for chunks in rounds]
    worse[run][at : at + 1] = [rounds[run][at] - 1, 1]
    old, new = rounds_of(rounds), rounds_of(worse)
    assert only(judged(new, old, "exact")).verdict == "regression"
    assert only(judged(old, new, "exact")).verdict == "improved"


def rounds_of(chunks: Sequence[Sequence[int]]) -> LoadedResult:
    return eagle(drafted_runs(len(chunks), chunks=lambda i: (1, *chunks[i])))


def test_other_drafts_with_the_same_outcome_are_no_pass_in_greedy_float32() -> None:
    def deeper(steps: Steps) -> Steps:
        return steps.model_copy(update={"drafted": [2 * depth for depth in steps.drafted]})

    runs = [run.model_copy(update={"steps": deeper(run.steps)}) for run in drafted_runs()]
    found = only(judged(eagle(runs), eagle(), "exact"))
    assert found.verdict == "regression"
    assert "step 1: drafted 8, was 4" in finding(found, "num_steps").reason


def test_the_exact_gate_judges_results_of_another_machine() -> None:
    assert only(judged(eagle(machine="b"), eagle(), "exact")).verdict == "pass"


def test_times_do_not_matter_to_the_exact_gate() -> None:
    assert only(judged(eagle(drafted_runs(step_ns=lambda i: 10**8 + i)), eagle(), "exact")).verdict == "pass"


# Where ids may differ


@pytest.mark.parametrize("loose", [{"dtype": "bfloat16"}, {"temperature": 0.8}])
def test_other_ids_outside_of_greedy_float32_inform(loose: dict[str, Any]) -> None:
    other = drafted_runs(ids=lambda i: [7] * 10 if i == 3 else None)
    found = only(judged(eagle(other, **loose), eagle(**loose), "exact"))
    assert found.verdict == "pass"
    outputs = finding(found, "identical_outputs")
    assert (outputs.now, outputs.before, outputs.decides) == (9, 10, False)
    assert "1 of 10 outputs differ" in outputs.reason


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [(200, 199, "pass"), (200, 198, "regression"), (199, 200, "pass"), (198, 200, "improved")],
)
def test_acceptance_may_fall_by_half_a_per_cent(old: int, new: int, verdict: GateVerdict) -> None:
    """Of 300 rounds with one draft each, so many are accepted."""
    sides = (
        [make_run(steps_of(accepted), output_ids=range(300 + accepted + 1), prompt=f"p{i}") for i in range(2)]
        for accepted in (new, old)
    )
    new_result, old_result = (eagle(side, dtype="bfloat16") for side in sides)
    found = only(judged(new_result, old_result, "exact"))
    assert finding(found, "acceptance_rate").verdict == verdict


def steps_of(num_accepted: int) -> Steps:
    accepted = [0, *([1] * num_accepted + [0] * (300 - num_accepted))]
    ones = [0, *[1] * 300]
    return Steps(
        t_ns=list(range(301)),
        emitted=[1, *(1 + count for count in accepted[1:])],
        drafted=ones,
        judged=ones,
        accepted=accepted,
        forwards=[2.0] * 301,
    )


def test_the_allowed_fall_of_acceptance_is_an_option() -> None:
    sides = (
        [make_run(steps_of(accepted), output_ids=range(1 + 300 + accepted), prompt=f"p{i}") for i in range(2)]
        for accepted in (198, 200)
    )
    new, old = (eagle(side, dtype="bfloat16") for side in sides)
    assert only(judged(new, old, "exact", max_acceptance_drop=0.02)).verdict == "pass"


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [({"real": 1}, "regression"), ({"unclassified": 1}, "inconclusive"), ({"ties": 2, "near_ties": 1}, "pass")],
)
def test_what_the_run_found_against_plain_decoding_counts(counts: dict[str, int], verdict: GateVerdict) -> None:
    none = {"identical": 5, "ties": 0, "near_ties": 0, "real": 0, "unclassified": 0}
    new = eagle(dtype="bfloat16", divergence=Divergence(**(none | counts)))
    assert only(judged(new, eagle(dtype="bfloat16"), "exact", by_category=True)).verdict == verdict


def test_an_engine_that_gives_text_alone_is_never_called_equal() -> None:
    """It keeps no ids, so that any two of its outputs would look alike."""
    for new, old in ((eagle(unknown=["ids"]), eagle()), (eagle(), eagle(unknown=["ids"]))):
        found = only(judged(new, old, "exact"))
        assert found.verdict == "not comparable"
        assert "--gate timing" in finding(found, "identical_outputs").reason


def test_another_model_is_held_to_the_number_of_steps_and_not_to_each_of_them() -> None:
    new = eagle(drafted_runs(chunks=lambda _: (1, 3, 3, 3)), other_model="quantised")
    assert finding(only(judged(new, eagle(), "exact")), "num_steps").verdict == "pass"


@pytest.mark.parametrize(("chunks", "verdict"), [((1, 4, 2, 1, 2), "regression"), ((1, 5, 4), "improved")])
def test_outside_of_greedy_float32_the_number_of_steps_may_grow_by_little(
    chunks: Sequence[int], verdict: GateVerdict
) -> None:
    new = eagle(drafted_runs(chunks=lambda _: chunks), dtype="bfloat16")
    old = eagle(dtype="bfloat16")
    assert finding(only(judged(new, old, "exact")), "num_steps").verdict == verdict


@pytest.mark.parametrize("tokens", [5, 15])
def test_answers_of_other_lengths_are_a_regression_anywhere(tokens: int) -> None:
    """Half as long, or half as long again, whatever is in them."""
    runs = [make_run(vanilla_steps(tokens), prompt=f"p{i}", category=CATEGORIES[i % 2]) for i in range(10)]
    found = only(judged(plain(runs, dtype="bfloat16"), plain(dtype="bfloat16"), "exact"))
    assert found.verdict == "regression"
    assert finding(found, "num_new_tokens").now == 10 * tokens


def test_chunks_of_a_connection_are_no_steps() -> None:
    other = drafted_runs(chunks=lambda _: (1, 1, 1, 1, 1, 5))
    new, old = (eagle(runs, unknown=["drafts"], other_model="served") for runs in (other, drafted_runs()))
    assert only(judged(new, old, "exact")).verdict == "pass"


def test_acceptance_that_cannot_be_told_any_more_is_no_pass() -> None:
    """Every answer ends with its first token, so that no draft is judged."""
    ended = [make_run(chunk_steps([1]), prompt=f"p{i}", category=CATEGORIES[i % 2]) for i in range(10)]
    found = only(judged(eagle(ended, dtype="bfloat16"), eagle(dtype="bfloat16"), "exact"))
    assert finding(found, "acceptance_rate").verdict == "regression"
    assert finding(found, "acceptance_rate").now is None


def test_acceptance_that_an_engine_counted_itself_is_judged() -> None:
    def served(accepted: int) -> LoadedResult:
        counted = Drafts(rounds=10, judged=40, accepted=accepted)
        runs = [run.model_copy(update={"drafts": counted}) for run in drafted_runs()]
        return eagle(runs, unknown=["drafts"], other_model="served")

    assert only(judged(served(20), served(20), "exact")).verdict == "pass"
    found = only(judged(served(10), served(20), "exact"))
    assert finding(found, "acceptance_length").before == pytest.approx(3.0)
    assert finding(found, "acceptance_length").verdict == finding(found, "acceptance_rate").verdict == "regression"
