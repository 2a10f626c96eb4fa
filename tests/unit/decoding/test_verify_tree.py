"""Verdicts on trees: the longest right path when greedy, the exact distribution when sampling, typical acceptance."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree, chain, from_paths
from spdbench.decoding.verify import Verification, sampled_at_once, typical, verify
from spdbench.judge.metrics.chi_square import chi_square
from spdbench.types import Sampling

TREE = from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 0, 0)])
IDS = torch.tensor([9, 1, 2, 3, 4, 5, 6, 7])
GREEDY = Sampler(Sampling(), 0)
DRAWS = 4_000


def logits(*best: int) -> Tensor:
    """Logits whose argmax at each node is the given token."""
    return torch.nn.functional.one_hot(torch.tensor(best), 10).float()


@pytest.mark.parametrize(
    ("best", "path", "token_ids", "judged"),
    [
        ([8, 0, 0, 0, 0, 0, 0, 0], (0,), (8,), 1),
        ([3, 0, 0, 5, 0, 0, 0, 0], (0, 3), (3, 5), 1),
        ([1, 5, 0, 0, 0, 8, 0, 0], (0, 1, 5), (1, 5, 8), 2),
        ([2, 0, 6, 0, 0, 0, 7, 4], (0, 2, 6, 7), (2, 6, 7, 4), 3),
        ([2, 0, 6, 0, 0, 0, 8, 4], (0, 2, 6), (2, 6, 8), 3),
    ],
)
def test_the_longest_right_path_counts(
    best: list[int], path: tuple[int, ...], token_ids: tuple[int, ...], judged: int
) -> None:
    verdict = verify(logits(*best), DraftTree(TREE, IDS), GREEDY)
    assert (verdict.path, verdict.token_ids, verdict.judged) == (path, token_ids, judged)
    assert verdict.drafted == 3
    assert verdict.accepted == len(path) - 1


def test_a_lone_root_gets_the_targets_own_token() -> None:
    verdict = verify(logits(4), DraftTree(chain(0), torch.tensor([1])), GREEDY)
    assert (verdict.path, verdict.token_ids, verdict.drafted, verdict.judged) == ((0,), (4,), 0, 0)


def test_forced_verdicts_follow_first_children() -> None:
    everything = logits(8, 8, 8, 8, 8, 8, 8, 8)
    assert verify(everything, DraftTree(TREE, IDS, None, [True, True, True]), GREEDY).path == (0, 1, 4)
    rejected = verify(everything, DraftTree(TREE, IDS, None, [True, False, True]), GREEDY, typical(0.09, 0.3))
    assert (rejected.path, rejected.token_ids, rejected.judged) == ((0, 1), (1, 8), 2)


LOGITS = torch.tensor(
    [
        [1.0, 0.2, -0.5, 1.4, 0.0],
        [0.3, 1.2, 0.4, -1.0, 0.5],
        [-0.7, 0.2, 1.0, 0.9, 0.1],
        [0.0, 0.1, 0.2, 0.3, 0.4],
        [0.9, -0.2, 0.3, 0.5, 0.0],
    ]
)


def joint(sampling: Sampling) -> dict[object, float]:
    """Exact probabilities of the first two tokens, row t of LOGITS standing behind token t."""
    sampler = Sampler(sampling, 0)
    first = sampler.probabilities(LOGITS[4]).tolist()
    second = [sampler.probabilities(LOGITS[t]).tolist() for t in range(5)]
    return {(a, b): first[a] * second[a][b] for a in range(5) for b in range(5)}


def pairs(sampling: Sampling, draft: DraftTree, rows: list[int]) -> Counter[object]:
    """First two tokens of many verdicts; a verdict of one token is completed from the target."""
    sampler, counts = Sampler(sampling, 3), Counter[object]()
    for _ in range(DRAWS):
        found = verify(LOGITS[rows], draft, sampler).token_ids
        second = found[1] if len(found) > 1 else sampler.choose(LOGITS[found[0]])
        counts[(found[0], second)] += 1
    return counts


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7), Sampling(1.0, top_p=0.8), Sampling(0.9, top_k=3)])
@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        ([(0,), (0, 0)], [4, 3, 2]),
        ([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)], [4, 0, 3, 1, 2, 4, 1]),
        ([(0,), (1,), (2,), (1, 0)], [4, 2, 2, 3, 1]),  # a sibling twice
    ],
    ids=["chain", "tree", "twins"],
)
def test_picked_drafts_leave_the_targets_distribution(
    sampling: Sampling, paths: list[tuple[int, ...]], ids: list[int]
) -> None:
    draft = DraftTree(from_paths(paths), torch.tensor(ids))
    assert chi_square(pairs(sampling, draft, ids), joint(sampling)).p_value > 1e-4 / 12


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)])
def test_drawn_chains_leave_the_targets_distribution(sampling: Sampling) -> None:
    sampler, drafting, counts = Sampler(sampling, 3), Sampler(sampling, 4), Counter[object]()
    drafter = [drafting.probabilities(row) for row in torch.randn(5, 5, generator=torch.Generator().manual_seed(0))]
    for _ in range(DRAWS):
        first = drafting.draw(drafter[4])
        second = drafting.draw(drafter[first])
        draft = DraftTree(chain(2), torch.tensor([4, first, second]), (drafter[4], drafter[first]))
        found = verify(LOGITS[[4, first, second]], draft, sampler).token_ids
        counts[(found[0], found[1] if len(found) > 1 else sampler.choose(LOGITS[found[0]]))] += 1
    assert chi_square(counts, joint(sampling)).p_value > 1e-4 / 2


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(0.9, top_k=3)])
@pytest.mark.parametrize("kind", ["tree", "twins", "drawn", "root"])
def test_a_device_that_is_asked_once_gives_the_verdicts_of_the_walk(sampling: Sampling, kind: str) -> None:
    """What is computed on a GPU for all nodes at once is what a CPU computes node by node, number for number."""
    generator, drawing = torch.Generator().manual_seed(0), Sampler(sampling, 4)
    seen = set()
    for seed in range(300):
        drawn = None
        if kind == "tree":
            tree = from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
            ids = torch.tensor([4, 0, 3, 1, 2, 4, 1, 3])
        elif kind == "twins":
            tree, ids = from_paths([(0,), (1,), (2,), (1, 0)]), torch.tensor([4, 2, 2, 3, 1])
        elif kind == "root":
            tree, ids = chain(0), torch.tensor([1])
        else:
            tree = chain(2)
            drawn = tuple(drawing.probabilities(torch.randn(5, generator=generator)) for _ in range(2))
            ids = torch.tensor([4, *(drawing.draw(each) for each in drawn)])
        draft, logits_NV = DraftTree(tree, ids, drawn), torch.randn(len(ids), 5, generator=generator)
        expected = verify(logits_NV, draft, Sampler(sampling, seed))
        rule, node, path = sampled_at_once(logits_NV, draft, Sampler(sampling, seed)), 0, [0]
        while children := (tree.parents_N == node).nonzero().flatten().tolist():
            if (found := rule.accept(node, children)) is None:
                break
            node = found
            path.append(node)
        assert tuple(path) == expected.path
        assert rule.token_after(node, children) == expected.token_ids[-1]
        seen.add(expected.path)
    assert len(seen) > 1 or kind == "root"


def test_the_rule_for_drawn_drafts_on_picked_ones_is_caught() -> None:
    """The negative control: drafts that were picked, but verified as if drawn."""
    sampler, counts, ids = Sampler(Sampling(1.0), 3), Counter[object](), [4, 3, 2]
    claimed = tuple(sampler.probabilities(LOGITS[row]) for row in (1, 0))
    for _ in range(DRAWS):
        found = verify(LOGITS[ids], DraftTree(chain(2), torch.tensor(ids), claimed), sampler).token_ids
        counts[(found[0], found[1] if len(found) > 1 else sampler.choose(LOGITS[found[0]]))] += 1
    assert chi_square(counts, joint(Sampling(1.0))).p_value < 1e-9


def test_children_that_have_all_the_mass_leave_no_other_token() -> None:
    """The greatest uniform number can reject them by rounding alone; there is nothing else to draw then."""

    class Greatest(Sampler):
        def uniform(self) -> float:
            return math.nextafter(1.0, 0.0)

    sampling = Sampling(1.0, top_k=2)
    for row in torch.randn(40, 5, generator=torch.Generator().manual_seed(0)):
        children = row.topk(2).indices
        draft = DraftTree(from_paths([(0,), (1,)]), torch.cat((torch.tensor([4]), children)))
        found = verify(row.expand(3, -1), draft, Greatest(sampling, 0))
        assert set(found.token_ids) <= set(children.tolist())


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (1, Verification((0,), (5,), 0, 0)),
        (2, Verification((0, 1), (5, 6), 1, 1)),
        (3, Verification((0, 1, 2), (5, 6, 7), 2, 2)),
        (4, Verification((0, 1, 2), (5, 6, 7), 3, 3)),
        (9, Verification((0, 1, 2), (5, 6, 7), 4, 3)),
    ],
)
def test_of_a_tree_deeper_than_there_is_room_nothing_counts_that_lies_deeper(room: int, expected: Verification) -> None:
    """Drafts 5 and 6 of four levels accepted, the third rejected, and 7 the target's own."""
    assert Verification((0, 1, 2), (5, 6, 7), 4, 3).within(room) == expected


