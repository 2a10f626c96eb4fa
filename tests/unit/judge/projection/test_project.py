"""From results to a projection: what is replayed, what parts cost, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spdbench.errors import InputError
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.projection.costs import ProfileCosts, RecordedCosts
from spdbench.judge.projection.opponents import Load, break_even, frontier, tensor_parallel_s, token_s, under_load
from spdbench.judge.projection.project import Setting, even_layers, make_parts, parse_stages, project
from spdbench.judge.projection.recorded import (
    Recorded,
    rounds_of,
    rows_a_stage,
    sort_results,
    stage_sigma,
    start_seconds,
    verdicts,
    with_acceptance,
)
from spdbench.judge.results.lanes import FullCycles, PartTime, PartTimes
from spdbench.judge.results.schema import Result
from spdbench.profiles.profile import Profile
from spdbench.render.projection import verdict
from tests.builders import (
    MS,
    ORACLE,
    RANDOM,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    make_steps,
    pipeline_steps,
    vanilla_steps,
)
from tests.unit.judge.projection.projected import (
    BUSY,
    PARTS,
    VERDICTS,
    eagle_result,
    make_profile,
    medusa_result,
    pipeline_result,
    vanilla_result,
)


def vanilla() -> LoadedResult:
    return load(vanilla_result(), "vanilla.json")


def pipeline(num_stages: int = 3, **more: Any) -> LoadedResult:
    return load(pipeline_result(num_stages, **more), f"spd{num_stages}.json")


def eagle() -> LoadedResult:
    return load(eagle_result(), "eagle.json")


def medusa() -> LoadedResult:
    return load(medusa_result(), "medusa.json")


def setting(*stages: int, **more: Any) -> Setting:
    return Setting(tuple(tuple(even_layers(30, count)) for count in stages), own_drafter=True, **more)


def with_failed(result: Result) -> Result:
    """With one request more, which failed."""
    failed = result.runs[0].model_copy(update={"prompt_id": "p9", "finish_reason": "error", "error": "it broke"})
    return result.model_copy(update={"runs": [*result.runs, failed]})


def of_other_prompts(result: Result) -> Result:
    runs = [run.model_copy(update={"prompt_sha256": "f" * 64}) for run in result.runs]
    return result.model_copy(update={"runs": runs})


RESULTS: Sequence[LoadedResult] = (vanilla(), pipeline(), eagle(), medusa())


@pytest.fixture
def recorded() -> Recorded:
    return sort_results(RESULTS)


def test_the_verdicts_are_those_of_every_token_after_the_first() -> None:
    assert list(verdicts(pipeline()).values()) == VERDICTS
    assert list(verdicts(pipeline(5)).values()) == VERDICTS


def test_rounds_are_counted_with_their_rows_and_levels() -> None:
    found = next(iter(rounds_of(eagle()).values()))
    assert (found.num, found.rows, found.levels) == (3, 3.0, 2.0)


@pytest.mark.parametrize("change", [-0.2, -0.05, 0.05, 0.2])
def test_another_acceptance_is_as_much_higher_or_lower(change: float) -> None:
    rng = np.random.default_rng(0)
    sequence = (rng.random(20_000) < 0.6).tolist()
    assert np.mean(with_acceptance(sequence, change, rng)) == pytest.approx(0.6 + change, abs=0.02)


def test_acceptance_has_its_bounds() -> None:
    rng = np.random.default_rng(0)
    assert with_acceptance([True, False], 1.0, rng) == [True, True]
    assert with_acceptance([True, True], 0.1, rng) == [True, True]
    assert with_acceptance([False, False], -0.1, rng) == [False, False]


def test_what_the_first_cycle_takes_longer_than_a_refill_is_the_start() -> None:
    steps = pipeline_steps([True, False, True, True], 3)
    late = steps.model_copy(update={"t_ns": [steps.t_ns[0], *(each + 30 * MS for each in steps.t_ns[1:])]})
    result = pipeline()
    slow = load(make_result([make_run(late)], result.head.backend), "slow.json")
    assert start_seconds(slow) == pytest.approx(0.03)
    assert start_seconds(result) == 0.0


def test_without_a_profile_vanillas_token_is_split_by_bytes(recorded: Recorded) -> None:
    costs = RecordedCosts(recorded)
    # 30 layers of 6 bytes and a head of 20: a tenth of the token's 100 ms is the head's
    assert costs.head_s(1) == pytest.approx(0.01)
    assert costs.layer_s(1) == pytest.approx(0.003)
    assert costs.layer_s(2) is None
    assert costs.message_s(1) is None
    parts = make_parts(recorded, costs, pipeline(), (10, 10, 10), setting())
    assert parts.stages == pytest.approx((0.03, 0.03, 0.03))
    assert (parts.draft_s, parts.verify_s) == pytest.approx((0.002, 0.0001))
    assert parts.devices == (0, 1, 2, 3)
    assert parts.abort_s == pytest.approx(0.0015)


def test_without_a_profile_plain_decoding_is_as_fast_as_it_was_measured(recorded: Recorded) -> None:
    class Waiting(RecordedCosts):
        """Whose pipelines waited for messages and the host."""

        def host_s(self, result: LoadedResult) -> float:  # noqa: ARG002
            return 5.0

    assert token_s(Waiting(recorded), recorded.num_layers) == pytest.approx(0.1)


def test_the_drafter_shares_the_first_stages_device_where_asked(recorded: Recorded) -> None:
    shared = replace(setting(), own_drafter=False)
    parts = make_parts(recorded, RecordedCosts(recorded), pipeline(), (15, 15), shared)
    assert (parts.devices, parts.abort_s) == ((0, 1, 0), 0.0)


def test_a_part_of_the_head_runs_next_to_the_drafter_where_asked(recorded: Recorded) -> None:
    costs, rows = ProfileCosts(make_profile(), recorded), {}
    for share in (0.0, 0.5, 1.0):
        row = project(recorded, costs, replace(setting(3), drafters_head=share)).pipelines[0]
        rows[share] = row.slowest_stage_s
    assert rows == pytest.approx({0.0: 0.015, 0.5: 0.0125, 1.0: 0.01})


def test_a_synthetic_drafter_takes_no_time(recorded: Recorded) -> None:
    synthetic = pipeline(parts=None, drafter=ORACLE)
    assert make_parts(recorded, RecordedCosts(recorded), synthetic, (15, 15), setting()).draft_s == 0.0


def test_a_projection_has_a_row_for_each_number_of_stages_and_each_opponent(recorded: Recorded) -> None:
    found = project(recorded, ProfileCosts(make_profile(), recorded), setting(1, 2, 3, 5))
    assert [row.num_stages for row in found.pipelines] == [1, 2, 3, 5]
    assert found.token_s == pytest.approx(0.035)
    assert {each.label for each in found.opponents} == {
        "vanilla",
        "eagle",
        "medusa",
        *(f"tensor parallel x{count}" for count in (2, 3, 4, 5, 6)),
    }
    for row in found.pipelines:
        assert row.interval is not None
        assert row.interval[0] <= row.tokens_per_s <= row.interval[1]
        assert row.speedup == pytest.approx(row.tokens_per_s * 0.035)
        by_what = {(each.what, each.value): each.speedup for each in row.sensitivities}
        assert by_what["acceptance", -0.1] <= row.speedup <= by_what["acceptance", 0.1]
        assert by_what["message_s", 1e-3] <= by_what["message_s", 1e-5] <= row.speedup
    assert found.best is max(found.pipelines, key=lambda row: row.speedup)
    assert found.most_efficient is max(found.pipelines, key=lambda row: row.speedup / row.devices)


def test_the_steady_cycle_of_a_projection_is_the_slowest_stage(recorded: Recorded) -> None:
    costs = ProfileCosts(make_profile(), recorded)
    row = project(recorded, costs, setting(3)).pipelines[0]
    assert row.slowest_stage_s == pytest.approx(0.015)
    assert row.hidden_layers == pytest.approx(13.0)  # 15 ms less a draft of 2 ms, in layers of 1 ms


def test_a_result_of_the_same_number_of_stages_is_replayed_rather_than_another() -> None:
    recorded = sort_results([vanilla(), pipeline(3), pipeline(5)])
    found = project(recorded, RecordedCosts(recorded), setting(2, 3, 5, 6))
    assert [row.recorded_stages for row in found.pipelines] == [3, 3, 5, 5]
    assert any("verdicts of a drafter for 3, 5 stages stand for spd x2, spd x6" in note for note in found.notes)


def test_a_draft_takes_what_the_results_own_drafter_took_with_all_threads(recorded: Recorded) -> None:
    own, seconds = "d" * 12, make_profile().seconds
    found = seconds | {
        f"draft drafter={own} method=spd stages=2 threads=16": 3e-3,
        f"draft drafter={own} method=spd stages=2 threads=4": 5e-3,
        "draft drafter=other method=spd stages=2 threads=32": 7e-3,
    }
    costs = ProfileCosts(make_profile().model_copy(update={"seconds": found}), recorded)
    assert [costs.pipeline_draft_s(pipeline(), stages) for stages in (2, 3)] == [3e-3, 2e-3]


def test_a_round_drafts_at_the_cost_of_its_own_drafter(recorded: Recorded) -> None:
    own = {f"draft drafter={'d' * 12} method=eagle3 tree=chain levels={levels}": levels * 1e-3 for levels in (1, 2)}
    other = {f"draft drafter=z method=eagle3 tree=chain levels={levels}": 1.0 for levels in (1, 2)}
    seconds = own | make_profile().seconds | other
    costs = ProfileCosts(make_profile().model_copy(update={"seconds": seconds}), recorded)
    assert [costs.round_draft_s(eagle(), levels) for levels in (1, 2)] == [1e-3, 2e-3]


def test_eagle_takes_its_rounds_at_the_profiles_costs(recorded: Recorded) -> None:
    found = project(recorded, ProfileCosts(make_profile(), recorded), setting(2))
    rival = next(each for each in found.opponents if each.label == "eagle")
    round_s = 30 * 1.02e-3 + 5e-3 + 6e-3  # three rows, two levels
    assert rival.tokens_per_s == pytest.approx(6 / (3 * round_s))


def test_eagle_without_costs_of_several_rows_is_as_it_was_measured(recorded: Recorded) -> None:
    found = project(recorded, RecordedCosts(recorded), setting(2))
    rival = next(each for each in found.opponents if each.label == "eagle")
    assert rival.tokens_per_s == pytest.approx(6 / (3 * 0.12))


@pytest.mark.parametrize(
    ("profiled", "round_s"),
    [(True, 30 * 1.04e-3 + 5e-3 + 2e-3), (False, 0.12)],  # five rows, two of the three heads; or as it was measured
)
def test_medusa_takes_its_trees_rows_and_its_heads(recorded: Recorded, profiled: bool, round_s: float) -> None:
    costs = ProfileCosts(make_profile(), recorded) if profiled else RecordedCosts(recorded)
    found = project(recorded, costs, setting(2))
    (rival,) = [each for each in found.opponents if each.label.startswith("medusa")]
    assert rival.tokens_per_s == pytest.approx(6 / (3 * round_s))
    assert (rival.devices, rival.method) == (1, "draft_verify")


def test_what_results_alone_cannot_say_is_named_with_the_command_that_measures_it(recorded: Recorded) -> None:
    notes = project(recorded, RecordedCosts(recorded), setting(2)).notes
    (missing,) = [note for note in notes if "omitted" in note]
    assert missing.startswith("tensor parallelism and several requests at once are omitted")
    assert "spdbench profile -m smollm2 --dtype float32 -o profile.json, then --profile profile.json" in missing
    assert any(note.startswith("n replicas of what runs on one device take n requests") for note in notes)
    profiled = project(recorded, ProfileCosts(make_profile(), recorded), setting(2)).notes
    assert not any("omitted" in note for note in profiled)
    assert any(note.startswith("--concurrency N") for note in profiled)


def test_tensor_parallelism_shares_the_work_and_pays_for_all_reduces(recorded: Recorded) -> None:
    costs = ProfileCosts(make_profile(), recorded)
    assert tensor_parallel_s(costs, 30, 4) == pytest.approx(0.035 / 4 + 2 * 30 * 2 * 1e-4)
    assert tensor_parallel_s(RecordedCosts(recorded), 30, 4) is None


def test_under_load_requests_share_a_forward(recorded: Recorded) -> None:
    costs = ProfileCosts(make_profile(), recorded)
    loads = under_load(recorded, costs, [2], 5, [("spd x1", 2, lambda _: 0.02)])
    by_name = {(each.label, each.requests): each for each in loads}
    assert sorted({each.requests for each in loads}) == [1, 2, 4, 5]
    five = token_s(costs, 30, 5)
    assert five is not None
    assert by_name["vanilla", 5].token_s == five
    assert by_name["vanilla", 5].device_s_per_token == pytest.approx(five / 5)
    assert by_name["replicas x2", 5].token_s == token_s(costs, 30, 3)
    assert ("replicas x2", 1) not in by_name
    assert by_name["spd x1", 4].device_s_per_token == pytest.approx(2 * 0.02 / 4)


def test_further_requests_read_their_own_keys_and_values(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes 1 us more for each token of context, and 10 us for each further row."""
    seconds = make_profile().seconds
    longer = {key.replace("128", "1128"): each + 1e-3 for key, each in seconds.items() if key.startswith("layer")}
    costs = ProfileCosts(make_profile().model_copy(update={"seconds": seconds | longer}), recorded)
    attention_s = recorded.context * 1e-6
    one, five = costs.layer_s(1), costs.layer_s(5, 5)
    assert one is not None
    assert five is not None
    assert five == pytest.approx(one + 4e-5 + 4 * attention_s)
    assert costs.layer_s(5) == pytest.approx(one + 4e-5)  # the rows of one request share them
    tokens = [token_s(costs, 30, requests) for requests in (1, 5)]
    assert tokens == pytest.approx([30 * one + 5e-3, 30 * five + 5e-3])
    shared = tensor_parallel_s(costs, 30, 2, 5)
    assert shared == pytest.approx((30 * five + 5e-3) / 2 + 2 * 30 * (costs.message_s(5) or 0.0))
    load = project(recorded, costs, setting(3, concurrency=5)).loads[-1]
    with monkeypatch.context() as patch:
        patch.setattr(Profile, "attention_s", lambda *_: 0.0)
        free = project(recorded, costs, setting(3, concurrency=5)).loads[-1]
    assert (load.label, load.requests) == (free.label, free.requests) == ("spd x3", 5)
    assert load.token_s > free.token_s + 10 * 4 * attention_s  # at least a stage's ten layers
    flat = ProfileCosts(make_profile(), recorded)
    assert any("one length of context alone" in note for note in project(recorded, flat, setting(3)).notes)


