"""Draft counters of vLLM and SGLang, from the text that they export to Prometheus.

Counters belong to a whole server, so their difference belongs to one request only if the server did nothing else: no
other request ran or waited at either reading, exactly one finished between them, and the number of generated tokens is
that of the request.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from spdbench.types import DraftCounts

LINE = re.compile(r"^([a-z_]+:[a-z0-9_]+)(?:\{([^}]*)\})?\s+([0-9.eE+-]+)")
POSITION = re.compile(r'position="([0-9]{1,4})"')
MAX_COUNT = 2.0**53
"""From here on a float does not hold every whole number; no counter gets there."""
ROUNDS = "vllm:spec_decode_num_drafts_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
SGLANG_ROUNDS = "sglang:spec_verify_calls_total"


class Engine(NamedTuple):
    """An engine's names for its verify rounds, finished requests, generated tokens, and running and waiting requests.

    `stale` is how many requests it may still report as running when it is idle.
    """

    name: str
    rounds: str
    requests: str
    tokens: str
    running: str
    waiting: str
    stale: int


ENGINES = (
    Engine(
        "vLLM",
        ROUNDS,
        "vllm:request_success_total",
        "vllm:generation_tokens_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        stale=0,
    ),
    # SGLang updates the last two every 40 steps, and every 30 s when it is idle, so they may still include our own
    # request. It updates the others when a request finishes, so a request that is still running does not show in them.
    Engine(
        "SGLang",
        SGLANG_ROUNDS,
        "sglang:num_requests_total",
        "sglang:generation_tokens_total",
        "sglang:num_running_reqs",
        "sglang:num_queue_reqs",
        stale=1,
    ),
)
UNCOUNTED = 1
"""By how many tokens two counts of an answer may differ: only one of them may include the end of sequence."""


@dataclass(frozen=True)
class Counters:
    """Values by name, summed over a server's engines; `by_position` are drafts accepted at depth 1, 2, ..."""

    values: Mapping[str, float]
    by_position: tuple[float, ...]

    @property
    def engine(self) -> Engine | None:
        """The engine that these counters belong to; None if no engine has all that are needed."""
        return next((engine for engine in ENGINES if all(name in self.values for name in engine[1:-1])), None)

    @property
    def requests(self) -> float:
        return sum(self.values.get(engine.requests, 0) for engine in ENGINES)

    def idle(self, engine: Engine) -> bool:
        return self.values.get(engine.running, 0) <= engine.stale and self.values.get(engine.waiting, 0) == 0


def parse_counters(text: str) -> Counters:
    """Every counter of an engine in Prometheus' text format; ignores other lines."""
    values: dict[str, float] = defaultdict(float)
    positions: dict[int, float] = defaultdict(float)
    for line in text.splitlines():
        if (match := LINE.match(line)) is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if not abs(value) < MAX_COUNT:
            continue
        values[match[1]] += value
        if match[1] == BY_POSITION and (place := POSITION.search(match[2] or "")):
            positions[int(place[1])] += value
    return Counters(dict(values), tuple(positions[depth] for depth in sorted(positions)))


def drafts_between(before: Counters, after: Counters, num_new_tokens: int) -> DraftCounts | None:
    """Drafts of the one request between two readings, which had `num_new_tokens`.

    None if the counters are missing, the server also handled another request, or they contradict the answer.
    """
    engine = after.engine
    if engine is None or not (before.idle(engine) and after.idle(engine)) or after.requests - before.requests != 1:
        return None

    def difference(name: str) -> int:
        return round(after.values.get(name, 0) - before.values.get(name, 0))

    rounds, source = difference(engine.rounds), f"{engine.name}'s counters"
    if abs(difference(engine.tokens) - num_new_tokens) > UNCOUNTED or not 0 <= rounds < num_new_tokens + UNCOUNTED:
        return None
    if engine.rounds == SGLANG_ROUNDS:  # it counts only rounds; each commits its accepted drafts and one token more
        accepted = num_new_tokens - 1 - rounds
        return DraftCounts(rounds, None, accepted, source=source) if rounds and accepted >= 0 else None
    drafted, accepted = difference(DRAFTED), difference(ACCEPTED)
    # The last round may accept drafts past the end of the answer, as many as it is deep.
    depth = len(after.by_position) or ceil(drafted / max(1, rounds))
    if not 0 <= accepted <= drafted or rounds + accepted > num_new_tokens + depth:
        return None
    return DraftCounts(rounds, _verified(before, after, rounds, drafted), accepted, drafted, source=source)


def _verified(before: Counters, after: Counters, rounds: int, drafted: int) -> int | None:
    """Drafts that were verified: one a round, and one more after each accepted draft that had a successor.

    Follows from the counts by position if all chains have the same length; None otherwise.
    """
    depth = len(after.by_position)
    old = before.by_position or (0.0,) * depth
    if not depth or len(old) != depth or drafted != rounds * depth:
        return None
    accepted_at = [round(new - was) for new, was in zip(after.by_position, old, strict=True)]
    return rounds + sum(accepted_at[:-1])
