"""Several branches in flight: the target's own tokens, the cycles that follow from which drafts are right, and mistakes
that are found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.decoding.sampling import Logits, Sampler
from spdbench.decoding.verify import Draft, DraftVerdict
from spdbench.errors import InputError
from spdbench.judge.metrics.chi_square import chi_square
from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import KVCache
from spdbench.models.partition import split_by_counts
from spdbench.models.target import Target
from spdbench.pipeline.inline import InlinePipeline
from spdbench.pipeline.schedule import Change, Node, PipelineSchedule
from spdbench.pipeline.stage_cache import StageCache
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.spd.backend import SPD
from spdbench_backends.spd.engine import PipelinedDecoding
from spdbench_backends.spd.formats import build_head, random_head
from tests import tiny
from tests.unit.spd.dialled import DialledDrafter
from tests.unit.spd.test_formats import published

CUTS = {2: (3, 3), 3: (2, 2, 2), 5: (2, 1, 1, 1, 1), 6: (1,) * 6}
SETTINGS = [
    pytest.param(2, 2, False, id="n=2, k=2"),
    pytest.param(3, 2, False, id="n=3, k=2"),
    pytest.param(3, 4, False, id="n=3, k=4"),
    pytest.param(5, 2, False, id="n=5, k=2"),
    pytest.param(2, 1, True, id="n=2, early"),
    pytest.param(3, 1, True, id="n=3, early"),
    pytest.param(5, 1, True, id="n=5, early"),
    pytest.param(6, 1, True, id="n=6, early"),
    pytest.param(3, 2, True, id="n=3, k=2, early"),
]
ALL = 4096


def dialled(
    decoder: Decoder, num_stages: int, top_k: int, *, redraft: bool, answer: Sequence[int], max_rows: int = ALL
) -> DialledDrafter:
    stages = split_by_counts(6, CUTS[num_stages])
    head = build_head(random_head(decoder, stages, 3), decoder, stages)
    return DialledDrafter(head, top_k, max_rows, redraft=redraft, num_prompt=len(tiny.PROMPT), answer=answer)


class CheckedPipeline(InlinePipeline):
    """Compares each node's logits with a forward of its tokens from scratch."""

    num_checked = 0
    ids: tuple[int, ...] = ()

    def finish(self) -> Logits | None:
        assert self._cycle is not None
        logits_V = super().finish()
        if self._cycle.completing is not None:
            root = self._cycle.completing
            self.ids = (*self.ids[: root.position], root.token_id)
            hidden_SM, _ = self._decoder.forward(
                self._decoder.embed(self._decoder.ids(self.ids)), 0, self._decoder.new_cache(len(self.ids))
            )
            assert isinstance(logits_V, Tensor)
            torch.testing.assert_close(logits_V, self._decoder.logits(hidden_SM[-1:])[0], rtol=1e-3, atol=1e-3)
            self.num_checked += 1
        return logits_V


def run(decoder: Decoder, drafter: DialledDrafter, max_new_tokens: int) -> list[Step]:
    stages = drafter._weights.plan.stages
    pipeline = CheckedPipeline(decoder, stages, drafter.hidden_indices)
    pipeline.ids = tiny.PROMPT
    request = replace(tiny.greedy(tiny.PROMPT, max_new_tokens), keep_drafts=True)
    steps = list(PipelinedDecoding(pipeline, stages, drafter, request).steps())
    assert pipeline.num_checked == max_new_tokens - 1
    return steps


def ids(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


@pytest.mark.parametrize(("num_stages", "top_k", "redraft"), SETTINGS)
def test_cycles_follow_from_which_drafts_are_right(
    decoder: Decoder, num_stages: int, top_k: int, *, redraft: bool
) -> None:
    """A right token that enters s cycles after its predecessor gives the next verdict s cycles after it: 1 as one of
    the first k, d + 1 drafted again in depth d, n as the target's own."""
    count = 24
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, count)))
    drafter = dialled(decoder, num_stages, top_k, redraft=redraft, answer=answer)
    steps = run(decoder, drafter, count)
    assert ids(steps) == answer
    lags = [drafter.lag(index) for index in range(1, count - 1)]
    assert len(steps) - 1 == num_stages + sum(lags)
    verdicts = [step for step in steps[1:] if step.token_ids]
    assert [step.accepted for step in verdicts[:-1]] == [int(lag < num_stages) for lag in lags]
    assert all(step.drafted == step.judged == 1 for step in verdicts)
    if top_k > 1 or num_stages > 2:
        assert sum(drafter.is_right_late(index) for index in range(1, count - 1)) > 2, "nothing was won"


