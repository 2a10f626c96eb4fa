"""`suffix` and `recycling`: what they draft, when they draft nothing, and what they keep from request to request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spdbench.backend import Backend, BackendContext, find_backend, parse_options
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features, ObservesLogits
from spdbench.decoding.tree import DraftTree
from spdbench.decoding.tree_choice import best_paths
from spdbench.types import Sampling
from spdbench_backends.recycling import RecyclingDrafter, likeliest
from spdbench_backends.suffix import BREAK, SuffixDrafter
from spdbench_backends.weighing import Rates, worthwhile
from tests import tiny

SAMPLER = Sampler(Sampling(), 0)
NOTHING = Features(torch.zeros(0, 0), {})


class Here:
    """What drafters need of a target."""

    def ids(self, token_ids: Collection[int]) -> Tensor:
        return torch.tensor(list(token_ids))


def suffix(prompt: Sequence[int], root: int, row_cost: float = 0.0, num_tokens: int = 8) -> SuffixDrafter:
    drafter = SuffixDrafter(num_tokens, row_cost, Here())
    drafter.start(prompt, NOTHING, root)
    return drafter


def drafted(draft: DraftTree) -> list[int]:
    return draft.ids_N[1:].tolist()


def test_suffix_drafts_what_followed_the_longest_match() -> None:
    """(2, 3) was followed by 4 twice, but (1, 2, 3) by 9."""
    drafter = suffix((5, 2, 3, 4, 6, 2, 3, 4, 1, 2, 3, 9, 8, 1, 2), 3)
    assert drafted(drafter.propose(8, SAMPLER))[:2] == [9, 8]


def test_suffix_drafts_the_most_frequent_of_equally_long_matches_and_of_these_the_latest() -> None:
    most = suffix((1, 2, 7, 0, 1, 2, 9, 0, 1, 2, 7, 5, 1), 2)
    assert drafted(most.propose(1, SAMPLER)) == [7]
    latest = suffix((1, 2, 7, 0, 1, 2, 9, 5, 1), 2)
    assert drafted(latest.propose(1, SAMPLER)) == [9]


def test_suffix_drafts_no_more_than_it_is_asked_for() -> None:
    drafter = suffix(tuple(range(20)) * 2, 0)
    assert [len(drafted(drafter.propose(levels, SAMPLER))) for levels in (0, 3, 50)] == [0, 3, 8]


def test_suffix_drafts_nothing_where_nothing_repeats() -> None:
    drafter = suffix(range(50), 50)
    for token in range(51, 80):
        assert drafted(drafter.propose(8, SAMPLER)) == []
        drafter.accept((token,), NOTHING)


def test_suffix_stops_drafting_what_never_comes_true_and_begins_again_where_it_does() -> None:
    """After (1, 2) another token comes each time, until a sequence begins to repeat as it was."""
    drafter = suffix((1, 2, 3, 1), 2, row_cost=0.1)
    assert drafted(drafter.propose(8, SAMPLER))
    for token in range(100, 140):
        drafter.accept((token, 1, 2), NOTHING)
    assert drafted(drafter.propose(8, SAMPLER)) == []
    for _ in range(4):
        drafter.accept(tuple(range(200, 240)), NOTHING)
    drafter.accept((200, 201, 202), NOTHING)
    assert drafted(drafter.propose(8, SAMPLER)) == list(range(203, 211))


def test_suffix_does_not_go_from_one_text_to_the_next() -> None:
    drafter = SuffixDrafter(8, 0.0, Here())
    drafter.read((1, 2, 3, BREAK, 4, 5, BREAK))
    drafter.start((7, 1), NOTHING, 2)
    assert drafted(drafter.propose(8, SAMPLER)) == [3]


def recycling(table: dict[int, list[int]], num_nodes: int = 12, row_cost: float = 0.0) -> RecyclingDrafter:
    paths = [path for path, _ in best_paths([[0.5, 0.2, 0.1]] * 4, num_nodes)]
    return RecyclingDrafter(table, paths, 3, row_cost, Here())


def test_recycling_fills_the_static_tree_from_its_table() -> None:
    drafter = recycling({1: [2, 3], 2: [4], 3: [5, 6], 4: [2]}, num_nodes=5)
    drafter.start((0,), NOTHING, 1)
    draft = drafter.propose(4, SAMPLER)
    parents, ids = draft.tree.parents_N.tolist(), draft.ids_N.tolist()
    paths = set()
    for node in range(1, len(ids)):
        path, at = [ids[node]], parents[node]
        while at > 0:
            path, at = [ids[at], *path], parents[at]
        paths.add(tuple(path))
    assert paths == {(2,), (3,), (2, 4), (2, 4, 2)}
    assert draft.tree.num_levels == 3
    assert max(draft.tree.rows.depths_S.tolist()) == 3


def test_recycling_knows_the_prompts_successors_the_latest_first() -> None:
    drafter = recycling({})
    drafter.start((1, 2, 1, 3, 9), NOTHING, 1)
    level = [token for token, parent in zip(*_lists(drafter.propose(1, SAMPLER)), strict=True) if parent == 0]
    assert level == [3, 2]


def _lists(draft: DraftTree) -> tuple[list[int], list[int]]:
    return draft.ids_N.tolist(), draft.tree.parents_N.tolist()


def test_recycling_takes_over_what_the_target_finds_likely() -> None:
    drafter = recycling({})
    assert isinstance(drafter, ObservesLogits)
    drafter.start((8,), NOTHING, 1)
    logits_NV = torch.full((2, 10), -50.0)
    logits_NV[0, [4, 7]] = torch.tensor([3.0, 5.0])
    logits_NV[1, 6] = 1.0
    drafter.observe((7,), logits_NV)
    drafter.accept((7, 6), NOTHING)
    drafter.accept((1,), NOTHING)
    ids, parents = _lists(drafter.propose(1, SAMPLER))
    assert (ids, parents) == ([1, 7, 4], [-1, 0, 0])


def test_recycling_drafts_nothing_once_its_candidates_are_wrong() -> None:
    drafter = recycling({}, row_cost=0.1)
    drafter.start((1, 2, 1), NOTHING, 1)
    for token in range(100, 140):
        drafter.accept((token, 1), NOTHING)
    assert len(drafter.propose(4, SAMPLER).ids_N) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest_tokens_are_those_of_topk(dtype: torch.dtype) -> None:
    logits_NV = (torch.randn(5, 4000, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    expected = logits_NV.topk(4, dim=-1).values
    for row, ids in enumerate(likeliest(logits_NV, 4)):
        assert logits_NV[row, ids].tolist() == expected[row].tolist()


def test_logits_that_are_no_numbers_have_no_likeliest_token() -> None:
    assert likeliest(torch.full((2, 5), float("nan")), 3) == [[], []]


def test_rates_begin_at_their_prior_and_follow_what_is_seen() -> None:
    rates: Rates[str] = Rates(lambda _: 0.5)
    assert rates["a"] == 0.5
    for _ in range(200):
        rates.add("a", right=True)
    assert rates["a"] > 0.95
    assert rates["b"] == 0.5


@pytest.mark.parametrize(
    ("chances", "row_cost", "count"),
    [([], 0.1, 0), ([0.9, 0.8, 0.05], 0.1, 2), ([0.05], 0.1, 0), ([0.05, 0.9], 0.1, 2), ([0.01, 0.01], 0.0, 2)],
)
def test_rows_are_drafted_as_far_as_they_earn_their_time(chances: list[float], row_cost: float, count: int) -> None:
    assert worthwhile(chances, row_cost) == count


def backend(folder: Path, name: str, **options: str) -> Backend:
    cls = find_backend(name)
    made = cls(
        parse_options(name, cls.Options, options), BackendContext(name, tiny.load(folder), "auto", ("cpu",), 1, 0)
    )
    made.load()
    return made


@pytest.mark.parametrize("name", ["suffix", "recycling"])
def test_requests_leave_nothing_behind_unless_asked_to(tiny_model: Path, name: str) -> None:
    first, second = tiny.greedy(tiny.PROMPT, 40), tiny.greedy(tiny.PROMPT[3:], 40)
    made = backend(tiny_model, name, row_cost="0")
    alone = [step[:5] for step in made.generate(second)]
    list(made.generate(first))
    assert [step[:5] for step in made.generate(second)] == alone
    assert made.describe().chosen["drafts_from"] == "prompt and answer"


def test_earlier_answers_are_drafted_from_but_for_those_to_the_same_prompt(tiny_model: Path) -> None:
    made = backend(tiny_model, "suffix", row_cost="0", earlier_answers="true")
    assert "earlier answers" in made.describe().chosen["drafts_from"]
    request = tiny.greedy(tiny.PROMPT, 40)
    first = [step[:5] for step in made.generate(request)]
    assert [step[:5] for step in made.generate(request)] == first
    drafter = made._new_drafter(tiny.greedy(tiny.PROMPT[1:], 40))  # type: ignore[attr-defined]
    assert drafter.ids == [*(token for step in first for token in step[0]), BREAK]
