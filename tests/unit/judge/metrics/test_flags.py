"""Which result earns which flag."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spdbench
from spdbench.cli.main import COMMANDS
from spdbench.judge.metrics.flags import DISQUALIFYING, MADE_FROM_ONE_RESULT, flags_for
from spdbench.judge.results.schema import BackendRecord, Divergence, DrafterRecord, Run
from spdbench.judge.results.table import is_degenerate
from tests.builders import (
    MS,
    ORACLE,
    RANDOM,
    TRAINED,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    summarise,
    vanilla_steps,
)

EIGHT = [make_run(vanilla_steps(20, step_ns=12 * MS), prompt=f"p{index}") for index in range(8)]
MODEL = make_result([]).model


def names(
    runs: list[Run],
    backend: BackendRecord | None = None,
    drafter: DrafterRecord | None = None,
    divergence: Divergence | None = None,
) -> set[str]:
    return {flag.name for flag in make_result(runs, backend, drafter=drafter, divergence=divergence).flags}


def divergence(**counts: int) -> Divergence:
    return Divergence(**({"identical": 6, "ties": 0, "near_ties": 0, "real": 0, "unclassified": 0} | counts))


def test_sound_result_has_no_flag() -> None:
    assert names(EIGHT) == set()
    assert names(EIGHT, make_backend("pipeline"), TRAINED, divergence(ties=1, near_ties=1)) == set()


def test_lossy_backend_is_flagged_lossy_and_not_also_diverged() -> None:
    assert names(EIGHT, make_backend("draft_verify", lossy=True), TRAINED, divergence(real=2)) == {"lossy"}


@pytest.mark.parametrize("counts", [{"real": 1}, {"unclassified": 1}])
def test_difference_that_is_no_tie_is_flagged_diverged(counts: dict[str, int]) -> None:
    assert names(EIGHT, make_backend("pipeline"), TRAINED, divergence(**counts)) == {"diverged"}


def test_oracle_is_flagged_synthetic_and_random_untrained() -> None:
    assert names(EIGHT, make_backend("pipeline"), ORACLE) == {"synthetic_drafter"}
    assert names(EIGHT, make_backend("pipeline"), RANDOM) == {"untrained_drafter"}


def test_a_model_without_a_chat_template_is_flagged_unless_its_server_has_one() -> None:
    def found(backend: BackendRecord, **changes: object) -> list[str]:
        overall = summarise(EIGHT, backend, None).overall
        bare = MODEL.model_copy(update={"template_sha256": None, **changes})
        return [flag.name for flag in flags_for(overall, backend, bare, None, None)]

    assert found(make_backend()) == ["no_template"]
    assert found(make_backend(), num_layers=None) == []
    assert found(make_backend().model_copy(update={"chosen": {"prompt": "messages"}})) == []
    assert found(make_backend().model_copy(update={"chosen": {"prompt": "ids"}})) == ["no_template"]


def test_fewer_than_eight_prompts_are_few_however_often_repeated() -> None:
    assert "few_prompts" in names([make_run(prompt=f"p{index % 7}", repeat=index // 7) for index in range(21)])


def test_truncated_means_more_than_half_cut_by_the_limit() -> None:
    cut = [run.model_copy(update={"finish_reason": "length"}) for run in EIGHT]
    assert "truncated" not in names(cut[:4] + EIGHT[4:])
    assert "truncated" in names(cut[:5] + EIGHT[5:])


def test_loops_are_flagged_with_the_acceptance_of_the_others() -> None:
    eagle = make_backend("draft_verify")
    loop = make_run(chunk_steps([1, *[5] * 8]), prompt="loop", output_ids=[7] * 41)
    overall = summarise([loop, make_run(chunk_steps([1, *[2] * 20]), prompt="sane")], eagle, None).overall
    [flag] = [each for each in flags_for(overall, eagle, MODEL, None, None) if each.name == "degenerate"]
    assert "1 of 2 outputs" in flag.reason
    assert "without them 50.0% of the drafts are accepted" in flag.reason


def test_speed_that_varies_over_prompts_is_noisy() -> None:
    assert "noisy" in names(
        [make_run(vanilla_steps(9, step_ns=10 * MS * 2**index), prompt=f"p{index}") for index in range(8)]
    )


def test_a_baseline_on_layers_of_transformers_is_slow_unless_measured_otherwise() -> None:
    backend = make_backend(kernels="transformers")
    assert names(EIGHT, backend) == set()
    overall = summarise(EIGHT, backend, None).overall
    assert [flag.name for flag in flags_for(overall, backend, MODEL, None, None)] == ["slow_baseline"]
    assert flags_for(overall, make_backend(kernels="numba"), MODEL, None, None) == []
    assert flags_for(overall, make_backend("pipeline", kernels="transformers"), MODEL, None, None) == []


def test_baseline_far_from_the_bandwidth_is_slow() -> None:
    slow = [make_run(vanilla_steps(20, step_ns=30 * MS), prompt=f"p{index}") for index in range(8)]
    assert names(slow) == {"slow_baseline"}
    assert names(slow, make_backend("pipeline")) == set()


def test_remedies_name_no_command_that_does_not_exist() -> None:
    folders = [Path(spdbench.__file__).parent / name for name in ("judge", "prompts", "render")]
    text = "".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))
    named = set(re.findall(r"`spdbench (\w+)", text))
    assert "run" in named
    assert named <= set(COMMANDS)


def test_every_flag_says_why_and_what_to_do() -> None:
    loops = [make_run(vanilla_steps(40), prompt="p0", output_ids=[5] * 40, finish="length")]
    result = make_result(loops, make_backend("pipeline"), drafter=ORACLE, divergence=divergence(real=1))
    assert {flag.name for flag in result.flags} == {
        "diverged", "synthetic_drafter", "degenerate", "truncated", "few_prompts",
    }  # fmt: skip
    assert all(flag.reason and flag.remedy and "\n" not in flag.reason + flag.remedy for flag in result.flags)
    assert {flag.name for flag in result.flags} <= MADE_FROM_ONE_RESULT | DISQUALIFYING


@given(cycle=st.lists(st.integers(0, 9), min_size=1, max_size=32))
def test_output_that_ends_in_a_cycle_of_at_most_32_is_degenerate(cycle: list[int]) -> None:
    prose = random.Random(0).sample(range(1000, 2000), 100)
    loop = (cycle * 64)[:64]
    assert is_degenerate(prose + loop)
    assert is_degenerate(loop)


def test_only_the_last_64_tokens_are_looked_at() -> None:
    prose = random.Random(0).sample(range(1000, 2000), 64)
    assert not is_degenerate([5] * 200 + prose)


def test_exactly_half_in_a_cycle_is_not_degenerate() -> None:
    prose = list(range(1000, 1100))
    assert not is_degenerate(prose + [5] * 32)
    assert is_degenerate(prose + [5] * 33)


def test_longer_cycles_single_ones_and_short_outputs_are_not_degenerate() -> None:
    assert is_degenerate(list(range(32)) * 3)
    assert not is_degenerate(list(range(33)) * 3)
    assert not is_degenerate([*range(1000, 1032), *range(24), *range(8)])  # 24 ids and a third of them again
    assert not is_degenerate([5] * 15)
    assert not is_degenerate([])