def test_a_profile_without_messages_says_that_they_are_taken_as_free(recorded: Recorded) -> None:
    profile = make_profile()
    alone = profile.model_copy(update={"seconds": {k: s for k, s in profile.seconds.items() if "message" not in k}})
    said = [project(recorded, ProfileCosts(each, recorded), setting(3)).notes for each in (profile, alone)]
    assert [any("no messages between devices" in note for note in notes) for notes in said] == [False, True]


def test_the_frontier_has_what_nothing_beats() -> None:
    fast, cheap, both = Load("a", 1, 2, 1.0, 2.0), Load("b", 1, 1, 2.0, 1.0), Load("c", 1, 2, 2.0, 2.0)
    assert frontier([fast, cheap, both, replace(both, requests=2)]) == [fast, cheap, replace(both, requests=2)]


def test_where_speculation_stops_paying() -> None:
    loads = [
        Load(label, num, 1, seconds, 1.0)
        for label, times in {"eagle": (1.0, 2.0, 9.0), "vanilla": (2.0, 3.0, 4.0), "slow": (5.0, 5.0, 1.0)}.items()
        for num, seconds in zip((1, 2, 4), times, strict=True)
    ]
    found = {label: break_even(loads, label, "vanilla") for label in ("eagle", "slow")}
    assert [(each.up_to, each.faster_at) for each in found.values() if each] == [(2, [1, 2]), (0, [4])]
    assert break_even(loads, "eagle", "nothing") is None


