"""A projection: recorded results and costs in, a pipeline of each number of stages and its opponents out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np

from spdbench.errors import InputError
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.bubble import LaneTime
from spdbench.judge.metrics.flags import disqualifies
from spdbench.judge.metrics.stats import SEED, Interval, ratio_interval
from spdbench.judge.projection.costs import Costs, LowestCosts, refuse
from spdbench.judge.projection.notes import notes
from spdbench.judge.projection.opponents import (
    BreakEven,
    Load,
    Opponent,
    break_even,
    one_request,
    token_s,
    under_load,
)
from spdbench.judge.projection.recorded import Recorded, rows_a_stage, sort_results, verdicts, with_acceptance
from spdbench.judge.projection.simulation import (
    Parts,
    Scatter,
    Stretch,
    lane_shares,
    lognormal_factors,
    request_seconds,
    stretches,
)
from spdbench.judge.projection.sources import replayed
from spdbench.judge.results.schema import RunKey

LINKS_S = (1e-5, 1e-4, 1e-3)
"""Seconds of a message at which the sensitivity to links is computed."""
ACCEPTANCE_CHANGES = (-0.1, -0.05, 0.05, 0.1)


@dataclass(frozen=True)
class Setting:
    """What to project: `stages` as layer counts each, whether the drafter has a device of its own, what share of the
    output head runs there, requests at once."""

    stages: tuple[tuple[int, ...], ...]
    own_drafter: bool
    drafters_head: float = 0.0
    concurrency: int = 1


@dataclass(frozen=True)
class Sensitivity:
    """A speed-up if one thing were different: `acceptance` by so much, or `message_s` so long."""

    what: str
    value: float
    speedup: float


@dataclass(frozen=True)
class PipelineRow:
    """One pipeline. `source` is the result whose verdicts it replays, measured with `recorded_stages` stages;
    `disqualified` if that has a flag which keeps it from being the best, such as that of a synthetic drafter."""

    label: str
    source: str
    recorded_stages: int
    layers: tuple[int, ...]
    devices: int
    acceptance: float
    tokens_per_s: float
    interval: Interval | None
    speedup: float
    speedup_interval: Interval | None
    cycle_s: float
    slowest_stage_s: float
    draft_s: float
    tokens_per_cycle: float
    lanes: LaneTime
    hidden_layers: float
    sensitivities: tuple[Sensitivity, ...]
    disqualified: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def speedup_per_device(self) -> float:
        return self.speedup / self.devices


@dataclass(frozen=True)
class OwnDevices:
    """What a measured pipeline's speed-up over plain decoding would be if each of its `num_stages` stages, and the
    drafter, had a device like plain decoding's; with its 95 % `interval` over prompts, which is None where there is one
    prompt. It is at most `speedup` if `is_bound`: no time of a draft, or none of messages and the host, is known."""

    speedup: float
    interval: Interval | None
    num_stages: int
    is_bound: bool


@dataclass(frozen=True)
class Projection:
    """`token_s` is plain decoding's on one device. `loads` is empty without concurrency."""

    device: str
    token_s: float
    pipelines: tuple[PipelineRow, ...]
    opponents: tuple[Opponent, ...]
    loads: tuple[Load, ...]
    notes: tuple[str, ...]

    @cached_property
    def best(self) -> PipelineRow:
        """The fastest pipeline; a disqualified one only if all are."""
        return max(self._fair, key=lambda row: row.tokens_per_s)

    @cached_property
    def most_efficient(self) -> PipelineRow:
        """The pipeline with the highest speed-up a device."""
        return max(self._fair, key=lambda row: row.speedup_per_device)

    @property
    def best_opponent(self) -> Opponent:
        """Plain decoding cannot be disqualified, so one always counts."""
        return max((each for each in self.opponents if not each.disqualified), key=lambda each: each.tokens_per_s)

    @property
    def _fair(self) -> Sequence[PipelineRow]:
        return [row for row in self.pipelines if not row.disqualified] or self.pipelines

    @property
    def breakevens(self) -> list[BreakEven]:
        """Under load: speculative ways to decode against plain ones."""
        pairs = [(each.label, "vanilla") for each in self.opponents if each.method == "draft_verify"]
        for row in self.pipelines:
            pairs += [(row.label, "vanilla"), (row.label, f"tensor parallel x{row.devices}")]
        found = [break_even(self.loads, label, rival) for label, rival in dict.fromkeys(pairs)]
        return [each for each in found if each is not None]

    def speedup(self, tokens_per_s: float) -> float:
        return tokens_per_s * self.token_s


