"""`eagle`: a head drafts a chain or a tree from the target's features, the target verifies it in one forward.

EAGLE-1, 2 and 3 differ by their heads' tensors, and any head grows any tree. Source: METHODS.md, section A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from spdbench.backend import BackendContext, BackendOptions
from spdbench.errors import InputError
from spdbench.types import GenerationRequest
from spdbench_backends.draft_verify import DraftVerify
from spdbench_backends.graph_options import GraphOptions, to_be_recorded

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter
    from spdbench.decoding.synthetic import DrafterChoice
    from spdbench_backends.eagle.formats import EagleFile
    from spdbench_backends.eagle.head import EagleWeights
    from spdbench_backends.eagle.recorded import RecordedEagle
    from spdbench_backends.eagle.tree_builder import TreeBuilder

ASSUMED_ACCURACY = 0.6
"""First-choice accuracy of a head that says nothing about it; heads trained on little data reach about so much."""

LARGEST_AUTO_TREE = 32
CHAIN_DEPTH = 4
TIMED_TOKENS = 64
"""Room for the drafts that are timed: a token each."""

STATIC_DEPTH = 5
"""Levels of EAGLE-1's tree."""


class Eagle(DraftVerify):
    """EAGLE: a head drafts a tree from the target's features."""

    class Options(GraphOptions):
        tree: Literal["chain", "static", "dynamic", "auto"] = Field(
            "auto",
            description="chain: one draft a level; static: EAGLE-1's 25 nodes; dynamic: EAGLE-2's most probable paths; "
            "auto: what pays here, by measured costs and the drafter's acceptance",
        )
        depth: int | None = Field(None, ge=1, le=32, description="levels drafted; default: 4 in a chain, 5 in a tree")
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

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        super().__init__(context)
        self._options = cast(Eagle.Options, options)
        self._weights: EagleWeights | None = None
        self._growth: TreeBuilder | None = None
        self._module: RecordedEagle | None = None

    def load(self) -> None:
        from spdbench.decoding.synthetic import parse_drafter

        choice = parse_drafter(self._context.drafter)
        self._check_options()
        file = self._find_head(choice)
        if file is None:
            self._info = self._synthetic(choice)
        else:
            from spdbench_backends.drafter_files import drafter_info

            self._weights = self._build(file)
            method = "eagle3" if self._weights.is_eagle3 else "eagle"
            self._info = drafter_info(choice.kind, file.path.name, method, file.sha256, file.trained_tokens)
        self._choice = choice
        self._growth = self._choose_growth(choice, file)
        self._record_all(self._growth)

    def _check_options(self) -> None:
        options, label = self._options, self._context.label
        if options.tree == "static" and (options.depth or 0) > STATIC_DEPTH:
            raise InputError(f"-o {label}.depth={options.depth}: the static tree has {STATIC_DEPTH} levels")
        for name, trees in (("top_k", ("dynamic",)), ("total_tokens", ("dynamic", "auto"))):
            if name in options.model_fields_set and options.tree not in trees:
                raise InputError(
                    f"-o {label}.{name}={getattr(options, name)}: has no meaning with {label}.tree={options.tree}; "
                    f"allowed with {' and '.join(trees)}"
                )
        counts = options.tree == "dynamic" or "total_tokens" in options.model_fields_set
        if counts and options.depth is not None and options.total_tokens < options.depth + 1:
            raise InputError(
                f"-o {label}.total_tokens={options.total_tokens}: too few for {label}.depth={options.depth} levels "
                f"behind the newest token; give at least {options.depth + 1}"
            )

    def _find_head(self, choice: DrafterChoice) -> EagleFile | None:
        if choice.kind in ("oracle", "forced"):
            return None
        from spdbench.models.checkpoints.find_drafter import find_drafter
        from spdbench_backends.eagle.build import random_eagle
        from spdbench_backends.eagle.formats import read_eagle

        if choice.kind == "path":
            return read_eagle(choice.path)
        if choice.kind == "random":
            return random_eagle(self._context.target.own_decoder, self._context.seed)
        return read_eagle(find_drafter(self._context.target.files, "eagle3", None))

    def _build(self, file: EagleFile) -> EagleWeights:
        from spdbench_backends.eagle.build import build_eagle

        options = self._options
        weights = build_eagle(
            file,
            self._context.target.own_decoder,
            aux_convention=options.aux_convention,
            rope_theta=options.rope_theta,
            norm_output=options.norm_output,
        )
        vocabulary = self._decoder.config.vocab_size if weights.token_ids_U is None else len(weights.token_ids_U)
        if options.tree == "dynamic" and options.top_k > vocabulary:
            raise InputError(f"-o {self._context.label}.top_k={options.top_k}: the head knows {vocabulary} tokens only")
        return weights

    def _choose_growth(self, choice: DrafterChoice, file: EagleFile | None) -> TreeBuilder:
        from spdbench_backends.eagle.tree_builder import EAGLE_1, ChainBuilder, DynamicTreeBuilder, StaticTreeBuilder

        options = self._options
        if options.tree == "chain":
            return ChainBuilder(options.depth or CHAIN_DEPTH)
        if not self._decoder.takes_trees:
            if options.tree == "auto":
                depth = options.depth or CHAIN_DEPTH
                self._chosen = {"tree": f"chain, depth {depth}: transformers' layers take no trees"}
                return ChainBuilder(depth)
            raise self._no_trees(options.tree)
        if options.tree == "static":
            paths = tuple(path for path in EAGLE_1 if len(path) <= (options.depth or STATIC_DEPTH))
            return StaticTreeBuilder(paths, self._decoder.device)
        if options.tree == "dynamic":
            depth = options.depth or min(5, options.total_tokens - 1)
            return DynamicTreeBuilder(depth, options.top_k, options.total_tokens)
        return self._choose_by_cost(choice, file)

    def _choose_by_cost(self, choice: DrafterChoice, file: EagleFile | None) -> TreeBuilder:
        """The growth that promises the most tokens a second; METRICS.md's speed-up is what it then turns out to be."""
        from spdbench.decoding.tree_choice import assumed_accuracies, choose_tree
        from spdbench_backends.eagle.tree_builder import ChainBuilder, DynamicTreeBuilder

        largest = self._options.total_tokens if "total_tokens" in self._options.model_fields_set else LARGEST_AUTO_TREE
        depth = self._options.depth or min(8, largest - 1)
        by_level = list(file.acceptance_by_position) if file is not None else [choice.probability]
        by_level = [*by_level, *[by_level[-1] if by_level else ASSUMED_ACCURACY] * depth][:depth]
        synthetic = self._weights is None
        accuracies = assumed_accuracies(by_level, 1 if synthetic else 4)
        costs = self._row_costs(self._options.graphs, largest)
        chain_s = self._draft_costs(ChainBuilder(1), ChainBuilder(CHAIN_DEPTH))
        tree_s = self._draft_costs(
            DynamicTreeBuilder(1, 2, total_tokens=3), DynamicTreeBuilder(CHAIN_DEPTH, 2, total_tokens=8)
        )
        chain = choose_tree([ranks[:1] for ranks in accuracies], costs, chain_s, largest - 1)
        tree = choose_tree(accuracies, costs, tree_s, largest - 1)
        if tree.speedup <= chain.speedup or len(tree.paths) == tree.num_levels:
            levels = max(1, chain.num_levels)
            self._chosen = {"tree": f"chain, depth {levels}"}
            return ChainBuilder(levels)
        levels, num_nodes = tree.num_levels, len(tree.paths) + 1
        top_k = max(sum(len(path) == level for path in tree.paths) for level in range(1, levels + 1))
        self._chosen = {"tree": f"dynamic, depth {levels}, top_k {top_k}, total_tokens {num_nodes}"}
        return DynamicTreeBuilder(levels, top_k, num_nodes)

    def _draft_costs(self, shallow: TreeBuilder, deep: TreeBuilder) -> Callable[[int], float]:
        """What so many levels of drafting take, from two growths of the kind: the first level, which takes the target's
        features in, costs more than each further one."""
        first_s, all_s = self._draft_seconds(shallow), self._draft_seconds(deep)
        further_s = max(0.0, all_s - first_s) / (deep.num_levels - shallow.num_levels)
        return lambda levels: first_s + further_s * (levels - shallow.num_levels)

    def _draft_seconds(self, growth: TreeBuilder) -> float:
        """What a draft takes, timed as it will run: in turn with the target's forwards."""
        from spdbench.models.timing import median_seconds

        if self._weights is None:
            return 0.0
        return median_seconds(self._drafting(self._weights, growth), between=self._forward_between())

    def _drafting(self, weights: EagleWeights, growth: TreeBuilder) -> Callable[[], object]:
        """A draft, as there is one a round; its tokens are of no use."""
        import torch

        inputs = len(weights.aux) if weights.is_eagle3 else 1
        features = torch.zeros(1, inputs * self._decoder.config.hidden_size, dtype=weights.dtype, device=weights.device)
        target = to_be_recorded(self._options.graphs, self._context)
        if target is not None:
            from spdbench_backends.eagle.recorded import RecordedEagle

            recorded = RecordedEagle(weights, target, growth, TIMED_TOKENS, compiled=self._compiled)
            return lambda: recorded.replay(features, (0,)).ids_N.tolist()
        from spdbench_backends.eagle.drafter import HeadProposer
        from spdbench_backends.eagle.head import EagleModule

        module, root = EagleModule(weights, TIMED_TOKENS), self._decoder.ids((0,))

        def draft() -> object:
            proposer = HeadProposer(module, *module.extend(features, root))
            return growth.grow(proposer, root, growth.num_levels).ids_N.tolist()

        return draft

    def _new_drafter(self, request: GenerationRequest) -> Drafter:
        from spdbench_backends.eagle.drafter import EagleDrafter, SyntheticEagleDrafter

        if self._growth is None:
            raise RuntimeError("eagle is not loaded")
        if self._weights is None:
            return SyntheticEagleDrafter(self._drafts(request), self._growth, self._decoder.device)
        target = self._context.target.own_decoder
        if self._module is not None and self._is_recorded_for(request, self._growth.max_nodes):
            from spdbench_backends.eagle.recorded import RecordedEagleDrafter

            return RecordedEagleDrafter(self._weights, target, self._growth, self._module)
        capacity = len(request.prompt_ids) + request.max_new_tokens
        return EagleDrafter(self._weights, target, self._growth, capacity)

    def _record_all(self, growth: TreeBuilder) -> None:
        """The target's forwards and the head's rounds, if the option says so."""
        weights = self._weights
        target = self._record(self._options.graphs, growth.max_nodes, () if weights is None else weights.aux)
        if target is not None and weights is not None and self._recorded is not None:
            from spdbench_backends.eagle.recorded import RecordedEagle

            capacity = self._recorded.capacity
            self._module = RecordedEagle(weights, target, growth, capacity, compiled=self._compiled)

    @property
    def _compiled(self) -> bool:
        return self._options.graphs == "compiled"

    def close(self) -> None:
        super().close()
        self._weights = self._growth = self._module = None
