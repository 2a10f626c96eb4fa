"""What vLLM and SGLang count of their drafts, out of the text that they show to Prometheus.

Counters belong to a whole server, so their difference is a request's only if no other request came in between: the
server's own count of requests has to have moved by exactly one. Must not know how the text is fetched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from spdbench.types import DraftCounts

LINE = re.compile(r"^([a-z_]+:[a-z0-9_]+)(?:\{([^}]*)\})?\s+([0-9.eE+-]+)")
POSITION = re.compile(r'position="([0-9]+)"')
VLLM_REQUESTS, SGLANG_REQUESTS = "vllm:request_success_total", "sglang:num_requests_total"
ROUNDS = "vllm:spec_decode_num_drafts_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
SGLANG_ROUNDS = "sglang:spec_verify_calls_total"


@dataclass(frozen=True)
class Counters:
    """Readings by name, summed over a server's engines; `by_position` are drafts accepted at depth 1, 2, ..."""

    values: Mapping[str, float]
    by_position: tuple[float, ...]

    @property
    def engine(self) -> str | None:
        """Whose counters of drafts these are; None where there are none."""
        if ROUNDS in self.values and VLLM_REQUESTS in self.values:
            return "vLLM"
        return "SGLang" if SGLANG_ROUNDS in self.values and SGLANG_REQUESTS in self.values else None

    @property
    def requests(self) -> float:
        return self.values.get(VLLM_REQUESTS, 0) + self.values.get(SGLANG_REQUESTS, 0)


def parse_counters(text: str) -> Counters:
    """Every counter in Prometheus' text; what is none of a server's own is left out."""
    values: dict[str, float] = defaultdict(float)
    positions: dict[int, float] = defaultdict(float)
    for line in text.splitlines():
        if (match := LINE.match(line)) is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        values[match[1]] += value
        if match[1] == BY_POSITION and (place := POSITION.search(match[2] or "")):
            positions[int(place[1])] += value
    return Counters(dict(values), tuple(positions[depth] for depth in sorted(positions)))


def drafts_between(before: Counters, after: Counters, num_new_tokens: int) -> DraftCounts | None:
    """What was drafted for the one request between two readings, which had `num_new_tokens`.

    None where the counters do not tell: there are none, or the server answered others as well.
    """
    if after.engine is None or after.requests - before.requests != 1:
        return None

    def moved(name: str) -> int:
        return round(after.values.get(name, 0) - before.values.get(name, 0))

    if after.engine == "SGLang":  # rounds alone: each commits its accepted drafts and one token more
        rounds = moved(SGLANG_ROUNDS)
        return DraftCounts(rounds, None, max(0, num_new_tokens - 1 - rounds))
    rounds, drafted, accepted = moved(ROUNDS), moved(DRAFTED), moved(ACCEPTED)
    if min(rounds, drafted, accepted) < 0:
        return None
    return DraftCounts(rounds, _judged(before, after, rounds, drafted), accepted)


def _judged(before: Counters, after: Counters, rounds: int, drafted: int) -> int | None:
    """Drafts that got a verdict: one a round, and one more behind each that was accepted and had a successor.

    Positions tell that of chains of one length; of others nobody counts it.
    """
    depth = len(after.by_position)
    old = before.by_position or (0.0,) * depth
    if not depth or len(old) != depth or drafted != rounds * depth:
        return None
    moved = [round(new - was) for new, was in zip(after.by_position, old, strict=True)]
    return rounds + sum(moved[:-1])
