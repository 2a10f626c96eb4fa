"""The gate on results of servers: what is known of acceptance, scores and lengths is judged, equal text is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from spdbench.judge.gate.counterpart import reference
from spdbench.judge.gate.verdict import GateVerdict, Judgement
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.schema import Divergence, Drafts, Run
from tests.builders import MS, chunk_steps, make_run, vanilla_steps
from tests.unit.judge.gate.gates import eagle, finding, judged, only

SERVED: dict[str, Any] = {"unknown": ["drafts", "forwards", "devices", "ids"], "other_model": "m in its server"}
ROUNDS = 10


def server(
    *accepted: int,
    text: str = "An answer",
    score: float | None = None,
    num_prompts: int = 12,
    also: Sequence[Run] = (),
    **more: Any,
) -> LoadedResult:
    """Prompts whose rounds accepted as many drafts; the last number goes for all that follow."""
    runs = list(also)
    for i in range(num_prompts):
        drafts = None
        if accepted:
            drafts = Drafts(
                rounds=ROUNDS, judged=None, accepted=accepted[min(i, len(accepted) - 1)], source="its response"
            )
        steps = vanilla_steps(30)
        runs.append(make_run(steps, prompt=f"p{i}", output_ids=[], text=f"{text} {i}", drafts=drafts, score=score))
    return eagle(runs, **{**SERVED, **more})


def counted(drafted: int | None, accepted: int = 0) -> Drafts:
    return Drafts(rounds=ROUNDS, judged=None, accepted=accepted, drafted=drafted)


@pytest.mark.parametrize(
    ("drafts", "acceptance", "expected"),
    [
        (counted(40), "each response of vLLM", True),
        (counted(40, 20), "each response of vLLM", True),
        (counted(None), "each response of SGLang", True),
        (counted(0), "each response of llama.cpp", False),
        (None, "vLLM's counters, before and after each request", True),
        (None, "not reported", None),
    ],
)
def test_a_server_drafts_if_anything_was_drafted_whether_or_not_it_was_accepted(
    drafts: Drafts | None, acceptance: str, expected: bool | None
) -> None:
    def one(label: str, own: Drafts | None, acceptance: str, step_ns: int = 20 * MS, **more: Any) -> LoadedResult:
        runs = [
            make_run(vanilla_steps(30, step_ns=step_ns), prompt=f"p{i}", output_ids=[], text="An answer", drafts=own)
            for i in range(12)
        ]
        return eagle(runs, label=label, baseline="a", chosen={"acceptance": acceptance}, **SERVED, **more)

    made = one("b", drafts, acceptance)
    assert made.drafts is expected
    old, new = [one("a", None, "not reported"), made], [one("a", None, "not reported", 60 * MS), made]
    plain, drafted = judged(new, old, "timing", max_slowdown=0.05)
    if expected is False:
        assert "speedup" not in {each.metric for each in drafted.findings}
    else:
        assert finding(drafted, "speedup").decides
        assert not finding(plain, "decode_tokens_per_s").decides
        assert any("a reports nothing of drafts, and is taken for plain decoding" in each for each in drafted.notes)
    chosen = reference(one("c", counted(40), ""), [*new, one("0", counted(0), "")])
    assert chosen is not None
    assert chosen.label == ("0" if expected is not False else chosen.label)
    chosen = reference(one("c", None, ""), new)
    assert chosen is not None
    assert chosen.label == ("b" if expected is False else "a")


def exact(new: LoadedResult, old: LoadedResult) -> Judgement:
    return only(judged(new, old, "exact"))


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ((20,), "pass"),
        ((10,), "regression"),
        ((30,), "improved"),
        ((0, 39, 0, 39, 10), "inconclusive"),
    ],
)
def test_acceptance_of_a_server_is_judged_by_size_and_interval(now: tuple[int, ...], verdict: GateVerdict) -> None:
    assert finding(exact(server(*now), server(20)), "acceptance_length").verdict == verdict


def test_other_texts_inform_and_decide_nothing() -> None:
    judgement = exact(server(20, text="Another"), server(20))
    texts = finding(judgement, "identical_outputs")
    assert (texts.before, texts.now, texts.decides) == (12, 0, False)
    assert judgement.verdict == "pass"


def test_a_server_that_reports_no_drafts_passes_with_a_word_and_one_that_stopped_to_does_not() -> None:
    judgement = exact(server(), server())
    assert "the server reports no drafts" in finding(judgement, "acceptance_length").reason
    assert judgement.verdict == "pass"
    assert exact(server(), server(20)).verdict == "not comparable"


@pytest.mark.parametrize("gate", ["exact", "timing"])
def test_counts_that_contradict_each_other_are_named_and_decide_nothing(gate: str) -> None:
    def one(rounds: int, step_ns: int, contradiction: str | None = None) -> LoadedResult:
        drafts = Drafts(rounds=rounds, judged=None, accepted=20, drafted=40)
        steps = vanilla_steps(30, step_ns=step_ns)
        runs = [
            make_run(steps, prompt=f"p{i}", output_ids=[], text="A", drafts=drafts, contradiction=contradiction)
            for i in range(12)
        ]
        return eagle(runs, **SERVED)

    old, new = one(10, 20 * MS), (20, 40 * MS)
    slowdown = {"max_slowdown": 0.05}
    sure = only(judged(one(*new), old, gate, **slowdown))
    judgement = only(judged(one(*new, "8 listed, a usage of 20"), old, gate, **slowdown))
    metric = "acceptance_length" if gate == "exact" else "decode_tokens_per_s"
    assert "contradict" in finding(judgement, metric).reason or gate == "timing"
    assert finding(judgement, metric).verdict == judgement.verdict == "inconclusive"
    assert any(note.startswith("contradicted: 12 of 12 answers") for note in judgement.notes)
    assert not any("contradict" in note for note in sure.notes)
    assert gate == "timing" or sure.verdict == "regression"


def test_quality_is_judged_where_answers_have_scores() -> None:
    good, bad = server(20, score=0.9), server(20, score=0.5)
    assert finding(exact(good, good), "score").verdict == "pass"
    assert finding(exact(bad, good), "score").verdict == "regression"
    assert "score" not in {each.metric for each in exact(server(20), server(20)).findings}


def test_a_real_difference_from_the_plain_server_is_a_regression() -> None:
    real = Divergence(identical=11, ties=0, near_ties=0, real=1, unclassified=0)
    tied = Divergence(identical=10, ties=1, near_ties=1, real=0, unclassified=0)
    assert exact(server(20, divergence=real), server(20)).verdict == "regression"
    assert exact(server(20, divergence=tied), server(20)).verdict == "pass"


def test_ids_on_one_side_alone_compare_with_nothing() -> None:
    assert exact(server(20), eagle()).verdict == "not comparable"


def test_an_answer_of_one_token_has_no_rounds_and_takes_none_of_the_others_from_the_gate() -> None:
    none = Drafts(rounds=0, judged=None, accepted=0, source="its response")
    short = [make_run(vanilla_steps(1), prompt="short", output_ids=[], text="A", drafts=none)]
    for now, before in ((server(0, also=short), server(20, also=short)), (server(0, also=short), server(20))):
        assert finding(exact(now, before), "acceptance_length").verdict == "regression"


def test_a_server_that_lists_ids_is_judged_by_size_and_interval_as_well() -> None:
    """Its answers end elsewhere from run to run; that alone is no fault, and scores count."""

    def one(score: float, *rounds: int) -> LoadedResult:
        runs = [
            make_run(chunk_steps([1, *[3] * count], depth=4), prompt=f"p{i}", score=score)
            for i, count in enumerate(rounds)
        ]
        return eagle(runs, temperature=0.8, **{**SERVED, "unknown": ["drafts", "forwards", "devices"]})

    before, now = one(0.9, *range(4, 16)), one(0.9, *range(14, 2, -1))
    judgement = exact(now, before)
    assert judgement.verdict == "pass"
    assert not finding(judgement, "num_new_tokens").decides
    assert finding(exact(one(0.0, *range(4, 16)), before), "score").verdict == "regression"


def test_what_one_side_does_not_know_is_not_judged_by_the_little_that_is_left() -> None:
    """A server that stopped to report drafts of most requests, and a run that was ended before it scored."""
    unknown = [run.model_copy(update={"drafts": None}) for run in server_runs(20, 12, None)[3:]]
    lost = [*server_runs(20, 3, None), *unknown]
    found = finding(exact(eagle(lost, **SERVED), server(20)), "acceptance_length")
    assert found.verdict == "not comparable"
    assert "known of 3 of 12 requests of both, and of fewest in this run" in found.reason
    scored = finding(exact(server(20), server(20, score=0.9)), "score")
    assert scored.verdict == "not comparable"
    part = [*server_runs(20, 6, 0.9), *server_runs(20, 12, None)[6:]]
    some = finding(exact(eagle(part, **SERVED), server(20, score=0.9)), "score")
    assert (some.verdict, some.before, some.now) == ("pass", 0.9, 0.9)
    assert some.reason.endswith("(on 6 of 12 requests)")


def server_runs(accepted: int, num: int, score: float | None) -> list[Run]:
    drafts = Drafts(rounds=ROUNDS, judged=None, accepted=accepted, source="its response")
    return [
        make_run(vanilla_steps(30), prompt=f"p{i}", output_ids=[], text=f"An answer {i}", drafts=drafts, score=score)
        for i in range(num)
    ]


def test_counts_of_a_baseline_are_in_its_own_columns() -> None:
    """One that reports its drafts, next to one whose steps say them."""
    steps = [make_run(chunk_steps([1, *[3] * 10], depth=2), prompt=f"p{i}", text=f"An answer {i}") for i in range(12)]
    now = eagle(steps, **{**SERVED, "unknown": ["forwards", "devices", "ids"]})
    assert finding(exact(now, server(20)), "acceptance_length").before == 3.0
    assert finding(exact(now, server(20)), "acceptance_length").now == 3.0
