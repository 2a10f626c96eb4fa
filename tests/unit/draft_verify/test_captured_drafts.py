"""Drafts of captured rounds are the eager ones, round by round: verdicts alone would hardly show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Drafter, Features
from spdbench.decoding.tree import chain_paths, named_tree
from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, TreeBuilder, chain_builder
from spdbench.models.decoder import Decoder
from spdbench.types import Sampling
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.captured import CapturedRounds
from spdbench_backends.eagle.drafter import EagleDrafter, Rounds
from spdbench_backends.medusa.drafter import MedusaDrafter, build_medusa, capture_draft, random_medusa
from tests import tiny

PROMPT = tuple(range(30, 41))
CPU = torch.device("cpu")
BUILDERS: dict[str, TreeBuilder] = {
    "chain": chain_builder(4, CPU),
    "chain of 1": chain_builder(1, CPU),
    "static": StaticTreeBuilder(named_tree("eagle_1"), CPU),
    "dynamic": DynamicTreeBuilder(4, 5, 17),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tiny.make_model(tmp_path_factory.mktemp("drafts") / "qwen3", "qwen3")
    return tiny.load(folder).own_decoder


def features(target: Decoder, count: int, seed: int, hidden_indices: Sequence[int]) -> Features:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(count, target.config.hidden_size, generator=generator) for _ in range(1 + len(hidden_indices))]
    return Features(rows[0], dict(zip(hidden_indices, rows[1:], strict=True)))


@torch.inference_mode()
def same_drafts(target: Decoder, new: Sequence[Callable[[], Drafter]], levels: int) -> None:
    """Two requests, of a long and a short prompt, with rounds that accept more and fewer tokens. Captured trees have
    all levels wherever there is room for one; deeper ones will not count."""
    sampler = Sampler(Sampling(), 0)
    for request, prompt in enumerate((PROMPT, PROMPT[:2])):
        sides = [make() for make in new]
        hidden_indices = tuple(sides[0].hidden_indices)
        for side in sides:
            side.start(prompt, features(target, len(prompt), request, hidden_indices), 7)
        seen = set()
        for turn in range(12):
            room = levels if turn % 5 != 4 else max(1, levels - 1)
            eager, captured = sides[0].propose(levels, sampler), sides[1].propose(room, sampler)
            assert eager.ids_N.tolist() == captured.ids_N.tolist(), f"round {turn}"
            assert eager.tree.parents_N.tolist() == captured.tree.parents_N.tolist()
            assert eager.tree.is_chain == captured.tree.is_chain
            assert torch.equal(eager.tree.rows.visible_SW, captured.tree.rows.visible_SW)
            assert torch.equal(eager.tree.rows.depths_S, captured.tree.rows.depths_S)
            seen.add(tuple(eager.ids_N.tolist()))
            count = 1 + turn % (levels + 1)
            token_ids = [(13 * turn + index) % 250 for index in range(count)]
            for side in sides:
                side.accept(token_ids, features(target, count, 100 + turn, hidden_indices))
        assert len(seen) > 8


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("version", [1, 3])
def test_eagles_captured_rounds(target: Decoder, builder: TreeBuilder, version: int) -> None:
    file = random_eagle(target, 3, version)  # type: ignore[arg-type]
    weights = build_eagle(file, target, aux_convention="auto", rope_theta=None, norm_output="auto")
    columns = target.config.hidden_size * max(1, len(weights.aux))
    captured = CapturedRounds(weights, columns, builder, 120)
    new = (
        lambda: EagleDrafter(target, Rounds(weights, builder, 120)),
        lambda: EagleDrafter(target, captured),
    )
    same_drafts(target, new, builder.num_levels)


@pytest.mark.parametrize("tree", ["chain", "mc_sim_7b_63"])
def test_medusas_captured_rounds(target: Decoder, tree: str) -> None:
    weights = build_medusa(random_medusa(target, 4, 3), target)
    builder = StaticTreeBuilder(chain_paths(4) if tree == "chain" else named_tree(tree), target.device)
    captured = capture_draft(weights, target, builder)
    new = (
        lambda: MedusaDrafter(weights, target, builder),
        lambda: MedusaDrafter(weights, target, builder, captured),
    )
    same_drafts(target, new, 4)
