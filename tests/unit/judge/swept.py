"""Rows of a sweep for tests: pipelines of two and three stages with drafters of three qualities, and plain decoding."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace

from spdbench.judge.comparison.compare import Row, compare
from spdbench.judge.loaded import load
from spdbench.judge.sweeps import SweepRow
from tests.builders import MS, TRAINED, make_backend, make_result, make_run, pipeline_steps, vanilla_steps

PROMPTS = 4
STAGES, DRAFTERS = "options.spd.stages", "drafters"
CYCLE_MS = {2: 60, 3: 45}
ACCEPTED = {"oracle:0.2": 1, "oracle:0.5": 4, "oracle:0.9": 8}
"""Of eight verdicts."""


def row(stages: int, drafter: str) -> Row:
    """Against plain decoding at 100 ms a token."""
    accepted = ACCEPTED[drafter]
    verdicts = [True] * accepted + [False] * (8 - accepted)
    backend = make_backend("pipeline", lanes=stages, stage_layers=[30 // stages] * stages, num_devices=stages)
    steps = pipeline_steps(verdicts, stages, step_ns=CYCLE_MS[stages] * MS)
    runs = [make_run(steps, prompt=f"p{number}") for number in range(PROMPTS)]
    plain = [make_run(vanilla_steps(9, step_ns=100 * MS), prompt=f"p{number}") for number in range(PROMPTS)]
    results = [load(make_result(plain), "vanilla.json"), load(make_result(runs, backend, drafter=TRAINED), "spd.json")]
    return next(each for table in compare(results, "vanilla") for each in table.rows if not each.is_baseline)


def swept(stages: Sequence[int] = (2, 3), drafters: Sequence[str] = tuple(ACCEPTED)) -> list[SweepRow]:
    return [SweepRow({STAGES: each, DRAFTERS: drafter}, row(each, drafter)) for each in stages for drafter in drafters]


def with_speedups(speedups: Sequence[float]) -> list[SweepRow]:
    """One method at n = 1, 2, ..."""
    like = row(2, "oracle:0.9")
    return [
        SweepRow({"n": at}, replace(like, metrics=ChainMap({"speedup": speedup}, dict(like.metrics))))
        for at, speedup in enumerate(speedups, 1)
    ]
