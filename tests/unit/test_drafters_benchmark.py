"""The training of the drafters that ship: what is held out, and features that stay from one run to the next."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.drafters import SHIPPED, STARTS, SharedFeatures, split, start_of
from spdbench.models.decoder import Decoder
from spdbench.training.features import Features
from spdbench.training.tokens import TokenSequence

LENGTHS = [40] * 60


def chosen(*, judge: bool = False, more: bool = True) -> Namespace:
    return Namespace(judge=judge, more=more or None, seed=0, held_out_tokens=80)


def test_what_was_held_out_of_the_first_data_is_never_learned() -> None:
    learned, held = split(LENGTHS, 40, chosen(judge=True))
    assert set(learned) | set(held) == set(range(40))
    later_learned, later_held = split(LENGTHS, 40, chosen())
    assert set(later_learned) & set(range(40)) == set(learned)
    assert later_held[:-1] == held  # 80 tokens, all of them
    assert later_held[-1] in range(40, 60)  # a twentieth of the twenty new ones
    assert set(later_learned) | set(later_held) == set(range(60))
    assert split(LENGTHS, 40, chosen(more=False)) == (learned, held)


def test_of_what_was_held_out_no_more_tokens_are_judged_than_asked_for() -> None:
    fewer = Namespace(judge=False, more=True, seed=0, held_out_tokens=40)
    learned, held = split(LENGTHS, 40, fewer)
    assert len(held) == 2  # one of each
    assert len(learned) == 57  # the other of the first data's two is not learned either


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    return [TokenSequence(tuple(range(10 * k, 10 * k + 8)), (False,) * 3 + (True,) * 5) for k in range(4)]


def features_in(folder: Path, decoder: Decoder, sequences: list[TokenSequence], *kinds: int) -> SharedFeatures:
    found = SharedFeatures(decoder, sequences, kinds)
    found.keep_in(folder, "d" * 64, "float32")
    return found


def test_features_stay_for_a_run_that_reads_fewer_of_them(
    decoder: Decoder, sequences: list[TokenSequence], tmp_path: Path
) -> None:
    features_in(tmp_path / "new", decoder, sequences, 2, 4).prepare([1, 3])
    again = features_in(tmp_path / "new", decoder, sequences, 4)
    assert again.know_all() == {1, 3}
    fresh = Features(decoder, sequences, [4])
    for found, expected in ((again.batch([3]), fresh.batch([3])), (again.only([4]).batch([1]), fresh.batch([1]))):
        assert found.states[4].shape == expected.states[4].shape
        torch.testing.assert_close(found.states[4], expected.states[4], atol=0.02, rtol=0.02)  # kept in bfloat16
        assert torch.equal(found.argmax_BS, expected.argmax_BS)


def test_features_of_other_data_are_refused(decoder: Decoder, sequences: list[TokenSequence], tmp_path: Path) -> None:
    features_in(tmp_path, decoder, sequences, 2)
    with pytest.raises(SystemExit, match="holds other features"):
        features_in(tmp_path, decoder, sequences, 3)
    with pytest.raises(SystemExit, match="holds other features"):
        SharedFeatures(decoder, sequences, [2]).keep_in(tmp_path, "e" * 64, "float32")


def test_a_drafter_goes_on_from_its_own_or_from_one_like_it(tmp_path: Path) -> None:
    spd = next(each for each in SHIPPED if each.name == "spd")
    with pytest.raises(SystemExit, match="holds no spd"):
        start_of(tmp_path, spd)
    for name in (STARTS["spd"], "spd"):
        (tmp_path / name).mkdir()
        assert start_of(tmp_path, spd) == tmp_path / name
