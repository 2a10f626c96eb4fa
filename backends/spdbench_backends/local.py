"""What the backends that decode in this process share: one life cycle, the options `graphs` and `prompt_lookup`, and
steps that are observed from outside. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from spdbench.backend import BackendContext, BackendInfo, BackendOptions, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import Drafted, GenerationRequest, Span, Step

if TYPE_CHECKING:
    from spdbench.decoding.stored_costs import StoredCosts
    from spdbench.models.decoder import Decoder
    from spdbench.models.interface import TargetDecoder

T = TypeVar("T")

Graphs = Literal["auto", "on", "off", "compiled"]


class LocalBackend:
    """Base of the backends that decode in this process.

    A class declares what `load` makes as attributes, with the value before loading as their default. `close` drops the
    instance's own values, so that the defaults hold again.
    """

    _options: BackendOptions
    _info: DrafterInfo | None = None
    _spans: Sequence[Span] = ()
    _chosen: Mapping[str, str] = MappingProxyType({})
    """By the backend itself; recorded in the result."""

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        self._options = options
        self._context = context

    @property
    def lossless(self) -> bool:
        return True

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

    def prepare(self, request: GenerationRequest) -> None:
        pass

    def spans(self) -> Sequence[Span]:
        return self._spans

    def close(self) -> None:
        for name in vars(self).keys() - {"_options", "_context"}:
            delattr(self, name)

    @property
    def _decoder(self) -> TargetDecoder:
        return self._context.target.decoder

    @property
    def _stored(self) -> StoredCosts:
        """Measured costs of the target, and where new ones are kept."""
        from spdbench.decoding.stored_costs import StoredCosts

        return StoredCosts(self._context.target, self._context.threads)

    def _loaded(self, part: T | None) -> T:
        """`part`, which `load` makes."""
        if part is None:
            raise RuntimeError(f"{self._context.label} is not loaded")
        return part

    def _option_error(self, name: str, problem: str, value: object = None) -> InputError:
        """What is wrong with option `name`. `value` is shown in place of the given value."""
        shown = getattr(self._options, name) if value is None else value
        return InputError(f"-o {self._context.label}.{name}={shown}: {problem}")


class GraphOptions(BackendOptions):
    """Options of all backends whose steps can be captured."""

    graphs: Graphs = Field(
        "auto",
        description="on: steps are captured at load and replayed, as CUDA graphs on a GPU, on a CPU to rehearse that; "
        "compiled: the target's are fused by torch.compile before that; "
        "auto: on where a GPU holds a model that can be captured",
    )


def described_snapshots(decoder: TargetDecoder, stages: Sequence[range], counts: Sequence[int]) -> dict[str, str]:
    """What a result says of the states of recurrent layers that are kept to go back to: how many in each stage, and
    their memory; empty where no layer is recurrent."""
    if not decoder.snapshot_bytes(decoder.layers):
        return {}
    num_bytes = sum(count * decoder.snapshot_bytes(layers) for layers, count in zip(stages, counts, strict=True))
    by_stage = " by stage" if len(counts) > 1 else ""
    return {"snapshots": f"{', '.join(map(str, counts))}{by_stage}, {num_bytes / 1e6:.3g} MB"}


def captured_as(graphs: Graphs, capacity: int) -> str:
    """How a result describes captured steps."""
    return f"{'compiled' if graphs == 'compiled' else 'on'}, for up to {capacity} tokens"


def decoder_to_capture(graphs: Graphs, context: BackendContext) -> Decoder | None:
    """The decoder whose steps are to be captured; None where they are not.

    Raises:
        InputError: graphs were asked for, and the model's layers cannot be captured.
    """
    from spdbench.models.cuda.captured_decoder import is_capturable, refuse_uncapturable

    decoder = context.target.decoder
    if graphs == "off" or (graphs == "auto" and (decoder.device.type != "cuda" or not is_capturable(decoder))):
        return None
    return refuse_uncapturable(decoder, f"-o {context.label}.graphs={graphs}", "auto, off")


class LookupOptions(BackendOptions):
    """Options of engines that can look drafts up in the context."""

    prompt_lookup: int = Field(0, ge=0, le=64, description="tokens that are looked up in the context; 0: none")
    max_ngram: int = Field(2, ge=1, le=64, description="longest run of last tokens that is looked up")


class ObservedEngine(LocalBackend):
    """Base of the backends that drive an engine's own loop, plain or with prompt lookup."""

    _options: LookupOptions

    def _set_lookup(self) -> None:
        """Sets what results say of prompt lookup, if it is on.

        Raises:
            InputError: an option of prompt lookup is given without it.
        """
        if self._options.prompt_lookup:
            self._info = DrafterInfo("prompt lookup", method="prompt_lookup", synthetic=False)
        elif "max_ngram" in self._options.model_fields_set:
            raise self._option_error("max_ngram", f"needs {self._context.label}.prompt_lookup=TOKENS")


def observed_step(token_ids: Sequence[int], drafts: Sequence[int], forwards: int, *, keep_drafts: bool = False) -> Step:
    """The step of an engine that is observed from outside: it emitted `token_ids` after `drafts`, and its target
    forwarded `forwards` tokens.

    Ids equal to the drafts are accepted ones; the first that differs shows that its draft was rejected. Where a round
    was cut at an end of sequence or at the limit, later verdicts are unknown and do not count.
    """
    pairs = zip(token_ids, drafts, strict=False)
    accepted = next((index for index, (token, draft) in enumerate(pairs) if token != draft), None)
    rejected = accepted is not None
    if accepted is None:
        accepted = min(len(token_ids), len(drafts))
    kept = Drafted(tuple(map(int, drafts)), tuple(range(-1, len(drafts) - 1))) if keep_drafts else None
    return Step(tuple(token_ids), len(drafts), accepted + rejected, accepted, float(forwards), kept)