def test_a_profile_of_requests_at_once_gives_loads_and_a_breakeven(recorded: Recorded) -> None:
    found = project(recorded, ProfileCosts(make_profile(), recorded), setting(3, concurrency=8))
    assert {each.requests for each in found.loads} == {1, 2, 4, 8}
    assert {(each.label, each.rival) for each in found.breakevens} == {
        ("eagle", "vanilla"),
        ("medusa", "vanilla"),
        ("spd x3", "vanilla"),
        ("spd x3", "tensor parallel x4"),
    }


def test_a_shorter_chain_is_an_opponent_where_it_is_faster(recorded: Recorded) -> None:
    """Rounds accepted 2, 1 and 0 of two drafts each; with a second level as dear as a forward, one draft is better."""
    profile = make_profile()
    slow = profile.model_copy(
        update={"seconds": profile.seconds | {"draft drafter=b method=eagle3 tree=chain levels=2": 3e-2}}
    )
    found = project(recorded, ProfileCosts(slow, recorded), setting(2))
    best = next(each for each in found.opponents if each.label == "eagle, chain of 1")
    assert best.tokens_per_s == pytest.approx(5 / 3 / (30 * 1.01e-3 + 5e-3 + 4e-3))
    assert best.tokens_per_s > next(each for each in found.opponents if each.label == "eagle").tokens_per_s
    assert best.interval is not None
    known = {each.label for each in project(recorded, ProfileCosts(profile, recorded), setting(2)).opponents}
    assert "eagle, chain of 1" not in known  # two drafts are better there


