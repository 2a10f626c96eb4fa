"""The interface between harness and engine: what a backend is, and how one is found.

A backend is a class that fits `Backend` and one line under the entry point group `spdbench.backends`, for built-in and
third-party backends alike. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from spdbench.errors import InputError
from spdbench.plugins import PluginOptions, find_class, installed, parse_keys
from spdbench.types import (
    BackendKind,
    EngineLogits,
    EngineReport,
    FirstDivergence,
    GenerationRequest,
    MeasurementKind,
    Span,
    Step,
)

if TYPE_CHECKING:
    from spdbench.models.target import Target

ENTRY_POINT_GROUP = "spdbench.backends"


class BackendOptions(PluginOptions):
    """Base of a backend's `Options`: its defaults and descriptions are shown by `spdbench backends`."""


@dataclass(frozen=True)
class BackendContext:
    """What a run gives to each of its backends.

    `model` is one object for all backends of a run and loads its weights at first use; None where only a server has the
    model. `drafter` is what the user gave (`auto`, a path, `oracle:0.8`, ...), `seed` the run's. `devices` are names
    such as `cpu` or `cuda:0`. `template_args` are for servers that apply the chat template themselves; the ids of a
    request have them in already, and the template `chat_template` too, which no server is given.
    """

    label: str
    model: Target | None
    drafter: str
    devices: tuple[str, ...]
    threads: int
    seed: int
    template_args: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

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
    """Where the drafts come from. `synthetic` drafters know the answer; an untrained head has 0 `trained_tokens`."""

    id: str
    method: str
    synthetic: bool
    sha256: str | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class BackendInfo:
    """What a loaded backend is made of.

    `lane_bytes` are the target's bytes that each lane reads for one token. `chosen` is what the backend decided where
    the options left it open, such as a tree. `kernels` is what computes the target's layers (`TargetDecoder.kernels`);
    None where the backend does not report it. Metrics that need one of the `missing_measurements` are null.
    `other_model` is the model that it runs where that is not the target as vanilla runs it; its outputs are not
    compared with vanilla's.
    """

    devices: tuple[str, ...]
    lane_bytes: tuple[int, ...]
    stage_layers: tuple[int, ...] = ()
    drafter: DrafterInfo | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
    kernels: str | None = None
    missing_measurements: tuple[MeasurementKind, ...] = ()
    other_model: str | None = None

    @property
    def lanes(self) -> int:
        return len(self.lane_bytes)

    @property
    def knows_ids(self) -> bool:
        """False where an engine gives text without ids."""
        return "ids" not in self.missing_measurements

    @property
    def known_devices(self) -> tuple[str, ...] | None:
        """What the backend runs on; None where it does not know."""
        return None if "devices" in self.missing_measurements else self.devices


@runtime_checkable
class Backend(Protocol):
    """A way of decoding. Its life: construct, `load`, then for each request `prepare` and `generate`, then `close`.

    Optional members: `check()`, see `check_before_load`. For backends that drive an engine: `account()`, see
    `engine_report`; `text_only = True` in a class that needs no target, see `is_text_only`; `concurrency`, see
    `concurrency_of`; `learns = True` in a class, see `learns_from_verdicts`; `next_logits`, see `engine_logits`;
    `explain_divergence`, see `divergence_explainer`.
    """

    kind: ClassVar[BackendKind]
    Options: ClassVar[type[BackendOptions]]

    def __init__(self, options: BackendOptions, context: BackendContext) -> None: ...

    @property
    def lossless(self) -> bool:
        """True if the output is the target's own: token for token when greedy, in distribution when sampling."""

    def load(self) -> None:
        """Untimed: weights, processes, graphs, warm-up. Raises `InputError` for what the user can correct."""

    def describe(self) -> BackendInfo:
        """What was loaded; valid after `load`."""

    def prepare(self, request: GenerationRequest) -> None:
        """Untimed, before each request: what only a synthetic drafter needs. Usually does nothing."""

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        """Timed. Yields a step per event, prefill first. Closing the iterator early leaves the backend usable."""

    def spans(self) -> Sequence[Span]:
        """The last request's spans, in any order; empty for a backend that records none.

        Called after each request, untimed. `target` and `head` spans are on lanes 0 to `describe().lanes` - 1 and do
        not overlap on a lane; the lanes of a drafter and a controller follow. With several lanes a step is a cycle:
        spans carry its number, or the step is yielded when every lane has begun its work of the cycle.
        """

    def close(self) -> None:
        """Frees what `load` took. May be called twice, and after a failure."""


