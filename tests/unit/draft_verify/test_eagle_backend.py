"""The `eagle` backend's options: those that contradict each other, and what the others make of a missing one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.decoding.drafter_choice import parse_drafter
from spdbench.decoding.sampling import DraftVocabulary
from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, TreeBuilder, chain_builder, is_chain
from spdbench.decoding.tree_choice import ROW_COUNTS
from spdbench.errors import InputError
from spdbench.models.cpu.linear import linear
from spdbench.models.kv_cache import CAPACITY_STEP
from spdbench.models.target import Target
from spdbench.profiles.profile import RowCosts
from spdbench.types import GenerationRequest, Sampling
from spdbench_backends.eagle.backend import Eagle
from spdbench_backends.eagle.head import EagleModule
from tests import tiny


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


def load(target: Target, options: dict[str, str], drafter: str = "oracle:1") -> Eagle:
    eagle = Eagle(parse_options("e", Eagle.Options, options), BackendContext("e", target, drafter, ("cpu",), 1, 0))
    eagle.load()
    return eagle


@pytest.mark.parametrize("tree", [{"tree": "dynamic"}, {"tree": "auto"}, {}])
def test_a_tree_of_fewer_tokens_than_levels_is_refused(target: Target, tree: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"-o e\.total_tokens=5: too few for e\.depth=5 levels .*at least 6"):
        load(target, {**tree, "depth": "5", "total_tokens": "5"})


@pytest.mark.parametrize(("tree", "option"), [("static", "total_tokens"), ("chain", "top_k"), ("auto", "top_k")])
def test_an_option_that_would_do_nothing_is_refused(target: Target, tree: str, option: str) -> None:
    with pytest.raises(
        InputError, match=rf"-o e\.{option}=9: has no meaning with e\.tree={tree}; allowed with dynamic"
    ):
        load(target, {"tree": tree, option: "9"})


def test_auto_keeps_to_the_tokens_that_it_may_verify(target: Target) -> None:
    backend = load(target, {"total_tokens": "3"})
    assert backend._builder is not None
    assert backend._builder.max_nodes <= 3


@pytest.mark.parametrize(
    ("grown_s", "branching_s", "expected"),
    [(0.0, 1e3, "dynamic, depth"), (1e3, 1e3, "chain, depth"), (1e3, 1.0, "chain with"), (0.5, 1.0, "dynamic, depth")],
)
def test_auto_weighs_what_levels_of_trees_and_of_chains_take(
    target: Target, grown_s: float, branching_s: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(_: Eagle, builder: TreeBuilder, _forward_s: float) -> float:
        each = 1.0 if is_chain(builder) else branching_s if isinstance(builder, StaticTreeBuilder) else grown_s
        return each * builder.num_levels

    monkeypatch.setattr(Eagle, "_draft_seconds", seconds)
    monkeypatch.setattr(Eagle, "_row_costs", lambda *_: RowCosts((1, 64), (1.0, 1.0)))
    backend = load(target, {}, "random")
    chosen = backend.describe().chosen
    assert chosen["tree"].startswith(expected)
    if expected != "chain, depth":
        assert chosen["with a temperature"] == "chain, depth 1, drawn"  # the best chain at these costs


def test_alternatives_to_a_chain_do_not_go_on(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only first choices go on, so that a level is one row for the head, as in a chain."""
    costs = {True: 1.0, False: 1.001}  # of a chain, of one with alternatives
    monkeypatch.setattr(
        Eagle,
        "_draft_seconds",
        lambda _, builder, __: (
            costs[is_chain(builder)] if isinstance(builder, StaticTreeBuilder) else 1e3 * builder.num_levels
        ),
    )
    monkeypatch.setattr(Eagle, "_row_costs", lambda *_: RowCosts((1, 64), (1.0, 1.0)))
    builder = load(target, {"total_tokens": "9"}, "random")._builder
    assert isinstance(builder, StaticTreeBuilder)
    assert not builder.tree.is_chain
    assert len(builder.tree) == 9
    assert all(len(level.inner) <= 1 for level in builder._levels)