def test_typical_acceptance_takes_what_is_likely_enough() -> None:
    """By hand: p = softmax of logits at the parent, bound min(epsilon, delta e^-H)."""
    tree = from_paths([(0,), (1,), (0, 0), (1, 0), (1, 1)])
    ids = torch.tensor([0, 1, 2, 3, 1, 2])
    logits_NV = torch.zeros(6, 4)
    logits_NV[0] = torch.tensor([0.0, 2.0, 2.1, -9.0])  # both 1 and 2 pass
    logits_NV[1] = torch.tensor([9.0, 0.0, 0.0, 0.0])  # 3 does not
    logits_NV[2] = torch.tensor([-9.0, 1.0, 3.0, -9.0])  # 1 and 2 pass, 2 is the likelier
    verdict = verify(logits_NV, DraftTree(tree, ids), Sampler(Sampling(1.0), 0), typical(0.09, 0.3))
    assert verdict.path == (0, 2, 5)
    assert verdict.token_ids[:2] == (2, 2)
    assert (verdict.drafted, verdict.judged) == (2, 2)
    strict = verify(logits_NV, DraftTree(tree, ids), Sampler(Sampling(1.0), 0), typical(0.99, 5.0))
    assert (strict.path, strict.judged) == ((0,), 1)
    greedy = verify(logits_NV, DraftTree(tree, ids), GREEDY, typical(0.09, 0.3))
    assert greedy.path == (0, 2, 5)