# Labels and doubts


def relabelled(result: LoadedResult, label: str, file: str, **options: object) -> LoadedResult:
    backend = result.head.backend.model_copy(update={"label": label, "options": options})
    return replace(result, file=file, head=result.head.model_copy(update={"backend": backend}))


def test_every_label_of_a_backend_is_projected() -> None:
    deep = relabelled(pipeline(), "deep", "deep.json", draft_top_k=4)
    wide, again = relabelled(eagle(), "wide", "wide.json", top_k=9), relabelled(eagle(), "eagle", "again.json")
    recorded = sort_results([vanilla(), pipeline(), pipeline(5), deep, eagle(), wide, again])
    found = project(recorded, ProfileCosts(make_profile(), recorded), setting(3, 5, concurrency=2))
    assert [row.label for row in found.pipelines] == ["spd x3", "deep x3", "spd x5", "deep x5"]
    assert [row.recorded_stages for row in found.pipelines] == [3, 3, 5, 3]
    assert {each.label for each in found.opponents} >= {"eagle", "wide", "eagle#2"}
    assert {each.label for each in found.loads} >= {"eagle", "wide", "eagle#2", "deep x5"}
    assert "eagle#2: is again.json, the label being that of another result too" in found.notes


def test_a_result_that_stands_for_nothing_is_named() -> None:
    recorded = sort_results([vanilla(), pipeline(3), relabelled(pipeline(5), "five", "five.json"), plain_again()])
    notes = project(recorded, RecordedCosts(recorded), setting(3)).notes
    (unused,) = [note for note in notes if note.startswith("five: is not shown: it has 5 stages")]
    assert "nearer" in unused
    assert "vanilla: is not shown (again.json): plain decoding is that of vanilla.json" in notes


