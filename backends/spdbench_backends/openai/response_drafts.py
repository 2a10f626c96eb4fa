"""Drafts of one request, from the server's own response to it: vLLM, SGLang and llama.cpp.

Unlike counters, which belong to a whole server, these are right whatever else the server does meanwhile.

- vLLM (`--per-request-spec-decode-metrics summary` or `detailed`) sends `metrics.speculative_decoding` with the usage.
- SGLang sends `sglext.spec_tokens_details` where the request asks for it, some versions the same in `meta_info`.
- llama.cpp sends `timings`. These have `draft_n` if anything was drafted, in builds that have `cache_n` as well, so
  that there a response without it had no drafts, and elsewhere nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spdbench.types import DraftCounts

REQUEST: Mapping[str, Any] = {"return_spec_tokens_details": True}
"""What makes SGLang report its drafts."""
MAX_DEPTH = 4096
CORRECT = ("spec_num_correct_drafts", "spec_accepted_drafts")
PROPOSED = ("spec_num_proposed_drafts", "spec_proposed_drafts")
HISTOGRAM = ("spec_correct_drafts_histogram", "spec_accept_histogram")
"""SGLang's names for one count, the newest first."""


class DraftReport(NamedTuple):
    """What a response says of its drafts, in its `engine`'s own words."""

    engine: str
    values: Mapping[str, Any]

    @property
    def source(self) -> str:
        return f"each response of {self.engine}"


def find_report(event: Mapping[str, Any], choice: Mapping[str, Any]) -> DraftReport | None:
    """The report in one event of a stream, None where it has none; `choice` is the event's only choice."""
    if values := _mapping(_mapping(event.get("metrics")).get("speculative_decoding")):
        return DraftReport("vLLM", values)
    for holder in (event, choice):
        details = _mapping(_mapping(holder.get("sglext")).get("spec_tokens_details"))
        if values := details or _mapping(holder.get("meta_info")):
            return DraftReport("SGLang", values) if "spec_verify_ct" in values else None
    timings = _mapping(event.get("timings"))
    if {"draft_n", "cache_n"} & timings.keys():
        return DraftReport("llama.cpp", timings)
    return None


def count_drafts(report: DraftReport, num_new_tokens: int) -> DraftCounts | None:
    """The drafts of a request that had `num_new_tokens`; None if its report has another shape or contradicts itself."""
    try:
        found = READERS[report.engine](report.values, num_new_tokens)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if found.is_possible(num_new_tokens) else None


def _count_vllm(values: Mapping[str, Any], num_new_tokens: int) -> DraftCounts:  # noqa: ARG001
    rounds, drafted = _number(values["num_spec_steps"]), _number(values["num_draft_tokens"])
    accepting = _numbers(values["acceptance_histogram"])
    of_steps = values.get("per_step_accepted"), values.get("per_step_drafted")
    judged_at: tuple[int, ...] | None = None
    if None not in of_steps:
        steps = list(zip(*map(_numbers, of_steps), strict=True))
        if sum(depth for _, depth in steps) != drafted or any(accepted > depth for accepted, depth in steps):
            raise ValueError("steps that contradict their totals")
        judged_at = _reaching(min(accepted + 1, depth) for accepted, depth in steps)
    elif drafted == rounds * (depth := _number(values["num_spec_tokens"])):
        judged_at = _verified_in_chains(accepting, depth)
    accepted = _number(values["num_accepted_draft_tokens"])
    return _counts("vLLM", rounds, accepted, drafted, accepting, judged_at)


def _count_sglang(values: Mapping[str, Any], num_new_tokens: int) -> DraftCounts:
    rounds = _number(values["spec_verify_ct"])
    accepting = _numbers(_first(values, HISTOGRAM) or ()) or None
    accepted, drafted = (
        None if (value := _first(values, names)) is None else _number(value) for names in (CORRECT, PROPOSED)
    )
    if accepted is None:  # each round commits its accepted drafts and one token more, prefill the first token
        accepted = max(0, num_new_tokens - 1 - rounds)
    judged_at = None
    # A draft may be a tree with more nodes than levels; with no more nodes than the deepest accepted one it is a chain.
    if accepting and rounds and drafted == rounds * (len(accepting) - 1):
        judged_at = _verified_in_chains(accepting, len(accepting) - 1)
    return _counts("SGLang", rounds, accepted, drafted, accepting, judged_at)


def _count_llamacpp(values: Mapping[str, Any], num_new_tokens: int) -> DraftCounts:
    drafted, accepted = _number(values.get("draft_n", 0)), _number(values.get("draft_n_accepted", 0))
    # `predicted_n` also counts tokens that the last step committed beyond the answer's end.
    num_tokens = max(num_new_tokens, _number(values.get("predicted_n", num_new_tokens)))
    rounds = num_tokens - 1 - accepted
    return _counts("llama.cpp", rounds, accepted, drafted, None, None if drafted else ())


READERS = {"vLLM": _count_vllm, "SGLang": _count_sglang, "llama.cpp": _count_llamacpp}


def _counts(
    engine: str,
    rounds: int,
    accepted: int,
    drafted: int | None,
    accepting: Sequence[int] | None,
    judged_at: Sequence[int] | None,
) -> DraftCounts:
    return DraftCounts(
        rounds=rounds,
        judged=None if judged_at is None else sum(judged_at),
        accepted=accepted,
        drafted=drafted,
        rounds_accepting=None if accepting is None else tuple(accepting),
        judged_at=None if judged_at is None or accepting is None else tuple(judged_at),
        source=DraftReport(engine, {}).source,
    )


def _verified_in_chains(accepting: Sequence[int], depth: int) -> tuple[int, ...]:
    """Drafts that got a verdict at depth 1, 2, ... if every round drafts a chain of `depth`."""
    if len(accepting) > depth + 1:
        raise ValueError("more drafts accepted than made")
    return tuple(sum(accepting[k:]) for k in range(depth))


def _reaching(depths: Iterable[int]) -> tuple[int, ...]:
    """How many of `depths` are at least 1, at least 2, and so on up to the largest."""
    depths = list(depths)
    return tuple(sum(depth > k for depth in depths) for k in range(max(depths, default=0)))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 0 <= value < 2**31:
        raise ValueError("not a count")
    return int(value)


def _numbers(values: Any) -> tuple[int, ...]:
    """Counts in a list, or in a mapping from their places."""
    if isinstance(values, Mapping):
        places = {int(place): number for place, number in values.items()}
        if any(not 0 <= place <= MAX_DEPTH for place in places):
            raise ValueError("a place that cannot be")
        values = [places.get(place, 0) for place in range(max(places, default=-1) + 1)]
    if not isinstance(values, list | tuple):
        raise TypeError("not a list of counts")
    return tuple(map(_number, values))
