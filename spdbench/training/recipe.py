"""What a method provides to be trained (module, loss, acceptance, files), and how its recipe is found by name.

The loop knows recipes only by the base class here. They are found through the entry point group `spdbench.recipes`, as
the harness finds backends; importing this module loads none.

Shapes: B conversations in a batch, S tokens of each, M model width, V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.errors import FileWord, InputError, given_by
from spdbench.models.decoder import Decoder
from spdbench.plugins import PluginOptions, find_class, installed, parse_keys

ENTRY_POINT_GROUP = "spdbench.recipes"


class RecipeOptions(PluginOptions):
    """The `-o` keys of a recipe; subclasses add theirs."""


@dataclass(frozen=True)
class Batch:
    """A few conversations, padded on the right, and what the frozen target computed for them.

    `states[k]` is hidden state k of every token, `[B, S, M]` in float32 (0 is the embedding, the
    number of layers is the last layer's output before the final norm). `answers_BS` is true where the *next* token
    exists and is part of an answer: only these positions count in losses and acceptance. `valid_BS` is false on
    padding. `argmax_BS` is the target's own greedy next token at each position.
    """

    ids_BS: Tensor
    valid_BS: Tensor
    answers_BS: Tensor
    states: Mapping[int, Tensor]
    argmax_BS: Tensor


class Teacher:
    """The frozen target as recipes need it: embeddings, final norm and output head in float32, without gradients."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder.embeddings_VM is not None
        assert decoder.head is not None
        assert decoder.final_norm is not None
        self.config, self.decoder, self.device = decoder.config, decoder, decoder.device
        self.head_VM = decoder.head.plain().to(self.device, torch.float32)
        tied = decoder.config.tied
        self.embeddings_VM = self.head_VM if tied else decoder.embeddings_VM.to(self.device, decoder.dtype).float()
        self.norm_M = decoder.final_norm.weight_M.float()

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids of any shape, `[..., M]`."""
        return nn.functional.embedding(ids, self.embeddings_VM)

    def normed(self, hidden: Tensor) -> Tensor:
        """The last layer's output after the final norm."""
        return nn.functional.rms_norm(hidden.float(), (hidden.shape[-1],), self.norm_M, self.config.norm_eps)


class TrainedVocabulary(DraftVocabulary):
    """A draft vocabulary with the target's head rows for it; of all tokens if `token_ids_U` is None."""

    def __init__(self, token_ids_U: Tensor | None, head_VM: Tensor) -> None:
        device, vocab_size = head_VM.device, len(head_VM)
        super().__init__(vocab_size, None if token_ids_U is None else token_ids_U.to(device))
        self._index_V = torch.arange(vocab_size, device=device)
        self.head_UM = head_VM
        if self.token_ids_U is not None:
            self.head_UM = head_VM[self.token_ids_U]
            self._index_V = torch.full_like(self._index_V, -1)
            self._index_V[self.token_ids_U] = torch.arange(self.size, device=device)

    def draft_ids(self, token_ids: Tensor) -> Tensor:
        """Indices of tokens in the draft vocabulary, -1 for those that it lacks."""
        return self._index_V[token_ids]


@dataclass(frozen=True)
class Counts:
    """Drafts judged and accepted at each draft position, position 0 first; they add up over batches."""

    judged: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        pairs = ((self.judged, other.judged), (self.accepted, other.accepted))
        return Counts(*(tuple(a + b for a, b in zip_longest(*pair, fillvalue=0)) for pair in pairs))

    @property
    def rates(self) -> tuple[float, ...]:
        """Acceptance by position; 0 where nothing was judged."""
        return tuple(a / j if j else 0.0 for a, j in zip(self.accepted, self.judged, strict=True))


@dataclass(frozen=True)
class Provenance:
    """What a drafter's config says of its origin, for every method."""

    model_id: str
    model_sha256: str
    data_sha256: str
    trained_tokens: int
    seed: int
    acceptance_by_position: tuple[float, ...] = ()


class Recipe(ABC):
    """One method's training, made anew for each run. Every recipe derives from this class."""

    method: ClassVar[str]
    Options: ClassVar[type[RecipeOptions]]
    formats: ClassVar[tuple[str, ...]]
    """The layouts that `write` knows, `spdbench` first."""
    has_stages: ClassVar[bool] = False
    """True if the drafter is for a pipeline of a given number of stages."""
    module: nn.Module
    """All that is trained, in float32, on the teacher's device."""
    hidden_indices: tuple[int, ...]
    """The hidden states that `loss` and `acceptance` read from a batch."""

    def __init__(
        self, options: RecipeOptions, teacher: Teacher, draft_ids_U: Tensor | None, num_stages: int | None
    ) -> None:
        """`draft_ids_U`: the draft vocabulary, ascending; None for all tokens. `num_stages`: of the pipeline that is
        drafted for, if the recipe `has_stages`; None for the usual number.

        Raises:
            InputError: the options do not fit the model.
        """
        self._options, self._teacher, self._num_stages = options, teacher, num_stages
        self._vocabulary = TrainedVocabulary(draft_ids_U, teacher.head_VM)
        self.module = self._build().to(teacher.device)

    @abstractmethod
    def _build(self) -> nn.Module:
        """The module, drawn with torch's current seed. Also sets `hidden_indices`.

        Raises:
            InputError: the options do not fit the model.
        """

    def require_layout(self, layout: str) -> None:  # noqa: B027 - most recipes can write all of their layouts
        """Checks before training that `write` can use a layout with these options.

        Raises:
            InputError: it cannot; says what to give instead.
        """

    def fit(self, batches: Iterable[Batch]) -> None:  # noqa: B027 - optional
        """Sets weights from the first batches before the first step, where that starts closer to the target."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """A scalar to minimise, the mean over the positions that count, and figures for the log."""

    @abstractmethod
    def acceptance(self, batch: Batch) -> Counts:
        """Greedy drafts against the target's own next tokens, as decoding would verify them along the given text."""

    @abstractmethod
    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        """Writes the drafter as files that the method's backend reads."""


def find_recipe(name: str) -> type[Recipe]:
    """The class of the recipe called `name`.

    Raises:
        InputError: no recipe has that name, or its package cannot be imported.
    """
    return cast("type[Recipe]", find_class("method", name, installed(ENTRY_POINT_GROUP)))


def parse_recipe_options(words: Sequence[str], options: type[RecipeOptions]) -> RecipeOptions:
    """`-o KEY=VALUE` words as the recipe's typed options; the last word for a key wins. Of a file's words, those that
    are for another method are skipped.

    Raises:
        InputError: a word of another form, a key that is not known, or a value of the wrong type.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(
                f"{given_by(word, '-o')} {word}: expected KEY=VALUE. Known: {', '.join(sorted(options.model_fields))}."
            )
        if not isinstance(word, FileWord):
            given[key] = value.strip()
        elif key in options.model_fields or not _is_known(key):
            given[key] = FileWord(value.strip(), word.where)
    return parse_keys("", options, given)


def _is_known(key: str) -> bool:
    """True if some installed method has an option of this name."""
    return any(key in find_recipe(name).Options.model_fields for name in installed(ENTRY_POINT_GROUP))


def check_recipe(recipe: type[Recipe], layout: str, num_stages: int | None) -> None:
    """Raises `InputError` for a --format that the recipe does not write, or --stages of one that has none."""
    if layout not in recipe.formats:
        raise InputError(f"--format {layout}: {recipe.method} is written as {' or '.join(recipe.formats)}")
    if num_stages is not None and not recipe.has_stages:
        raise InputError(
            f"--stages {num_stages}: {recipe.method} drafts for a model in one piece; leave it out (spd and ppsd have "
            "stages)"
        )
