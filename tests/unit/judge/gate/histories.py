"""A history of a label and plain decoding, made by hand: all that happens in it is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from spdbench.judge.results.schema import Result
from tests.builders import MS, TRAINED, make_backend, make_result
from tests.unit.judge.gate.gates import drafted_runs, plain_runs

NUM_RUNS = 20
PLANTED = 13
"""The run from which on drafting is slower by a fifth."""
BEGIN = datetime(2026, 6, 1, 9, 30, tzinfo=UTC)
NOISE = 0.01


def planted(number: int) -> float:
    """Speed of drafting in a run, relative to its own in the first."""
    return 0.8 if number >= PLANTED else 1.0


def history_results(
    num_runs: int = NUM_RUNS,
    speed: Callable[[int], float] = planted,
    *,
    machine: Callable[[int], str] = lambda _: "0a1b2c3d4e5f6071",
    commit: Callable[[int], str | None] = lambda _: None,
    label: str = "eagle",
    seed: int = 7,
    **more: Any,
) -> dict[str, Result]:
    """By file name, vanilla and `label` a day. The machine itself drifts, which cancels in the speed-up, and each start
    has noise of its own."""
    rng = random.Random(seed)
    found = {}
    for number in range(num_runs):
        when = BEGIN + timedelta(days=number)
        drift = 1 + 0.08 * rng.random()
        environment = {
            "cpu": "Testium 9000",
            "read_bandwidth_bytes_per_s": 20_000_000_000 + number,
            "fingerprint": machine(number),
        }
        pace = drift * (1 + rng.gauss(0, NOISE)) / speed(number)
        jitter = [1 + rng.gauss(0, NOISE) for _ in range(10)]
        pairs = {
            "vanilla": make_result(plain_runs(step_ns=round(20 * MS * drift)), make_backend(), **more),
            label: make_result(
                drafted_runs(step_ns=lambda i, pace=pace, jitter=jitter: round(22 * MS * pace * jitter[i])),  # type: ignore[misc]
                make_backend("draft_verify", label=label),
                drafter=TRAINED,
                **more,
            ),
        }
        for name, result in pairs.items():
            update = {
                "created": when.isoformat(timespec="seconds"),
                "environment": environment,
                "spdbench": {"version": "0.1.0", "git": commit(number)},
            }
            kind = "vanilla" if name == "vanilla" else "draft"
            found[f"quick__{kind}__smollm2__{number:02}.json"] = result.model_copy(update=update)
    return found


def same_code(num_runs: int = 8) -> dict[str, Result]:
    """Runs of the same code, for a calibration."""
    return history_results(num_runs, lambda _: 1.0, seed=99)


def verdicts(points: Sequence[Any]) -> list[str]:
    return [point.verdict for _, point in points]
