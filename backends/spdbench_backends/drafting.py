"""What all backends that draft share: a drafter for each request, and where drafters come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from spdbench.backend import BackendContext, DrafterInfo
from spdbench.types import GenerationRequest, Step

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice, SyntheticDrafts
    from spdbench.models.interface import TargetDecoder

D = TypeVar("D")
F = TypeVar("F")


class Drafting(ABC, Generic[D]):
    """Base of the backends that draft. `D` drafts for one request; `load` sets `_choice` and `_info`."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._choice: DrafterChoice | None = None
        self._info: DrafterInfo | None = None
        self._prepared: tuple[GenerationRequest, D] | None = None

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
        """The drafter that the user chose: read from its folder, or drawn at random; None for a synthetic one.

        Raises:
            InputError: no drafter of `method` (for `num_stages`) is installed, or it cannot be read.
        """
        from spdbench_backends.drafter_files.folder import find_drafter

        if choice.kind in ("oracle", "forced"):
            return None
        if choice.kind == "random":
            return draw()
        installed = choice.kind == "auto"
        return read(find_drafter(self._context.target.files, method, num_stages) if installed else choice.path)

    def _synthetic(self, choice: DrafterChoice) -> DrafterInfo:
        return DrafterInfo(choice.text, method=choice.kind, synthetic=True)

    def _drafts(self, request: GenerationRequest) -> SyntheticDrafts:
        from spdbench.decoding.synthetic import synthetic_drafts

        if self._choice is None:
            raise RuntimeError(f"{self._context.label} is not loaded")
        return synthetic_drafts(self._choice, self._context.seed, self._decoder, request)
