"""What all backends that draft share: a drafter for each request, where drafters come from, and steps that are observed
from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from spdbench.backend import BackendContext, DrafterInfo
from spdbench.types import GenerationRequest, Step

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice, SyntheticDrafts
    from spdbench.models.interface import TargetDecoder
    from spdbench_backends.drafter_files.folder import DrafterFile

D = TypeVar("D")
F = TypeVar("F", bound="DrafterFile[Any]")


class Drafting(ABC, Generic[D]):
    """Base of the backends that draft. `D` drafts for one request."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._choice: DrafterChoice | None = None
        self._info: DrafterInfo | None = None
        self._prepared: tuple[GenerationRequest, D] | None = None

    def load(self) -> None:
        from spdbench.decoding.synthetic import parse_drafter

        choice = parse_drafter(self._context.drafter)
        self._load_drafter(choice)
        self._choice = choice

    @abstractmethod
    def _load_drafter(self, choice: DrafterChoice) -> None:
        """Loads what the drafters of all requests share, and sets `_info`."""

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
        self._prepared = (request, self._new_drafter(request))

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        if self._prepared is None or self._prepared[0] is not request:
            self.prepare(request)
        assert self._prepared is not None
        drafter, self._prepared = self._prepared[1], None
        return self._decode(request, drafter)

    def close(self) -> None:
        self._prepared = self._choice = None

    @property
    def _decoder(self) -> TargetDecoder:
        return self._context.target.decoder

    def _read_drafter(
        self,
        choice: DrafterChoice,
        method: str,
        read: Callable[[Path], F],
        draw: Callable[[], F],
        num_stages: int | None = None,
    ) -> F | None:
        """The drafter that the user chose: read from its folder, or drawn at random; None for a synthetic one. Also
        sets what results say of it.

        Raises:
            InputError: no drafter of `method` (for `num_stages`) is installed, or it cannot be read.
        """
        from spdbench_backends.drafter_files.folder import find_drafter

        if choice.kind in ("oracle", "forced"):
            self._info = DrafterInfo(choice.text, method=choice.kind, synthetic=True)
            return None
        if choice.kind == "random":
            file = draw()
        else:
            files = self._context.target.files
            file = read(find_drafter(files, method, num_stages) if choice.kind == "auto" else choice.path)
        self._info = file.info(choice.kind, method)
        return file

    def _drafts(self, request: GenerationRequest) -> SyntheticDrafts:
        from spdbench.decoding.synthetic import synthetic_drafts

        if self._choice is None:
            raise RuntimeError(f"{self._context.label} is not loaded")
        return synthetic_drafts(self._choice, self._context.seed, self._decoder, request)


def observed_step(token_ids: Sequence[int], drafts: Sequence[int], forwards: int) -> Step:
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
    return Step(tuple(token_ids), len(drafts), accepted + rejected, accepted, float(forwards))
