"""What the backends of kind draft_verify share: rounds, spans, captured forwards, and the costs that choose a tree.

A method adds how its drafters are loaded and made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from spdbench.backend import BackendContext, BackendInfo
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Sampling, Span, Step
from spdbench_backends.drafting import Drafting
from spdbench_backends.graph_options import GraphOptions, captured_as, decoder_to_capture

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter
    from spdbench.decoding.synthetic import SyntheticDrafter
    from spdbench.decoding.tree_builder import TreeBuilder
    from spdbench.decoding.tree_choice import RowCosts
    from spdbench.decoding.verify import AcceptRule
    from spdbench.models.cuda.captured_decoder import CapturedDecoder
    from spdbench.models.decoder import Decoder


class DraftVerify(Drafting["Drafter"]):
    """Base of the backends of kind draft_verify."""

    kind: ClassVar[BackendKind] = "draft_verify"

    def __init__(self, options: GraphOptions, context: BackendContext) -> None:
        super().__init__(context)
        self._graphs = options.graphs
        self._spans: Sequence[Span] = ()
        self._chosen: Mapping[str, str] = {}  # by the backend itself; recorded in the result
        self._captured: CapturedDecoder | None = None

    def describe(self) -> BackendInfo:
        decoder = self._decoder
        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(decoder.bytes_per_token(decoder.layers, head=True),),
            stage_layers=(len(decoder.layers),),
            drafter=self._info,
            chosen=self._chosen,
            kernels=decoder.kernels,
        )

    def spans(self) -> Sequence[Span]:
        return self._spans

    def close(self) -> None:
        super().close()
        self._spans = ()
        self._captured = None

    def _decode(self, request: GenerationRequest, drafter: Drafter) -> Iterator[Step]:
        from spdbench.decoding.speculate import Speculation

        speculation = Speculation(self._captured or self._decoder, drafter, request, self._accept_rule())
        self._spans = speculation.spans
        return speculation.steps()

    def _capture_target(self, num_nodes: int, hidden_indices: Collection[int]) -> Decoder | None:
        """Captures the target's forwards of one row and of `num_nodes` rows if the option says so. Returns the target
        if it did, for a drafter that captures its own steps."""
        decoder = decoder_to_capture(self._graphs, self._context)
        if decoder is not None:
            from spdbench.models.cuda.captured_decoder import CapturedDecoder, usual_capacity

            capacity, compiled = usual_capacity(decoder), self._graphs == "compiled"
            self._captured = CapturedDecoder(decoder, (1, num_nodes), capacity, hidden_indices, compiled=compiled)
            self._chosen = {**self._chosen, "graphs": captured_as(self._graphs, capacity)}
        return decoder

    def _row_costs(self, largest: int) -> RowCosts:
        """Seconds of forwards of up to `largest` rows; of captured ones if the method captures its own."""
        from spdbench.decoding.tree_choice import CONTEXT, ROW_COUNTS, measure_row_costs

        decoder = decoder_to_capture(self._graphs, self._context)
        if decoder is None:
            return measure_row_costs(self._decoder, largest)
        from spdbench.models.cuda.captured_decoder import CapturedDecoder

        counts = [count for count in ROW_COUNTS if count <= largest]
        captured = CapturedDecoder(decoder, counts, CONTEXT + largest, compiled=self._graphs == "compiled")
        return measure_row_costs(captured, largest)

    def _seconds_to_draft(self, drafter: Drafter, num_levels: int) -> float:
        """Seconds of one draft of `num_levels` levels, timed as it will run: in turn with forwards of the target, so
        that what the drafter reads is not in the processor's caches."""
        import torch

        from spdbench.decoding.sampling import Sampler
        from spdbench.decoding.speculate import Features
        from spdbench.models.layer_ops import argmax
        from spdbench.models.torch_utils import median_seconds

        decoder, sampler = self._decoder, Sampler(Sampling(), 0)
        cache = decoder.new_cache(1)
        hidden_1M = torch.zeros(1, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
        features = Features(hidden_1M, dict.fromkeys(drafter.hidden_indices, hidden_1M))
        drafter.start((0,), features, 0)

        def draft() -> None:
            drafter.propose(num_levels, sampler).ids_N.tolist()
            drafter.accept((0,), features)

        def forward() -> None:
            hidden_1M, _ = decoder.forward(decoder.embed(decoder.ids((0,))), 0, cache)
            argmax(decoder.logits(hidden_1M)).tolist()
            cache.rollback(0)

        return median_seconds(draft, between=forward)

    def _is_captured_for(self, request: GenerationRequest, num_nodes: int) -> bool:
        """True if forwards were captured and the sequence fits into their capacity."""
        needed = len(request.prompt_ids) + request.max_new_tokens + num_nodes
        return self._captured is not None and needed <= self._captured.capacity

    def _accept_rule(self) -> AcceptRule | None:
        """None: greedy or lossless sampling, as the request says."""
        return None

    def _synthetic_drafter(self, request: GenerationRequest, builder: TreeBuilder) -> SyntheticDrafter:
        from spdbench.decoding.synthetic import SyntheticDrafter

        return SyntheticDrafter(self._drafts(request), builder, self._decoder.device)

    def _no_trees(self, asked: str) -> InputError:
        return InputError(
            f"-o {self._context.label}.tree={asked}: this model runs on transformers' layers, which take no trees; "
            "use chain"
        )
