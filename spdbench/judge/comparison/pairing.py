"""Which results did the same work on the same machine, which of their runs belong together, and how their speeds and
outputs compare, over all of them and conversation by conversation. docs/metrics.md, "Pairing" and "Intervals"."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics import stats
from spdbench.judge.metrics.definitions import requests_at_once, steps_of
from spdbench.judge.results.schema import Result, RunKey
from spdbench.judge.results.table import COLUMN, RunTable

NOTHING = hashlib.sha256(b"").digest()
"""The hash of an output of which neither ids nor text are known."""


def workload(head: Result) -> str:
    """Equal for results that did the same work: suite, model, dtype, chosen chat template and its arguments, decoding,
    and requests at once."""
    return repr(work_and_load(head))


def work_and_load(head: Result) -> tuple[Any, ...]:
    """What `workload` is made of; the last entry is the number of requests at once, where that is not 1."""
    suite, model = head.suite, head.model
    args = sorted(model.template_args.items())
    key = (suite.name, suite.version, suite.sha256, model.sha256, model.dtype, args, head.decoding.model_dump())
    # Calibrations are kept under a hash of this, so one request at a time and the model's own template add nothing.
    chosen = () if model.chat_template is None else ("chat template", model.template_sha256)
    return (*key, *chosen) if (at_once := concurrency(head)) == 1 else (*key, *chosen, at_once)


def work_at_any_load(head: Result) -> str:
    """Equal for results of `workload` that differ at most in the number of requests at once."""
    return repr(work_and_load(head)[:-1] if concurrency(head) > 1 else work_and_load(head))


def concurrency(head: Result) -> int:
    """How many requests were under way at once."""
    return requests_at_once(head.backend)


def machine(head: Result) -> str:
    return repr(head.environment.get("fingerprint"))


def same_machine(base: Result, candidate: Result) -> bool:
    """True if both are known to be of one machine and its software."""
    return base.environment.get("fingerprint") is not None and machine(base) == machine(candidate)


def differences(base: Result, candidate: Result) -> list[str]:
    """What of `workload` differs, each with both values."""
    heads = base, candidate
    found = []
    for name, values, hashes in (
        (
            "suite",
            [f"{head.suite.name} v{head.suite.version}" for head in heads],
            [head.suite.sha256 for head in heads],
        ),
        ("model", [head.model.id for head in heads], [head.model.sha256 for head in heads]),
        ("dtype", [head.model.dtype for head in heads], ["", ""]),
    ):
        if values[0] != values[1]:
            found.append(f"{name} ({values[0]}, not {values[1]})")
        elif hashes[0] != hashes[1]:
            found.append(f"{name} ({values[0]} {hashes[0][:8]}, not {hashes[1][:8]})")
    names = [head.model.chat_template or "none" for head in heads]
    same_template = base.model.template_sha256 == candidate.model.template_sha256
    if names != ["none", "none"] and not (same_template and "none" not in names):
        found.append(f"--chat-template ({names[0]}, not {names[1]})")
    if base.model.template_args != candidate.model.template_args:
        given = [", ".join(f"{key}={value}" for key, value in head.model.template_args.items()) for head in heads]
        found.append(f"--template-arg ({given[0] or 'none'}, not {given[1] or 'none'})")
    if concurrency(base) != concurrency(candidate):
        found.append(f"--concurrency ({concurrency(base)}, not {concurrency(candidate)})")
    others = candidate.decoding.model_dump()
    pairs = [(name, value, others[name]) for name, value in base.decoding.model_dump().items()]
    changed = [f"{name} {value}, not {other}" for name, value, other in pairs if value != other]
    return [*found, f"decoding ({', '.join(changed)})"] if changed else found


class Outputs(NamedTuple):
    """How many of `num_compared` runs gave the baseline's ids, token for token."""

    num_compared: int
    num_identical: int


