"""Acceptance length as others print it: a rule for each dialect, on the same columns of the same runs.

docs/metrics.md, "Dialects". One decoding gives a different number under each rule, so a figure from elsewhere may only
be compared with ours under its own.

N are all new tokens, the first from prefill among them; decode tokens are N - 1. Lengths of verify steps are taken
before an output is cut at its end. Micro is totals over totals, macro the mean over requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.definitions import by_layers, steps_of
from spdbench.judge.metrics.stats import divide
from spdbench.judge.results.schema import BackendRecord
from spdbench.judge.results.table import COLUMN


@dataclass(frozen=True)
class Dialect:
    """What one calls the acceptance length: the sum of the columns `tokens` over the rounds, which are verify steps or
    cycles without prefill, and `more_rounds` a request."""

    rule: str
    tokens: tuple[str, ...]
    more_rounds: int = 0
    macro: bool = False
    of_pipelines: bool = False


LENGTHS = "accepted", "steps"
"""A verify step's length is what it accepted and one token of the target's own."""
REPORTED_COLUMNS = {"accepted": "reported_accepted", "steps": "reported_rounds"}
"""Columns with an engine's own counts, in place of those with the steps', which are a server's chunks."""
DIALECTS = {
    "spdbench": Dialect("1 + accepted / verify steps, micro", LENGTHS),
    "vllm": Dialect("1 + accepted / verify steps, micro", LENGTHS),
    "spec-bench": Dialect("mean length of a verify step, micro", LENGTHS),
    "sglang": Dialect("N / verify steps, micro", ("new_tokens",)),
    "nvidia": Dialect("mean chunk with prefill's among them, macro", ("new_tokens",), more_rounds=1, macro=True),
    "specforge": Dialect("N / verify steps, macro", ("new_tokens",), macro=True),
    "aiperf": Dialect("1 + accepted / verify steps, macro", LENGTHS, macro=True),
    "eagle": Dialect("decode tokens / (verify steps - 1), micro", ("decode_tokens",), more_rounds=-1),
    "spd": Dialect(
        "layers / largest stage's x N / cycles, macro; pipelines only", ("new_tokens",), macro=True, of_pipelines=True
    ),
}


def metric_name(dialect: str) -> str:
    """What metrics call the acceptance length in this dialect."""
    return f"acceptance_length_{dialect.replace('-', '_')}"


def acceptance_length(dialect: str, table: NDArray[np.float64], backend: BackendRecord) -> float | None:
    """The acceptance length of the requests in `table` [R, columns] as `dialect` prints it.

    None where the rule says nothing: for vanilla, for a pipeline in a dialect of verify steps and the other way round,
    and where there is nothing to divide by.
    """
    rule = DIALECTS[dialect]
    if backend.kind == "autoregressive" or rule.of_pipelines != (backend.kind == "pipeline"):
        return None
    columns: Mapping[str, str] = {}
    if steps_of(backend) == "reported":
        table, columns = table[table[:, COLUMN["reported_rounds"]] > 0], REPORTED_COLUMNS
    tokens = table[:, [COLUMN[columns.get(name, name)] for name in rule.tokens]].sum(axis=1)
    rounds = np.maximum(table[:, COLUMN[columns.get("steps", "steps")]] + rule.more_rounds, 0)
    values = divide(tokens, rounds) if rule.macro else divide(tokens.sum(keepdims=True), rounds.sum(keepdims=True))
    finite = values[np.isfinite(values)]
    scale = by_layers(backend) if rule.of_pipelines else None
    return float(finite.mean()) * (scale or 1.0) if len(finite) else None
