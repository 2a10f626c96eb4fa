"""The data types that all of spdbench shares: prompts, requests, steps, spans. Imports neither torch nor pydantic."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

BackendKind = Literal["autoregressive", "draft_verify", "pipeline"]
FinishReason = Literal["eos", "length", "error"]
SpanKind = Literal["target", "head", "draft", "verify", "host"]
MeasurementKind = Literal["ids", "times", "drafts", "forwards", "devices"]
"""What a backend may be unable to measure: the ids of tokens, the times of single tokens, drafts and verdicts, the
target's work, the devices that it runs on."""
DivergenceClass = Literal["identical", "tie", "near_tie", "real", "unclassified"]
"""How a greedy output compares with plain decoding's (metrics.md, "Losslessness"); unclassified: it differs, and the
engine does not report the logits that could say why."""
EngineLogits = Callable[[Sequence[int], Sequence[int]], Mapping[int, float] | None]
"""(prompt ids, new ids) -> an engine's logits or log-probabilities of the next token by id: all, or the likeliest; None
where it reports none."""
UNKNOWN_ID = -1
"""The id, in a step, of a token whose id is unknown."""
Message = Mapping[str, str]
"""One chat message: `{"role": ..., "content": ...}`, with `reasoning_content` where a given answer has thoughts."""


class Chat(Protocol):
    """The model's format of conversations, as `prompts.chat` implements it."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids to feed so that the answer to the last message comes next."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""


@dataclass(frozen=True)
class Prompt:
    """One conversation of a suite: the user's turns in order, the answers being the model's own. `context` are the
    messages before the first turn, such as a system prompt, or turns whose answers are given."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    context: tuple[Message, ...] = ()

    @property
    def first_messages(self) -> list[Message]:
        """The messages of the first request."""
        return [*self.context, {"role": "user", "content": self.turns[0]}]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch those filters off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """One request, the same for every backend.

    `prompt_ids` are the ids as fed to the model, after the chat template; `messages` are the same thing for backends
    that take text only. `seed` is this request's own. Generation ends at the first of `eos_ids`, which counts, or
    after `max_new_tokens`. The caller cuts the answer at the first of the texts `stop`; a backend may end there.
    `keep_drafts` asks for the drafted tokens in each step.
    """

    prompt_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    keep_drafts: bool = False


class Drafted(NamedTuple):
    """The drafted tokens of a step: a tree after the token that was the newest one at its start.

    `parents` holds the index of the draft before each one; -1 means the newest token. Parents come before children.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]


class Step(NamedTuple):
    """One event of a generation: prefill first, then verify rounds or pipeline cycles.

    `token_ids` are the committed ids, as Python ints. `drafted` is the depth of the proposed draft, `judged` the number
    of drafts that got a verdict, `accepted` that of the accepted ones. `forwards` is the target's work in
    token-forwards: tree nodes, the root included; 1 for vanilla; in a pipeline, layers run by busy stages over all
    layers. `drafts` are the drafted tokens where the request asks for them: the whole tree of a round; in a pipeline
    those that a verdict settles: the drafts that got it, and the drafts in flight that were dropped with them.
    """

    token_ids: tuple[int, ...]
    drafted: int
    judged: int
    accepted: int
    forwards: float
    drafts: Drafted | None = None


@dataclass(frozen=True)
class DraftCounts:
    """What an engine counted over one request, prefill omitted; None for what it does not report.

    `rounds` are verify rounds, `drafted` all drafted tokens, `judged` those that got a verdict. `rounds_accepting` are
    rounds by how many drafts they accepted: 0, 1, 2, ...; `judged_at` are verdicts by the draft's depth: 1, 2, ....
    `source` is where the counts come from, for people.
    """

    rounds: int
    judged: int | None
    accepted: int
    drafted: int | None = None
    rounds_accepting: tuple[int, ...] | None = None
    judged_at: tuple[int, ...] | None = None
    source: str = ""

    def is_possible(self, num_new_tokens: int) -> bool:
        """False if the counts contradict each other, or an answer of `num_new_tokens`."""
        rounds, accepted, accepting = self.rounds, self.accepted, self.rounds_accepting
        if accepting is not None and (sum(accepting), sum(k * n for k, n in enumerate(accepting))) != (
            rounds,
            accepted,
        ):
            return False
        if not 0 <= rounds < num_new_tokens + UNCOUNTED_ENDS or accepted < 0 or (accepted and not rounds):
            return False
        if self.drafted is not None and accepted > self.drafted:
            return False
        # The last round may accept drafts past the end of the answer, as many as it is deep.
        deepest = MAX_DRAFT_DEPTH if self.drafted is None else min(self.drafted, MAX_DRAFT_DEPTH)
        return rounds + accepted <= num_new_tokens + (len(accepting) if accepting else deepest)


UNCOUNTED_ENDS = 1
"""Tokens at the end of a sequence that an engine gives and does not count."""
MAX_DRAFT_DEPTH = 256
"""Of drafts whose depth an engine does not report."""


@dataclass(frozen=True)
class EngineReport:
    """What an engine reports of a finished request in addition to its steps; None for what it does not report.

    `finish` is why it stopped, for engines whose end of sequence is no token of the answer. `num_cached_tokens` are
    those of the prompt that a cache answered; `decode_s` is the decode time by the engine's own clock. `contradiction`
    says which of its counts contradict each other.
    """

    text: str | None = None
    finish: FinishReason | None = None
    num_prompt_tokens: int | None = None
    drafts: DraftCounts | None = None
    num_cached_tokens: int | None = None
    decode_s: float | None = None
    contradiction: str | None = None


@dataclass(frozen=True)
class FirstDivergence:
    """The first id in which a greedy output differs from plain decoding's, and why.

    `position` counts new tokens from 0. `expected` is plain decoding's id, `found` the other output's, None where an
    output has ended. The two logits are plain decoding's, `gap` is their difference, and `floor` the noise floor that
    the gap is compared with, which `floor_source` explains. `engine_gap` is the gap by another engine's own logits,
    `apart` how far all of its logits lie from plain decoding's, relative to their spread. None: not measured.
    """

    outcome: DivergenceClass
    position: int
    expected: int | None
    found: int | None
    expected_logit: float | None = None
    found_logit: float | None = None
    gap: float | None = None
    floor: float | None = None
    floor_source: str = ""
    engine_gap: float | None = None
    apart: float | None = None
    reason: str = ""


class Span(NamedTuple):
    """An interval of work on one lane, in `time.perf_counter_ns` time; `kept` is false for tokens later discarded.

    Kinds: `target` the target's layers, `head` its output head, `draft` the drafter, `verify` acceptance and rejection,
    `host` messages, synchronisation and bookkeeping. `cycle` counts a pipeline's cycles from 0, for lanes that may run
    ahead of each other; -1 is the cycle in which the span begins.
    """

    lane: int
    kind: SpanKind
    start_ns: int
    end_ns: int
    position: int
    kept: bool
    cycle: int = -1


def first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    """The index of the first item that differs; the shorter length where one is the beginning of the other."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def request_seed(*parts: object) -> int:
    """A seed below 2^48 that `parts` determine: the run's seed, then what tells its requests apart."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "little")


def encodable(text: str) -> str:
    """`text` itself; raises `ValueError` where it holds half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text, but holds half of a surrogate pair") from None
    return text