def plain_again() -> LoadedResult:
    return replace(vanilla(), file="again.json")


def test_synthetic_drafters_of_two_rates_are_two_ways_to_decode() -> None:
    drafters = [ORACLE.model_copy(update={"id": f"oracle:{rate}"}) for rate in (0.5, 0.9)]
    results = [relabelled(pipeline(drafter=each), each.id[-1], f"{each.id}.json") for each in drafters]
    recorded = sort_results([vanilla(), *results])
    found = project(recorded, RecordedCosts(recorded), setting(2, 3))
    assert [row.label for row in found.pipelines] == ["5 x2", "9 x2", "5 x3", "9 x3"]


def test_a_disqualified_pipeline_is_the_best_only_if_all_are() -> None:
    made_up = relabelled(pipeline(drafter=ORACLE, parts=None), "made_up", "oracle.json")
    for results, best in ((made_up, pipeline()), "spd x3"), ((made_up,), "spd x3"):
        recorded = sort_results([vanilla(), *results])
        found = project(recorded, ProfileCosts(make_profile(), recorded), setting(3))
        assert found.best.label == found.most_efficient.label == best
        assert found.best.disqualified == (len(results) == 1)
        assert (" (disqualified, as all are)" in verdict(found)) == (len(results) == 1)
        assert max(found.pipelines, key=lambda row: row.tokens_per_s).disqualified
    random = load(eagle_result().model_copy(update={"drafter": RANDOM}), "random.json")
    recorded = sort_results([vanilla(), pipeline(), random])
    found = project(recorded, RecordedCosts(recorded), setting(3))
    assert found.best_opponent.label == "vanilla"
    assert max(found.opponents, key=lambda each: each.tokens_per_s).label == "eagle"


