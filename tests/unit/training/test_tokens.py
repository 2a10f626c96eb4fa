"""Conversations become the ids that decoding would be fed and put out."""

from __future__ import annotations

import pytest

from spdbench.prompts.chat import ChatFormat
from spdbench.training.tokens import TokenSequence, ending_token, most_frequent_tokens, tokenised
from spdbench.types import Message
from tests import tiny

TALK: list[Message] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "xyz"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "w"},
]
FORGETFUL = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"


def chat(template: str = tiny.CHAT_TEMPLATE) -> ChatFormat:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def answers(sequence: TokenSequence) -> list[int]:
    return [token for token, said in zip(sequence.ids, sequence.answer, strict=True) if said]


def test_turns_are_one_sequence_where_each_prompt_begins_with_what_came_before() -> None:
    form = chat()
    end = ending_token(form, {256, 3})
    (whole,) = tokenised(TALK, form, end, 1000)
    assert end == 256
    assert whole.ids[: len(form.encode(TALK[:2]))] == form.encode(TALK[:2])
    assert whole.ids[: len(form.encode(TALK[:4]))] == form.encode(TALK[:4])
    assert answers(whole) == [*form.encode_answer("xyz"), 256, *form.encode_answer("w"), 256]


def test_a_template_that_forgets_gives_each_turn_a_sequence_of_its_own() -> None:
    form = chat(FORGETFUL)
    first, second = tokenised(TALK, form, 256, 1000)
    assert first.ids == (*form.encode(TALK[:2]), *form.encode_answer("xyz"), 256)
    assert second.ids == (*form.encode(TALK[:4]), *form.encode_answer("w"), 256)
    assert answers(second) == [*form.encode_answer("w"), 256]


def test_long_ones_are_cut_and_those_left_without_an_answer_dropped() -> None:
    form = chat()
    prompt = len(form.encode(TALK[:2]))
    assert [answers(s) for s in tokenised(TALK, form, 256, prompt + 2)] == [list(form.encode_answer("xy"))]
    assert list(tokenised(TALK, form, 256, prompt)) == []
    assert list(tokenised(TALK[:2], form, 256, 1000)) == []


def test_the_end_of_an_answer_is_the_templates_own_or_the_lowest() -> None:
    assert ending_token(chat(), {256, 3}) == 256
    assert ending_token(chat(), {9, 7}) == 7
    assert ending_token(chat(FORGETFUL), {9, 7}) == 7
    assert ending_token(chat(), set()) is None


@pytest.mark.parametrize(("size", "expected"), [(3, [5, 8, 9]), (5, [0, 5, 7, 8, 9]), (10, None)])
def test_the_most_frequent_tokens_and_the_end_make_a_vocabulary(size: int, expected: list[int] | None) -> None:
    sequence = TokenSequence((4, 5, 5, 8, 8, 7), (False, True, True, True, True, True))
    found = most_frequent_tokens([sequence], size, 10, {9})
    assert (None if found is None else found.tolist()) == expected
