"""The one meeting point of the harness and the engine room: what a backend is, and how one is found.

A backend is a class that fits `Backend` and one line under the entry point group `spdbench.backends`; the built-in ones
use the same door. This module must know no backend by name, and importing it must load neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError

from spdbench.errors import InputError, did_you_mean, first_problem
from spdbench.types import BackendKind, EngineReport, GenerationRequest, Span, Step, Unknown

if TYPE_CHECKING:
    from spdbench.models.target import Target

ENTRY_POINT_GROUP = "spdbench.backends"


class BackendOptions(BaseModel):
    """Base of a backend's `Options`: frozen, typed, and strict about unknown keys.

    Give every field a default and a `description`: both are shown by `spdbench backends`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


@dataclass(frozen=True)
class BackendContext:
    """What a run gives to each of its backends.

    `model` is one object for all backends of a run and loads its weights at first use; None where only a server has the
    model. `drafter` is what the user gave (`auto`, a path, `oracle:0.8`, ...), `seed` the run's. `devices` are names
    such as `cpu` or `cuda:0`.
    """

    label: str
    model: Target | None
    drafter: str
    devices: tuple[str, ...]
    threads: int
    seed: int

    @property
    def target(self) -> Target:
        """The model, for backends that decode with it.

        Raises:
            InputError: only its server has the model.
        """
        if self.model is None:
            raise InputError(f"-b {self.label}: needs a model that can be loaded here; name it with -m")
        return self.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where only its server has the model."""
        return None if self.model is None else self.model.tokenizer


@dataclass(frozen=True)
class DrafterInfo:
    """Where the drafts come from. `synthetic` ones know the answer; `trained_tokens` 0 is an untrained head."""

    id: str
    method: str
    synthetic: bool
    sha256: str | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class BackendInfo:
    """What a loaded backend is made of.

    `lane_bytes` are the target's bytes that each lane reads for one token. `chosen` is what the backend decided for
    itself where the options left it open, such as a tree.
    `kernels` is what computes the target's layers (`TargetDecoder.kernels`); None if the backend does not tell.
    `unknown` is what it cannot know of its steps: the metrics made of it are null. `other_model` is what it runs where
    that is not the target as vanilla runs it, so that no output of its is held against vanilla's.
    """

    devices: tuple[str, ...]
    lane_bytes: tuple[int, ...]
    stage_layers: tuple[int, ...] = ()
    drafter: DrafterInfo | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
    kernels: str | None = None
    unknown: tuple[Unknown, ...] = ()
    other_model: str | None = None

    @property
    def lanes(self) -> int:
        return len(self.lane_bytes)


@runtime_checkable
class Backend(Protocol):
    """A way of decoding. Its life: construct, `load`, then for each request `prepare` and `generate`, then `close`.

    A backend that drives an engine may have more: `account()`, see `engine_report`; `text_only = True` in its class if
    it needs nothing of the target, see `is_text_only`; `concurrency`, see `concurrency_of`.
    """

    kind: ClassVar[BackendKind]
    Options: ClassVar[type[BackendOptions]]

    def __init__(self, options: BackendOptions, context: BackendContext) -> None: ...

    @property
    def lossless(self) -> bool:
        """True if the output is the target's own: token for token when greedy, in distribution when sampling."""

    def load(self) -> None:
        """Untimed: weights, processes, graphs, warm-up. Raises `InputError` for what the user can mend."""

    def describe(self) -> BackendInfo:
        """What was loaded; valid after `load`."""

    def prepare(self, request: GenerationRequest) -> None:
        """Untimed, before each request: what only a synthetic drafter needs. Usually does nothing."""

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        """Timed. Yields a step per event, prefill first. Closing the iterator early leaves the backend usable."""

    def spans(self) -> Sequence[Span]:
        """The last request's spans, in any order; empty for a backend that takes none.

        Asked for after each request, outside of the time that counts. `target` and `head` spans lie on lanes 0 to
        `describe().lanes` - 1 and do not overlap on a lane; a drafter's and a controller's lanes come after these. With
        several lanes a step is a cycle; spans name theirs, or it is yielded when every lane has begun its work of it.
        """

    def close(self) -> None:
        """Frees what `load` took. May be called twice, and after a failure."""


def engine_report(backend: Backend) -> EngineReport:
    """What `backend` tells of the request that this thread made last, if it has a method `account` for it."""
    tell = getattr(backend, "account", None)
    return EngineReport() if tell is None else cast(EngineReport, tell())


def is_text_only(cls: type[Backend]) -> bool:
    """True for a backend that knows text only: it works without the target's weights, and without its tokenizer."""
    return bool(getattr(cls, "text_only", False))


def concurrency_of(backend: Backend) -> int:
    """How many requests `backend` takes at once, each from a thread of its own; 1 unless it says otherwise."""
    return int(getattr(backend, "concurrency", 1))


def installed_backends() -> dict[str, EntryPoint]:
    """Entry points of every installed backend by name, sorted. Nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name)}


def find_backend(name: str) -> type[Backend]:
    """The class of the backend called `name`.

    Raises:
        InputError: no backend has that name, or its package does not fit `Backend`.
    """
    installed = installed_backends()
    if name not in installed:
        raise InputError(f"unknown backend '{name}'{did_you_mean(name, installed)}")
    try:
        found = installed[name].load()
    except Exception as error:  # somebody else's package, which may fail in any way
        raise InputError(
            f"backend '{name}' ({installed[name].value}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    missing = [
        word
        for word in ("kind", "Options", "load", "describe", "prepare", "generate", "spans", "close")
        if not hasattr(found, word)
    ]
    if missing:
        raise InputError(
            f"backend '{name}' ({installed[name].value}) lacks {', '.join(missing)}: see spdbench.backend.Backend"
        )
    return cast(type[Backend], found)


def parse_options(label: str, options: type[BackendOptions], given: Mapping[str, str]) -> BackendOptions:
    """`given` (the text behind `-o LABEL.KEY=`) as this backend's typed options.

    Raises:
        InputError: a key that the backend does not know, or a value of the wrong type; names both and what is allowed.
    """
    known = options.model_fields
    for key in given:
        if key not in known:
            raise InputError(f"-o {label}.{key}: unknown option{did_you_mean(key, known)}")
    try:
        return options.model_validate(dict(given))
    except ValidationError as error:
        loc, reason = first_problem(error)
        key = loc[0] if loc else "?"
        raise InputError(f"-o {label}.{key}={given.get(key, '')}: {reason}") from None
