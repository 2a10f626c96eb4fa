"""Parts of the output head give what the whole gives, and a layout is chosen by what a cycle takes at least."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import next_tokens
from spdbench.models.partition import Layout, PieceTimes, best_layout, split_by_counts
from spdbench.pipeline.output_head import HeadPart, HeadParts, best_of, join_best, lane_bytes

LOGITS = st.sampled_from([-1.5, 0.0, 0.25, 3.0, 3.0000002, math.inf, -math.inf, math.nan])
ALL = [Layout(drafting, head) for head in ("last_stage", "drafter", "split") for drafting in ("first_stage", "own")]


@given(st.lists(st.lists(LOGITS, min_size=4, max_size=4), min_size=1, max_size=3), st.sets(st.integers(1, 3)))
def test_the_best_of_parts_is_the_next_token_of_the_whole(rows: list[list[float]], cuts: set[int]) -> None:
    """Ties, infinities and NaN included, in every way of cutting four ids."""
    for dtype in (torch.float32, torch.bfloat16):
        logits_SV = torch.tensor(rows, dtype=dtype)
        parts = [best_of(logits_SV[:, start:stop], start) for start, stop in pairwise([0, *sorted(cuts), 4])]
        assert join_best(parts).tolist() == next_tokens(logits_SV).tolist()


@pytest.mark.parametrize("vocab_size", [1, 16, 17, 31, 32, 262, 49_152, 248_320])
def test_parts_hold_every_id_once_and_begin_with_a_block(vocab_size: int) -> None:
    for place in ("last_stage", "drafter", "split"):
        parts = HeadParts.of(place, vocab_size)
        assert [*parts.stage, *parts.controller] == list(range(vocab_size))
        assert sum(parts.bytes_of(1001)) == 1001
    half = HeadParts.of("split", vocab_size)
    assert half.controller.start % 16 == 0 or not half.controller
    assert abs(len(half.stage) - len(half.controller)) <= 32


def test_a_part_of_the_head_gives_the_wholes_logits(decoder: Decoder) -> None:
    rows_SM = torch.randn(3, decoder.config.hidden_size)
    parts = HeadParts.of("split", decoder.config.vocab_size)
    with torch.inference_mode():
        found = torch.cat([HeadPart(decoder, ids).logits(rows_SM) for ids in parts], dim=-1)
        best = join_best([HeadPart(decoder, ids).best(rows_SM) for ids in parts])
        expected = decoder.logits(rows_SM)
    assert torch.equal(found, expected)
    assert torch.equal(best, next_tokens(expected))
    assert decoder.with_head_of(range(0)).head is None


def test_bytes_are_those_of_the_lane_that_reads_them(decoder: Decoder) -> None:
    stages = split_by_counts(6, [2, 4])
    whole = [decoder.bytes_per_token(layers, head=False) for layers in stages]
    head = decoder.bytes_per_token(stages[1], head=True) - whole[1]
    found = {layout: lane_bytes(decoder, stages, layout) for layout in ALL}
    assert found[Layout()] == found[Layout("first_stage")] == [whole[0], whole[1] + head]
    assert found[Layout("first_stage", "drafter")] == [whole[0] + head, whole[1]]
    assert found[Layout("own", "drafter")] == [*whole, head]
    assert {sum(lanes) for lanes in found.values()} == {sum(whole) + head}


def times(head_s: float, draft_s: float, *, drafts_last: bool = False, has_lane: bool = True) -> PieceTimes:
    return PieceTimes([1.0] * 6, head_s, draft_s, drafts_last, has_lane)


@pytest.mark.parametrize(
    ("pieces", "counts", "expected"),
    [
        (times(1, 2), [3, 3], {"own last_stage": 4, "first_stage last_stage": 5, "own split": 3.5, "own drafter": 3}),
        (times(1, 2), [1, 5], {"own last_stage": 6, "first_stage last_stage": 6, "first_stage drafter": 5}),
        (times(4, 1), [3, 3], {"own drafter": 5, "own split": 5, "first_stage split": 6, "first_stage drafter": 8}),
        (times(1, 2, has_lane=False), [3, 3], {"own last_stage": 4.5, "first_stage last_stage": 5, "own drafter": 4.5}),
        (times(1, 2, drafts_last=True), [3, 3], {"own last_stage": 6, "first_stage last_stage": 6, "own drafter": 6}),
    ],
)
def test_a_cycle_takes_what_its_slowest_lane_takes(
    pieces: PieceTimes, counts: list[int], expected: dict[str, float]
) -> None:
    stages = split_by_counts(6, counts)
    for words, cycle_s in expected.items():
        drafting, head = words.split()
        assert pieces.cycle_s(Layout(drafting, head), stages) == pytest.approx(cycle_s)  # type: ignore[arg-type]


def test_stages_leave_room_for_what_else_they_do() -> None:
    assert times(4, 1).extras_s(Layout("own", "split"), 3) == [0, 0, 2]
    assert times(4, 1).extras_s(Layout("first_stage", "split"), 3) == [3, 0, 2]
    assert times(4, 1, has_lane=False).extras_s(Layout("own", "drafter"), 3) == [5, 0, 0]


def test_the_layout_with_fewer_devices_is_chosen_unless_another_one_is_faster() -> None:
    first, own = Layout("first_stage"), Layout("own")
    assert best_layout({first: 1.01, own: 1.0}) == first
    assert best_layout({first: 1.05, own: 1.0}) == own