@dataclass(frozen=True, eq=False)
class Pair:
    """Two results. `keys` are the runs that answered the same prompt in both, in the candidate's order."""

    baseline: LoadedResult
    candidate: LoadedResult
    keys: tuple[RunKey, ...]

    @property
    def heads(self) -> tuple[Result, Result]:
        return self.baseline.head, self.candidate.head

    @property
    def knows_ids(self) -> bool:
        return self.baseline.knows_ids and self.candidate.knows_ids

    @property
    def knows_texts(self) -> bool:
        """True if both are of servers that give text alone, and gave some."""
        sides = self.baseline, self.candidate
        return not any(side.knows_ids for side in sides) and all(
            {*side.runs.output_sha256} - {NOTHING} for side in sides
        )

    @property
    def is_strict(self) -> bool:
        """True where nothing excuses a difference: greedy in float32, by the model itself."""
        head = self.candidate.head
        own = self.knows_ids and head.backend.other_model is None
        return own and head.model.dtype == "float32" and head.decoding.temperature == 0

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys([*self.candidate.runs.categories, *self.baseline.runs.categories]))

    @property
    def same_machine(self) -> bool:
        """True if both are of one machine, and of one kind of its devices as far as engines report them."""
        known = [each.known_devices for each in (self.baseline, self.candidate)]
        kinds = {frozenset(name.partition(":")[0] for name in devices) for devices in known if devices is not None}
        return same_machine(*self.heads) and len(kinds) <= 1

    @property
    def num_prompts(self) -> int:
        """Conversations with a run that pairs."""
        return len({prompt for prompt, _, _ in self.keys})

    @property
    def num_timed_prompts(self) -> int:
        """Of these, conversations that have a speed on either side: answers of one token have none."""
        rates = self.baseline.runs.rates(self.keys) + self.candidate.runs.rates(self.keys)
        return len({key[0] for key, row in zip(self.keys, rates, strict=True) if row.any()})

    @property
    def num_dropped(self) -> int:
        """Runs of either that did not fail and have no partner."""
        return len({*self.baseline.runs.answered, *self.candidate.runs.answered}) - len(self.keys)

    @property
    def first_prompts_differ(self) -> bool:
        """True if a conversation begins differently in the two, or nothing pairs at all. A later turn may differ
        without fault, when the answers before it did."""
        old, new = set(self.baseline.runs.answered), set(self.candidate.runs.answered)
        both, paired = old & new, set(self.keys)
        first_turn = min((turn for _, turn, _ in both), default=0)
        return bool(old and new) and (not paired or any(key[1] == first_turn for key in both - paired))

    def speedup(self) -> tuple[float | None, stats.Interval | None]:
        """Ratio of the candidate's decode tokens/s to the baseline's, and its 95 % interval; None where it has none."""
        sides = self.baseline.runs.rates(self.keys), self.candidate.runs.rates(self.keys)
        (base_tokens, base_s), (tokens, seconds) = (side.sum(axis=0) for side in sides)
        if not (base_tokens and base_s and tokens and seconds):
            return None, None
        return float(tokens / seconds / (base_tokens / base_s)), stats.ratio_interval(self.keys, *sides)

    def spread(self) -> float | None:
        """Standard deviation between conversations of the log of the speed-up; None with fewer than two."""
        sides = self.baseline.runs.rates(self.keys), self.candidate.runs.rates(self.keys)
        return stats.spread_of_log_ratio(self.keys, *sides)

    def break_even(self) -> tuple[float | None, stats.Interval | None]:
        """The acceptance length at which the candidate would be as fast as the baseline, and its 95 % interval: its own
        over the speed-up, on the same runs. None where no draft was accepted, or drafts are those of a pipeline, which
        verifies in every cycle."""
        if steps_of(self.candidate.head.backend) not in ("draft_verify", "reported"):
            return None, None
        accepted, rounds = columns_of_rounds(self.candidate)
        old, new = self.baseline.runs, self.candidate.runs
        keys = [key for key in self.keys if new.sums[new.row_of[key], COLUMN[rounds]] > 0]
        drafts = new.columns(keys, accepted, rounds)
        if not drafts[:, 0].any():
            return None, None
        columns = np.hstack([drafts, old.rates(keys), new.rates(keys)])

        def needed(totals: NDArray[np.float64]) -> NDArray[np.float64]:
            taken, verified, base_tokens, base_s, tokens, seconds = totals
            speedup = stats.divide(stats.divide(tokens, seconds), stats.divide(base_tokens, base_s))
            return stats.divide(stats.divide(taken + verified, verified), speedup)

        value = float(needed(columns.sum(axis=0)))
        return (value, stats.interval_of(keys, columns, needed)) if np.isfinite(value) else (None, None)

    def outputs(self) -> Outputs:
        return Outputs(len(self.keys), len(self.keys) - len(self.with_other_ids))

    @cached_property
    def with_other_ids(self) -> list[RunKey]:
        """The runs that gave other ids than the baseline's."""
        old, new = self.baseline.runs, self.candidate.runs
        return [key for key in self.keys if old.output_sha256[old.row_of[key]] != new.output_sha256[new.row_of[key]]]

    def part(self, category: str) -> Pair:
        """The runs of one category."""
        return pair(self.baseline.part(category), self.candidate.part(category))


