"""Conversations as scripts, with a model whose answers a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from spdbench.judge.results.table import is_degenerate
from spdbench.training.distill.continuous import Completion
from spdbench.training.distill.filters import Overlap, Seen
from spdbench.training.distill.seed_prompts import GROUPS, LONGEST_PROMPT
from spdbench.training.distill.talk import Distiller, Dropped, Kept, Talk, TalkResult
from spdbench.types import Message

END = 0
GOOD = (11, 12, 13, 14, 15, END)


class WordChat:
    """An id is a word, `w11`; a conversation is the ids of its words."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(range(1, 1 + sum(len(message["content"].split()) for message in messages))) or (1,)

    def encode_open(self, messages: Sequence[Message], begun: str) -> tuple[int, ...]:
        return self.encode([*messages, {"role": "user", "content": begun}])

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" w{token}" + "." * (token % 10 == 9) for token in ids if token != END)


def distiller(**changes: Any) -> Distiller:
    settings: dict[str, Any] = {
        "chat": WordChat(),
        "is_chat": True,
        "eos_ids": frozenset({END}),
        "seed": 0,
        "max_new_tokens": 100,
        "room": 1000,
        "overlap": Overlap([]),
        "is_loop": is_degenerate,
        "seen": Seen(),
    }
    return Distiller(**(settings | changes))


def play(talk: Talk, *said: tuple[int, ...]) -> tuple[TalkResult, list[Completion]]:
    """The outcome if the model answers with `said` in turn, and with the last of it from then on."""
    requests, lines = [next(talk)], list(said)
    try:
        while True:
            requests.append(talk.send(lines.pop(0) if len(lines) > 1 else lines[0]))
    except StopIteration as end:
        return end.value, requests


def asked(
    shared: Distiller, *said: tuple[int, ...], turns: Sequence[str] = ("What is it?",), index: int = 0
) -> TalkResult:
    return play(shared.reply(index, (), turns), *said)[0]


def test_given_turns_are_answered_in_order() -> None:
    outcome, requests = play(distiller().reply(3, (), ["one two", "three"]), GOOD, (21, 22, 23, END))
    assert isinstance(outcome, Kept)
    assert [message["role"] for message in outcome.messages] == ["user", "assistant"] * 2
    assert outcome.messages[3]["content"] == " w21 w22 w23"
    assert outcome.num_tokens == len(GOOD) + 4
    assert len(requests) == 2


def test_half_of_the_conversations_are_greedy_and_the_others_say_their_temperature() -> None:
    shared = distiller()
    samplings = [shared.answer_sampling(index) for index in range(40)]
    assert sum(sampling.greedy for sampling in samplings) == 20
    assert all(0.7 <= sampling.temperature <= 1.0 for sampling in samplings[1::2])
    outcome = asked(shared, GOOD, index=1)
    assert isinstance(outcome, Kept)
    assert outcome.sampling["temperature"] == samplings[1].temperature