@contextmanager
def closing_steps(steps: Iterator[Step]) -> Iterator[Iterator[Step]]:
    """The steps of a request, which is given up at the end of the block."""
    try:
        yield steps
    finally:
        if isinstance(steps, Generator):  # any other iterator ends itself
            steps.close()


def check_before_load(backend: Backend) -> None:
    """Calls the method `check` of a backend that has one: it finds what is missing without loading anything, so that no
    other backend is loaded in vain.

    Raises:
        InputError: the backend cannot be loaded.
    """
    check = getattr(backend, "check", None)
    if check is not None:
        check()


def engine_report(backend: Backend) -> EngineReport:
    """What `backend` reports of this thread's last request; empty where it has no method `account`."""
    account = getattr(backend, "account", None)
    return EngineReport() if account is None else cast(EngineReport, account())


def engine_logits(backend: Backend) -> EngineLogits | None:
    """The method `next_logits(prompt_ids, answer_ids)` of a backend whose engine computes the model by itself: its
    logits or log-probabilities of the next token by id, of all or of the likeliest, None where it reports none. None
    for a backend without that method."""
    return cast("EngineLogits | None", getattr(backend, "next_logits", None))


class Answer(NamedTuple):
    """An answer of a server: its ids, empty where they are unknown, and its text."""

    ids: Sequence[int]
    text: str


DivergenceExplainer = Callable[[GenerationRequest, Answer, Answer, Backend], FirstDivergence | None]


def divergence_explainer(backend: Backend) -> DivergenceExplainer | None:
    """The method `explain_divergence(request, expected, found, other)` of a backend whose engine has the only copy of
    its model: where and why the greedy answer `found`, of the backend `other`, differs from its own answer `expected`;
    None if it does not. None for a backend without that method."""
    return cast("DivergenceExplainer | None", getattr(backend, "explain_divergence", None))


def is_text_only(cls: type[Backend]) -> bool:
    """True for a backend that takes text only: it needs neither the target's weights nor its tokenizer."""
    return bool(getattr(cls, "text_only", False))


def learns_from_verdicts(backend: Backend) -> bool:
    """True for a backend whose drafts depend on earlier verdicts or on logits of rejected tokens as well, so that the
    same tokens may be followed by other drafts."""
    return bool(getattr(backend, "learns", False))


def concurrency_of(backend: Backend) -> int:
    """How many requests `backend` takes at once, each from a thread of its own; 1 unless it says otherwise."""
    return int(getattr(backend, "concurrency", 1))


def installed_backends() -> dict[str, EntryPoint]:
    """Entry points of every installed backend by name, sorted. Nothing is imported."""
    return installed(ENTRY_POINT_GROUP)


def find_backend(name: str) -> type[Backend]:
    """The class of the backend called `name`.

    Raises:
        InputError: no backend has that name, or its package does not fit `Backend`.
    """
    points = installed_backends()
    found = find_class("backend", name, points)
    missing = [
        word
        for word in ("kind", "Options", "load", "describe", "prepare", "generate", "spans", "close")
        if not hasattr(found, word)
    ]
    if missing:
        raise InputError(
            f"backend '{name}' ({points[name].value}) lacks {', '.join(missing)}: see spdbench.backend.Backend"
        )
    return cast(type[Backend], found)


def parse_options(label: str, options: type[BackendOptions], given: Mapping[str, str]) -> BackendOptions:
    """`given` (the texts after `-o LABEL.KEY=`) as this backend's typed options.

    Raises:
        InputError: a key that the backend does not know, or a value of the wrong type; names both and what is allowed.
    """
    return parse_keys(f"{label}.", options, given)
