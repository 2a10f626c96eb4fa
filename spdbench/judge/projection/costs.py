"""What a part of decoding costs on one device, from one of two sources: a profile, or what results recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NoReturn, Protocol

import numpy as np

from spdbench.errors import InputError
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.definitions import by_layers, shares_devices
from spdbench.judge.projection.recorded import (
    Recorded,
    host_seconds,
    part_seconds,
    rows_a_stage,
    stage_sigma,
    start_seconds,
    steady_rows,
)
from spdbench.judge.projection.sources import labels
from spdbench.judge.results.table import COLUMN
from spdbench.profiles.profile import Profile, RowCosts, make_key, nearest, parse_key

SHOWN_SLOWDOWN = 1.05
"""Below it, layers that shared a device were about as fast as alone."""


class Costs(Protocol):
    """Seconds on one device. A method returns None for what the source cannot say."""

    @property
    def device(self) -> str:
        """What a device is, for people."""

    @property
    def notes(self) -> Sequence[str]:
        """What limits these numbers."""

    def layer_s(self, rows: float, requests: int = 1) -> float | None:
        """Of `rows` rows in all, which belong to so many requests: each reads its own keys and values."""

    def head_s(self, rows: float) -> float | None: ...

    def growth(self, rows: float, requests: int = 1) -> float:
        """How much longer a forward of `rows` rows of so many requests takes than one of a single row."""

    def pipeline_draft_s(self, result: LoadedResult, num_stages: int) -> float | None: ...

    def round_draft_s(self, result: LoadedResult, levels: float) -> float | None: ...

    def verify_s(self, result: LoadedResult) -> float: ...

    def host_s(self, result: LoadedResult) -> float:
        """Of a pipeline's cycle."""

    def own_host_s(self) -> float:
        """Of a token or a round on one device, beyond its forward."""

    def message_s(self, rows: float) -> float | None: ...

    def start_s(self, result: LoadedResult) -> float: ...

    def sigma(self, result: LoadedResult) -> float:
        """How the parts' times scatter: the standard deviation of their logarithm."""


def refuse(what: str, command: str) -> NoReturn:
    """Raises `InputError` for a cost that no source here knows."""
    raise InputError(f"{what} is not in these results. This measures it: {command}")