def test_conversation_is_settled_by_seed_and_number() -> None:
    first, again, other = (play(distiller(seed=seed).invent(5), GOOD)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_invented_conversations_have_one_turn_or_two_and_all_topics() -> None:
    shared = [
        play(distiller().invent(index), GOOD, (31, 32, 33, 34, END), (41, 42, 43, 44, END))[0] for index in range(300)
    ]
    kept = [outcome for outcome in shared if isinstance(outcome, Kept)]
    assert len(kept) == 300
    assert {len(outcome.messages) for outcome in kept} == {2, 4}
    assert {outcome.sampling["topic"] for outcome in kept} == set(GROUPS)


def test_seed_prompts_are_many_and_end_in_no_space() -> None:
    prompts = {prompt for group, _ in GROUPS.values() for prompt in group}
    assert len(prompts) > 100
    assert LONGEST_PROMPT in prompts
    assert all(prompt == prompt.strip() for prompt in prompts)


def test_user_turn_that_was_cut_ends_at_its_last_sentence() -> None:
    outcome, _ = play(distiller().invent(0), (11, 12, 13, 19, 14, 15), GOOD)
    assert isinstance(outcome, Kept)
    assert outcome.messages[0]["content"].endswith("w13 w19.")


def test_half_a_character_at_the_end_of_an_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its limit falls into the bytes of one."""
    decode = WordChat.decode
    monkeypatch.setattr(WordChat, "decode", lambda self, ids: decode(self, ids) + "\ufffd")
    outcome = asked(distiller(), GOOD)
    assert isinstance(outcome, Kept)
    assert outcome.messages[-1]["content"] == " w11 w12 w13 w14 w15"


def test_bad_answers_are_dropped_with_the_reason() -> None:
    cycle, sentence = (7, 8) * 40, tuple(range(20, 60)) * 3
    for said, reason in (((END,), "empty"), ((5, END), "short"), (cycle, "loop"), (sentence, "repetitive")):
        assert asked(distiller(), said) == Dropped(0, reason)


def test_bad_second_answer_leaves_the_first_turn() -> None:
    outcome = asked(distiller(), GOOD, (5,) * 80, turns=["one two", "three"])
    assert isinstance(outcome, Kept)
    assert len(outcome.messages) == 2


def test_no_suite_prompt_gets_in_by_turn_or_by_answer() -> None:
    overlap = Overlap(["what is the sum of two and three", "w1 w2 w3 w4 w5 w6 w7 w8"])
    shared = distiller(overlap=overlap)
    talk = shared.reply(0, (), ["So what is the sum of two and three?"])
    assert list(talk) == []
    assert asked(shared, (1, 2, 3, 4, 5, 6, 7, 8, END)) == Dropped(0, "overlap")


@pytest.mark.parametrize(
    ("second_turn", "second_answer"),
    [("So what is the sum of two and three?", GOOD), ("three", (1, 2, 3, 4, 5, 6, 7, 8, END))],
    ids=["turn", "answer"],
)
def test_suite_prompt_in_a_later_turn_cuts_the_conversation_which_says_so(
    second_turn: str, second_answer: tuple[int, ...]
) -> None:
    shared = distiller(overlap=Overlap(["what is the sum of two and three", "w1 w2 w3 w4 w5 w6 w7 w8"]))
    outcome = asked(shared, GOOD, second_answer, turns=["one two", second_turn])
    assert isinstance(outcome, Kept)
    assert [message["content"] for message in outcome.messages] == ["one two", " w11 w12 w13 w14 w15"]
    assert outcome.cut_short == "overlap"


def test_conversation_that_is_whole_was_not_cut_short() -> None:
    outcome = asked(distiller(), GOOD, (21, 22, 23, END), turns=["one two", "three"])
    assert isinstance(outcome, Kept)
    assert len(outcome.messages) == 4
    assert outcome.cut_short is None
    assert "cut_short" not in outcome.sampling


def test_no_suite_prompt_gets_in_by_a_system_message() -> None:
    shared = distiller(overlap=Overlap(["what is the sum of two and three"]))
    talk = shared.reply(0, [{"role": "system", "content": "Tell what is the sum of two and three."}], ["one two"])
    with pytest.raises(StopIteration) as end:
        next(talk)
    assert end.value.value == Dropped(0, "overlap")
    talk = shared.reply(1, [{"role": "system", "content": "Be brief."}], ["one two"])
    assert isinstance(play(talk, GOOD)[0], Kept)


def test_same_turn_or_same_answer_is_kept_once() -> None:
    shared = distiller()
    assert isinstance(asked(shared, GOOD), Kept)
    assert list(shared.reply(1, (), ["what is IT"])) == []
    assert asked(shared, GOOD, turns=["Something else."], index=2) == Dropped(2, "duplicate")


def test_conversation_that_leaves_no_room_is_dropped_before_it_is_fed() -> None:
    shared = distiller(room=102)
    assert list(shared.reply(0, (), ["one two three"])) == []
    assert isinstance(asked(shared, GOOD, turns=["one two"]), Kept)


def test_model_without_a_template_always_gets_something_to_begin_with() -> None:
    chat = WordChat()
    for index in range(40):
        request = next(distiller(chat=chat, is_chat=False).invent(index))
        assert request.ids
