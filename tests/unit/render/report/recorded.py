"""Results as large as real ones with spans and drafts: as many numbers as a run records, drawn instead of measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any

from spdbench.judge.results.kept import DraftColumns, SpanColumns
from spdbench.judge.results.schema import Result, Run, Steps
from spdbench.types import Drafted, Span, SpanKind
from tests.builders import (
    TRAINED,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    sha256,
    vanilla_steps,
)

VOCABULARY = 49_152
NUM_TOKENS = 32
STEP_NS = 200_000_000
STAGES = 2
ROUND: tuple[SpanKind, ...] = ("draft", "target", "verify", "host")
STAGE: tuple[SpanKind, ...] = ("host", "target", "host")
LAST_STAGE: tuple[SpanKind, ...] = ("host", "target", "head", "host")
LONGEST_NS = {"target": 80_000_000, "head": 30_000_000, "draft": 30_000_000, "verify": 100_000, "host": 3_000_000}
NUM_DRAFTS = {"eagle": 3, "medusa": 3, "spd": 6}
"""Of each verdict, those that got none among them."""


def recorded(num_prompts: int) -> dict[str, Result]:
    """Vanilla, EAGLE, Medusa and SPD of two stages, `NUM_TOKENS` each, by file name."""
    made = {
        "vanilla": make_backend(),
        "eagle": make_backend("draft_verify"),
        "medusa": make_backend("draft_verify", label="medusa"),
        "spd": make_backend("pipeline", lanes=STAGES, lane_bytes=[10**8] * STAGES, stage_layers=[15] * STAGES),
    }
    found = {}
    for name, backend in made.items():
        runs = [_run(f"prompt-{number}", name) for number in range(num_prompts)]
        found[f"quick__{name}.json"] = make_result(runs, backend, drafter=None if name == "vanilla" else TRAINED)
    return found


def _token(random: Random) -> int:
    """Few ids are frequent, as in texts (Zipf's law)."""
    return int(VOCABULARY ** random.random())


def _run(prompt: str, name: str) -> Run:
    of_prompt, random = Random(prompt), Random(f"{prompt} {name}")
    ids = [_token(of_prompt) for _ in range(NUM_TOKENS)]
    steps = _steps(name, random)
    if name == "vanilla":
        return make_run(steps, prompt=prompt, output_ids=ids, prompt_sha256=sha256(prompt))
    drafts, spans, done = [], [], 0
    for number, emitted in enumerate(steps.emitted):
        accepted, judged = steps.accepted[number], steps.judged[number]
        tree = ids[done : done + accepted] + [
            _token(random) for _ in range(NUM_DRAFTS[name] - accepted if judged else 0)
        ]
        drafts.append(Drafted(tuple(tree), tuple(range(-1, accepted - 1)) + (accepted - 1,) * (len(tree) - accepted)))
        if number:
            spans += _spans(name, steps.t_ns[number - 1], 7 + done, number - 1, random)
        done += emitted
    kept: dict[str, Any] = {
        "drafted_tokens": DraftColumns.of(drafts),
        "spans": SpanColumns.of(sorted(spans, key=lambda span: (span.lane, span.start_ns)), 0),
    }
    return make_run(steps, prompt=prompt, output_ids=ids, prompt_sha256=sha256(prompt), **kept)


def _steps(name: str, random: Random) -> Steps:
    """`NUM_TOKENS` tokens in steps of unequal duration."""
    if name == "vanilla":
        steps = vanilla_steps(NUM_TOKENS)
    elif name == "spd":
        steps = pipeline_steps([random.random() < 0.75 for _ in range(NUM_TOKENS - 1)], STAGES)
    else:
        left, chunks = NUM_TOKENS - 1, [1]
        while left:
            chunks.append(random.randint(1, min(3, left)))
            left -= chunks[-1]
        steps = chunk_steps(chunks, depth=3)
    times = accumulate(random.randint(120_000_000, STEP_NS) for _ in steps.t_ns)
    return steps.model_copy(update={"t_ns": list(times)})


def _spans(name: str, start: int, position: int, cycle: int, random: Random) -> list[Span]:
    """What a lane does in a step: one piece of work after another, some with waiting in between."""
    lanes: Sequence[tuple[int, Sequence[SpanKind]]] = [(0, ROUND)]
    if name == "spd":
        lanes = [(0, STAGE), (1, LAST_STAGE), (2, ("draft", "verify")), (3, ("host",))]
    found, waiting = [], 0.6 if name == "spd" else 0.25
    for lane, kinds in lanes:
        first = start
        for kind in kinds:
            last = first + random.randint(LONGEST_NS[kind] // 2, LONGEST_NS[kind])
            found.append(Span(lane, kind, first, last, position, True, cycle))
            first = last + random.randint(1000, 500_000) * (random.random() < waiting)
    return found
