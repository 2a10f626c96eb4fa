"""What a pipeline is held against, in the same costs: plain decoding on one device, tensor parallelism and replicas on
n, drafting and verifying on one; for one request, and for 1 to N at once.

With c requests at once a forward has c times the rows, and so does a drafter, whose time grows as a forward's does.
Every request advances in each step (continuous batching). Weights are read once for all; keys and values are each
request's own, as long as the mean context of the recorded runs, and take their time once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import ceil, log2
from operator import itemgetter

import numpy as np

from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.flags import disqualifies
from spdbench.judge.metrics.stats import Interval, ratio_interval
from spdbench.judge.projection.costs import Costs
from spdbench.judge.projection.recorded import Recorded, rounds_of
from spdbench.judge.projection.sources import labels
from spdbench.judge.results.table import COLUMN

ALL_REDUCES = 2
"""Of a layer in tensor parallelism: after attention's output and after the MLP (M. Shoeybi et al., Megatron-LM, arXiv
1909.08053)."""


@dataclass(frozen=True)
class Opponent:
    """A way to decode on `devices` devices: tokens/s of one request, and its interval over prompts."""

    label: str
    method: str
    devices: int
    tokens_per_s: float
    interval: Interval | None = None
    disqualified: bool = False


@dataclass(frozen=True)
class Load:
    """A way to decode with `requests` at once: seconds between two tokens of one, and of device time a token."""

    label: str
    requests: int
    devices: int
    token_s: float
    device_s_per_token: float

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.requests / self.token_s


def forward_s(costs: Costs, num_layers: int, rows: float, requests: int = 1) -> float | None:
    """Seconds of a forward of `rows` rows in all, of so many requests, on one device, head included."""
    layer, head = costs.layer_s(rows, requests), costs.head_s(rows)
    return None if layer is None or head is None else num_layers * layer + head


def token_s(costs: Costs, num_layers: int, requests: int = 1) -> float | None:
    """Seconds of a token of plain decoding on one device, for each of so many requests at once."""
    found = forward_s(costs, num_layers, requests, requests)
    return None if found is None else found + costs.own_host_s()


def tensor_parallel_s(costs: Costs, num_layers: int, devices: int, requests: int = 1) -> float | None:
    """Seconds of a token on `devices` devices that share every product, and keys and values by heads. An all-reduce
    takes ceil(log2 n) messages (recursive doubling: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective
    Communication Operations in MPICH", 2005)."""
    alone, message_s = forward_s(costs, num_layers, requests, requests), costs.message_s(requests)
    if alone is None or message_s is None:
        return None
    all_reduce_s = ceil(log2(devices)) * message_s
    return alone / devices + ALL_REDUCES * num_layers * all_reduce_s + costs.own_host_s()


def one_request(recorded: Recorded, costs: Costs, device_counts: Sequence[int]) -> list[Opponent]:
    """All opponents with one request under way."""
    layers, found, names = recorded.num_layers, [], labels(recorded.all)
    alone = token_s(costs, layers)
    if alone is not None:
        found.append(Opponent("vanilla", "autoregressive", 1, 1 / alone))
    for count in device_counts:
        shared = tensor_parallel_s(costs, layers, count)
        if shared is not None and count > 1:
            found.append(Opponent(f"tensor parallel x{count}", "tensor_parallel", count, 1 / shared))
    for result in recorded.rounds:
        as_recorded = _rounds(names[result], result, recorded, costs)
        ways = (as_recorded, _best_chain(names[result], result, recorded, costs))
        found += [replace(each, disqualified=disqualifies(result.flags)) for each in ways if each]
    return found


def _rounds(label: str, result: LoadedResult, recorded: Recorded, costs: Costs) -> Opponent | None:
    """Draft-verify on one device: its recorded rounds, each as long as a forward of its tree, a draft, a verdict."""
    runs = result.runs
    rounds, keys = rounds_of(result), list(runs.answered)
    sums = runs.sums[[runs.row_of[key] for key in keys]]
    if costs.layer_s(2) is None:  # no cost of several rows: the rounds as they were timed, on the device that ran them
        seconds = sums[:, COLUMN["decode_s"]]
    else:
        times = [_round_s(result, recorded, costs, rounds[key].rows, rounds[key].levels) for key in keys]
        if any(time is None for time in times):
            return None
        seconds = np.array([rounds[key].num * (time or 0.0) for key, time in zip(keys, times, strict=True)])
    tokens = sums[:, COLUMN["decode_tokens"]]
    rates = np.stack([tokens, seconds], axis=1)
    return Opponent(label, "draft_verify", 1, float(tokens.sum() / seconds.sum()), ratio_interval(keys, rates))


def _best_chain(name: str, result: LoadedResult, recorded: Recorded, costs: Costs) -> Opponent | None:
    """The fastest shorter chain of a method that drafted chains, where one is faster than those it drafted. A round
    with a chain of d drafts accepts as many as the recorded one did, at most d: so rounds are taken to begin where the
    recorded ones did."""
    rounds, runs, found = rounds_of(result), result.runs, []
    if not all(each.is_chain for each in rounds.values()) or costs.layer_s(2) is None:
        return None
    keys = [key for key in runs.answered if rounds[key].num]
    longest = max((round(rounds[key].levels) for key in keys), default=0)
    for depth in range(1, longest + 1):
        round_s = _round_s(result, recorded, costs, depth + 1, depth)
        if round_s is None:
            return None
        tokens = [float(1 + np.minimum(rounds[key].accepted, depth).mean()) * rounds[key].num for key in keys]
        rates = np.array([[each, rounds[key].num * round_s] for each, key in zip(tokens, keys, strict=True)])
        rate = float(rates[:, 0].sum() / rates[:, 1].sum())
        label = f"{name}, chain of {depth}"
        found.append((rate, depth, Opponent(label, "draft_verify", 1, rate, ratio_interval(keys, rates))))
    best = max(found, key=lambda each: each[0], default=None)
    return None if best is None or best[1] == longest else best[2]


def _round_s(
    result: LoadedResult, recorded: Recorded, costs: Costs, rows: float, levels: float, requests: int = 1
) -> float | None:
    """Seconds of one round of `requests` requests with trees of `rows` nodes each."""
    forward = forward_s(costs, recorded.num_layers, rows * requests, requests)
    draft = costs.round_draft_s(result, levels)
    if forward is None or draft is None:
        return None
    return forward + draft * costs.growth(requests, requests) + costs.verify_s(result) + costs.own_host_s()


def under_load(
    recorded: Recorded,
    costs: Costs,
    device_counts: Sequence[int],
    most: int,
    pipelines: Sequence[tuple[str, int, Callable[[int], float]]],
) -> list[Load]:
    """All ways to decode with 1, 2, 4, ... `most` requests at once. `pipelines` are labels with their devices and the
    seconds between two tokens of one request by the number of requests whose tokens share each stage."""
    layers, found, names = recorded.num_layers, [], labels(recorded.all)
    requests, count = [], 1
    while count < most:
        requests.append(count)
        count *= 2
    for num in [*requests, most]:
        ways: list[tuple[str, int, float | None]] = [("vanilla", 1, token_s(costs, layers, num))]
        for devices in (each for each in device_counts if each > 1):
            ways.append((f"tensor parallel x{devices}", devices, tensor_parallel_s(costs, layers, devices, num)))
            if devices <= num:  # a replica without a request is none
                ways.append((f"replicas x{devices}", devices, token_s(costs, layers, ceil(num / devices))))
        for result in recorded.rounds:
            ways.append((names[result], 1, _token_s_of_rounds(result, recorded, costs, num)))
        ways += [(label, devices, seconds(num)) for label, devices, seconds in pipelines]
        found += [Load(label, num, n, each, n * each / num) for label, n, each in ways if each is not None]
    return found


def _token_s_of_rounds(result: LoadedResult, recorded: Recorded, costs: Costs, requests: int) -> float | None:
    rounds = rounds_of(result)
    total = sum(each.num for each in rounds.values())
    if not total:
        return None
    rows = sum(each.num * each.rows for each in rounds.values()) / total
    levels = sum(each.num * each.levels for each in rounds.values()) / total
    tokens = result.runs.total(result.runs.answered)[COLUMN["decode_tokens"]]
    round_s = _round_s(result, recorded, costs, rows, levels, requests)
    return None if round_s is None else float(round_s * total / tokens)


@dataclass(frozen=True)
class BreakEven:
    """At which numbers of requests at once, of those computed, a token by `label` takes less time than by `rival`."""

    label: str
    rival: str
    requests: tuple[int, ...]
    faster: tuple[bool, ...]

    @property
    def up_to(self) -> int:
        """The most requests up to which it is faster without a gap; 0 if it is not with the fewest."""
        return max(
            (num for num, _ in takewhile(itemgetter(1), zip(self.requests, self.faster, strict=True))), default=0
        )

    @property
    def faster_at(self) -> list[int]:
        return [num for num, faster in zip(self.requests, self.faster, strict=True) if faster]


def break_even(loads: Sequence[Load], label: str, rival: str) -> BreakEven | None:
    """None where not both were computed."""
    times = {(each.label, each.requests): each.token_s for each in loads}
    shared = sorted(num for name, num in times if name == label and (rival, num) in times)
    faster = tuple(times[label, num] < times[rival, num] for num in shared)
    return BreakEven(label, rival, tuple(shared), faster) if shared else None


def frontier(loads: Sequence[Load]) -> list[Load]:
    """Those that no other of as many requests beats in both time a token and device time a token."""
    found = []
    for requests in dict.fromkeys(each.requests for each in loads):
        alike = [each for each in loads if each.requests == requests]
        best = undominated([(each.token_s, each.device_s_per_token) for each in alike])
        found += [each for each, kept in zip(alike, best, strict=True) if kept]
    return found


def undominated(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of these pairs of costs no other pair is below in one and at most equal to in the other."""
    return [
        not any(one <= first and two <= second and (one, two) != (first, second) for one, two in costs)
        for first, second in costs
    ]