@pytest.mark.parametrize(
    ("doubtful", "note"),
    [
        (pipeline(drafter=ORACLE), r"spd: the drafts come from oracle:0.\d.* \(synthetic_drafter\)"),
        (
            pipeline(drafter=RANDOM),
            r"spd: the drafter has random weights.* \(untrained_drafter\)",
        ),
        (
            load(with_failed(pipeline_result()), "failed.json"),
            "spd: 1 of 4 requests failed and are omitted",
        ),
        (
            load(of_other_prompts(pipeline_result()), "other.json"),
            "spd: not paired with vanilla: 3 of 3 requests have no partner .*, and 3 of vanilla's none here",
        ),
    ],
    ids=["synthetic", "untrained", "failed", "unpaired"],
)
def test_what_casts_doubt_on_a_result_is_one_note(doubtful: LoadedResult, note: str) -> None:
    recorded = sort_results([vanilla(), doubtful])
    found = project(recorded, ProfileCosts(make_profile(), recorded), setting(2)).notes
    assert [len(re.findall(note, each)) for each in found].count(1) == 1
    assert any("not paired" in each for each in found) == ("not paired" in note)
    sound = sort_results([vanilla(), pipeline()])
    assert not any(re.search(note, each) for each in project(sound, RecordedCosts(sound), setting(2)).notes)


def test_flags_that_only_warn_are_named_together_and_those_that_disqualify_are_not_among_them() -> None:
    recorded = sort_results([vanilla(), pipeline(drafter=ORACLE)])
    found = project(recorded, RecordedCosts(recorded), setting(2)).notes
    (warned,) = [note for note in found if note.startswith("the results carry warnings")]
    assert "few_prompts (vanilla, spd); slow_baseline (vanilla)" in warned
    assert "synthetic_drafter" not in warned


# Branches


