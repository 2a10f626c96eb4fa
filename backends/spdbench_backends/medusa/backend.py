"""`medusa`: several heads draft a tree from the target's last hidden state, and the target verifies it in one forward.

Source: arXiv 2401.10774.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from spdbench.errors import InputError
from spdbench.types import GenerationRequest
from spdbench_backends.drafting import DraftVerify
from spdbench_backends.local import GraphOptions

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.decoding.speculate import Drafter
    from spdbench.decoding.tree import Path
    from spdbench.decoding.tree_builder import StaticTreeBuilder
    from spdbench.decoding.verify import AcceptRule
    from spdbench.models.cuda.captured_function import CapturedFunction
    from spdbench_backends.medusa.drafter import MedusaWeights
    from spdbench_backends.medusa.formats import MedusaFile

ASSUMED_ACCURACIES = (0.55, 0.35, 0.25, 0.18, 0.14)
"""First-choice accuracy by head where the drafter's file does not give it: each head predicts one token further."""

SYNTHETIC_HEADS = 5
MAX_HEADS = 16


class Medusa(DraftVerify):
    """Medusa: several heads draft a tree from the target's last hidden state."""

    largest_depth = MAX_HEADS

    class Options(GraphOptions):
        tree: str = Field(
            "auto",
            description="auto: what pays here, by measured costs and the heads' accuracies; chain; a name such as "
            "mc_sim_7b_63; or a file that lists paths of ranks",
        )
        heads: int | None = Field(None, ge=1, le=MAX_HEADS, description="heads used; default: all that the drafter has")
        acceptance: Literal["lossless", "typical"] = Field(
            "lossless", description="lossless: exact; typical: what the target finds likely enough, which is lossy"
        )
        posterior_threshold: float = Field(0.09, gt=0, lt=1, description="typical: threshold where the target is sure")
        posterior_alpha: float = Field(0.3, gt=0, description="typical: how the threshold falls with the entropy")

    _options: Options
    _weights: MedusaWeights | None = None
    _builder: StaticTreeBuilder | None = None
    _captured_draft: CapturedFunction | None = None

    @property
    def lossless(self) -> bool:
        return super().lossless and self._options.acceptance == "lossless"

    def check(self) -> None:
        from spdbench_backends.medusa.formats import holds_medusa_heads

        if not holds_medusa_heads(self._context.target.files.directory):
            self._require_trained("medusa")

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench.decoding.tree_builder import StaticTreeBuilder

        file = self._find_heads(choice)
        if file is not None:
            from spdbench_backends.medusa.drafter import build_medusa

            self._weights = build_medusa(file, self._context.target.ends)
        self._builder = StaticTreeBuilder(self._choose_paths(choice, file), self._decoder.device)
        self._capture_target(self._builder.max_nodes, ())
        self._captured_draft = self._capture_draft(self._builder)

    def _find_heads(self, choice: DrafterChoice) -> MedusaFile | None:
        from spdbench_backends.medusa.drafter import random_medusa
        from spdbench_backends.medusa.formats import holds_medusa_heads, read_medusa

        target, heads, seed = self._context.target, self._num_synthetic_heads(choice), self._context.seed
        folder = target.files.directory
        if choice.kind == "auto" and holds_medusa_heads(folder):
            choice = replace(choice, kind="path", text=str(folder))
        return self._read_drafter(
            choice,
            "medusa",
            lambda path: read_medusa(path, folder),
            lambda: random_medusa(target.ends, heads, seed),
        )

    def _num_synthetic_heads(self, choice: DrafterChoice) -> int:
        return self._options.heads or choice.depth(SYNTHETIC_HEADS, MAX_HEADS)

    def _options_for_depth(self, num_levels: int) -> Mapping[str, object]:
        return {**({} if self._options.tree in ("auto", "chain") else {"tree": "chain"}), "heads": num_levels}

    def _num_heads(self, choice: DrafterChoice) -> int:
        if self._weights is None:
            return self._num_synthetic_heads(choice)
        available = self._weights.num_heads
        asked = self._options.heads or available
        if asked > available:
            raise self._option_error("heads", f"the drafter has {available} heads")
        return asked

    def _choose_paths(self, choice: DrafterChoice, file: MedusaFile | None) -> tuple[Path, ...]:
        from spdbench.decoding.tree import chain_paths

        heads, asked = self._num_heads(choice), self._options.tree
        if asked == "auto" and self._context.target.unsupported_reason is not None:
            self._chosen = {"tree": "chain: transformers' layers take no trees"}
            return chain_paths(heads)
        if asked == "chain":
            return chain_paths(heads)
        if asked == "auto":
            return self._choose_by_cost(choice, file, heads)
        self._require_trees()
        from spdbench_backends.medusa.trees import check_levels, check_ranks, find_tree

        try:
            paths = find_tree(asked)
            check_levels(paths, heads)
            check_ranks(paths, self._vocabulary())
        except InputError as error:
            raise self._option_error("tree", str(error)) from None
        return paths

    def _vocabulary(self) -> int:
        """The number of tokens that can be drafted."""
        return self._decoder.config.vocab_size if self._weights is None else self._weights.vocabulary.size

    def _choose_by_cost(self, choice: DrafterChoice, file: MedusaFile | None, heads: int) -> tuple[Path, ...]:
        from spdbench.decoding.tree import chain_paths
        from spdbench.decoding.tree_choice import MAX_AUTO_NODES, assumed_accuracies, choose_tree

        if file is None:
            accuracies = assumed_accuracies(choice.rates, heads, 1)
        elif file.config.head_accuracies:
            accuracies = [list(ranks) for ranks in file.config.head_accuracies[:heads]]
        else:
            accuracies = assumed_accuracies(ASSUMED_ACCURACIES, heads, min(4, self._vocabulary()))
        largest = MAX_AUTO_NODES
        if not self._decoder.takes_trees:
            accuracies, largest = [ranks[:1] for ranks in accuracies], heads + 1
        costs = self._row_costs(largest)
        draft_s = self._draft_seconds(heads, costs(1))
        best = choose_tree(accuracies, costs, lambda levels: draft_s * levels, largest - 1)
        needed = min(max(1, choice.num_levels), heads)
        paths = best.paths if best.num_levels >= needed else chain_paths(needed)
        self._chosen = {"tree": f"{len(paths) + 1} nodes, {max(map(len, paths))} levels"}
        return paths

    def _draft_seconds(self, num_heads: int, forward_s: float) -> float:
        """Seconds of one head in a draft of `num_heads` levels, where a forward takes `forward_s`."""
        from spdbench.decoding.tree_builder import chain_builder
        from spdbench_backends.medusa.drafter import MedusaDrafter

        if self._weights is None:
            return 0.0
        weights, target = self._weights, self._context.target.ends

        def measure() -> float:
            builder = chain_builder(num_heads, self._decoder.device)
            drafter = MedusaDrafter(weights, target, builder, self._capture_draft(builder))
            return self._seconds_to_draft(drafter, num_heads, forward_s)

        return self._draft_cost("chain", num_heads, measure) / num_heads

    def _capture_draft(self, builder: StaticTreeBuilder) -> CapturedFunction | None:
        """The heads' rounds captured, if the option says so."""
        from spdbench_backends.medusa.drafter import capture_draft

        target = self._decoder_to_capture()
        return None if target is None or self._weights is None else capture_draft(self._weights, target, builder)

    def _accept_rule(self) -> AcceptRule | None:
        from spdbench.decoding.verify import typical

        options = self._options
        if options.acceptance == "typical":
            return typical(options.posterior_threshold, options.posterior_alpha)
        return None

    def _weights_drafter(self, request: GenerationRequest) -> Drafter:
        from spdbench.decoding.tree_builder import is_chain
        from spdbench_backends.medusa.drafter import MedusaDrafter

        weights, builder = self._loaded(self._weights), self._loaded(self._builder)
        exact = self._options.acceptance == "lossless" and not request.sampling.greedy
        ends, captured = self._context.target.ends, self._captured_draft
        return MedusaDrafter(weights, ends, builder, captured, draws=exact and is_chain(builder))
