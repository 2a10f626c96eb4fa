"""What the backends that draft share: a drafter for each request, and where drafters come from; for those of kind
draft_verify also rounds, captured forwards, and the costs that choose a tree. A method adds its drafter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from spdbench.backend import BackendInfo, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Sampling, Step
from spdbench_backends.local import GraphOptions, LocalBackend, captured_as, decoder_to_capture, described_snapshots

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.decoding.speculate import Drafter
    from spdbench.decoding.synthetic import SyntheticDrafts
    from spdbench.decoding.tree_builder import TreeBuilder
    from spdbench.decoding.verify import AcceptRule
    from spdbench.models.cuda.captured_decoder import CapturedDecoder
    from spdbench.models.decoder import Decoder
    from spdbench.profiles.profile import RowCosts
    from spdbench_backends.drafter_files.folder import DrafterFile

D = TypeVar("D")
F = TypeVar("F", bound="DrafterFile[Any]")


class Drafting(LocalBackend, ABC, Generic[D]):
    """Base of the backends that draft. `D` drafts for one request."""

    _choice: DrafterChoice | None = None
    _prepared: tuple[GenerationRequest, D] | None = None

    def load(self) -> None:
        from spdbench.decoding.drafter_choice import parse_drafter

        choice = parse_drafter(self._context.drafter)
        if choice.is_synthetic:
            self._info = DrafterInfo(choice.title, method=choice.kind, synthetic=True)
        self._load_drafter(choice)
        self._choice = choice

    @abstractmethod
    def _load_drafter(self, choice: DrafterChoice) -> None:
        """Loads what the drafters of all requests share, and sets `_info` unless the choice is a synthetic one."""

    @abstractmethod
    def _new_drafter(self, request: GenerationRequest) -> D:
        """A new drafter for `request`."""

    @abstractmethod
    def _decode(self, request: GenerationRequest, drafter: D) -> Iterator[Step]:
        """The steps of one request."""

    @property
    def lossless(self) -> bool:
        """False for forced verdicts, which serve timing: the tokens that they accept are not the target's own."""
        return not self._context.drafter.startswith("forced:")

    def prepare(self, request: GenerationRequest) -> None:
        """Makes a synthetic drafter, which decodes the answer first. What other drafters do for a request is timed."""
        is_synthetic = self._info is not None and self._info.synthetic
        self._prepared = (request, self._new_drafter(request)) if is_synthetic else None

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is request:
            return self._decode(request, prepared[1])
        return self._decode(request, self._new_drafter(request))

    def _read_drafter(
        self,
        choice: DrafterChoice,
        method: str,
        read: Callable[[Path], F],
        draw: Callable[[], F],
    ) -> F | None:
        """The drafter that the user chose: read from its folder, or drawn at random; None for a synthetic one. Also
        sets what results say of it.

        Raises:
            InputError: no drafter of `method` is installed, or it cannot be read, or the target shares nothing with
                one.
        """
        if choice.is_synthetic:
            return None
        if choice.kind == "random":
            file = draw()
        else:
            file = read(self._find_trained(method) if choice.kind == "auto" else choice.path)
        self._info = file.info(choice.kind, method)
        return file

    def _require_trained(self, method: str) -> None:
        """For `check`: where `auto` asks for a trained drafter, a missing one is found before anything is loaded.

        Raises:
            InputError: none is installed, or the words of `--drafter` have no meaning.
        """
        from spdbench.decoding.drafter_choice import parse_drafter

        if parse_drafter(self._context.drafter).kind == "auto":
            self._find_trained(method)

    @property
    def _asked_cut(self) -> tuple[int | None, Sequence[int] | None]:
        """The stages that a drafter has to be for, as `find_drafter` takes them; none where the target is not cut."""
        return None, None

    def _find_trained(self, method: str) -> Path:
        from spdbench_backends.drafter_files.folder import find_drafter

        target = self._context.target
        try:
            return find_drafter(target.files, method, *self._asked_cut)
        except InputError:
            if target.unsupported_reason is not None:
                _ = target.ends  # fails where the advice to train one would be refused
            raise

    def _drafts(self, request: GenerationRequest) -> SyntheticDrafts:
        from spdbench.decoding.synthetic import synthetic_drafts

        return synthetic_drafts(self._loaded(self._choice), self._context.seed, self._decoder, request)


