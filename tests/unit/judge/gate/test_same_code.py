"""Runs of the same code are never a regression, whichever way they are given; runs of slower code are one.

The noise is that of a shared machine with two cores: between two starts the speed of everything differs by a quarter,
the speed-up by 2 %, and within a run single requests differ by 4 %, a few of them by much more: speed-ups of two starts
lie 4 % apart, as measured by `benchmarks.gate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from spdbench.judge.gate.calibration import calibrate
from spdbench.judge.gate.verdict import EXIT_CODES, GateVerdict, verdict_of
from spdbench.judge.loaded import LoadedResult
from tests.builders import MS
from tests.unit.judge.gate.gates import drafted_runs, eagle, judged, plain, plain_runs

SEEDS = range(20)
BASELINES, TOGETHER, PROMPTS = 8, 5, 12
MACHINE, START, REQUEST, STRAY = 0.25, 0.02, 0.04, 0.2

Start = list[LoadedResult]


class Noise:
    """Starts of one command on one machine, each with noise of its own."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._began = datetime(2026, 6, 1, tzinfo=UTC)

    def start(self, slower: float = 0.0) -> Start:
        """Vanilla's and eagle's results of one start, in which eagle is `slower` than it was."""
        self._began += timedelta(minutes=5)
        machine, own = self._rng.normal(0, MACHINE), self._rng.normal(0, START)
        facts: dict[str, Any] = {
            "created": self._began.isoformat(),
            "environment": {"fingerprint": "machine-a", "read_bandwidth_bytes_per_s": self._rng.uniform(30e9, 31e9)},
        }
        steps = self._steps(machine), self._steps(machine + own - np.log1p(-slower))
        vanilla = [run for i in range(PROMPTS) for run in plain_runs(PROMPTS, step_ns=steps[0](i))[i : i + 1]]
        return [plain(vanilla, **facts), eagle(drafted_runs(PROMPTS, step_ns=steps[1]), **facts)]

    def _steps(self, level: float) -> Callable[[int], int]:
        noise = self._rng.normal(0, REQUEST, PROMPTS) + STRAY * (self._rng.random(PROMPTS) < 0.02)
        return lambda prompt: round(20 * MS * float(np.exp(level + noise[prompt])))


def verdict(new: Sequence[Start], old: Sequence[Start], *, calibrated: bool = False, labels: int = 2) -> GateVerdict:
    """Of all results of `new` against those of `old`; of the last label alone with `labels` 1, as single files."""
    new_files, old_files = ([each for start in side for each in start[-labels:]] for side in (new, old))
    calibration = calibrate([each for start in old for each in start]) if calibrated else None
    return verdict_of(judged(new_files, old_files, "timing", calibration=calibration))


WAYS: dict[str, Callable[[Noise, float], GateVerdict]] = {
    "single files": lambda noise, slower: verdict([noise.start(slower)], [noise.start()], labels=1),
    "folders": lambda noise, slower: verdict([noise.start(slower)], [noise.start()]),
    "folders of several starts": lambda noise, slower: verdict(
        [noise.start(slower) for _ in range(TOGETHER)], [noise.start() for _ in range(BASELINES)]
    ),
    "calibrated folders": lambda noise, slower: verdict(
        [noise.start(slower) for _ in range(TOGETHER)], [noise.start() for _ in range(BASELINES)], calibrated=True
    ),
    "one new start, calibrated": lambda noise, slower: verdict(
        [noise.start(slower)], [noise.start() for _ in range(BASELINES)], calibrated=True
    ),
    "single files, calibrated": lambda noise, slower: verdict(
        [noise.start(slower)], [noise.start() for _ in range(BASELINES)], calibrated=True, labels=1
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_code_never_ends_with_1(way: str) -> None:
    codes = Counter(EXIT_CODES[WAYS[way](Noise(seed), 0.0)] for seed in SEEDS)
    assert codes[1] == codes[4] == 0


@pytest.mark.parametrize(
    ("way", "slower"),
    [
        ("folders", 0.3),
        ("folders of several starts", 0.2),
        ("calibrated folders", 0.15),
        ("one new start, calibrated", 0.3),
    ],
)
def test_slower_code_ends_with_1(way: str, slower: float) -> None:
    codes = Counter(EXIT_CODES[WAYS[way](Noise(seed), slower)] for seed in SEEDS)
    assert codes[1] >= 18


def test_tokens_per_s_alone_pass_or_are_inconclusive_however_much_slower() -> None:
    assert {WAYS["single files"](Noise(seed), 0.6) for seed in SEEDS} == {"inconclusive"}
