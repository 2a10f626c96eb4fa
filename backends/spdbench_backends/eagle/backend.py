"""`eagle`: a head drafts a chain or a tree from the target's features, and the target verifies it in one forward.

EAGLE-1, 2 and 3 differ by their heads' tensors; every head can draft every kind of tree. Source: as in `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from spdbench.console import counted, say
from spdbench.types import GenerationRequest
from spdbench_backends.drafting import DraftVerify
from spdbench_backends.local import GraphOptions

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.decoding.speculate import Drafter
    from spdbench.decoding.tree_builder import TreeBuilder
    from spdbench_backends.eagle.captured import CapturedRounds
    from spdbench_backends.eagle.drafter import Rounds
    from spdbench_backends.eagle.formats import EagleFile
    from spdbench_backends.eagle.head import EagleWeights

ASSUMED_ACCURACY = 0.6
"""First-choice accuracy of a head whose file does not give it; heads trained on little data reach about as much."""

CHAIN_DEPTH = 4
AUTO_DEPTH = 8
MAX_DEPTH = 32
TIMED_TOKENS = 64
"""Capacity for the drafts that are timed, each of which commits one token."""

STATIC_DEPTH = 5
"""Levels of EAGLE-1's tree."""


class Eagle(DraftVerify):
    """EAGLE: a head drafts a tree from the target's features."""

    largest_depth = MAX_DEPTH

    class Options(GraphOptions):
        tree: Literal["chain", "static", "dynamic", "auto"] = Field(
            "auto",
            description="chain: one draft a level; static: EAGLE-1's 25 nodes; dynamic: EAGLE-2's most probable paths; "
            "auto: what pays here, by measured costs and the drafter's acceptance",
        )
        depth: int | None = Field(
            None, ge=1, le=MAX_DEPTH, description="levels drafted; default: 4 in a chain, 5 in a tree"
        )
        top_k: int = Field(8, ge=1, le=64, description="dynamic: nodes of a level that go on")
        total_tokens: int = Field(
            24, ge=2, le=256, description="dynamic: nodes verified, the newest token included; auto: at most, then 32"
        )
        aux_convention: Literal["auto", "hidden_states", "layer_output"] = Field(
            "auto", description="what a head's auxiliary layer ids count: hidden states, or layers' outputs"
        )
        rope_theta: float | None = Field(
            None, gt=0, allow_inf_nan=False, description="base of the head's rotary positions; default: its own"
        )
        norm_output: Literal["auto", "feed", "ignore"] = Field(
            "auto", description="what a head's norm_output means: feed the normed state to the next row, or nothing"
        )

    _options: Options
    _weights: EagleWeights | None = None
    _rounds: CapturedRounds | None = None
    _last_rounds: Rounds | None = None
    _chain: TreeBuilder | None = None
    """What drafts with a temperature, where a chain that is drawn takes the place of the chosen tree."""

    def check(self) -> None:
        self._require_trained("eagle3")

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench_backends.eagle.build import random_eagle
        from spdbench_backends.eagle.formats import read_eagle

        self._check_options()
        target, seed = self._context.target, self._context.seed
        file = self._read_drafter(choice, "eagle3", read_eagle, lambda: random_eagle(target.ends, seed))
        if file is not None:
            self._weights = self._build(file)
            if choice.kind == "path":
                self._report_foreign(file)
            if self._info is not None and not self._weights.is_eagle3:
                self._info = replace(self._info, method="eagle")
        self._builder = builder = self._choose_builder(choice, file)
        captured = self._capture_target(builder.max_nodes, () if self._weights is None else self._weights.aux)
        if self._weights is not None and captured is not None:
            self._rounds = self._capture_rounds(builder, captured.capacity)

    def _check_options(self) -> None:
        options, depth, given = self._options, self._options.depth, self._options.model_fields_set
        if options.tree == "static" and (depth or 0) > STATIC_DEPTH:
            raise self._option_error("depth", f"the static tree has {STATIC_DEPTH} levels")
        for name, trees in (("top_k", ("dynamic",)), ("total_tokens", ("dynamic", "auto"))):
            if name in given and options.tree not in trees:
                tree = f"{self._context.label}.tree={options.tree}"
                raise self._option_error(name, f"has no meaning with {tree}; allowed with {' and '.join(trees)}")
        counts = options.tree == "dynamic" or "total_tokens" in given
        if counts and depth is not None and options.total_tokens < depth + 1:
            raise self._option_error(
                "total_tokens",
                f"too few for {self._context.label}.depth={depth} levels behind the newest token; give at least "
                f"{depth + 1}",
            )

    def _options_for_depth(self, num_levels: int) -> Mapping[str, object]:
        options = self._options
        found: dict[str, object] = {"tree": "chain"} if options.tree == "static" else {}
        counts = options.tree == "dynamic" or "total_tokens" in options.model_fields_set
        more = {"total_tokens": num_levels + 1} if counts and options.total_tokens <= num_levels else {}
        return {**found, "depth": num_levels, **more}

    def _build(self, file: EagleFile) -> EagleWeights:
        from spdbench_backends.eagle.build import build_eagle

        options = self._options
        weights = build_eagle(
            file,
            self._context.target.ends,
            aux_convention=options.aux_convention,
            rope_theta=options.rope_theta,
            norm_output=options.norm_output,
        )
        if options.tree == "dynamic" and options.top_k > weights.vocabulary.size:
            raise self._option_error("top_k", f"the head knows {weights.vocabulary.size} tokens only")
        return weights

    def _report_foreign(self, file: EagleFile) -> None:
        """Reports on stderr that a head fits in shape only."""
        from spdbench_backends.eagle.belonging import foreign_target

        target = self._context.target
        if reason := foreign_target(file, target.ends, target.files.id, target.files.sha256):
            say(f"NOTE: {file.path}: {reason}. It fits in shape only: few of its drafts can be expected to be right.")

    def _choose_builder(self, choice: DrafterChoice, file: EagleFile | None) -> TreeBuilder:
        from spdbench.decoding.tree import named_tree
        from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, chain_builder

        options, device = self._options, self._decoder.device
        if options.tree == "auto" and self._context.target.unsupported_reason is None:
            return self._choose_by_cost(choice, file)
        if options.tree in ("auto", "chain"):
            depth = options.depth or choice.depth(CHAIN_DEPTH, MAX_DEPTH)
            if options.tree == "auto":
                self._chosen = {"tree": f"chain, depth {depth}: transformers' layers take no trees"}
            return chain_builder(depth, device)
        self._require_trees()
        if options.tree == "static":
            depth = options.depth or STATIC_DEPTH
            return StaticTreeBuilder([path for path in named_tree("eagle_1") if len(path) <= depth], device)
        depth = options.depth or min(choice.depth(STATIC_DEPTH, MAX_DEPTH), options.total_tokens - 1)
        return DynamicTreeBuilder(depth, options.top_k, options.total_tokens)

    def _choose_by_cost(self, choice: DrafterChoice, file: EagleFile | None) -> TreeBuilder:
        """The builder that promises the most tokens a second; of a chain where the target takes no trees."""
        from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, chain_builder
        from spdbench.decoding.tree_choice import MAX_AUTO_NODES, assumed_accuracies, choose_tree

        device = self._decoder.device
        largest = self._options.total_tokens if "total_tokens" in self._options.model_fields_set else MAX_AUTO_NODES
        depth = self._options.depth or min(choice.depth(AUTO_DEPTH, MAX_DEPTH), largest - 1)
        if not self._decoder.takes_trees:
            largest = depth + 1
        by_level = (file.config.acceptance_by_position if file is not None else choice.rates) or (ASSUMED_ACCURACY,)
        accuracies = assumed_accuracies(by_level, depth, self._num_ranks)
        costs = self._row_costs(largest)
        chain_s, branching_s, grown_s = (partial(self._draft_costs, *pair, costs(1)) for pair in self._timed_trees())
        best = choose_tree([ranks[:1] for ranks in accuracies], costs, chain_s(), largest - 1)
        chain_levels, grows = best.num_levels, False
        if self._decoder.takes_trees and largest > 2:
            branching = choose_tree(accuracies, costs, branching_s(), largest - 1, one_row_a_level=True)
            grown = choose_tree(accuracies, costs, grown_s(), largest - 1)
            best = max((best, branching, grown), key=lambda tree: tree.speedup)  # the first of equal ones
            grows = best is grown
        levels, num_nodes = best.num_levels, len(best.paths) + 1
        if num_nodes == levels + 1:
            levels = min(max(1, chain_levels, choice.num_levels), depth)
            self._chosen = {"tree": f"chain, depth {levels}"}
            return chain_builder(levels, device)
        if self._decoder_to_capture() is None:
            self._chain = chain_builder(max(1, chain_levels), device)
            self._chosen = {"with a temperature": f"chain, depth {self._chain.num_levels}, drawn"}
        if not grows:
            words = f"chain with {counted(num_nodes - 1 - levels, 'alternative')}, depth {levels}"
            self._chosen = {"tree": words, **self._chosen}
            return StaticTreeBuilder(best.paths, device)
        widest = max(sum(len(path) == level for path in best.paths) for level in range(1, levels + 1))
        top_k = widest if self._weights is None else min(widest, self._weights.vocabulary.size)
        words = f"dynamic, depth {levels}, top_k {top_k}, total_tokens {num_nodes}"
        self._chosen = {"tree": words, **self._chosen}
        return DynamicTreeBuilder(levels, top_k, num_nodes)

    @property
    def _num_ranks(self) -> int:
        """How many candidates of a row a tree that is chosen may have."""
        return 1 if self._weights is None else min(4, self._weights.vocabulary.size)

    def _timed_trees(self) -> list[tuple[TreeBuilder, TreeBuilder]]:
        """A shallow and a deep tree of each kind: chains, chains with an alternative at each level, trees that grow."""
        from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, chain_builder

        device, width = self._decoder.device, self._num_ranks
        both = [(*[0] * level, rank) for level in range(CHAIN_DEPTH) for rank in range(min(2, width))]
        return [
            (chain_builder(1, device), chain_builder(CHAIN_DEPTH, device)),
            (StaticTreeBuilder(both[: min(2, width)], device), StaticTreeBuilder(both, device)),
            (DynamicTreeBuilder(1, width, total_tokens=1 + width), DynamicTreeBuilder(CHAIN_DEPTH, width, 3 * width)),
        ]

    def _draft_costs(self, shallow: TreeBuilder, deep: TreeBuilder, forward_s: float) -> Callable[[int], float]:
        """Seconds of drafting by number of levels where a forward of one row takes `forward_s`, by two builders of one
        kind: the first level, which reads the target's features, costs more than each further one."""
        first_s, all_s = self._draft_seconds(shallow, forward_s), self._draft_seconds(deep, forward_s)
        further_s = max(0.0, all_s - first_s) / (deep.num_levels - shallow.num_levels)
        return lambda levels: first_s + further_s * (levels - shallow.num_levels)

    def _draft_seconds(self, builder: TreeBuilder, forward_s: float) -> float:
        """Seconds of one draft where a forward of one row takes `forward_s`."""
        from spdbench.decoding.tree_builder import StaticTreeBuilder, is_chain

        if self._weights is None:
            return 0.0

        def measure() -> float:
            captured = self._decoder_to_capture() is not None
            rounds = self._capture_rounds(builder, TIMED_TOKENS) if captured else None
            drafter = self._head_drafter(builder, TIMED_TOKENS, rounds)
            return self._seconds_to_draft(drafter, builder.num_levels, forward_s)

        static = "chain" if is_chain(builder) else "alternatives"
        kind = static if isinstance(builder, StaticTreeBuilder) else "dynamic"
        return self._draft_cost(kind, builder.num_levels, measure)

    def _weights_drafter(self, request: GenerationRequest) -> Drafter:
        chosen = self._builder if request.sampling.greedy else self._chain or self._builder
        builder, capacity = self._loaded(chosen), len(request.prompt_ids) + request.max_new_tokens
        fits = self._captured is not None and capacity + builder.max_nodes <= self._captured.capacity
        return self._head_drafter(builder, capacity, self._rounds if fits else None)

    def _head_drafter(self, builder: TreeBuilder, capacity: int, captured: CapturedRounds | None) -> Drafter:
        from spdbench_backends.eagle.drafter import EagleDrafter

        return EagleDrafter(self._context.target.ends, captured or self._rounds_for(builder, capacity))

    def _rounds_for(self, builder: TreeBuilder, capacity: int) -> Rounds:
        """Those of the last request where they do, as their steps are recorded; a request follows the other."""
        from spdbench.models.kv_cache import whole_steps
        from spdbench_backends.eagle.drafter import Rounds

        kept = self._last_rounds
        if kept is None or kept.builder is not builder or kept.capacity < capacity:
            self._last_rounds = kept = None  # freed before there is more
            kept = Rounds(self._loaded(self._weights), builder, whole_steps(capacity))
        self._last_rounds = kept
        return kept

    def _capture_rounds(self, builder: TreeBuilder, capacity: int) -> CapturedRounds:
        from spdbench_backends.eagle.captured import CapturedRounds

        weights = self._loaded(self._weights)
        num_columns = self._decoder.config.hidden_size * max(1, len(weights.aux))
        return CapturedRounds(weights, num_columns, builder, capacity, compiled=self._options.graphs == "compiled")