def test_the_drafts_that_are_timed_come_after_forwards(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()

    def timed(work: Callable[[], object], between: Callable[[], object]) -> float:
        for name, act in (("forward", between), ("draft", work)):
            with torch.inference_mode():
                act()
            done.append(name)
        return 1.0

    monkeypatch.setattr("spdbench.models.torch_utils.median_seconds", timed)
    load(target, {}, "random")
    assert done == ["forward", "draft"] * 6


def test_a_second_start_chooses_the_same_tree_whatever_the_machine_does(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The costs that the first start measured are stored; with those of the second it would choose another tree."""

    def start(further_rows_cost: float) -> str:
        def measured(_decoder: object, largest: int) -> RowCosts:
            counts = tuple(count for count in ROW_COUNTS if count <= largest)
            return RowCosts(counts, tuple(1.0 + further_rows_cost * (count - 1) for count in counts))

        monkeypatch.setattr("spdbench.decoding.tree_choice.measure_row_costs", measured)
        monkeypatch.setattr("spdbench.models.torch_utils.median_seconds", lambda *_, **__: 0.01)
        monkeypatch.setattr("spdbench_backends.drafting.median", lambda _: 1.0)
        return load(target, {}, "random").describe().chosen["tree"]

    cheap = start(0.0)
    assert start(0.5) == cheap
    monkeypatch.setenv("SPDBENCH_PROFILES", os.environ["SPDBENCH_PROFILES"] + "-other")
    assert start(0.5) != cheap


def test_drafts_take_the_seconds_of_the_moment_of_the_stored_forwards(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is twice as slow now, so a draft of 0.01 s took 0.005 s then."""
    monkeypatch.setenv("SPDBENCH_PROFILES", os.environ["SPDBENCH_PROFILES"] + "-slow")
    eagle = load(target, {"tree": "chain"}, "random")
    monkeypatch.setattr("spdbench.models.torch_utils.median_seconds", lambda *_, **__: 0.01)
    monkeypatch.setattr("spdbench_backends.drafting.median", lambda _: 2.0)
    assert eagle._draft_seconds(chain_builder(2, target.device), 1.0) == 0.005


def test_levels_behind_the_first_cost_what_they_add(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 5.0, 4: 8.0}
    monkeypatch.setattr(Eagle, "_draft_seconds", lambda _, builder, _forward_s: seconds[builder.num_levels])
    eagle = load(target, {"tree": "chain"})
    costs = eagle._draft_costs(chain_builder(1, target.device), chain_builder(4, target.device), 1.0)
    assert [costs(levels) for levels in (1, 2, 6)] == [5.0, 6.0, 10.0]
    seconds[4] = 1.0  # as after a slow moment: no number of levels takes less than one
    assert eagle._draft_costs(chain_builder(1, target.device), chain_builder(4, target.device), 1.0)(6) == 5.0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_head_of_a_few_tokens_has_no_more_candidates(
    target: Target, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further rows cost nothing here, so the widest tree that there is gets chosen."""
    eagle = load(target, {}, "random")
    weights = eagle._weights
    assert weights is not None
    known = DraftVocabulary(weights.vocabulary.vocab_size, torch.arange(30, 30 + size))
    eagle._weights = replace(weights, vocabulary=known, head=linear(weights.head.plain()[:size].clone()))
    monkeypatch.setenv("SPDBENCH_PROFILES", os.environ["SPDBENCH_PROFILES"] + f"-{size}")
    monkeypatch.setattr(Eagle, "_row_costs", lambda _, largest: RowCosts((1, largest), (1.0, 1.0)))
    eagle._builder = builder = eagle._choose_by_cost(parse_drafter("random"), None)
    request = GenerationRequest(tuple(range(30, 38)), (), 12, Sampling(), 0, frozenset())
    assert sum(len(step.token_ids) for step in eagle.generate(request)) == 12
    if isinstance(builder, DynamicTreeBuilder):
        assert builder.top_k <= size
    else:
        assert isinstance(builder, StaticTreeBuilder)
        assert builder.num_ranks <= size


def test_a_request_drafts_with_the_recorded_steps_of_the_last(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(length: int, num_new: int) -> list[int]:
        prompt = tuple(range(30, 30 + length))
        request = GenerationRequest(prompt, (), num_new, Sampling(), 0, frozenset())
        return [token for step in eagle.generate(request) for token in step.token_ids]

    made: list[object] = []
    record = EagleModule._record

    def counted(module: EagleModule, *given: Any) -> Any:
        made.append(module)
        return record(module, *given)

    monkeypatch.setattr(EagleModule, "_record", counted)
    eagle = load(target, {"tree": "chain"}, "random")
    first = answer(8, 12)
    count = len(made)
    assert count > 0
    assert answer(8, 12) == first
    assert len(made) == count
    long = answer(12, CAPACITY_STEP)
    assert len(made) > count  # a longer one needs more memory
    assert answer(8, 12) == first
    assert answer(12, CAPACITY_STEP) == long


def test_the_static_tree_is_no_deeper_than_it_is(target: Target) -> None:
    with pytest.raises(InputError, match=r"-o e\.depth=6: the static tree has 5 levels"):
        load(target, {"tree": "static", "depth": "6"})


def test_a_depth_that_was_not_given_is_no_more_than_there_are_tokens_for(target: Target) -> None:
    backend = load(target, {"tree": "dynamic", "total_tokens": "3"})
    request = tiny.greedy(tiny.PROMPT, 9)
    backend.prepare(request)
    assert [step.drafted for step in backend.generate(request)][1:3] == [2, 2]


def test_a_chain_may_be_longer_than_a_trees_default(target: Target) -> None:
    builder = load(target, {"tree": "chain", "depth": "32"})._builder
    assert builder is not None
    assert builder.num_levels == 32


def test_a_random_head_fits_a_target_of_one_layer(tmp_path: Path) -> None:
    target, request = tiny.load(tiny.make_model(tmp_path / "one", num_hidden_layers=1)), tiny.greedy(tiny.PROMPT, 9)
    steps = load(target, {"tree": "chain"}, "random").generate(request)
    assert [token for step in steps for token in step.token_ids] == list(decode(target.decoder, request))