@pytest.mark.parametrize("max_rows", [2, 3])
@pytest.mark.parametrize(("num_stages", "top_k", "redraft"), [(3, 2, False), (5, 2, True), (6, 4, True)])
def test_few_rows_leave_the_tokens_right(
    decoder: Decoder, num_stages: int, top_k: int, max_rows: int, *, redraft: bool
) -> None:
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, 24)))
    drafter = dialled(decoder, num_stages, top_k, redraft=redraft, answer=answer, max_rows=max_rows)
    steps = run(decoder, drafter, 24)
    assert ids(steps) == answer
    assert len(drafter._ring_rows) <= drafter._ring_size
    assert all(step.forwards <= max_rows for step in steps[1:])


def test_kept_drafts_are_the_tree_of_those_that_a_verdict_settles(decoder: Decoder) -> None:
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, 24)))
    drafter = dialled(decoder, 3, 2, redraft=True, answer=answer)
    steps = run(decoder, drafter, 24)
    assert ids(steps) == answer
    assert sum(step.judged for step in steps) > 10
    for step in steps[1:]:
        if not step.judged:
            assert step.drafts is None
            continue
        assert step.drafts is not None
        first = [token for token, parent in zip(*step.drafts, strict=True) if parent == -1]
        assert (step.token_ids[0] in first) == bool(step.accepted)
        assert all(-1 <= parent < at for at, parent in enumerate(step.drafts.parents))


def leaks_a_sibling(self: StageCache, node: Node, slot_of: dict[int, int]) -> list[int]:  # noqa: ARG001
    return list(slot_of.values())


def keeps_a_branch_that_disagrees(self: PipelineSchedule, root: Node) -> Change:
    """Accepts, but drops nothing."""
    change = end(self, root)
    wrong = [node for node in change.dropped if node.parent == root.parent]
    if wrong:
        self._stages[-1] = (*wrong, *self._stages[-1])
    return replace(change, dropped=())


def forgets_to_move_rows(self: KVCache, mark: int, chosen: Sequence[int]) -> None:
    """Keeps the first slots in place of those of the branch that lives."""
    self.length = mark + len(chosen)


end = PipelineSchedule._end


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (StageCache, "_ancestors", leaks_a_sibling),
        (PipelineSchedule, "_end", keeps_a_branch_that_disagrees),
        (KVCache, "keep", forgets_to_move_rows),
    ],
)
def test_planted_mistakes_are_found(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, mistake: object
) -> None:
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, 24)))
    drafter = dialled(decoder, 3, 2, redraft=False, answer=answer)
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        assert ids(run(decoder, drafter, 24)) == answer


VOCABULARY = 5


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("small")
    return tiny.load(tiny.make_model(folder, vocab_size=VOCABULARY, num_hidden_layers=3, seed=4))


def drawn(target: Target, options: dict[str, str], sampling: Sampling, count: int) -> Counter[object]:
    context = BackendContext("spd", target, "random", ("cpu",), 1, seed=0)
    backend = SPD(parse_options("spd", SPD.Options, {"stages": "3", "executor": "inline", **options}), context)
    backend.load()
    counts: Counter[object] = Counter()
    for seed in range(count):
        steps = backend.generate(GenerationRequest((1, 2, 3), (), 4, sampling, seed, frozenset()))
        counts[tuple(ids(list(steps)))] += 1
    return counts