@dataclass(frozen=True)
class RecordedCosts:
    """Costs of one row, from the results alone: a device is what ran vanilla, whose time is split between layers and
    head by the bytes that each reads."""

    recorded: Recorded

    @property
    def device(self) -> str:
        head = self._vanilla.head
        where, threads = ", ".join(head.backend.devices), head.environment.get("threads")
        return f"what ran {head.backend.label}: {where}" + (f", {threads} threads" if where == "cpu" else "")

    @property
    def notes(self) -> Sequence[str]:
        head = self._vanilla.head
        found = [
            "tensor parallelism and several requests at once are omitted: these results do not hold what a message "
            "between devices and a forward of several requests take. This measures both: "
            f"{self.recorded.profile_command()}",
            "a pipeline's messages are taken as the time that lanes waited for messages and the host",
        ]
        if not self._rounds_s and any(rows_a_stage(each) > 1 for each in self.recorded.pipelines):
            found.append(
                "the pipelines have branches, and what a stage's further rows cost is not in these results: they are "
                "taken as free. Add a result of eagle or medusa, or `--profile`"
            )
        names = labels(self.recorded.all)
        slowed = [(names[each], self._slowdown(each)) for each in self.recorded.pipelines]
        if shown := ", ".join(f"{name} {factor:.1f}x" for name, factor in slowed if factor >= SHOWN_SLOWDOWN):
            found.append(
                f"stages shared devices: their layers took longer than {head.backend.label}'s ({shown}), and drafts, "
                "messages and starts are taken to have been slowed as much; `spdbench profile` times each part alone"
            )
        return found

    @property
    def _vanilla(self) -> LoadedResult:
        if self.recorded.vanilla is None:
            refuse("the time of a layer (there is no result of vanilla)", self.recorded.remeasure())
        return self.recorded.vanilla

    def _token_s(self) -> float:
        total = self._vanilla.runs.total(self._vanilla.runs.answered)
        return float(total[COLUMN["decode_s"]] / total[COLUMN["decode_tokens"]])

    def _head_share(self) -> float:
        """Of the bytes that a token reads, the head's: what lanes read beyond their layers. One has layers alone."""
        for result in self.recorded.pipelines:
            lane_bytes, layers = result.head.backend.lane_bytes, result.head.backend.stage_layers
            if 1 < len(lane_bytes) == len(layers) and by_layers(result.head.backend) is not None:
                layer = min(num_bytes / count for num_bytes, count in zip(lane_bytes, layers, strict=True) if count)
                if layer:  # else a lane has layers and no bytes: the engine did not say what it reads
                    return max(0.0, 1 - layer * sum(layers) / sum(lane_bytes))
        refuse("how much of a token's time is the output head's", self.recorded.remeasure())

    def layer_s(self, rows: float, requests: int = 1) -> float | None:  # noqa: ARG002 - of one row there is one
        if rows != 1:
            return None
        return self._token_s() * (1 - self._head_share()) / self.recorded.num_layers

    def head_s(self, rows: float) -> float | None:
        return self._token_s() * self._head_share() if rows == 1 else None

    def growth(self, rows: float, requests: int = 1) -> float:  # noqa: ARG002 - no result has several
        """On the line from vanilla's token to the rounds of a method that verifies several rows; 1 without one."""
        known = self._rounds_s
        if rows <= 1 or not known:
            return 1.0
        at, seconds = zip((1.0, self._token_s()), *sorted(known.items()), strict=True)
        return max(1.0, float(np.interp(rows, at, seconds) / seconds[0]))

    @cached_property
    def _rounds_s(self) -> dict[float, float]:
        """Seconds of a forward by its rows, of methods that verify several and nearly always as many: where rounds of
        few and of many rows mix, their mean time is not that of their mean number."""
        found = {}
        for result in self.recorded.rounds:
            rows, layer = steady_rows(result), part_seconds(result, "layer")
            if layer is not None and rows is not None and rows > 1:
                found[rows] = self.recorded.num_layers * layer + (part_seconds(result, "head") or 0.0)
        return found

    def _slowdown(self, result: LoadedResult) -> float:
        """How many times as long the layers of a pipeline whose stages shared devices took as on a device alone: what
        its drafter, messages and host took there was slowed like them. 1 where each stage had a device."""
        layer, alone = part_seconds(result, "layer"), self.layer_s(1)
        if layer is None or not alone or not shares_devices(result.head.backend):
            return 1.0
        return max(1.0, layer / (alone * self.growth(rows_a_stage(result))))

    def pipeline_draft_s(self, result: LoadedResult, num_stages: int) -> float | None:  # noqa: ARG002 - one was timed
        drafter, draft_s = result.head.drafter, part_seconds(result, "draft")
        if drafter is not None and drafter.synthetic:
            return 0.0
        return None if draft_s is None else draft_s / self._slowdown(result)

    def round_draft_s(self, result: LoadedResult, levels: float) -> float | None:  # noqa: ARG002
        return part_seconds(result, "draft")

    def verify_s(self, result: LoadedResult) -> float:
        return (part_seconds(result, "verify") or 0.0) / self._slowdown(result)

    def host_s(self, result: LoadedResult) -> float:
        return host_seconds(result) / self._slowdown(result)

    def own_host_s(self) -> float:
        return 0.0  # a forward is a whole token of plain decoding as it was measured

    def message_s(self, rows: float) -> float | None:  # noqa: ARG002 - a pipeline's are in `host_s`
        return None

    def start_s(self, result: LoadedResult) -> float:
        return start_seconds(result) / self._slowdown(result)

    def sigma(self, result: LoadedResult) -> float:
        return stage_sigma(result)


class LowestCosts(RecordedCosts):
    """What was not recorded takes no time, and neither does what waited nobody knows how long."""

    def _slowdown(self, result: LoadedResult) -> float:
        unknown = part_seconds(result, "layer") is None and shares_devices(result.head.backend)
        return inf if unknown else super()._slowdown(result)

    def pipeline_draft_s(self, result: LoadedResult, num_stages: int) -> float:
        return super().pipeline_draft_s(result, num_stages) or 0.0