def parse_stages(text: str, num_layers: int, split: Callable[[int], list[int]]) -> tuple[tuple[int, ...], ...]:
    """`2,4,11/10/9` as layer counts: each item is a number of stages, which `split` turns into layer counts, or the
    layers of each stage.

    Raises:
        InputError: an item is neither, or does not fit the model.
    """
    found = []
    for word in text.split(","):
        try:
            counts = [int(part) for part in word.strip().split("/")]
        except ValueError:
            raise InputError(
                f"--stages {text}: '{word.strip()}' is no number of stages. Write 2,4,8, or the layers of each stage: "
                "11/10/9"
            ) from None
        if len(counts) == 1:
            if not 1 <= counts[0] <= num_layers:
                raise InputError(
                    f"--stages {text}: {counts[0]} stages, and the model has {num_layers} layers. Allowed: 1 to "
                    f"{num_layers}"
                )
            counts = split(counts[0])
        elif min(counts) < 1 or sum(counts) != num_layers:
            raise InputError(
                f"--stages {text}: {word.strip()} has {sum(counts)} layers, and the model {num_layers}; every stage "
                "needs at least one"
            )
        found.append(tuple(counts))
    return tuple(dict.fromkeys(found))


def even_layers(num_layers: int, num_stages: int) -> list[int]:
    """As even as possible; the first stages get one more, since the last one has the output head."""
    least, more = divmod(num_layers, num_stages)
    return [least + (stage < more) for stage in range(num_stages)]


def project(recorded: Recorded, costs: Costs, setting: Setting) -> Projection:
    """The projection of all pipelines and opponents.

    Raises:
        InputError: a cost is needed that the source does not know; names the command that measures it.
    """
    alone = token_s(costs, recorded.num_layers)
    if alone is None:
        refuse("the time of a layer", recorded.profile_command())
    if setting.concurrency > 1 and costs.layer_s(2) is None:
        refuse("what a forward of several requests takes", recorded.profile_command())
    rows, by_load = [], []
    for layers in setting.stages:
        for name, source in replayed(recorded, len(layers)):
            parts = make_parts(recorded, costs, source, layers, setting)
            rows.append(_row(name, source, layers, parts, alone))
            by_load.append((rows[-1].label, rows[-1].devices, _seconds_a_token(costs, source, parts)))
    counts = sorted({row.devices for row in rows} | {row.num_stages for row in rows})
    loads = under_load(recorded, costs, counts, setting.concurrency, by_load) if setting.concurrency > 1 else []
    return Projection(
        device=costs.device,
        token_s=alone,
        pipelines=tuple(rows),
        opponents=tuple(one_request(recorded, costs, counts)),
        loads=tuple(loads),
        notes=tuple(notes(recorded, rows, costs, setting)),
    )


def with_own_devices(
    vanilla: LoadedResult, pipeline: LoadedResult, rounds: Sequence[LoadedResult], keys: Collection[RunKey]
) -> OwnDevices:
    """What `pipeline` would give with devices like that of `vanilla`, over the runs with these `keys`. `rounds` are
    results of the same workload that tell what further rows cost.

    Raises:
        InputError: the results do not hold the steps, or the sizes of the stages, that a projection needs.
    """
    recorded = sort_results([vanilla, pipeline, *rounds])
    costs, layers = LowestCosts(recorded), tuple(filter(None, pipeline.head.backend.stage_layers))
    parts = make_parts(recorded, costs, pipeline, layers, Setting((layers,), own_drafter=True))
    kept = {key: sequence for key, sequence in verdicts(pipeline).items() if key in keys}
    rate, interval, _ = replay(Stretch(parts), kept)
    alone = token_s(costs, recorded.num_layers) or 0.0
    bounds = interval and (interval[0] * alone, interval[1] * alone)
    return OwnDevices(rate * alone, bounds, len(layers), is_bound=not (parts.draft_s and parts.host_s))


def make_parts(
    recorded: Recorded, costs: Costs, source: LoadedResult, layers: Sequence[int], setting: Setting
) -> Parts:
    """The parts of a pipeline's cycle, each stage on a device of its own.

    A stage in a process of its own looks after each layer whether its token was dropped, and so works on it for half a
    layer more on average.
    All parts scatter as the recorded stages did.

    Raises:
        InputError: a cost is not known.
    """
    rows = rows_a_stage(source)
    layer, head, growth = costs.layer_s(1), costs.head_s(1), costs.growth(rows)
    draft = costs.pipeline_draft_s(source, len(layers))
    if layer is None or head is None:
        refuse("the time of a layer", recorded.profile_command())
    if draft is None:
        refuse(f"{source.file}: the time of a draft", f"{recorded.remeasure()}, or {recorded.profile_command()}")
    layer, head = layer * growth, head * growth
    factors = lognormal_factors(costs.sigma(source))
    return Parts(
        stages=tuple(count * layer for count in layers),
        head_s=head,
        draft_s=draft,
        verify_s=costs.verify_s(source),
        host_s=costs.host_s(source),
        message_s=costs.message_s(rows) or 0.0,
        devices=(*range(len(layers)), len(layers) if setting.own_drafter else 0),
        start_s=costs.start_s(source),
        drafters_head=setting.drafters_head,
        abort_s=layer / 2 if len(layers) > 1 and setting.own_drafter else 0.0,
        late=source.head.backend.name == "ppsd",
        scatter=Scatter(factors, factors, factors),
    )


