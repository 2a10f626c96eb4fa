"""`oracle:P` and `forced:P`: the same decisions for all, at the rate that was asked for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.drafter_choice import DrafterChoice, parse_drafter
from spdbench.decoding.speculate import Speculation
from spdbench.decoding.synthetic import SyntheticDrafter, SyntheticDrafts, require_known_answer, synthetic_drafts
from spdbench.decoding.tree_builder import chain_builder
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
    assert parse_drafter("oracle:0.75") == DrafterChoice("oracle", "oracle:0.75", (0.75,), 0, "oracle:0.75")
    assert parse_drafter("forced:1").rates == (1.0,)
    assert parse_drafter(str(tmp_path)).path == tmp_path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("oracle", r"needs an acceptance from 0 to 1, .* \(for example oracle:0.8\)"),
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


GOLDEN = "model-8b.1:\n  thinking_on: {1: 1.84, 3: 2.99}\n  thinking_off: {3: 3.4}\nrates: [0.9, 0.7]\n"


def test_an_acceptance_may_be_by_position_a_length_or_in_a_file(tmp_path: Path) -> None:
    assert parse_drafter("forced:0.8,0.6,0.4").rates == (0.8, 0.6, 0.4)
    assert parse_drafter("oracle:tau=2.5").rates == (1.0, 0.5, 0.0)
    assert [parse_drafter(f"forced:tau={tau}").num_levels for tau in ("1", "2", "2.25", "4.5")] == [0, 1, 2, 4]
    result, golden, single = (tmp_path / name for name in ("result.json", "golden.yaml", "one.yml"))
    golden.write_text(GOLDEN)
    single.write_text("2.5")
    choice = parse_drafter(f"forced:{golden}#model-8b.1/thinking_on/3")
    assert choice.rates == pytest.approx((1.0, 0.99, 0.0))
    assert choice.title == "forced:tau=2.99"
    assert parse_drafter(f"oracle:{golden}#rates").rates == (0.9, 0.7)
    assert parse_drafter(f"forced:{single}").rates == (1.0, 0.5, 0.0)
    for overall, title, note in (
        ({"acceptance_by_position": [0.75, 0.5], "acceptance_rate": 0.6}, "forced:0.75,0.5", "acceptance of 2 pos"),
        ({"acceptance_by_position": None, "acceptance_rate": 0.6}, "forced:0.6", "rate is taken at every position"),
        ({"acceptance_length": 2.25, "acceptance_rate": 0.6}, "forced:tau=2.25", "length is taken, tau=2.25"),
    ):
        result.write_text(json.dumps({"summary": {"overall": overall}}))
        taken = parse_drafter(f"forced:{result}")
        assert taken.title == title
        assert note in taken.note


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("forced:0.8,1.6", "1.6 is not from 0 to 1"),
        ("forced:0.8,", "'' is not a number"),
        ("oracle:tau=0.5", "a length from 1 to"),
        ("oracle:tau=nan", "a length from 1 to"),
        ("oracle:tau=inf", "a length from 1 to"),
        ("oracle:tau=", "'' is not a number"),
        ("forced:{}/golden.yaml", "After # may come: model-8b.1/thinking_on/1, model-8b.1/thinking_on/3"),
        ("forced:{}/golden.yaml#model-8b.1/thinking_on/2", "which value of the file"),
        ("forced:{}/words.yaml#rates", "'high' is not a number"),
        ("forced:{}/empty.json", "no acceptance by position, no mean acceptance length and no acceptance rate"),
        ("forced:{}/missing.json", "missing.json"),
        ("forced:{}/golden.json", "golden.json"),
    ],
)
def test_an_acceptance_that_is_none_says_what_one_is(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "golden.yaml").write_text(GOLDEN)
    (tmp_path / "golden.json").write_text(GOLDEN)
    (tmp_path / "words.yaml").write_text("rates: [high]")
    (tmp_path / "empty.json").write_text('{"summary": {"overall": {"acceptance_rate": null}}}')
    with pytest.raises(InputError, match=re.escape(why)):
        parse_drafter(text.format(tmp_path))


def lengths(text: str, num_levels: int, seed: int, num_rounds: int) -> list[int]:
    """Acceptance lengths of rounds with drafts of `num_levels` tokens."""
    some, found, index = drafts(text, seed=seed), list[int](), 1
    for _ in range(num_rounds):
        verdicts = some.forced_verdicts(index, num_levels)
        assert verdicts is not None
        found.append(1 + (verdicts.index(False) if False in verdicts else num_levels))
        index += found[-1]
    return found


@pytest.mark.parametrize("tau", [1.0, 1.3, 2.0, 2.5, 3.78, 5.0])
def test_lengths_have_the_mean_that_was_asked_for_and_vary_least(tau: float) -> None:
    means = []
    for seed in range(20):
        found = lengths(f"forced:tau={tau}", 5, seed, 500)
        assert set(found) <= {int(tau), math.ceil(tau)}
        means.append(sum(found) / len(found))
        assert abs(means[-1] - tau) < 4.5 * 0.5 / math.sqrt(500)
    assert sum(means) / 20 == pytest.approx(tau, abs=4.5 * 0.5 / math.sqrt(20 * 500))


def test_each_position_has_its_own_rate_and_later_ones_the_last() -> None:
    rates = (0.9, 0.5, 0.7)
    found = [length for seed in range(20) for length in lengths("forced:0.9,0.5,0.7", 5, seed, 500)]
    for position in range(1, 6):
        judged = sum(length >= position for length in found)
        rate = rates[min(position, 3) - 1]
        accepted = sum(length > position for length in found)
        assert abs(accepted / judged - rate) < 4.5 * math.sqrt(rate * (1 - rate) / judged)


def test_in_a_pipeline_positions_count_from_the_last_rejection() -> None:
    for text in ("forced:tau=3.5", "oracle:tau=3.5"):
        some = drafts(text, tuple(range(100, 900)))
        right = [
            verdict if (verdict := some.draft(t).forced_verdict) is not None else some.draft(t).token_id == 100 + t
            for t in range(1, 700)
        ]
        runs = "".join("x" if each else " " for each in right).split(" ")[:-1]
        assert {len(run) for run in runs} == {2, 3}
        assert sum(map(len, runs)) / len(runs) == pytest.approx(2.5, abs=0.2)


@pytest.mark.parametrize("drafter", ["oracle:tau=2.5", "oracle:0.9,0.6,0.3"])
def test_an_oracle_by_length_or_position_is_as_good_as_asked_and_stays_lossless(tiny_model: Path, drafter: str) -> None:
    decoder = tiny.load(tiny_model).decoder
    accepted = rounds = 0
    for seed in range(4):
        request = tiny.greedy(PROMPT[seed:], 120)
        expected = list(decode(decoder, request))
        synthetic = synthetic_drafts(parse_drafter(drafter), seed, decoder, request)
        builder = chain_builder(3, decoder.device)
        steps = list(Speculation(decoder, SyntheticDrafter(synthetic, builder, decoder.device), request).steps())
        assert [token for step in steps for token in step.token_ids] == expected
        accepted += sum(step.accepted for step in steps[1:])
        rounds += len(steps) - 1
    expected_length = 2.5 if "tau" in drafter else 1 + 0.9 + 0.9 * 0.6 + 0.9 * 0.6 * 0.3
    assert 1 + accepted / rounds == pytest.approx(expected_length, abs=0.25)


def test_a_length_beyond_the_drafts_depth_is_an_error(tiny_model: Path) -> None:
    decoder = tiny.load(tiny_model).decoder
    synthetic = synthetic_drafts(parse_drafter("forced:tau=4.5"), 0, decoder, tiny.greedy(PROMPT, 12))
    with pytest.raises(InputError, match="needs drafts of 4 tokens at least, and this backend drafts 3"):
        SyntheticDrafter(synthetic, chain_builder(3, decoder.device), decoder.device)


def test_an_empty_list_of_rates_is_refused_with_its_file(tmp_path: Path) -> None:
    golden = tmp_path / "golden.yaml"
    golden.write_text("eagle3: []\n")
    with pytest.raises(InputError, match=r"golden.yaml#eagle3: oracle needs .*the list of rates is empty"):
        parse_drafter(f"oracle:{golden}#eagle3")
