"""Results split by the length of the context, in place of the prompts' categories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.table import COLUMN

SMALLEST = 256
"""Shorter contexts are one group: what attention costs in them does not show."""
UNKNOWN = "context unknown (failed)"


def by_context(results: Sequence[LoadedResult]) -> list[LoadedResult]:
    """`results`, whose runs have as their category the length of the prompt that was fed in, earlier turns included: in
    groups from one power of two to the next."""
    found = []
    for result in results:
        tokens = result.runs.sums[:, COLUMN["prompt_tokens"]].tolist()
        groups = [UNKNOWN if failed else group_of(int(n)) for n, failed in zip(tokens, result.runs.failed, strict=True)]
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
    word = group.removeprefix("context from ")
    if word == group:
        return 0
    return int(word.removesuffix("k")) * (1024 if word.endswith("k") else 1)