def columns_of_rounds(result: LoadedResult) -> tuple[str, str]:
    """The columns of drafts accepted and of verify rounds: a server's are what it reports."""
    reported = steps_of(result.head.backend) == "reported"
    return ("reported_accepted", "reported_rounds") if reported else ("accepted", "steps")


def pair(baseline: LoadedResult, candidate: LoadedResult) -> Pair:
    """Pairs runs that did not fail, with the same prompt id, turn and repeat, whose `prompt_sha256` agree."""
    old, new = baseline.runs, candidate.runs
    answered = set(old.answered)
    keys = (key for key in new.answered if key in answered and new.prompt_of(key) == old.prompt_of(key))
    return Pair(baseline, candidate, tuple(keys))


class PromptSpeeds(NamedTuple):
    """Decode tokens/s of one conversation over its paired turns and repeats, and whether all ids are the baseline's."""

    prompt_id: str
    category: str
    baseline: float
    candidate: float
    identical: bool

    @property
    def speedup(self) -> float:
        return self.candidate / self.baseline


def prompt_speeds(pairing: Pair) -> list[PromptSpeeds]:
    """One entry a conversation, in the candidate's order; none for those of one token, which have no rate."""
    turns = _by_conversation(pairing.keys)
    others = {prompt for prompt, _, _ in pairing.with_other_ids}
    old, new = pairing.baseline.runs, pairing.candidate.runs
    found = []
    for prompt, keys in turns.items():
        (old_tokens, old_s), (tokens, seconds) = (table.rates(keys).sum(axis=0) for table in (old, new))
        if old_tokens and old_s and tokens and seconds:
            category = new.categories[new.row_of[keys[0]]]
            rates = float(old_tokens / old_s), float(tokens / seconds)
            found.append(PromptSpeeds(prompt, category, *rates, prompt not in others))
    return found


def conversation_rates(table: RunTable) -> dict[str, tuple[str, float | None]]:
    """Category and decode tokens/s of each conversation that was answered; None for a rate that one token has not."""
    found: dict[str, tuple[str, float | None]] = {}
    for prompt, keys in _by_conversation(table.answered).items():
        tokens, seconds = table.rates(keys).sum(axis=0)
        found[prompt] = table.categories[table.row_of[keys[0]]], float(tokens / seconds) if seconds else None
    return found


def _by_conversation(keys: Sequence[RunKey]) -> dict[str, list[RunKey]]:
    found: dict[str, list[RunKey]] = {}
    for key in keys:
        found.setdefault(key[0], []).append(key)
    return found