def branched(num_stages: int = 3) -> LoadedResult:
    """One request: two drafts accepted whose branches entered two cycles late, one rejected, one accepted; two rows a
    stage."""
    late = [(1, 1), (0, 0), (0, 0), (1, 1), (0, 0), (0, 0), (1, 0), (0, 0), (0, 0), (1, 1)]
    emitted, accepted = zip((1, 0), (0, 0), (0, 0), *late, strict=True)
    forwards = [1.0, *(2 * min(1.0, (each + 1) / 3) for each in [0, 1, *range(2, 9), 0, 1, 2])]
    steps = make_steps(emitted, drafted=emitted, judged=emitted, accepted=accepted, forwards=forwards, step_ns=MS)
    result = pipeline_result(num_stages)
    backend = result.backend.model_copy(update={"chosen": {"max_rows": "7"}})
    return load(
        result.model_copy(update={"backend": backend, "runs": [make_run(steps, bubble=BUSY, parts=PARTS)]}), "b.json"
    )


def test_an_accepted_branch_that_entered_late_delays_the_next_verdict() -> None:
    assert list(verdicts(branched()).values()) == [[3, 3, 0, 1]]
    assert list(verdicts(branched(), 2).values()) == [[2, 2, 0, 1]]


def test_branches_take_the_time_of_their_rows() -> None:
    assert rows_a_stage(pipeline()) == 1.0
    assert rows_a_stage(branched()) == pytest.approx(2.0)
    recorded = sort_results([vanilla(), branched()])
    profile = ProfileCosts(make_profile(), recorded)
    growth = (30 * 1.01e-3 + 5e-3) / 35e-3
    assert make_parts(recorded, profile, branched(), (15, 15), setting()).stages[0] == pytest.approx(15e-3 * growth)


def test_without_a_profile_rows_cost_what_rounds_of_several_rows_took() -> None:
    """A token takes 100 ms; a round of three rows 30 layers of 4 ms, so that two rows take 110."""
    rounds = eagle_result()
    parts = PartTimes(layer=PartTime(num=90, s=0.36))
    runs = [run.model_copy(update={"bubble": BUSY, "parts": parts}) for run in rounds.runs]
    timed = load(rounds.model_copy(update={"runs": runs}), "eagle.json")
    recorded = sort_results([vanilla(), branched(), timed])
    costs = RecordedCosts(recorded)
    assert [costs.growth(rows) for rows in (1, 2, 3, 9)] == pytest.approx([1.0, 1.1, 1.2, 1.2])
    assert not any("taken as free" in note for note in costs.notes)
    for drafted in ([0, 9, 0, 0], [0, 0, 1, 9], [0, 0, 0, 0]):
        mixed = rounds.runs[0].steps.model_copy(update={"drafted": drafted, "judged": [0] * 4, "accepted": [0] * 4})
        mixing = [run.model_copy(update={"steps": mixed}) for run in runs]
        uneven = load(rounds.model_copy(update={"runs": mixing}), "ngram.json")
        assert RecordedCosts(sort_results([vanilla(), branched(), uneven])).growth(2) == 1.0, "few rows and many"
    free = RecordedCosts(sort_results([vanilla(), branched()]))
    assert free.growth(2) == 1.0
    assert any("taken as free" in note for note in free.notes)


# Scatter


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5])
def test_the_recorded_scatter_is_found_by_the_slowest_of_the_stages(sigma: float) -> None:
    layer, head, num = 1e-3, 2e-3, 4_000
    rng = np.random.default_rng(1)
    factors = np.exp(sigma * rng.standard_normal((num, 3)) - sigma**2 / 2)
    slowest = float((factors * [0.01, 0.01, 0.012]).max(axis=1).sum())
    parts = PartTimes(layer=PartTime(num=300, s=300 * layer), head=PartTime(num=10, s=10 * head))
    cycles = FullCycles(num=num, stage_s=slowest, wall_s=2 * slowest)
    result = pipeline_result(parts=parts)
    runs = [run.model_copy(update={"full_cycles": cycles if at == 0 else None}) for at, run in enumerate(result.runs)]
    found = stage_sigma(load(result.model_copy(update={"runs": runs}), "spd.json"))
    assert found == pytest.approx(sigma, abs=0.03)