@dataclass(frozen=True)
class ProfileCosts:
    """Costs from a profile, at the mean context length of the recorded runs."""

    profile: Profile
    recorded: Recorded

    @property
    def device(self) -> str:
        profile = self.profile
        threads = f", {profile.threads} threads" if profile.threads else ""
        return f"{profile.device}{threads} ({profile.origin} profile of {profile.created[:10]})"

    @property
    def notes(self) -> Sequence[str]:
        found = []
        if self.profile.origin == "computed":
            found.append("the profile is computed from a datasheet: a bound with two efficiencies, no measurement")
        if len({parse_key(key)[1]["context"] for key in self.profile.seconds if key.startswith("layer ")}) == 1:
            found.append(
                "the profile has layers behind one length of context alone, so that the keys and values of a longer "
                "one, and of further requests at once, are taken as free"
            )
        if self.profile.message_s(1.0) is None:
            found.append("the profile has no messages between devices: a pipeline's are taken as free")
        return found

    def layer_s(self, rows: float, requests: int = 1) -> float | None:
        """The profile's rows are behind one context, whose keys and values they share. Of several requests each reads
        those of its own rows: so often the part that grows with the context is added, less what the profile's rows
        together already take for it."""
        context, profile = self.recorded.context, self.profile
        shared = profile.layer_s(rows, context)
        if shared is None or requests == 1:
            return shared
        own_s = requests * profile.attention_s(rows / requests, context)
        return shared + max(0.0, own_s - profile.attention_s(rows, context))

    def head_s(self, rows: float) -> float | None:
        return self.profile.head_s(rows)

    def growth(self, rows: float, requests: int = 1) -> float:
        layers, times = self.recorded.num_layers, []
        for each, num in ((1.0, 1), (rows, requests)):
            layer, head = self.layer_s(each, num), self.head_s(each)
            if layer is None or head is None:
                return 1.0
            times.append(layers * layer + head)
        return times[1] / times[0]

    def pipeline_draft_s(self, result: LoadedResult, num_stages: int) -> float | None:
        """With all threads of the device, of the nearest number of stages; of the result's own drafter where it was
        profiled, else of one of the same method."""
        drafter = result.head.drafter
        if drafter is None or drafter.synthetic:
            return 0.0
        own = (drafter.sha256 or drafter.id)[:12]
        found = sorted(
            (fields.get("drafter") == own, int(fields.get("threads", 0)), int(fields["stages"]), seconds)
            for key, seconds in self.profile.seconds.items()
            if (fields := parse_key(key)[1]).get("method") == drafter.method and "stages" in fields
        )
        by_stages = {stages: seconds for *_, stages, seconds in found}  # the last of a number is the one that is meant
        return by_stages[nearest(list(by_stages), num_stages)] if by_stages else None

    def round_draft_s(self, result: LoadedResult, levels: float) -> float | None:
        drafter = result.head.drafter
        if drafter is None or drafter.synthetic:
            return 0.0
        if drafter.sha256 is None and drafter.trained_tokens is None:  # it has no weights: a look-up on the host
            return part_seconds(result, "draft")
        words = result.head.backend.chosen.get("tree", "")
        tree = "alternatives" if "alternative" in words else "chain" if "chain" in words else "dynamic"
        for kind in (tree, "chain", "dynamic"):
            found = self._by_levels(drafter.method, kind, (drafter.sha256 or drafter.id)[:12])
            if found is not None and len(found.rows) == 1:  # the heads of Medusa, each for a level
                return found.seconds[0] * levels / found.rows[0]
            if found is not None:
                return max(0.0, found(levels))
        return None

    def _by_levels(self, method: str, tree: str, own: str) -> RowCosts | None:
        """Seconds of a draft by its levels: of the drafter `own` where it was profiled, else of those of its method."""
        drafts = [(parse_key(key), seconds) for key, seconds in self.profile.seconds.items()]
        of_method = [
            (fields, seconds)
            for (name, fields), seconds in drafts
            if name == "draft" and fields.get("method") == method and fields.get("tree") == tree and "levels" in fields
        ]
        of_own = [(fields, seconds) for fields, seconds in of_method if fields.get("drafter") == own]
        found = {int(fields["levels"]): seconds for fields, seconds in of_own or of_method}
        levels = sorted(found)
        return RowCosts(tuple(levels), tuple(found[each] for each in levels)) if levels else None

    def verify_s(self, result: LoadedResult) -> float:  # noqa: ARG002 - a verdict takes as long for all
        return self.profile.seconds.get(make_key("verify"), 0.0)

    def host_s(self, result: LoadedResult) -> float:  # noqa: ARG002
        return self.own_host_s()

    def own_host_s(self) -> float:
        return self.profile.seconds.get(make_key("host"), 0.0)

    def message_s(self, rows: float) -> float | None:
        return self.profile.message_s(rows * self.profile.row_bytes)

    def start_s(self, result: LoadedResult) -> float:
        """What the results recorded, on a device like this one; a measured profile is of the machine of the results
        unless it says otherwise."""
        recorded, own = part_seconds(result, "draft"), self.pipeline_draft_s(result, result.head.backend.num_stages)
        start_s = start_seconds(result)
        return start_s * own / recorded if recorded and own else start_s if own else 0.0

    def sigma(self, result: LoadedResult) -> float:
        """That of the machine that recorded the result; a computed profile is a bound, whose parts do not scatter."""
        return stage_sigma(result) if self.profile.origin == "measured" else 0.0