def _row(name: str, source: LoadedResult, layers: tuple[int, ...], parts: Parts, alone: float) -> PipelineRow:
    sequences, stretch = verdicts(source, len(layers)), Stretch(parts)
    rate, interval, seconds = replay(stretch, sequences)
    tokens = sum(map(len, sequences.values()))
    cycles = sum(_num_cycles(each, len(layers)) for each in sequences.values())
    layer = parts.stages[0] / layers[0]
    return PipelineRow(
        label=f"{name} x{len(layers)}" + ("" if _is_even(layers) else f" ({_shown(layers)})"),
        source=source.file,
        recorded_stages=source.head.backend.num_stages,
        layers=layers,
        devices=len(set(parts.devices)),
        acceptance=sum(map(bool, chain.from_iterable(sequences.values()))) / max(1, tokens),
        tokens_per_s=rate,
        interval=interval,
        speedup=rate * alone,
        speedup_interval=interval and (interval[0] * alone, interval[1] * alone),
        cycle_s=seconds / max(1, cycles),
        slowest_stage_s=parts.slowest_s,
        draft_s=parts.draft_s,
        tokens_per_cycle=tokens / max(1, cycles),
        lanes=lane_shares(stretch, list(sequences.values())),
        hidden_layers=max(0.0, parts.slowest_s - parts.draft_s) / layer,
        sensitivities=_sensitivities(parts, sequences, alone),
        disqualified=disqualifies(source.flags),
    )


def replay(stretch: Stretch, sequences: dict[RunKey, list[int]]) -> tuple[float, Interval | None, float]:
    """Tokens/s, its interval over resampled prompts, and seconds in all."""
    keys = [key for key, sequence in sequences.items() if sequence]
    rates = np.array([[len(sequences[key]), request_seconds(stretch, sequences[key])] for key in keys])
    tokens, seconds = rates.sum(axis=0)
    return float(tokens / seconds), ratio_interval(keys, rates), float(seconds)


def _num_cycles(sequence: Sequence[int], num_stages: int) -> int:
    """metrics.md: a verdict takes n cycles after a flush; after an accepted one as many as that one says, usually 1."""
    return sum(num_stages + cycles for _, cycles, _ in stretches(sequence))


def _sensitivities(parts: Parts, sequences: dict[RunKey, list[int]], alone: float) -> tuple[Sensitivity, ...]:
    found = []
    stretch = Stretch(parts)
    for change in ACCEPTANCE_CHANGES:
        rng = np.random.default_rng(SEED)
        changed = {key: with_acceptance(each, change, rng) for key, each in sequences.items()}
        found.append(Sensitivity("acceptance", change, replay(stretch, changed)[0] * alone))
    for message_s in LINKS_S:
        slower = Stretch(replace(parts, message_s=parts.message_s + message_s))
        found.append(Sensitivity("message_s", message_s, replay(slower, sequences)[0] * alone))
    return tuple(found)


def _seconds_a_token(costs: Costs, source: LoadedResult, parts: Parts) -> Callable[[int], float]:
    """Seconds between two tokens of one request by the number of requests whose tokens share each stage: all parts grow
    as a forward's do, a stage as its layers with each request's keys and values, the head by its rows alone. No engine
    of ours batches requests in a pipeline; this is what one would give."""
    sequences, rows = verdicts(source, parts.num_stages), rows_a_stage(source)

    def ratio(grown: float | None, single: float | None) -> float:
        return grown / single if grown and single else 1.0

    def seconds(requests: int) -> float:
        layers = ratio(costs.layer_s(rows * requests, requests), costs.layer_s(rows))
        growth = costs.growth(rows * requests, requests) / costs.growth(rows)
        grown = replace(
            parts,
            stages=tuple(each * layers for each in parts.stages),
            head_s=parts.head_s * ratio(costs.head_s(rows * requests), costs.head_s(rows)),
            draft_s=parts.draft_s * growth,
            abort_s=parts.abort_s * layers,
            message_s=costs.message_s(rows * requests) or 0.0,
        )
        return 1 / replay(Stretch(grown), sequences)[0]

    return seconds


def _is_even(layers: Sequence[int]) -> bool:
    return max(layers) - min(layers) <= 1


def _shown(layers: Sequence[int]) -> str:
    return "/".join(map(str, layers))
