"""Each conversation's speed: by itself, and next to the baseline's."""

from __future__ import annotations

import pytest

from spdbench.judge.comparison.pairing import conversation_rates, pair, prompt_speeds
from spdbench.judge.loaded import load
from tests.builders import MS, chunk_steps, failed_run, make_backend, make_result, make_run, vanilla_steps


def test_turns_and_repeats_of_a_conversation_are_one_point() -> None:
    keys = [(turn, repeat) for turn in (0, 1) for repeat in (0, 1)]
    base = make_result([make_run(vanilla_steps(9), turn=turn, repeat=repeat) for turn, repeat in keys])
    new = [
        make_run(chunk_steps([1, 4, 4], step_ns=(10 + turn) * MS), turn=turn, repeat=repeat) for turn, repeat in keys
    ]
    [found] = prompt_speeds(pair(load(base, "a"), load(make_result(new, make_backend("draft_verify")), "b")))
    assert (found.prompt_id, found.category, found.identical) == ("p0", "math", True)
    assert found.baseline == pytest.approx(100)
    assert found.candidate == pytest.approx(32 / (4 * 2 * 0.0105))
    assert found.speedup == pytest.approx(found.candidate / 100)


def test_other_ids_in_one_turn_are_noticed() -> None:
    base = make_result([make_run(vanilla_steps(3)), make_run(vanilla_steps(3), turn=1)])
    new = make_result([make_run(vanilla_steps(3)), make_run(vanilla_steps(3), turn=1, output_ids=[7, 8, 9])])
    [found] = prompt_speeds(pair(load(base, "a"), load(new, "b")))
    assert not found.identical


def test_one_token_and_failures_give_no_point() -> None:
    runs = [make_run(vanilla_steps(1), prompt="one"), failed_run("bad"), make_run(vanilla_steps(5), prompt="good")]
    loaded = load(make_result(runs), "a")
    assert [each.prompt_id for each in prompt_speeds(pair(loaded, loaded))] == ["good"]
    assert conversation_rates(loaded.runs) == {"one": ("math", None), "good": ("math", pytest.approx(100))}
