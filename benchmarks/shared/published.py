"""The reference code's published speed-ups, projected from what it publishes of a cycle's parts; and how numbers
measured and projected are put side by side.

Sources: github yuyijiong/speculative_pipeline_decoding at 186f366, BENCHMARK_RESULTS.md for speed-ups (greedy, 512 new
tokens, 80 prompts a suite) and distributed_inference/README.md for the times of a cycle's parts, Qwen3.5-4B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spdbench.judge.projection.simulation import Parts, Stretch, request_seconds

LAYERS = 32
STAGE_MS = {8: 7.90, 4: 4.20}
"""The slowest stage by its layers."""
LAYER_MS = (STAGE_MS[8] - STAGE_MS[4]) / (8 - 4)
DRAFT_MS = {(4, 4): 4.22, (8, 3): 3.49}
"""By the stages and the draft module's layers. A draft layer is a layer of the target's kind, so more of them take
`LAYER_MS` each; what is left between the two figures is what more stages add, each with a row and an anchor."""
STAGE_ADDS_MS = (DRAFT_MS[8, 3] + LAYER_MS - DRAFT_MS[4, 4]) / (8 - 4)
VERIFY_MS = 1.2
"""With 8 stages. The 4.0 ms that they give for 4 are more than their cycle leaves after the slowest stage."""
BASELINE = {"4B": 35.26, "9B": 34.18}
"""Tokens/s of plain decoding."""
TOKENS_A_REQUEST, REQUESTS = 512, 40


@dataclass(frozen=True)
class Compared:
    """One row: a measured or published number, and the projected one. With `own_core` no stage waited for a core."""

    name: str
    measured: float
    projected: float
    remark: str = ""
    own_core: bool = False

    @property
    def error(self) -> float:
        return self.projected / self.measured - 1


@dataclass(frozen=True)
class Regime:
    """Rows of one table. `what` was measured; `rows` ran under the conditions that `name` says."""

    name: str
    what: str
    rows: Sequence[Compared]

    @property
    def worst(self) -> Compared:
        return max(self.rows, key=lambda row: abs(row.error))

    def table(self) -> Iterator[str]:
        """Markdown, and the worst error."""
        yield ""
        yield f"| | {self.what} measured | projected | error | |"
        yield "|---|---:|---:|---:|---|"
        for row in self.rows:
            yield f"| {row.name} | {row.measured:.2f} | {row.projected:.2f} | {row.error:+.1%} | {row.remark} |"
        yield ""
        yield f"Worst: {self.worst.error:+.1%}, {self.worst.name}."


def worst_errors(regimes: Sequence[Regime]) -> Iterator[str]:
    """Of all tables at once, of the rows in which each stage has a core, and of each table."""
    worst = max(regimes, key=lambda each: abs(each.worst.error))
    own_core = [row for each in regimes for row in each.rows if row.own_core]
    yield ""
    yield f"**Worst error: {worst.worst.error:+.1%}**, {worst.worst.name} ({worst.name})."
    if own_core:
        each = max(own_core, key=lambda row: abs(row.error))
        yield f"Where every stage has a core of its own it is {each.error:+.1%}, {each.name}; the goal is 10 %."
    yield ""
    yield "| | rows | worst error | |"
    yield "|---|---:|---:|---|"
    for regime in regimes:
        yield f"| {regime.name} | {len(regime.rows)} | {regime.worst.error:+.1%} | {regime.worst.name} |"


class Speedup(NamedTuple):
    theory: float
    wall: float


@dataclass(frozen=True)
class Row:
    """A line of their tables: over all prompts, and by suite (MT-Bench, GSM8K, HumanEval) where it is used here."""

    model: str
    stages: int
    draft_layers: int
    overall: Speedup
    suites: tuple[Speedup, ...] = ()

    @property
    def name(self) -> str:
        return f"Qwen3.5-{self.model}, {self.stages} stages, {self.draft_layers} draft layers"

    @property
    def scale(self) -> float:
        """Seconds of this model for a millisecond of the 4B model."""
        return BASELINE["4B"] / BASELINE[self.model] / 1e3

    def tokens_per_cycle(self, speedup: Speedup) -> float:
        return speedup.theory / self.stages

    def cycle_ms(self, speedup: Speedup) -> float:
        """The mean over all cycles, as the two speed-ups mean it."""
        return 1e3 / BASELINE[self.model] * self.tokens_per_cycle(speedup) / speedup.wall

    @property
    def acceptance(self) -> float:
        # theory = n x tokens a cycle, and tokens a cycle = 1 / (a + (1 - a) n)
        return (self.stages - self.stages / self.overall.theory) / (self.stages - 1)

    @property
    def fill_and_verdict_ms(self) -> tuple[float, float]:
        """What a cycle takes without a verdict, and how much more with one: the line through the three suites, whose
        shares of cycles with a verdict are their tokens a cycle."""
        shares, cycles = zip(*((self.tokens_per_cycle(each), self.cycle_ms(each)) for each in self.suites), strict=True)
        slope, start = np.polyfit(shares, cycles, 1)
        return float(start), float(slope)


def _suites(*pairs: tuple[float, float]) -> tuple[Speedup, ...]:
    return tuple(Speedup(*each) for each in pairs)


FOUR = Row("4B", 4, 4, Speedup(2.64, 2.27), _suites((2.19, 1.90), (2.61, 2.24), (3.11, 2.65)))
EIGHT = Row("4B", 8, 3, Speedup(3.39, 2.53), _suites((2.55, 1.93), (3.22, 2.43), (4.40, 3.23)))
SIXTEEN = Row("4B", 16, 2, Speedup(3.70, 1.43), _suites((2.59, 1.04), (3.35, 1.32), (5.17, 1.94)))
ROWS = (
    FOUR,
    Row("4B", 8, 4, Speedup(3.51, 2.41)),
    EIGHT,
    Row("4B", 8, 2, Speedup(3.32, 2.47)),
    SIXTEEN,
    Row("9B", 4, 4, Speedup(2.70, 2.32)),
    Row("9B", 8, 4, Speedup(3.62, 2.44)),
    Row("9B", 8, 3, Speedup(3.61, 2.67)),
    Row("9B", 8, 2, Speedup(3.46, 2.56)),
    Row("9B", 16, 2, Speedup(3.90, 1.49)),
)
OTHER_TRAINING = (
    Row("4B", 4, 4, Speedup(2.77, 2.42)),
    Row("4B", 8, 3, Speedup(3.80, 2.78)),
    Row("9B", 4, 4, Speedup(2.79, 2.43)),
    Row("9B", 8, 3, Speedup(3.86, 2.72)),
)
"""The same pipelines with heads trained on Open-PerfectBlend: another acceptance, the same times."""


def published() -> Iterator[str | Regime]:
    yield ""
    yield "## Published tables"
    yield ""
    yield "Speed-ups of the reference code over plain decoding, greedy. From its tables come the acceptance (by the"
    yield "theoretical speed-up; taken as independent from token to token) and plain decoding's tokens/s. Its runtime"
    yield "keeps all ranks in step: every cycle begins after the verdict, and the head runs on the drafter's device."
    yield "The times of a cycle's parts are those of its README, of the 4B model; for 9B they are scaled by plain"
    yield f"decoding. A draft of 2 or 4 layers takes {LAYER_MS:.3f} ms less or more than one of 3, as a layer of the"
    yield "target does. Nothing is fitted."
    yield Regime("published tables, times of the README", "speed-up", [_by_readme(row) for row in ROWS])
    yield ""
    yield "These are times with a profiler on, which the tables were made without. What the tables themselves say of a"
    yield "cycle is in how speed-ups differ by suite: cycles with a verdict, whose share is the tokens a cycle, take"
    yield "longer than those that fill the pipeline. The line through the three suites gives both."
    yield ""
    yield "| Qwen3.5-4B | stage, draft by the README ms | cycle without a verdict ms | a verdict adds ms |"
    yield "|---|---:|---:|---:|"
    for row in (FOUR, EIGHT, SIXTEEN):
        fill, verdict = row.fill_and_verdict_ms
        yield f"| {row.stages} stages | {_stage_ms(row):.2f}, {_draft_ms(row):.2f} | {fill:.2f} | {verdict:.2f} |"
    fill, _ = SIXTEEN.fill_and_verdict_ms
    yield ""
    yield f"With 16 stages a cycle takes {fill:.1f} ms although neither a stage nor a draft takes 3, and a verdict"
    yield "adds three times as much as with 8. No stage is slower than the others: 32 layers make 16 equal stages,"
    yield "and the head is elsewhere. What grows with n is what rank 0 does for each stage: it sends every rank its"
    yield "orders and receives every rank's hidden states, one message each; and 17 ranks do not fit two nodes of 8"
    yield "GPUs, which their script for 9 ranks has. So the second projection adds a time by the number of stages: what"
    yield f"4 and 8 took beyond their slowest part, {_added_ms(8):.2f} ms with 8, on a line to {_added_ms(16):.2f} with"
    yield "16. The verdict is that of the same two rows. No figure of 16 stages, of 9B or of another training is used."
    rows = [_by_suites(row) for row in (*ROWS, *OTHER_TRAINING)]
    yield Regime("published tables, times by how suites differ", "speed-up", rows)
    yield ""
    yield "The last four rows are heads of another training. What is left with 16 stages is the longer verdict, behind"
    yield "which we suspect the network between the nodes; the published figures do not tell."


def _stage_ms(row: Row) -> float:
    return STAGE_MS[4] + LAYER_MS * (LAYERS // row.stages - 4)


def _draft_ms(row: Row) -> float:
    return DRAFT_MS[8, 3] + LAYER_MS * (row.draft_layers - 3) + STAGE_ADDS_MS * (row.stages - 8)


def _added_ms(stages: int) -> float:
    """What a cycle of so many stages takes beyond its slowest part: on the line through those of 4 and 8."""
    low, high = (row.fill_and_verdict_ms[0] - max(_stage_ms(row), _draft_ms(row)) for row in (FOUR, EIGHT))
    return max(0.0, low + (high - low) * (stages - 4) / (8 - 4))


def _by_readme(row: Row) -> Compared:
    return _projected(row, VERIFY_MS, 0.0, f"acceptance {row.acceptance:.0%}")


def _by_suites(row: Row) -> Compared:
    verdict_ms = sum(each.fill_and_verdict_ms[1] for each in (FOUR, EIGHT)) / 2
    return _projected(row, verdict_ms, _added_ms(row.stages), "gives the times" if row in (FOUR, EIGHT) else "")


def _projected(row: Row, verdict_ms: float, added_ms: float, remark: str) -> Compared:
    parts = Parts(
        stages=(row.scale * _stage_ms(row),) * row.stages,
        head_s=row.scale * verdict_ms,
        draft_s=row.scale * _draft_ms(row),
        verify_s=0.0,
        host_s=row.scale * added_ms,
        message_s=0.0,
        devices=(*range(row.stages), row.stages),
        drafters_head=1.0,
        in_step=True,
    )
    rng, stretch = np.random.default_rng(0), Stretch(parts)
    seconds = sum(
        request_seconds(stretch, (rng.random(TOKENS_A_REQUEST - 1) < row.acceptance).tolist()) for _ in range(REQUESTS)
    )
    rate = REQUESTS * (TOKENS_A_REQUEST - 1) / seconds
    return Compared(row.name, row.overall.wall, rate / BASELINE[row.model], remark)
