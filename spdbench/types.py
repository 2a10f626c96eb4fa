"""The words that all of spdbench shares: prompts, requests, steps, spans.

Plain data. Knows nothing of models, clocks, files or commands, and imports neither torch nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

BackendKind = Literal["autoregressive", "draft_verify", "pipeline"]
FinishReason = Literal["eos", "length", "error"]
SpanKind = Literal["target", "head", "draft", "verify", "host"]
Unknown = Literal["ids", "times", "drafts", "forwards", "devices"]
"""What a backend cannot know of its own steps: tokens' ids, when single tokens came, what was drafted and judged, the
target's work, what it runs on."""
UNKNOWN_ID = -1
"""Stands in a step for a token that came without its id."""
Message = Mapping[str, str]
"""One chat message: `{"role": ..., "content": ...}`."""


@dataclass(frozen=True)
class Prompt:
    """One conversation of a suite: the user's turns in order, the answers being the model's own."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None


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
    that know text only. `seed` is this request's own. Generation ends at the first of `eos_ids`, which counts, or
    after `max_new_tokens`. `stop` are texts at which the asker cuts the answer; backends that can end there may.
    """

    prompt_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    stop: tuple[str, ...] = ()


class Step(NamedTuple):
    """One event of a generation: prefill first, then verify rounds or pipeline cycles.

    `token_ids` are the ids committed, as Python ints. `drafted` is the depth of the draft offered, `judged` the drafts
    that got a verdict, `accepted` those accepted. `forwards` is the target's work in token-forwards: tree nodes, the
    root included; 1 for vanilla; in a pipeline, layers run by busy stages over all layers.
    """

    token_ids: tuple[int, ...]
    drafted: int
    judged: int
    accepted: int
    forwards: float


@dataclass(frozen=True)
class DraftCounts:
    """What an engine counted over one request, prefill left out: verify rounds, drafts that got a verdict (None where
    it does not tell), drafts accepted."""

    rounds: int
    judged: int | None
    accepted: int


@dataclass(frozen=True)
class EngineReport:
    """What an engine tells of a request when it is over, beside its steps; None for what it does not tell.

    `finish` is why it stopped, for engines that do not show their end of sequence as a token.
    """

    text: str | None = None
    finish: FinishReason | None = None
    num_prompt_tokens: int | None = None
    drafts: DraftCounts | None = None


class Span(NamedTuple):
    """A stretch of work on one lane, in `time.perf_counter_ns` time; `kept` is false for tokens later discarded.

    `target` is the target's layers at work and `head` its output head, `draft` the drafter, `verify` accepting and
    rejecting, `host` messages, synchronisation and bookkeeping. `cycle` counts a pipeline's cycles from 0, for lanes
    that may run ahead of each other; -1 is the cycle in which the span begins.
    """

    lane: int
    kind: SpanKind
    start_ns: int
    end_ns: int
    position: int
    kept: bool
    cycle: int = -1


def encodable(text: str) -> str:
    """`text` itself; raises `ValueError` where it is not all of what it was written as."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text, but holds half of a surrogate pair") from None
    return text