def test_a_projection_scatters_as_the_recorded_stages_did_unless_it_is_computed(recorded: Recorded) -> None:
    result = pipeline_result()
    cycles = FullCycles(num=100, stage_s=100 * 0.016, wall_s=2.0)
    runs = [run.model_copy(update={"full_cycles": cycles}) for run in result.runs]
    scattered = sort_results([vanilla(), load(result.model_copy(update={"runs": runs}), "spd.json")])
    measured, computed = make_profile(), make_profile().model_copy(update={"origin": "computed"})
    rates = [
        project(results, ProfileCosts(profile, results), setting(3)).pipelines[0].tokens_per_s
        for results, profile in ((scattered, measured), (scattered, computed), (recorded, measured))
    ]
    assert rates[0] < rates[1] == pytest.approx(rates[2])


# Refusals


def test_without_a_pipelines_result_there_is_nothing_to_replay() -> None:
    with pytest.raises(InputError, match=r"no result of a pipeline.*spdbench run quick -b vanilla -b spd"):
        sort_results([vanilla(), eagle()])


def test_a_command_to_measure_again_quotes_what_files_say() -> None:
    with pytest.raises(InputError, match=r"spdbench run 's; touch x' -b vanilla"):
        sort_results([load(vanilla_result(suite="s; touch x"), "vanilla.json")])


def test_results_of_several_workloads_are_refused() -> None:
    with pytest.raises(InputError, match=r"spd3\.json: does not fit vanilla\.json.*dtype"):
        sort_results([vanilla(), pipeline(dtype="bfloat16")])


def test_a_result_without_steps_is_refused() -> None:
    backend = make_backend("draft_verify", name="openai", label="server", unknown=["drafts", "times"])
    served = load(make_result([make_run(chunk_steps([1, 3]))], backend), "served.json")
    with pytest.raises(InputError, match=r"served\.json: server records no drafts and times"):
        sort_results([vanilla(), pipeline(), served])


def test_a_result_without_decode_steps_is_refused() -> None:
    empty = load(make_result([make_run(vanilla_steps(1), finish="length")]), "empty.json")
    with pytest.raises(InputError, match=r"empty\.json: holds no run with decode steps"):
        sort_results([empty, pipeline()])


def test_a_layers_time_is_refused_without_vanilla_and_without_a_profile() -> None:
    recorded = sort_results([pipeline()])
    with pytest.raises(InputError, match=r"no result of vanilla.*spdbench run quick"):
        project(recorded, RecordedCosts(recorded), setting(2))


def test_a_drafts_time_that_was_not_recorded_is_refused() -> None:
    recorded = sort_results([vanilla(), pipeline(parts=None)])
    with pytest.raises(InputError, match=r"the time of a draft is not in these results.*spdbench profile -m smollm2"):
        project(recorded, RecordedCosts(recorded), setting(2))


def test_several_requests_need_a_profile(recorded: Recorded) -> None:
    with pytest.raises(InputError, match=r"what a forward of several requests takes.*spdbench profile"):
        project(recorded, RecordedCosts(recorded), setting(2, concurrency=4))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2,31", "31 stages, and the model has 30 layers. Allowed: 1 to 30"),
        ("0", "0 stages"),
        ("2,x", "'x' is no number of stages"),
        ("10/10", "has 20 layers, and the model 30"),
        ("31/-1", "every stage needs at least one"),
        ("", "'' is no number of stages"),
    ],
)
def test_stages_that_do_not_fit_are_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_stages(text, 30, lambda count: even_layers(30, count))


def test_stages_are_numbers_or_layers() -> None:
    assert parse_stages("2, 4,11/10/9,2", 30, lambda count: even_layers(30, count)) == (
        (15, 15),
        (8, 8, 7, 7),
        (11, 10, 9),
    )
