"""Results and a profile for tests of projections, with times chosen by hand."""

from __future__ import annotations

from typing import Any

from spdbench.judge.results.lanes import BubbleParts, PartTime, PartTimes
from spdbench.judge.results.schema import Result
from spdbench.profiles.profile import ModelShape, Profile
from tests.builders import (
    MS,
    TRAINED,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    make_steps,
    pipeline_steps,
    vanilla_steps,
)

BUSY = BubbleParts(useful=1, wasted=0, fill=0, verify=0, draft=0, imbalance=0, host=0, unattributed=0)
VERDICTS = [[True, True, False, True, True, True], [True, False, True, True], [True] * 5]
PARTS = PartTimes(
    layer=PartTime(num=300, s=0.1),
    head=PartTime(num=10, s=0.02),
    draft=PartTime(num=10, s=0.02),
    verify=PartTime(num=10, s=0.001),
)


def vanilla_result(**more: Any) -> Result:
    """100 ms a token."""
    runs = [make_run(vanilla_steps(9, step_ns=100 * MS), prompt=f"p{number}") for number in range(3)]
    return make_result(runs, **more)


def pipeline_result(
    num_stages: int = 3, parts: PartTimes | None = PARTS, *, backend: dict[str, Any] | None = None, **more: Any
) -> Result:
    runs = [
        make_run(pipeline_steps(each, num_stages), prompt=f"p{number}", bubble=BUSY, parts=parts)
        for number, each in enumerate(VERDICTS)
    ]
    layers = 30 // num_stages
    fields: dict[str, Any] = {
        "lanes": num_stages,
        "stage_layers": [layers] * num_stages,
        "lane_bytes": [*[6 * layers] * (num_stages - 1), 6 * layers + 20],
    }
    return make_result(runs, make_backend("pipeline", **(fields | (backend or {}))), **({"drafter": TRAINED} | more))


def eagle_result() -> Result:
    runs = [make_run(chunk_steps([1, 3, 2, 1], depth=2, step_ns=120 * MS), prompt=f"p{number}") for number in range(3)]
    drafter = TRAINED.model_copy(update={"method": "eagle3"})
    return make_result(runs, make_backend("draft_verify"), drafter=drafter)


def medusa_result() -> Result:
    """Rounds of 120 ms with trees of five nodes on two levels."""
    chunks = [1, 3, 2, 1]
    steps = make_steps(
        chunks,
        drafted=[0, 2, 2, 2],
        judged=[0, 2, 2, 1],
        accepted=[0, 2, 1, 0],
        forwards=[1.0, 5.0, 5.0, 5.0],
        step_ns=120 * MS,
    )
    runs = [make_run(steps, prompt=f"p{number}") for number in range(3)]
    backend = make_backend("draft_verify", name="medusa", label="medusa", chosen={"tree": "5 nodes, 2 levels"})
    return make_result(runs, backend, drafter=TRAINED.model_copy(update={"method": "medusa"}))


def make_profile() -> Profile:
    """A layer takes 1 ms of one row and 2 ms of 101; a head 5 ms; a message 0.1 ms."""
    shape = ModelShape(id="smollm2", sha256="m" * 64, dtype="float32", num_layers=30, hidden_size=576)
    seconds = {
        "layer context=128 rows=1": 1e-3,
        "layer context=128 rows=101": 2e-3,
        "head rows=1": 5e-3,
        "draft drafter=a method=spd stages=3": 2e-3,
        "draft drafter=b method=eagle3 tree=chain levels=1": 4e-3,
        "draft drafter=b method=eagle3 tree=chain levels=2": 6e-3,
        "draft drafter=c method=medusa tree=chain levels=3": 3e-3,
        "message bytes=2304": 1e-4,
        "verify": 0.0,
        "host": 0.0,
    }
    return Profile(
        created="2026-06-01",
        origin="measured",
        device="Testium 9000",
        machine="a",
        threads=2,
        model=shape,
        seconds=seconds,
    )
