"""Results split by the length of the context, in place of the prompts' categories.

Servers count the tokens of one prompt differently, or not at all, so the first result that counts those of a prompt
counts for all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.table import COLUMN

SMALLEST = 256
"""Shorter contexts are one group: what attention costs in them does not show."""
UNKNOWN = "context unknown"


def by_context(results: Sequence[LoadedResult]) -> list[LoadedResult]:
    """`results`, whose runs have as their category the length of the prompt that was fed in, earlier turns included: in
    groups from one power of two to the next."""
    lengths: dict[object, int] = {}
    for result in results:
        tokens = result.runs.sums[:, COLUMN["prompt_tokens"]].tolist()
        for prompt, count, failed in zip(result.runs.asked, tokens, result.runs.failed, strict=True):
            if count and not failed:
                lengths.setdefault(prompt, int(count))
    found = []
    for result in results:
        groups = [
            UNKNOWN if failed or prompt not in lengths else group_of(lengths[prompt])
            for prompt, failed in zip(result.runs.asked, result.runs.failed, strict=True)
        ]
        found.append(replace(result, runs=replace(result.runs, categories=groups)))
    return found


def group_of(num_tokens: int) -> str:
    """The name of the group: `context under 256`, `context from 1k`, and so on."""
    if num_tokens < SMALLEST:
        return f"context under {SMALLEST}"
    bound = 1 << (num_tokens.bit_length() - 1)
    return f"context from {bound}" if bound < 1024 else f"context from {bound // 1024}k"


def length_of(group: str) -> int:
    """The least length in a group, to sort by; 0 for the name of a category."""
    found = re.fullmatch(r"context from (\d+)(k?)", group)
    return int(found[1]) * (1024 if found[2] else 1) if found else 0