class DraftVerify(Drafting["Drafter"]):
    """Base of the backends of kind draft_verify."""

    kind: ClassVar[BackendKind] = "draft_verify"
    largest_depth: ClassVar[int]
    """How many tokens deep drafts can be made with options."""

    _options: GraphOptions
    _weights: Any = None
    """What a trained or random drafter computes with; None for a synthetic one."""
    _builder: TreeBuilder | None = None
    _captured: CapturedDecoder | None = None

    def load(self) -> None:
        from spdbench.decoding.synthetic import require_depth

        super().load()
        if self._loaded(self._info).synthetic:
            choice = self._loaded(self._choice)
            options = self._options_for_depth(choice.num_levels)
            names = " ".join(f"-o {self._context.label}.{name}={value}" for name, value in options.items())
            impossible = choice.num_levels > self.largest_depth
            deeper = f"it drafts {self.largest_depth} at most" if impossible else f"give {names}"
            require_depth(choice, self._loaded(self._builder).num_levels, deeper)

    def _options_for_depth(self, num_levels: int) -> Mapping[str, object]:
        """The options that make drafts `num_levels` tokens deep."""
        raise NotImplementedError

    def describe(self) -> BackendInfo:
        info, decoder = super().describe(), self._decoder
        snapshots = described_snapshots(decoder, (decoder.layers,), (self._max_nodes - 1,))
        return replace(info, chosen={**info.chosen, **snapshots})

    @property
    def _max_nodes(self) -> int:
        """No tree has more nodes, the root included."""
        return self._loaded(self._builder).max_nodes

    def _new_drafter(self, request: GenerationRequest) -> Drafter:
        from spdbench.decoding.synthetic import SyntheticDrafter

        builder = self._loaded(self._builder)
        if self._weights is None:
            return SyntheticDrafter(self._drafts(request), builder, self._decoder.device)
        return self._weights_drafter(request)

    def _weights_drafter(self, request: GenerationRequest) -> Drafter:
        """A drafter for `request` that computes with `_weights`."""
        raise NotImplementedError

    def _decode(self, request: GenerationRequest, drafter: Drafter) -> Iterator[Step]:
        from spdbench.decoding.speculate import Speculation

        speculation = Speculation(self._captured or self._decoder, drafter, request, self._accept_rule())
        self._spans = speculation.spans
        return speculation.steps()

    def _accept_rule(self) -> AcceptRule | None:
        """None: greedy or lossless sampling, as the request says."""
        return None

    def _decoder_to_capture(self) -> Decoder | None:
        return decoder_to_capture(self._options.graphs, self._context)

    def _capture_target(self, num_nodes: int, hidden_indices: Collection[int]) -> CapturedDecoder | None:
        """The target with its forwards of one row and of `num_nodes` rows captured, if the option says so."""
        if (decoder := self._decoder_to_capture()) is not None:
            from spdbench.models.cuda.captured_decoder import usual_capacity

            capacity = usual_capacity(decoder)
            self._captured = self._captured_decoder(decoder, (1, num_nodes), capacity, hidden_indices)
            self._chosen = {**self._chosen, "graphs": captured_as(self._options.graphs, capacity)}
        return self._captured

    def _captured_decoder(
        self, decoder: Decoder, row_counts: Collection[int], capacity: int, hidden_indices: Collection[int] = ()
    ) -> CapturedDecoder:
        from spdbench.models.cuda.captured_decoder import CapturedDecoder

        compiled = self._options.graphs == "compiled"
        return CapturedDecoder(decoder, row_counts, capacity, hidden_indices, compiled=compiled)

    def _row_costs(self, largest: int) -> RowCosts:
        """Seconds of forwards of up to `largest` rows; of captured ones if the method captures its own."""
        from spdbench.decoding.tree_choice import CONTEXT, ROW_COUNTS, measure_row_costs
        from spdbench.profiles.profile import RowCosts, make_key

        counts = [count for count in ROW_COUNTS if count <= largest]
        decoder = self._decoder_to_capture()

        def measure() -> Sequence[float]:
            timed = self._captured_decoder(decoder, counts, CONTEXT + largest) if decoder else self._decoder
            return measure_row_costs(timed, largest).seconds

        keys = [make_key("forward", graphs=self._graphs, rows=count) for count in counts]
        return RowCosts.rising(counts, self._stored.seconds(keys, measure))

    def _draft_cost(self, tree: str, num_levels: int, measure: Callable[[], float]) -> float:
        """Seconds of one draft of `num_levels` levels in a tree of that kind."""
        from spdbench.profiles.profile import make_key

        info = self._loaded(self._info)
        fields = {"method": info.method, "drafter": (info.sha256 or info.id)[:12]}
        key = make_key("draft", **fields, tree=tree, levels=num_levels, graphs=self._graphs)
        return self._stored.seconds([key], lambda: [measure()])[0]

    @property
    def _graphs(self) -> str:
        """How forwards run, in keys of stored costs."""
        return "off" if self._decoder_to_capture() is None else self._options.graphs.replace("auto", "on")

    def _seconds_to_draft(self, drafter: Drafter, num_levels: int, forward_s: float) -> float:
        """Seconds of one draft of `num_levels` levels, timed as it will run: in turn with forwards of the target, so
        that what the drafter reads is not in the processor's caches.

        `forward_s` is the stored cost of a forward of one row. It may be of a moment when the machine was busier, or
        less so, and what counts is how a draft compares with it: the draft's seconds are those of that moment. The same
        forward, timed in turn, says by how much the speed differs. Captured ones, on GPUs, are not timed here.
        """
        import torch

        from spdbench.decoding.sampling import Sampler
        from spdbench.decoding.speculate import Features
        from spdbench.decoding.tree_choice import CONTEXT
        from spdbench.models.layer_ops import argmax
        from spdbench.models.torch_utils import median_seconds

        decoder, sampler = self._decoder, Sampler(Sampling(), 0)
        cache = decoder.new_cache(CONTEXT + 1, num_snapshots=1)
        decoder.forward(decoder.embed(decoder.ids([0] * CONTEXT)), 0, cache)
        hidden_1M = torch.zeros(1, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
        features = Features(hidden_1M, dict.fromkeys(drafter.hidden_indices, hidden_1M))
        drafter.start((0,), features, 0)
        times: list[float] = []

        def draft() -> None:
            drafter.propose(num_levels, sampler).ids_N.tolist()
            drafter.accept((0,), features)

        def forward() -> None:
            began = perf_counter()
            hidden_1M, _ = decoder.forward(decoder.embed(decoder.ids((0,))), CONTEXT, cache)
            argmax(decoder.logits(hidden_1M)).tolist()
            times.append(perf_counter() - began)
            cache.rollback(CONTEXT)

        draft_s = median_seconds(draft, between=forward)
        return draft_s if self._decoder_to_capture() else draft_s * forward_s / median(times)

    def _require_trees(self) -> None:
        """Raises `InputError` where the layers of this model take no trees."""
        if not self._decoder.takes_trees:
            foreign = self._context.target.unsupported_reason is not None
            layers = "runs on transformers' layers, which" if foreign else "has recurrent layers, which"
            raise self._option_error("tree", f"this model {layers} take no trees; use chain")


class Lookup(DraftVerify):
    """Base of the methods that draft from text alone: they take no drafter, so none has a say in what they give."""

    method: ClassVar[str]
    drafts_are: ClassVar[str]
    """What results call their drafter."""

    @property
    def lossless(self) -> bool:
        return True

    def _load_drafter(self, choice: DrafterChoice) -> None:  # noqa: ARG002
        self._set_up()
        self._capture_target(self._max_nodes, ())
        self._info = DrafterInfo(self.drafts_are, method=self.method, synthetic=False)

    @abstractmethod
    def _set_up(self) -> None:
        """Checks the options, and makes what is kept between requests."""
