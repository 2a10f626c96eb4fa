"""Acceptance length as others print it: a rule for each dialect, on the same columns of the same runs.

METRICS.md, "Dialects". One decoding gives a different number under each rule, so a figure from elsewhere may only
be compared with ours under its own.

N are all new tokens, the first from prefill among them; decode tokens are N - 1. Lengths of verify steps are taken
before an output is cut at its end. Micro is totals over totals, macro the mean over requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.definitions import by_layers
from spdbench.judge.metrics.stats import divide
from spdbench.judge.results.schema import BackendRecord
from spdbench.judge.results.table import COLUMN

Numbers = NDArray[np.float64]


class Counts(NamedTuple):
    """Each request's counts: [R]. `steps` are verify steps or cycles, so without prefill."""

    new_tokens: Numbers
    decode_tokens: Numbers
    steps: Numbers
    accepted: Numbers


@dataclass(frozen=True)
class Dialect:
    """What `name` calls the acceptance length: `parts` give numerator and denominator of each request."""

    name: str
    rule: str
    parts: Callable[[Counts], tuple[Numbers, Numbers]]
    macro: bool = False
    of_pipelines: bool = False


def _lengths(counts: Counts) -> tuple[Numbers, Numbers]:
    """A verify step's length is what it accepted and one token of the target's own."""
    return counts.accepted + counts.steps, counts.steps


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("spdbench", "1 + accepted / verify steps, micro", _lengths),
        Dialect("vllm", "1 + accepted / verify steps, micro", _lengths),
        Dialect("spec-bench", "mean length of a verify step, micro", _lengths),
        Dialect("sglang", "N / verify steps, micro", lambda counts: (counts.new_tokens, counts.steps)),
        Dialect(
            "nvidia",
            "mean chunk with prefill's among them, macro",
            lambda counts: (counts.new_tokens, counts.steps + 1),
            macro=True,
        ),
        Dialect(
            "eagle",
            "decode tokens / (verify steps - 1), micro",
            lambda counts: (counts.decode_tokens, np.maximum(counts.steps - 1, 0)),
        ),
        Dialect(
            "spd",
            "layers / largest stage's x N / cycles, macro; pipelines only",
            lambda counts: (counts.new_tokens, counts.steps),
            macro=True,
            of_pipelines=True,
        ),
    )
}


def metric_name(dialect: str) -> str:
    """What metrics call the acceptance length in this dialect."""
    return f"acceptance_length_{dialect.replace('-', '_')}"


def acceptance_length(dialect: str, table: Numbers, backend: BackendRecord) -> float | None:
    """The acceptance length of the requests in `table` [R, columns] as `dialect` prints it.

    None where the rule says nothing: for vanilla, for a pipeline in a dialect of verify steps and the other way round,
    and where there is nothing to divide by.
    """
    rule = DIALECTS[dialect]
    if backend.kind == "autoregressive" or rule.of_pipelines != (backend.kind == "pipeline"):
        return None
    tokens, rounds = rule.parts(Counts(*(table[:, COLUMN[name]] for name in Counts._fields)))
    values = divide(tokens, rounds) if rule.macro else divide(tokens.sum(keepdims=True), rounds.sum(keepdims=True))
    finite = values[np.isfinite(values)]
    scale = by_layers(backend) if rule.of_pipelines else None
    return float(finite.mean()) * (scale or 1.0) if len(finite) else None
