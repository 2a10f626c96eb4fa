"""End to end on the embedded model, a real chat model: exact outputs, dialled acceptance, sensible text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from scipy.stats import binom

from spdbench.judge.results.schema import Result, read_result
from spdbench.models.checkpoints.folders import cache_folder

pytestmark = pytest.mark.embedded
STAGES = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Results of `quick` on the embedded model, as in the README but in float32."""
    if not list((cache_folder() / "models").glob("SmolLM2*")):
        pytest.skip("the embedded model is not in the cache: run `python -m spdbench.models`")
    folder = tmp_path_factory.mktemp("embedded")
    words = ["run", "quick", "-b", "vanilla", "-b", "spd", "-o", f"spd.stages={STAGES}", "--drafter", "oracle:0.8"]
    more = ["--limit", "8", "--max-new-tokens", "24", "--dtype", "float32", "--results", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "spdbench", *words, *more],
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "synthetic_drafter (spd): " in done.stdout
    return {label: read_result(folder / f"quick__{label}__smollm2.json") for label in ("vanilla", "spd")}


def test_every_output_equals_vanillas(results: dict[str, Result]) -> None:
    assert {run.key: run.output_ids for run in results["spd"].runs} == {
        run.key: run.output_ids for run in results["vanilla"].runs
    }
    assert results["spd"].divergence is not None
    assert results["spd"].divergence.identical == len(results["vanilla"].runs) >= 8


def test_acceptance_is_what_was_dialled(results: dict[str, Result]) -> None:
    judged = sum(sum(run.steps.judged) for run in results["spd"].runs)
    accepted = sum(sum(run.steps.accepted) for run in results["spd"].runs)
    low, high = binom.interval(0.999, judged, 0.8)
    assert low <= accepted <= high


def test_every_requests_cycles_follow_from_its_verdicts(results: dict[str, Result]) -> None:
    for run in results["spd"].runs:
        verdicts = [right for right, judged in zip(run.steps.accepted, run.steps.judged, strict=True) if judged]
        cycles = len(run.steps.t_ns) - 1
        assert cycles == len(verdicts) + (STAGES - 1) * (1 + verdicts[:-1].count(0))


def test_answers_are_sensible(results: dict[str, Result]) -> None:
    """A model with a wrong rotary base or a swapped matrix still decodes, but soon repeats itself."""
    for run in results["vanilla"].runs:
        assert len(set(run.output_ids)) > len(run.output_ids) // 3