def exact(decoder: Decoder, sampling: Sampling) -> dict[object, float]:
    """Probabilities of every first four tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        found = {
            (*before, token): p * q
            for before, p in found.items()
            for token, q in enumerate(tiny.next_probabilities(decoder, (1, 2, 3, *before), sampling))
        }
    return cast("dict[object, float]", found)


BRANCHES = [
    {"draft_top_k": "2"},
    {"draft_top_k": "4"},
    {"draft_top_k": "4", "max_rows": "3"},
    {"redraft": "true"},
]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_p=0.9, top_k=4)], ids=["plain", "warped"])
@pytest.mark.parametrize("options", BRANCHES, ids=lambda options: "-".join(options))
def test_sampled_tokens_follow_the_exact_joint_distribution(
    small: Target, options: dict[str, str], sampling: Sampling
) -> None:
    found = chi_square(drawn(small, options, sampling, 1500), exact(small.own_decoder, sampling))
    assert found.p_value > 1e-4 / (2 * len(BRANCHES))


def test_a_rule_that_prefers_drafts_is_found(small: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def prefers(logits: Logits, drafts: Sequence[Draft], sampler: Sampler) -> DraftVerdict:
        """Tries each draft with a number of its own, as if those before it had not been tried."""
        assert isinstance(logits, Tensor)
        target_V = sampler.probabilities(logits)
        for draft in drafts:
            if sampler.uniform() < float(target_V[draft.token_id]):
                return DraftVerdict(True, draft.token_id)
        return DraftVerdict(False, sampler.draw(target_V))

    monkeypatch.setattr("spdbench_backends.spd.engine.verify_siblings", prefers)
    found = chi_square(drawn(small, BRANCHES[0], Sampling(1.0), 1500), exact(small.own_decoder, Sampling(1.0)))
    assert found.p_value < 1e-6


def test_a_sequence_fits_its_cache_whatever_branches_there_are(decoder: Decoder) -> None:
    """Slots of branches come on top of those of the longest sequence, in every stage."""
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, 12)))
    for num_stages, max_rows in product(CUTS, (2, 5)):
        drafter = dialled(decoder, num_stages, 4, redraft=True, answer=answer, max_rows=max_rows)
        assert ids(run(decoder, drafter, 12)) == answer


def refusals() -> Iterator[tuple[str, dict[str, str], str]]:
    yield "llama", {"draft_top_k": "2", "executor": "streams"}, r"spd\.executor=streams: .* Allowed: process, inline"
    yield "llama", {"max_rows": "4"}, r"spd\.max_rows=4: is used with draft_top_k above 1 or redraft=true only"
    yield "qwen3_5_text", {"draft_top_k": "2"}, r"spd\.draft_top_k=2: .*recurrent layers.* use spd\.draft_top_k=1"
    yield "qwen3_5_text", {"redraft": "true"}, r"spd\.redraft=[Tt]rue: .*recurrent layers.* use spd\.redraft=false"
    yield "gpt2", {"draft_top_k": "2"}, r"spd\.draft_top_k=2: .*transformers' layers.* use spd\.draft_top_k=1"
    yield "mistral", {"redraft": "true", "stages": "6"}, r"spd\.redraft=[Tt]rue: .*fewer than 12 tokens"


@pytest.mark.parametrize(("family", "options", "message"), list(refusals()))
def test_what_cannot_be_is_refused_with_the_option_that_works(
    tmp_path_factory: pytest.TempPathFactory, family: str, options: dict[str, str], message: str
) -> None:
    target = tiny.load(tiny.make_model(tmp_path_factory.mktemp("refused") / family, family))
    context = BackendContext("spd", target, "oracle:0.5", ("cpu",), 1, seed=0)
    with pytest.raises(InputError, match=message):
        SPD(parse_options("spd", SPD.Options, options), context).load()


def test_draws_of_the_dial_are_repeatable(decoder: Decoder) -> None:
    """The same numbers as in a test of stages in processes."""
    answer = [random.Random(0).randrange(50) for _ in range(8)]
    first, second = (dialled(decoder, 3, 2, redraft=True, answer=answer) for _ in range(2))
    assert [first.lag(index) for index in range(8)] == [second.lag(index) for index in range(8)]


def started(folder: Path, drafter: Path | str, **options: str) -> SPD:
    context = BackendContext("spd", tiny.load(folder), str(drafter), ("cpu",), 1, seed=0)
    backend = SPD(parse_options("spd", SPD.Options, {"executor": "inline", **options}), context)
    backend.load()
    return backend


@pytest.mark.parametrize(("num_cores", "chosen"), [(2, None), (4, "4, 1 when sampling")])
def test_more_than_three_stages_have_branches_only_with_a_core_each(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int, chosen: str | None
) -> None:
    monkeypatch.setattr("spdbench_backends.spd.backend.usable_cores", lambda: num_cores)
    own, stages = tiny.load(tiny_model).own_decoder, split_by_counts(6, (2, 2, 1, 1))
    head = published(own, tmp_path / "head.pt", stages=stages, trained_with_use_deepest=True)
    assert started(tiny_model, head).describe().chosen.get("draft_top_k") == chosen


def test_a_trained_head_has_branches_for_greedy_requests_unless_told_otherwise(
    tiny_model: Path, tmp_path: Path
) -> None:
    target = tiny.load(tiny_model)
    stages, request = split_by_counts(6, (3, 3)), tiny.greedy(tiny.PROMPT, 30)
    trained = published(target.own_decoder, tmp_path / "head.pt", stages=stages, trained_with_use_deepest=True)
    level = published(target.own_decoder, tmp_path / "level.pt", stages=stages, trained_with_use_deepest=False)
    auto, four, one = (
        started(tiny_model, trained, **words) for words in ({}, {"draft_top_k": "4"}, {"draft_top_k": "1"})
    )
    assert auto.describe().chosen["draft_top_k"] == "4, 1 when sampling"
    assert list(auto.generate(request)) == list(four.generate(request)) != list(one.generate(request))
    drawn = replace(request, sampling=Sampling(1.0))
    assert list(auto.generate(drawn)) == list(one.generate(drawn))
    for plain in (started(tiny_model, level), started(tiny_model, "random"), started(tiny_model, "oracle:0.5")):
        assert "max_rows" not in plain.describe().chosen
    streams = started(tiny_model, trained, executor="streams")
    assert "max_rows" not in streams.describe().chosen
