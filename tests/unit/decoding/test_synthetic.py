"""`oracle:P` and `forced:P`: the same decisions for all, at the rate that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.synthetic import (
    DrafterChoice,
    SyntheticDrafts,
    parse_drafter,
    require_known_answer,
    synthetic_drafts,
)
from spdbench.errors import InputError
from spdbench.types import Sampling
from tests import tiny

PROMPT = tuple(range(40, 52))


def drafts(
    text: str, reference: tuple[int, ...] = tuple(range(100, 300)), digest: bytes = b"p", seed: int = 0
) -> SyntheticDrafts:
    return SyntheticDrafts(parse_drafter(text), seed, digest, reference, 1000, frozenset({7}))


def test_words_are_understood(tmp_path: Path) -> None:
    assert parse_drafter("auto").kind == "auto"
    assert parse_drafter("random").kind == "random"
    assert parse_drafter("oracle:0.75") == DrafterChoice("oracle", "oracle:0.75", 0.75)
    assert parse_drafter("forced:1").probability == 1.0
    assert parse_drafter(str(tmp_path)).path == tmp_path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("oracle", r"needs an acceptance from 0 to 1 \(for example oracle:0.8\)"),
        ("oracle:1.2", "from 0 to 1"),
        ("forced:x", "from 0 to 1"),
        ("oracle:nan", "from 0 to 1"),
        ("orcale:0.8", "no such file or folder; did you mean 'oracle:P'"),
        ("/nowhere/head.pt", "no such file or folder"),
        ("~nobody-is-called-so/head.pt", "no such file or folder"),
        ("a" * 5000, "no such file or folder"),
    ],
)
def test_wrong_words_say_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_drafter(text)


def test_an_oracle_is_right_or_wrong_at_the_rate_asked_for() -> None:
    some = drafts("oracle:0.8", tuple(range(100, 900)))
    right = sum(some.token(t) == 100 + t for t in range(800))
    assert right == sum(some.favourable(t) for t in range(800))
    assert 0.75 < right / 800 < 0.85


@pytest.mark.parametrize(("text", "right"), [("oracle:0", 0), ("oracle:1", 200)])
def test_the_ends_of_the_scale_are_exact(text: str, right: int) -> None:
    some = drafts(text)
    assert sum(some.token(t) == 100 + t for t in range(200)) == right


def test_decisions_hang_on_seed_prompt_and_position_alone() -> None:
    same = [drafts("oracle:0.5").favourable(t) for t in range(64)]
    assert [drafts("oracle:0.5").favourable(t) for t in range(64)] == same
    assert [drafts("oracle:0.5", digest=b"q").favourable(t) for t in range(64)] != same
    assert [drafts("oracle:0.5", seed=1).favourable(t) for t in range(64)] != same


def test_behind_the_reference_an_oracle_drafts_something_ordinary() -> None:
    some = drafts("oracle:1", reference=(1, 2))
    assert all(0 <= some.token(t) < 1000 and some.token(t) != 7 for t in range(2, 40))


def test_forced_drafts_never_end_the_sequence_and_force_verdicts() -> None:
    some = drafts("forced:0.5")
    assert 7 not in {some.token(t) for t in range(3000)}
    assert {some.draft(t).forced_verdict for t in range(50)} == {True, False}
    assert some.forced_verdicts(0, 50) == [some.draft(t).forced_verdict for t in range(50)]
    assert drafts("oracle:0.5").draft(3).forced_verdict is None
    assert drafts("oracle:0.5").forced_verdicts(0, 3) is None


def test_an_oracle_with_a_temperature_is_an_error() -> None:
    with pytest.raises(InputError, match=r"oracle:0.8 works with --temperature 0 only \(given: 0.7\)"):
        require_known_answer(parse_drafter("oracle:0.8"), Sampling(0.7))
    require_known_answer(parse_drafter("forced:0.8"), Sampling(0.7))


def test_the_reference_is_what_plain_decoding_emits(tiny_model: Path) -> None:
    decoder = tiny.load(tiny_model).decoder
    request = tiny.greedy(PROMPT, 12)
    expected = tuple(decode(decoder, request))
    assert synthetic_drafts(parse_drafter("oracle:1"), 0, decoder, request).reference == expected
    stopped = tiny.greedy(PROMPT, 12, frozenset({expected[4]}))
    first = expected.index(expected[4])
    assert synthetic_drafts(parse_drafter("oracle:1"), 0, decoder, stopped).reference == expected[: first + 1]
