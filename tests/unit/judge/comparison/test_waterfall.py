"""The waterfall from ideal to measured: in one form for every method, and always adding up to wall time."""

from __future__ import annotations

from typing import Any

import pytest

from spdbench.judge.comparison.pairing import Pair, pair
from spdbench.judge.comparison.waterfall import Waterfall, waterfall
from spdbench.judge.loaded import load
from spdbench.judge.results.lanes import BubbleParts
from spdbench.judge.results.schema import Run
from spdbench.types import BackendKind
from tests.builders import (
    MS,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    vanilla_steps,
)

PARTS = {"useful": 0.5, "wasted": 0.1, "fill": 0.08, "verify": 0.02, "draft": 0.15, "imbalance": 0.05, "host": 0.06}


def bubble(**parts: float) -> BubbleParts:
    found = dict.fromkeys(BubbleParts.model_fields, 0.0) | parts
    return BubbleParts(**(found | {"unattributed": 1 - sum(found.values())}))


def pairing(kind: BackendKind, *runs: Run, **backend: Any) -> Pair:
    """`runs` next to vanilla's, which takes 10 ms a token and gives each of them 21."""
    vanilla = make_result([make_run(vanilla_steps(21), prompt=run.prompt_id) for run in runs])
    other = make_result(runs, make_backend(kind, **backend))
    return pair(load(vanilla, "vanilla.json"), load(other, "other.json"))


def by_name(fall: Waterfall) -> dict[str, float]:
    return dict(fall.parts)


def test_draft_and_verify_needs_one_pass_a_verify_step() -> None:
    steps = chunk_steps([1, 4, 4, 4, 4, 4], step_ns=16 * MS)  # 20 tokens in 5 rounds of 16 ms
    fall = waterfall(pairing("draft_verify", make_run(steps, bubble=bubble(useful=0.9, draft=0.06, verify=0.04))))
    assert fall is not None
    parts = by_name(fall)
    assert fall.vanilla_s == pytest.approx(0.010)
    assert fall.measured_s == pytest.approx(0.004)
    assert parts["ideal"] == pytest.approx(0.010 / 4)  # vanilla's time over the acceptance length
    assert parts["verify"] == pytest.approx(0.9 * 0.004 - 0.0025)
    assert parts["draft"] == pytest.approx(0.06 * 0.004)
    assert parts["verdict"] == pytest.approx(0.04 * 0.004)
    assert parts["flush"] == parts["imbalance"] == parts["host"] == 0
    assert parts["residual"] == pytest.approx(0, abs=1e-12)


def test_pipeline_shares_one_pass_a_token_among_its_lanes() -> None:
    steps = pipeline_steps([True] * 18 + [False], 3, step_ns=5 * MS)
    run = make_run(steps, bubble=bubble(**PARTS))
    fall = waterfall(pairing("pipeline", run))
    assert fall is not None
    assert run.decode_s is not None
    measured = run.decode_s / 19
    parts = by_name(fall)
    assert parts["ideal"] == pytest.approx(0.010 / 3)
    assert parts["flush"] == pytest.approx((0.1 + 0.08) * measured)
    assert parts["imbalance"] == pytest.approx(0.05 * measured)
    assert parts["residual"] == pytest.approx(0.04 * measured)


@pytest.mark.parametrize("kind", ["draft_verify", "pipeline"])
def test_parts_add_up_to_the_wall_time_of_all_runs(kind: BackendKind) -> None:
    steps = pipeline_steps([True, False], 3) if kind == "pipeline" else chunk_steps([1, 3, 5, 2])
    runs = [
        make_run(steps, prompt=f"p{number}", bubble=bubble(**{name: share * scale for name, share in PARTS.items()}))
        for number, scale in enumerate((1.0, 0.7, 0.4))
    ]
    fall = waterfall(pairing(kind, *runs))
    assert fall is not None
    wall_s = sum(run.decode_s or 0 for run in runs)
    tokens = sum(run.num_new_tokens - 1 for run in runs)
    assert sum(part.seconds for part in fall.parts) * tokens == pytest.approx(wall_s, rel=1e-9)
    assert fall.measured_s * tokens == pytest.approx(wall_s)
    unexplained = sum((run.decode_s or 0) * run.bubble.unattributed for run in runs if run.bubble)
    assert by_name(fall)["residual"] * tokens == pytest.approx(unexplained)


def test_pass_that_is_faster_than_vanillas_is_a_gain() -> None:
    fall = waterfall(
        pairing("draft_verify", make_run(chunk_steps([1, 2, 2], step_ns=6 * MS), bubble=bubble(useful=1.0)))
    )
    assert fall is not None
    assert by_name(fall)["verify"] == pytest.approx(0.003 - 0.005)


def test_only_runs_with_spans_count() -> None:
    with_spans = make_run(chunk_steps([1, 4, 4]), prompt="a", bubble=bubble(useful=1.0))
    without = make_run(chunk_steps([1, 4, 4], step_ns=70 * MS), prompt="b")
    fall = waterfall(pairing("draft_verify", with_spans, without))
    assert fall is not None
    assert fall.num_runs == 1
    assert fall.measured_s == pytest.approx(0.0025)
    assert waterfall(pairing("draft_verify", without)) is None


def test_one_token_gives_nothing_to_divide_by() -> None:
    assert waterfall(pairing("draft_verify", make_run(chunk_steps([1]), bubble=bubble(useful=1.0)))) is None
