"""Each conversation's speed, by itself and under two backends side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spdbench.judge.comparison.pairing import Pair
from spdbench.judge.results.schema import RunKey
from spdbench.judge.results.table import RunTable


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
