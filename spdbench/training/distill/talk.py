"""One conversation that the target holds alone: it writes the user's turns, or is given them, and answers.

A conversation is a script for `continuous.Batch` that ends in a `Kept` or a `Dropped`. The run's seed and its own
number alone decide its outcome.

Source of the idea: self-synthesised instructions, Xu et al., Magpie, arXiv 2406.08464.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from spdbench.training.distill.continuous import Completion
from spdbench.training.distill.filters import Overlap, Seen, is_repetitive, words
from spdbench.training.distill.seed_prompts import GROUPS
from spdbench.training.tokens import TokenChat
from spdbench.types import Message, Sampling

SECOND_TURN_SHARE = 0.35
USER_SAMPLING = Sampling(temperature=1.0, top_p=0.95)
ANSWER_TEMPERATURES = (0.7, 1.0)
ANSWER_TOP_P = 0.95
MAX_USER_TOKENS = 128
MIN_USER_WORDS = 3
MIN_ANSWER_IDS = 4
_ENDS = re.compile(r"[.?!:](?=[\s\"')\]]|$)|\n")


@dataclass(frozen=True)
class Kept:
    """A conversation for the file; `sampling` describes how it was made, `num_tokens` counts the answers' ids."""

    index: int
    messages: tuple[Message, ...]
    sampling: dict[str, Any]
    num_tokens: int

    @property
    def cut_short(self) -> str | None:
        """Why it ends before its last turn; None if it does not."""
        return self.sampling.get("cut_short")


@dataclass(frozen=True)
class Dropped:
    """A conversation that is not kept, and why, in one word."""

    index: int
    reason: str


TalkResult = Kept | Dropped
Talk = Generator[Completion, tuple[int, ...], TalkResult]
Turn = Generator[Completion, tuple[int, ...], str | None]
"""The making of one turn; returns the reason why the conversation must end, or None."""


@dataclass(frozen=True)
class Distiller:
    """What all conversations of a run share.

    `room` is the most tokens that a conversation may have; `is_loop` tells whether ids end in a short cycle.
    """

    chat: TokenChat
    is_chat: bool
    eos_ids: frozenset[int]
    seed: int
    max_new_tokens: int
    room: int
    overlap: Overlap
    is_loop: Callable[[Sequence[int]], bool]
    seen: Seen

    def answer_sampling(self, index: int) -> Sampling:
        """Every other conversation is greedy, the others are sampled at a temperature of their own."""
        if index % 2 == 0:
            return Sampling()
        low, high = ANSWER_TEMPERATURES
        return Sampling(round(random.Random(f"{self.seed} {index} answer").uniform(low, high), 2), ANSWER_TOP_P)

    def invent(self, index: int) -> Talk:
        """A conversation whose user turns the model writes, one or two of them."""
        draw = random.Random(f"{self.seed} {index}")
        group = draw.choices(list(GROUPS), [weight for _, weight in GROUPS.values()])[0]
        begun = draw.choice(GROUPS[group][0])
        if not begun and not self.is_chat:  # without a template nothing would be fed
            begun = "The"
        talk = _Conversation(self, index, draw, [])
        failure = None
        for _ in range(1 + (draw.random() < SECOND_TURN_SHARE)):
            failure = (yield from talk.write_user_turn(begun)) or (yield from talk.write_answer())
            if failure is not None:
                break
            begun = ""
        return talk.outcome(failure, topic=group)

    def reply(self, index: int, system: Sequence[Message], turns: Sequence[str]) -> Talk:
        """A conversation whose user turns are given."""
        if any(message["content"] in self.overlap for message in system):
            return Dropped(index, "overlap")
        talk = _Conversation(self, index, random.Random(f"{self.seed} {index}"), list(system))
        failure = None
        for turn in turns:
            failure = talk.add_user_turn(turn) or (yield from talk.write_answer())
            if failure is not None:
                break
        return talk.outcome(failure)


class _Conversation:
    """A conversation that grows turn by turn. Its steps return a reason to stop, or None."""

    def __init__(self, shared: Distiller, index: int, draw: random.Random, system: list[Message]) -> None:
        self._shared, self._index, self._draw = shared, index, draw
        self._messages = system
        self._num_tokens = self._num_answers = 0
        self._sampling = shared.answer_sampling(index)

    def add_user_turn(self, turn: str) -> str | None:
        """Adds the next user turn as it is."""
        if turn in self._shared.overlap:
            return "overlap"
        if not self._num_answers and not self._shared.seen.claim(turn):
            return "duplicate"
        self._messages.append({"role": "user", "content": turn})
        return None

    def write_user_turn(self, begun: str) -> Turn:
        """Has the model write the next user turn, which begins with `begun`."""
        shared = self._shared
        ids = shared.chat.encode_open(self._messages, begun)
        if len(ids) + MAX_USER_TOKENS > shared.room:
            return "too_long"
        new = yield Completion(ids, MAX_USER_TOKENS, USER_SAMPLING, self._draw.getrandbits(32), shared.eos_ids)
        text = begun + shared.chat.decode(new)
        if new[-1] not in shared.eos_ids:
            text = _to_last_end(text)
        text = text.strip()
        if len(words(text)) < max(MIN_USER_WORDS, len(words(begun)) + 1):
            return "short_turn"
        if shared.is_loop(new) or is_repetitive(new) or "\ufffd" in text:
            return "bad_turn"
        return self.add_user_turn(text)

    def write_answer(self) -> Turn:
        """Has the model answer the last user turn."""
        shared = self._shared
        ids = shared.chat.encode(self._messages)
        if len(ids) + shared.max_new_tokens > shared.room:
            return "too_long"
        new = yield Completion(ids, shared.max_new_tokens, self._sampling, self._draw.getrandbits(32), shared.eos_ids)
        text = shared.chat.decode(new).rstrip("\ufffd")  # the limit may fall into the middle of a character
        checks = (
            ("empty", not text.strip()),
            ("short", len(new) < MIN_ANSWER_IDS),
            ("loop", shared.is_loop(new)),
            ("repetitive", is_repetitive(new)),
            ("overlap", text in shared.overlap),
        )
        if failure := next((reason for reason, failed in checks if failed), None):
            return failure
        self._messages.append({"role": "assistant", "content": text})
        self._num_tokens += len(new)
        self._num_answers += 1
        return None

    def outcome(self, failure: str | None, **facts: Any) -> TalkResult:
        """Keeps everything up to the last good answer, if there is one."""
        if not self._num_answers:
            return Dropped(self._index, failure or "empty")
        if self._messages[-1]["role"] == "user":  # its answer failed
            self._messages.pop()
        if not self._shared.seen.claim(self._messages[-1]["content"]):
            return Dropped(self._index, "duplicate")
        if failure is not None:
            facts["cut_short"] = failure
        sampling = {"index": self._index, "temperature": self._sampling.temperature, "top_p": self._sampling.top_p}
        return Kept(self._index, tuple(self._messages), sampling | facts, self._num_tokens)


def _to_last_end(text: str) -> str:
    """A text that was cut, up to the end of its last sentence or line; empty if it has none."""
    ends = [match.end() for match in _ENDS.finditer(text)]
    return text[: ends[-1]] if ends else ""
