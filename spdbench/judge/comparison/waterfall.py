"""Where a method's decode time goes, from an ideal in which the target's passes are all there is, to what was measured.

One form for draft-and-verify methods and pipelines. From metrics.md, "Bubble ratio", by which a lane's decode time is
useful work, wasted work, or idle for one cause; averaged over the lanes these add up to wall time. Useful work is split
once more, by what vanilla took for the same requests:

    ideal      passes x vanilla's time a token / lanes. A draft-and-verify method needs one pass a verify step, a
               pipeline one pass a token, shared evenly by its lanes.
    verify     useful work beyond the ideal: a pass over several rows, or on cores that others use too, takes longer
               than vanilla's. Below 0 where it takes less.
    flush      empty lanes, and work on tokens that a rejection dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from spdbench.judge.comparison.pairing import Pair
from spdbench.judge.results.table import COLUMN


class Part(NamedTuple):
    """A step of the waterfall, in seconds a decode token."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Waterfall:
    """`parts` add up to `measured_s`; the last of them is the residual, for which spans show no reason.

    All in seconds a decode token; `vanilla_s` is the baseline's over the same requests.
    """

    parts: tuple[Part, ...]
    measured_s: float
    vanilla_s: float
    num_runs: int


def waterfall(pairing: Pair) -> Waterfall | None:
    """The candidate's waterfall over the paired runs that have spans; None where there are none, or nothing to divide
    by."""
    table = pairing.candidate.runs
    keys = [key for key in pairing.keys if table.sums[table.row_of[key], COLUMN["measured_s"]] > 0]
    if not keys:
        return None
    base, own = pairing.baseline.runs.total(keys), table.total(keys)
    tokens, base_tokens = own[COLUMN["decode_tokens"]], base[COLUMN["decode_tokens"]]
    if not (tokens and base_tokens and base[COLUMN["decode_s"]]):
        return None
    backend = pairing.candidate.head.backend
    passes = own[COLUMN["steps"]] if backend.kind == "draft_verify" else tokens
    vanilla_s = float(base[COLUMN["decode_s"]] / base_tokens)
    ideal_s = vanilla_s * float(passes / tokens) / backend.lanes

    def a_token(*columns: str) -> float:
        return float(sum(own[COLUMN[column]] for column in columns) / tokens)

    parts = (
        Part("ideal", ideal_s),
        Part("draft", a_token("draft")),
        Part("verify", a_token("useful") - ideal_s),
        Part("verdict", a_token("verify")),
        Part("flush", a_token("fill", "wasted")),
        Part("imbalance", a_token("imbalance")),
        Part("host", a_token("host")),
    )
    measured_s = a_token("measured_s")
    residual = Part("residual", measured_s - sum(part.seconds for part in parts))
    return Waterfall((*parts, residual), measured_s, vanilla_s, len(keys))
