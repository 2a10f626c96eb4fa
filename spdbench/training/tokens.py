"""Conversations as the target's token ids, which of them are answers, and the ids that drafts may be.

An answer's ids are those that decoding would emit, up to the token that ends the turn; the ids before it are those that
decoding would be fed. Where the next turn's prompt does not begin with these same ids (templates that drop or trim
earlier answers), the next turn is a sequence of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spdbench.types import Chat, Message


class TokenChat(Chat, Protocol):
    """A format of conversations whose tokens are known: `prompts.chat.ChatFormat`."""

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's text, without special tokens around it."""

    def encode_open(self, messages: Sequence[Message], begun: str) -> tuple[int, ...]:
        """Ids of the conversation and of a user's turn that begins with `begun`, for the model to continue."""

    def turn_end(self) -> int | None:
        """The special token after an answer that another message follows; None where there is none."""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, and whether each is part of an answer."""

    ids: tuple[int, ...]
    answer: tuple[bool, ...]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers that have a predecessor, which is what can be learned."""
        return sum(self.answer[1:])


def tokenised(
    messages: Sequence[Message], chat: TokenChat, end_id: int | None, max_length: int
) -> Iterator[TokenSequence]:
    """The sequences of one conversation, cut to `max_length` tokens; none where nothing is answered within that."""
    ids: tuple[int, ...] = ()
    answer: tuple[bool, ...] = ()
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        fed = chat.encode(messages[:index])
        if fed[: len(ids)] != ids:
            yield from _cut(ids, answer, max_length)
            ids, answer = (), ()
        said = (*chat.encode_answer(message["content"]), *(() if end_id is None else (end_id,)))
        answer = (*answer, *(False,) * (len(fed) - len(ids)), *(True,) * len(said))
        ids = (*fed, *said)
    yield from _cut(ids, answer, max_length)


def _cut(ids: tuple[int, ...], answer: tuple[bool, ...], max_length: int) -> Iterator[TokenSequence]:
    sequence = TokenSequence(ids[:max_length], answer[:max_length])
    if sequence.num_answer_tokens:
        yield sequence


def ending_token(chat: TokenChat, eos_ids: Collection[int]) -> int | None:
    """The end-of-sequence token that closes an answer in this chat format; the lowest where the format has none.

    None where the model has no end-of-sequence token.
    """
    end = chat.turn_end()
    return end if end in eos_ids else min(eos_ids, default=None)


def most_frequent_tokens(
    sequences: Sequence[TokenSequence], size: int, vocab_size: int, eos_ids: Collection[int]
) -> Tensor | None:
    """The `size` most frequent tokens of answers and every end-of-sequence token, ascending: `[U]`.

    If there are too few, the lowest ids follow, which common tokenizers learned first. None for the whole vocabulary.
    """
    if size >= vocab_size:
        return None
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(token for token, said in zip(sequence.ids, sequence.answer, strict=True) if said)
    ranked = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    order = dict.fromkeys([*sorted(eos_ids), *ranked, *range(vocab_size)])
    return torch.tensor(sorted(list(order)[:size]), dtype=torch.long)
