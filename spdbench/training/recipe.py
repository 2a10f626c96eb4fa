"""What a method has to say to be trained: the module, its loss, how good it is, and how it is written.

The loop knows recipes only through this protocol, and finds them through the entry point group `spdbench.recipes`, as
the harness finds backends. Must not know any method.

Shapes: B conversations side by side, S tokens of each, M model width, V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from spdbench.models.decoder import Decoder


class RecipeOptions(BaseModel):
    """The `-o` keys of a recipe; subclasses add theirs. Strings from the command line are converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Batch:
    """A few conversations, padded on the right, and what the frozen target made of them.

    `states[k]` is hidden state k of every token, `[B, S, M]` in float32 (SPD.md, section 1: 0 is the embedding, the
    number of layers is the last layer's output before the final norm). `answers_BS` is true where the *next* token is
    there and part of an answer: losses and acceptance count such positions only. `valid_BS` is false on padding.
    `argmax_BS` is the target's own greedy next token at each position.
    """

    ids_BS: Tensor
    valid_BS: Tensor
    answers_BS: Tensor
    states: Mapping[int, Tensor]
    argmax_BS: Tensor


class Teacher:
    """The frozen target, as recipes need it: embeddings, final norm and output head in float32, without gradients."""

    def __init__(self, decoder: Decoder, embeddings_VM: Tensor, head_VM: Tensor, norm_M: Tensor) -> None:
        self.config = decoder.config
        self.decoder = decoder
        self.embeddings_VM, self.head_VM, self.norm_M = embeddings_VM, head_VM, norm_M

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids of any shape, `[..., M]`."""
        return nn.functional.embedding(ids, self.embeddings_VM)

    def normed(self, hidden: Tensor) -> Tensor:
        """The last layer's output after the final norm."""
        return nn.functional.rms_norm(hidden.float(), (hidden.shape[-1],), self.norm_M, self.config.norm_eps)

    def logits(self, hidden: Tensor, token_ids_U: Tensor | None = None) -> Tensor:
        """Next-token logits of the last layer's output, of the chosen tokens or of all, `[..., U]` or `[..., V]`."""
        rows = self.head_VM if token_ids_U is None else self.head_VM[token_ids_U]
        return nn.functional.linear(self.normed(hidden), rows)


@dataclass(frozen=True)
class Counts:
    """Drafts judged and accepted at each draft position, position 0 first; they add up over batches."""

    judged: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        size = max(len(self.judged), len(other.judged))
        return Counts(_added(self.judged, other.judged, size), _added(self.accepted, other.accepted, size))

    @property
    def rates(self) -> tuple[float, ...]:
        """Acceptance by position; nothing judged is 0."""
        return tuple(a / j if j else 0.0 for a, j in zip(self.accepted, self.judged, strict=True))


def _added(some: Sequence[int], others: Sequence[int], size: int) -> tuple[int, ...]:
    padded = [tuple(counts) + (0,) * (size - len(counts)) for counts in (some, others)]
    return tuple(a + b for a, b in zip(*padded, strict=True))


@dataclass(frozen=True)
class Provenance:
    """What a drafter's config says of where it comes from, whatever its method."""

    model_id: str
    model_sha256: str
    data_sha256: str
    trained_tokens: int
    seed: int
    acceptance_by_position: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Recipe(Protocol):
    """One method's training. Made anew for a run; `module` holds all that is trained, in float32."""

    method: ClassVar[str]
    Options: ClassVar[type[RecipeOptions]]
    formats: ClassVar[tuple[str, ...]]
    """The layouts that `write` knows, `spdbench` first."""
    module: nn.Module
    hidden_indices: tuple[int, ...]
    """The hidden states that `loss` and `acceptance` read from a batch."""

    def __init__(self, options: RecipeOptions, teacher: Teacher, draft_ids_U: Tensor | None, num_stages: int | None):
        """A fresh module, drawn with torch's current seed. `draft_ids_U`: the draft vocabulary, ascending; None: all.

        Raises:
            InputError: the options do not fit the model.
        """

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """A scalar to minimise, the mean over the positions that count, and figures for the log."""

    def acceptance(self, batch: Batch) -> Counts:
        """Greedy drafts against the target's own next tokens, as decoding would judge them along the given text."""

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        """The drafter as files that the method's backend reads, in bfloat16."""


@runtime_checkable
class Particular(Protocol):
    """What a recipe has besides, if some of its `formats` have no place for what some options ask of a drafter."""

    def require_layout(self, layout: str) -> None:
        """Asked before training, so that no drafter is trained that cannot be written.

        Raises:
            InputError: `write` could not use this layout; says what to give instead.
        """


@runtime_checkable
class Fitted(Protocol):
    """What a recipe has besides, if its module can begin closer to the target than a draw from a distribution."""

    def fit(self, batches: Iterable[Batch]) -> None:
        """Sets weights from the first batches that will be learned from, before the first step."""


def training_device(teacher: Teacher) -> torch.device:
    """Where the module and its batches live."""
    return teacher.head_VM.device
