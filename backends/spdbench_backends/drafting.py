"""What every backend that drafts shares: its drafters' life from request to request, and synthetic ones.

Must not know any method, nor in what order drafts are made and judged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from spdbench.backend import BackendContext, DrafterInfo
from spdbench.types import GenerationRequest, Step

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice, SyntheticDrafts
    from spdbench.models.interface import TargetDecoder

D = TypeVar("D")


class Drafting(ABC, Generic[D]):
    """Base of the backends that draft. `D` drafts for one request; `load` sets `_choice` and `_info`."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._choice: DrafterChoice | None = None
        self._info: DrafterInfo | None = None
        self._prepared: tuple[GenerationRequest, D] | None = None

    @abstractmethod
    def _new_drafter(self, request: GenerationRequest) -> D:
        """A drafter that has seen nothing yet."""

    @abstractmethod
    def _decode(self, request: GenerationRequest, drafter: D) -> Iterator[Step]:
        """The steps of one request."""

    @property
    def lossless(self) -> bool:
        """Dictated verdicts are for timing; what they let through is not the target's own."""
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

    def _synthetic(self, choice: DrafterChoice) -> DrafterInfo:
        return DrafterInfo(choice.text, method=choice.kind, synthetic=True)

    def _drafts(self, request: GenerationRequest) -> SyntheticDrafts:
        from spdbench.decoding.synthetic import synthetic_drafts

        if self._choice is None:
            raise RuntimeError(f"{self._context.label} is not loaded")
        return synthetic_drafts(self._choice, self._context.seed, self._decoder, request)
